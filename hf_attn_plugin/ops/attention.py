"""The narrow waist: exact attention over a pattern, whatever computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugin.ops.backend import Backend, Call, choose_backend
from hf_attn_plugin.ops.checks import check_tensors
from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.ops.torch.blocked import blocked_attention
from hf_attn_plugin.patterns import Pattern


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over the pairs of ``pattern``, exact, forward and backward.

    Args:
        query: ``[batch, heads, q_len, head_dim]``, any strides.
        key: ``[batch, kv_heads, kv_len, head_dim]``, never expanded: query head h reads KV head
            ``h // (heads / kv_heads)``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        pattern: Which pairs attend.
        scaling: Factor on the scores; None is ``head_dim ** -0.5``.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[heads]``, one more logit per head in the softmax's denominator, without a value.
        need_lse: Without it, faster kernels that do not return the log-sum-exp may be used.

    Returns:
        The output ``[batch, heads, q_len, value_dim]`` in the inputs' dtype, and the natural
        log-sum-exp ``[batch, heads, q_len]`` in float32 (float64 for float64 inputs), sinks
        included, or None when not asked for. A query that sees nothing gets output 0, log-sum-exp
        -inf (with sinks, the sink) and gradients 0.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    _check(query, key, value, pattern, sinks)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap must be above 0, or None for none; got {softcap}.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(
        batch=query.shape[0],
        dtype=query.dtype,
        device_type=query.device.type,
        softcap=softcap is not None,
        sinks=sinks is not None,
        need_lse=need_lse,
        compiling=torch.compiler.is_compiling(),
    )
    backend = choose_backend(pattern, call).backend
    if backend in (Backend.SDPA_CAUSAL, Backend.SDPA_FULL, Backend.SDPA_MASK):
        return _sdpa(query, key, value, pattern, scale, backend), None
    if backend is Backend.DENSE:
        return reference_attention(
            query, key, value, pattern, scaling=scale, softcap=softcap, sinks=sinks
        )
    return blocked_attention(
        query, key, value, pattern, scaling=scale, softcap=softcap, sinks=sinks
    )


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scaling: float, backend: Backend
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if backend is not Backend.SDPA_MASK:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=backend is Backend.SDPA_CAUSAL,
            scale=scaling,
            enable_gqa=grouped,
        )
    mask, empty = pattern.derive(
        ("sdpa mask", str(query.device)), lambda: _dense_mask(pattern, query)
    )
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )
    return output if empty is None else output.masked_fill(empty, 0.0)


def _dense_mask(pattern: Pattern, query: Tensor) -> tuple[Tensor, Tensor | None]:
    """A mask in which every row sees something, and the rows that in truth see nothing.

    SDPA's kernels differ in what an empty row returns (0 or NaN), and NaN would reach gradients.
    """
    mask = pattern.visible(query.device)
    empty = ~mask.any(-1, keepdim=True)
    if not bool(empty.any()):
        return mask, None
    return mask | empty, empty


def _check(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, sinks: Tensor | None
) -> None:
    check_tensors("attention", query, key, value, pattern)
    if pattern.dense is not None and pattern.dense.shape[1] not in (1, query.shape[1]):
        raise ValueError(
            f"attention: the pattern's dense mask must have 1 or {query.shape[1]} heads, one per "
            f"query head; got {pattern.dense.shape[1]}."
        )
    if sinks is not None and sinks.numel() != query.shape[1]:
        raise ValueError(
            f"attention: sinks must hold one logit per query head, {query.shape[1]}; "
            f"got {tuple(sinks.shape)}."
        )
