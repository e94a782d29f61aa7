"""Decoding steps over part of the KV cache that SparQ is compared with: exact top-k, given keys.

One query per sequence; H2O, which keeps a state from step to step, is in `h2o`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_attn_plugin.ops.choice import Choice, choose_keys
from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.ops.scores import cap, dot, softmax, weigh


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
    read = nbytes(keys)
    if top_k < keys.shape[2]:
        chosen = choose_keys(weights.sum(2), top_k, local_window, visible, None)
        sees = chosen.seen(visible)
        weights = masked_softmax(
            chosen.gather(scores), None if sees is None else sees[:, :, None], sinks
        )
        values, _ = chosen.take(values)
    return weigh_all(weights[..., None, :], values).to(query.dtype), read + nbytes(values)


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
    chosen = Choice(index.expand(*keys.shape[:2], -1))
    (keys, key_bytes), (values, value_bytes) = chosen.take(keys), chosen.take(values)
    scores = capped_scores(query, keys, scaling, softcap)
    mask = None if kept is None else kept[:, :, None, None]
    output = weigh_all(masked_softmax(scores, mask, sinks), values)
    return output.to(query.dtype), key_bytes + value_bytes


def capped_scores(
    query: Tensor, keys: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Scores [B, Hkv, G, q, S] of queries [B, H, q, D] and keys [B, Hkv, S, D].

    float32, and float64 for float64 queries.
    """
    batch, _, q_len, width = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, keys.shape[1], -1, width).to(dtype)
    grouped = grouped * (width**-0.5 if scaling is None else scaling)
    return cap(dot(grouped, keys), softcap).unflatten(2, (-1, q_len))


def masked_softmax(scores: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension where ``mask`` is True; a row that sees nothing gives 0.

    Args:
        scores: [B, Hkv, G, ..., S].
        mask: bool, broadcastable to ``scores``; None sees all.
        sinks: [H], one more logit per query head in the denominator.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        shape = (1, *scores.shape[1:3], *[1] * (scores.ndim - 3))
        sinks = sinks.to(scores.dtype).reshape(shape)
    return softmax(scores, sinks)


def weigh_all(weights: Tensor, values: Tensor) -> Tensor:
    """[B, H, q, Dv] of weights [B, Hkv, G, q, S] and values [B, Hkv, S, Dv], in their dtype."""
    batch, kv_heads, group, q_len, _ = weights.shape
    output = weigh(weights.flatten(2, 3), values)
    return output.reshape(batch, kv_heads * group, q_len, -1)
