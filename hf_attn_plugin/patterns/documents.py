"""Packed documents, told by positions that start again."""

from __future__ import annotations

import torch
from torch import Tensor


def restarts(positions: Tensor, valid: Tensor | None = None) -> Tensor:
    """Tokens whose position does not go on upwards from the valid token before them.

    Args:
        positions: ``[batch or 1, tokens]``; padding may be numbered in any way. Or ``[axes, batch
            or 1, tokens]``, of models that number images along several axes: within a document one
            of them always goes on.
        valid: bool ``[batch or 1, tokens]``, False at padding; None where there is none.

    Returns:
        bool ``[batch or 1, tokens]``, True at the first token of every document but the first.
    """
    if positions.ndim == 3:
        return torch.stack([restarts(axis, valid) for axis in positions]).all(0)
    if valid is None:
        return torch.nn.functional.pad(positions[:, 1:] <= positions[:, :-1], (1, 0))
    positions, valid = torch.broadcast_tensors(positions, valid)
    index = torch.arange(positions.shape[1], device=positions.device)
    last_valid = torch.where(valid, index, -1).cummax(1).values
    before = torch.nn.functional.pad(last_valid[:, :-1], (1, 0), value=-1)
    previous = positions.gather(1, before.clamp(min=0))
    return (positions <= previous) & valid & (before >= 0)
