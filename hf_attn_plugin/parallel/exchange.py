"""Tensors between the ranks of a group, point to point, in one batch of sends and receives."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_attn_plugin.parallel.groups import transfer_group
from hf_attn_plugin.parallel.layout import concatenate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# More tensors than this for one rank travel as one, packed: a message costs several microseconds.
_MOST_MESSAGES = 16

# (rank in the group, contiguous tensor)
Moves = list[tuple[int, Tensor]]


@dataclasses.dataclass
class Exchange:
    """Transfers under way.

    Attributes:
        bytes_sent: Bytes that this rank sends.
    """

    bytes_sent: int
    _works: list[Any]
    # Held until the transfers are done: nobody else may know of what is sent.
    _sent: list[Tensor]
    # What arrived packed, and where it belongs.
    _packed: list[tuple[Tensor, list[Tensor]]]

    def wait(self) -> None:
        """Let what follows see what was received (on a GPU: on the current stream)."""
        for work in self._works:
            work.wait()
        for flat, tensors in self._packed:
            parts = flat.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        self._works, self._sent, self._packed = [], [], []


def start_exchange(group: ProcessGroup | None, sends: Moves, receives: Moves) -> Exchange:
    """Send and receive at once, without waiting.

    Between two ranks the first send meets the first receive, and so on; a rank sends nothing to
    itself. A rank that neither sends nor receives may call or not.

    Args:
        group: The ranks; None for all processes.
        sends: What goes where.
        receives: What comes from where: tensors to fill.

    Returns:
        What to wait for before the received tensors are read.
    """
    import torch.distributed as dist

    if not sends and not receives:
        return Exchange(0, [], [], [])
    where = transfer_group(group, (sends or receives)[0][1].device)
    operations, held, packed = [], [], []
    for peer, tensors in _messages(sends):
        message = tensors[0] if len(tensors) == 1 else concatenate([t.reshape(-1) for t in tensors])
        operations.append(dist.P2POp(dist.isend, message, group=where, group_peer=peer))
        held.append(message)
    for peer, tensors in _messages(receives):
        message = tensors[0]
        if len(tensors) > 1:
            message = message.new_empty(sum(tensor.numel() for tensor in tensors))
            packed.append((message, tensors))
        operations.append(dist.P2POp(dist.irecv, message, group=where, group_peer=peer))
        held.append(message)
    works = dist.batch_isend_irecv(operations) if operations else []
    nbytes = sum(tensor.numel() * tensor.element_size() for _, tensor in sends)
    return Exchange(nbytes, works, held, packed)


def _messages(moves: Moves) -> list[tuple[int, list[Tensor]]]:
    """What travels together; sender and receiver come to the same."""
    by_kind: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for peer, tensor in moves:
        if tensor.numel():
            by_kind.setdefault((peer, tensor.dtype), []).append(tensor)
    messages = []
    for (peer, _), tensors in by_kind.items():
        together = [[each] for each in tensors] if len(tensors) <= _MOST_MESSAGES else [tensors]
        messages += [(peer, each) for each in together]
    return messages
