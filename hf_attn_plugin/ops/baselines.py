"""Decoding steps over part of the KV cache that SparQ is compared with: exact top-k, given keys.

One query per sequence; H2O, which keeps a state from step to step, is in `h2o`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exact_topk_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    top_k: int,
    local_window: int = 0,
    scaling: float | None = None,
    visible: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Attend to the ``top_k`` keys with the largest exact scores.

    The sparse attention of FlexGen (arXiv 2303.06865): all keys are read, and the values of those
    chosen only. Query heads that share a KV head share the choice, made on the sum of their
    attention weights; the weights of the keys chosen are divided by their sum.

    Args:
        query: [B, H, 1, D]; query head h reads KV head h // (H / Hkv).
        keys: [B, Hkv, S, D].
        values: [B, Hkv, S, Dv].
        top_k: Keys attended to, at least 1.
        local_window: Most recent visible keys that are always chosen, 0 to ``top_k``.
        scaling: Factor of the scores; None is 1/√D.
        visible: bool [B or 1, S], the keys that the query may see; None is all of them.
        softcap: Scores become softcap · tanh(scores / softcap).
        sinks: [H], one more logit per query head in the denominator, without a value.

    Returns:
        The output [B, H, 1, Dv] in the query's dtype, and the bytes of keys and values read.
        A query that sees nothing gets 0.
    """
    if top_k < 1 or not 0 <= local_window <= top_k:
        raise ValueError(
            "exact_topk_decode: top_k must be at least 1 and local_window 0 to top_k, got "
            f"{top_k} and {local_window}."
        )
    sees = None if visible is None else visible[:, None]
    scores = capped_scores(query, keys, scaling, softcap)[..., 0, :]  # [B, Hkv, G, S]
    weights = masked_softmax(scores, None if sees is None else sees[:, :, None], sinks)
    if top_k < keys.shape[2]:
        chosen = _largest(weights.sum(2), top_k, local_window, visible)  # [B, Hkv, k]
        scores = scores.gather(-1, chosen[:, :, None].expand(-1, -1, scores.shape[2], -1))
        if sees is not None:
            sees = sees.expand(chosen.shape[0], chosen.shape[1], -1).gather(-1, chosen)
        weights = masked_softmax(scores, None if sees is None else sees[:, :, None], sinks)
        values = take(values, chosen)
    return weigh(weights[..., None, :], values).to(query.dtype), nbytes(keys) + nbytes(values)


def attend_to(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    *,
    kept: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Attend to given positions of the cache; nothing else of it is read.

    Args:
        query: [B, H, 1, D].
        keys: [B, Hkv, S, D].
        values: [B, Hkv, S, Dv].
        index: int64 [B or 1, Hkv or 1, m], the positions.
        kept: bool like ``index``, False where it holds a position that is not to be seen, so that
            rows of different lengths fit in one tensor. None sees all.
        scaling: Factor of the scores; None is 1/√D.
        softcap: Scores become softcap · tanh(scores / softcap).
        sinks: [H], one more logit per query head in the denominator, without a value.

    Returns:
        The output [B, H, 1, Dv] in the query's dtype, and the bytes of keys and values read.
    """
    keys, values = take(keys, index), take(values, index)
    scores = capped_scores(query, keys, scaling, softcap)
    mask = None if kept is None else kept[:, :, None, None]
    output = weigh(masked_softmax(scores, mask, sinks), values)
    return output.to(query.dtype), nbytes(keys) + nbytes(values)


def capped_scores(
    query: Tensor, keys: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Scores [B, Hkv, G, q, S] of queries [B, H, q, D] and keys [B, Hkv, S, D].

    float32, and float64 for float64 queries.
    """
    batch, _, q_len, width = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.reshape(batch, keys.shape[1], -1, width).to(dtype)
    grouped = grouped * (width**-0.5 if scaling is None else scaling)
    scores = (grouped @ keys.to(dtype).mT).view(batch, keys.shape[1], -1, q_len, keys.shape[2])
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def masked_softmax(scores: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension where ``mask`` is True; a row that sees nothing gives 0.

    Args:
        scores: [B, Hkv, G, ..., S].
        mask: bool, broadcastable to ``scores``; None sees all.
        sinks: [H], one more logit per query head in the denominator.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        shape = (1, *scores.shape[1:3], *[1] * (scores.ndim - 3))
        sinks = sinks.to(scores.dtype).reshape(shape)
        largest = torch.maximum(largest, sinks)
    largest = largest.clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    # The largest term is 1, so a total below 1 belongs to a row that sees nothing.
    return weights / total.clamp_min(1)


def weigh(weights: Tensor, values: Tensor) -> Tensor:
    """[B, H, q, Dv] of weights [B, Hkv, G, q, S] and values [B, Hkv, S, Dv], in their dtype."""
    batch, kv_heads, group, q_len, _ = weights.shape
    output = weights.flatten(2, 3) @ values.to(weights.dtype)
    return output.reshape(batch, kv_heads * group, q_len, -1)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows [B, Hkv, m, D] of [B, Hkv, S, D] at ``index``, int64 [B or 1, Hkv or 1, m]."""
    batch, heads, _, width = tensor.shape
    return tensor.gather(2, index[..., None].expand(batch, heads, -1, width))


def most_recent(seen: Tensor, count: int) -> Tensor:
    """Which of the ``seen`` positions, bool [..., S], are among the last ``count`` of them."""
    return seen & (seen.flip(-1).cumsum(-1).flip(-1) <= count)


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _largest(scores: Tensor, top_k: int, local_window: int, visible: Tensor | None) -> Tensor:
    """Positions [B, Hkv, k] of the largest ``scores`` [B, Hkv, S], the local window among them."""
    if visible is None:
        visible = torch.ones(1, scores.shape[-1], dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(most_recent(visible, local_window)[:, None], math.inf)
    # Below the 0 to which the weight of a visible key may underflow.
    scores = scores.masked_fill(~visible[:, None], -1.0)
    return scores.topk(top_k, sorted=False).indices
