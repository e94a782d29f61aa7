"""Gradients of models that every rank holds whole, averaged over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def average_gradients(model: nn.Module, group: ProcessGroup | None) -> None:
    """Replace every gradient by its mean over the ranks.

    Parameters that have none on some ranks (experts that no token there chose) count as zero;
    those that have none anywhere keep none.

    Args:
        model: The same on all ranks.
        group: The ranks; None for one process.

    Raises:
        ValueError: Its parameters are distributed (FSDP): their gradients are averages already.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    if group is None:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return
    if any(isinstance(p, DTensor) for p in parameters):
        raise ValueError(
            "average_gradients is for models that every rank holds whole; this one's parameters "
            "are sharded (FSDP), and their gradients have been averaged. Leave it out."
        )
    device = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], device=device).int()
    dist.all_reduce(present, op=dist.ReduceOp.MAX, group=group)
    count = dist.get_world_size(group)
    for parameter, wanted in zip(parameters, present.tolist(), strict=True):
        if not wanted:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= count
