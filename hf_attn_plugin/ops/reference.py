"""The specification of attention: dense, slow, differentiable by autograd, in any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_plugin.patterns import Pattern


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs of ``pattern``, with the whole score matrix in memory.

    Args:
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``; query head h reads KV head
            ``h // (heads / kv_heads)``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        pattern: Which pairs attend.
        scaling: Factor on the scores; None is ``head_dim ** -0.5``.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[heads]``, one more logit per head in the softmax's denominator, without a value.

    Returns:
        The output ``[batch, heads, q_len, value_dim]`` and the natural log-sum-exp
        ``[batch, heads, q_len]`` (sinks included), both in the inputs' dtype. A query that sees
        nothing gets 0 and -inf (with sinks: 0 and the sink).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (
        query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = pattern.visible(query.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        # A sink of -inf is none, and a constant: beside no pair its gradient would be NaN.
        sinks = sinks.masked_fill(sinks.isneginf(), float("-inf"))
        logits = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logits], -1)
    lse = torch.logsumexp(scores, -1)
    # Empty rows have lse = -inf; subtracting 0 keeps the difference -inf and its gradient 0.
    weights = torch.exp(scores - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    return weights[..., : key.shape[2]] @ value, lse
