"""Packed documents, told by positions that start again."""

from __future__ import annotations

import torch
from torch import Tensor


def restarts(positions: Tensor, valid: Tensor | None = None) -> Tensor:
    """Tokens whose position does not go on upwards from the valid token before them.

    Args:
        positions: ``[batch or 1, tokens]``; padding may be numbered in any way. Or ``[axes, batch
            or 1, tokens]``, of models that number images along several axes. With four axes the
            first numbers the text. With three, a document starts where all of them are 0: inside of
            one, all may go back together (frames of a video at the same moment), but not to 0.
        valid: bool ``[batch or 1, tokens]``, False at padding; None where there is none.

    Returns:
        bool ``[batch or 1, tokens]``, True at the first token of every document but the first. A
        row in which no position goes on upwards is not numbered at all (some models pass zeros),
        and has none.
    """
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]
    follows = _follows(positions, valid)
    if positions.ndim == 3:
        starts = (positions == 0).all(0) & follows
    else:
        starts = _not_upwards(positions, valid) & follows
    return starts & (follows & ~starts).any(1, keepdim=True)


def _follows(positions: Tensor, valid: Tensor | None) -> Tensor:
    """Valid tokens with a valid one before them."""
    if valid is None:
        valid = torch.ones(1, positions.shape[-1], dtype=torch.bool, device=positions.device)
    seen = valid.long().cumsum(1)
    return valid & (seen > 1)


def _not_upwards(positions: Tensor, valid: Tensor | None) -> Tensor:
    """Tokens whose position is not above that of the valid token before them."""
    if valid is None:
        return torch.nn.functional.pad(positions[:, 1:] <= positions[:, :-1], (1, 0))
    positions, valid = torch.broadcast_tensors(positions, valid)
    index = torch.arange(positions.shape[1], device=positions.device)
    last_valid = torch.where(valid, index, -1).cummax(1).values
    before = torch.nn.functional.pad(last_valid[:, :-1], (1, 0), value=-1)
    return positions <= positions.gather(1, before.clamp(min=0))
