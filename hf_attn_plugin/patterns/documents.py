"""Packed documents, told by positions that start again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONTINUED = (
    "position_ids start again in the new tokens while earlier ones are cached: packed documents "
    "cannot be continued from a cache. Pass each document as a batch row of its own."
)


def restarts(positions: Tensor, valid: Tensor | None = None) -> Tensor:
    """Tokens whose position does not go on upwards from the valid token before them.

    Args:
        positions: ``[batch or 1, tokens]``; padding may be numbered in any way. Or ``[axes, batch
            or 1, tokens]``, of models that number images along several axes. With four axes the
            first numbers the text. With three, a document starts where all of them are 0: inside of
            one, all may go back together (frames of a video at the same moment), but not to 0.
        valid: bool ``[batch or 1, tokens]``, False at padding; None where there is none.

    Returns:
        bool ``[batch or 1, tokens]``, True at the first token of every document but the first.
        Zeros throughout are documents of one token each, as in transformers' own masks.
    """
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]
    follows = _follows(positions, valid)
    if positions.ndim == 3:
        return (positions == 0).all(0) & follows
    return _not_upwards(positions, valid) & follows


def begin_again(positions: Tensor, valid: Tensor | None, cached: Tensor) -> Tensor:
    """Rows whose first new token is at position 0 although earlier tokens of theirs are cached.

    A row of which nothing but padding is cached may begin there.

    Args:
        positions: Of the new tokens, as in `restarts`.
        valid: Of the new tokens, as in `restarts`.
        cached: bool ``[batch or 1]``, whether any valid token is cached.

    Returns:
        bool ``[batch or 1]``.
    """
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]
    follows = _follows(positions, valid)
    first = ~follows if valid is None else valid & ~follows
    at_zero = positions == 0 if positions.ndim == 2 else (positions == 0).all(0)
    return (first & at_zero).any(1) & cached.to(positions.device)


def numbers_tokens(config: Any) -> bool:
    """Whether ``position_ids`` number the tokens in models of this config.

    Decision Transformer gives its GPT-2 zeros, and adds what it knows of time by itself.
    """
    return getattr(config, "model_type", None) != "decision_transformer"


def number_chunks(documents: Tensor, size: int, first: Tensor) -> Tensor:
    """Numbers of (document, chunk) pairs; chunks start anew in every document (Llama 4).

    Args:
        documents: int64 ``[batch or 1, tokens]``.
        size: Tokens of a chunk.
        first: int64 ``[batch or 1, 1]``, the first valid token: padding before it does not count.

    Returns:
        int64 ``[batch or 1, tokens]``.
    """
    length = documents.shape[1]
    index = torch.arange(length, device=documents.device)[None]
    starts = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    first = torch.maximum(torch.where(starts, index, 0).cummax(1).values, first)
    return documents * (length + 1) + (index - first).div(size, rounding_mode="floor")


def number_in_cache(starts: Tensor, first: int | Tensor, kv_length: int) -> Tensor:
    """Document numbers of all keys of a cache, in operations that look at no value.

    What is cached belongs to the first document of the new tokens, and empty slots to none.

    Args:
        starts: bool ``[batch or 1, tokens]`` of `restarts`.
        first: The slot of the first new token.
        kv_length: Slots.

    Returns:
        int64 ``[batch or 1, kv_length]``.
    """
    length = starts.shape[1]
    new = starts.to(torch.int64).cumsum(1)
    index = torch.arange(kv_length, device=starts.device) - first
    keys = new[:, index.clamp(0, length - 1)]
    return torch.where(index < 0, 0, torch.where(index < length, keys, length))


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
