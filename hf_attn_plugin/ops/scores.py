"""Scores and softmax of decoding steps, grouped by key/value head."""

from __future__ import annotations

import torch
from torch import Tensor

# Half-precision keys and values are converted to float32 this many positions at a time, so that
# the converted block stays in the processor's cache and no full-length copy is ever made.
BLOCK = 1024


def dot(query: Tensor, keys: Tensor) -> Tensor:
    """Query [..., G, D] times keys [..., S, D], in the query's dtype."""
    if keys.dtype == query.dtype:
        return query @ keys.transpose(-1, -2)
    blocks = [query @ k.to(query.dtype).transpose(-1, -2) for k in keys.split(BLOCK, dim=-2)]
    return torch.cat(blocks, dim=-1)


def combine(part: Tensor, rows: Tensor) -> Tensor:
    """Part [..., G, r] of queries times components [..., r, S] of keys, in the part's dtype."""
    if rows.dtype == part.dtype:
        return part @ rows
    return torch.cat([part @ r.to(part.dtype) for r in rows.split(BLOCK, dim=-1)], dim=-1)


def weigh(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [..., G, S] times values [..., S, Dv], in the weights' dtype."""
    if values.dtype == weights.dtype:
        return weights @ values
    output = weights.new_zeros(*weights.shape[:-1], values.shape[-1])
    for weight, value in zip(
        weights.split(BLOCK, dim=-1), values.split(BLOCK, dim=-2), strict=True
    ):
        output = output + weight @ value.to(weight.dtype)
    return output


def cap(scores: Tensor, softcap: float | None) -> Tensor:
    """Softcap · tanh(scores / softcap); None caps nothing."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def hide(scores: Tensor, visible: Tensor | None) -> Tensor:
    """``scores`` [B, Hkv, G, S] with -inf where ``visible``, bool [B or 1, S], is False."""
    return scores if visible is None else scores.masked_fill(~visible[:, None, None], -torch.inf)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension; rows that are -inf throughout give 0, not NaN."""
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    largest = largest.clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    # The largest term is 1, so a total below 1 belongs to a row that sees nothing.
    return weights / total.clamp_min(1)
