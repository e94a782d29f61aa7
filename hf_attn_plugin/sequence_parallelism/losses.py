"""The loss over all tokens of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.sequence_parallelism.batch import IGNORED

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MeanOfRanks(torch.autograd.Function):
    """The mean of a number over the ranks; its gradient goes to this rank's number unchanged.

    So every rank sees the loss of all, and the mean of the ranks' gradients, as data-parallel
    training takes it, is the gradient of that loss.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        """0-d of any floating dtype; a collective call."""
        import torch.distributed as dist

        total = value.detach().clone()
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Unchanged."""
        return grads[0], None


def mean_of_ranks(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """`MeanOfRanks`; of one process, the value itself."""
    if group is None:
        return value
    mean: Tensor = MeanOfRanks.apply(value, group)
    return mean


def sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy added up over the tokens that count, as in transformers' losses in float32.

    Args:
        logits: ``[batch, tokens, classes]``.
        targets: int64 ``[batch, tokens]``, -100 where nothing is to be predicted.
    """
    classes = logits.shape[-1]
    wide = logits.reshape(-1, classes)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    return nn.functional.cross_entropy(
        wide, targets.reshape(-1).to(logits.device), ignore_index=IGNORED, reduction="sum"
    )
