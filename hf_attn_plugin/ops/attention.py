"""The narrow waist: exact attention over a pattern, whatever computes it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.backend import (
    Backend,
    Choice,
    capability_of,
    choose_backend,
    installed_packages,
)
from hf_attn_plugin.ops.call import Call
from hf_attn_plugin.ops.checks import check_softmax, check_tensors
from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.ops.torch.blocked import blocked_attention
from hf_attn_plugin.ops.vendors.cudnn import cudnn_attention
from hf_attn_plugin.ops.vendors.flash_attention_4 import flash_attention_4
from hf_attn_plugin.ops.vendors.sdpa import sdpa_attention
from hf_attn_plugin.patterns import Pattern

_INSTALLED = installed_packages()
_CUDNN = (Backend.CUDNN_CAUSAL, Backend.CUDNN_FULL)
_SDPA = (Backend.SDPA_CAUSAL, Backend.SDPA_FULL, Backend.SDPA_MASK)


class SlowAttentionWarning(UserWarning):
    """Attention on a GPU is computed without a kernel, and why. Said once per reason."""


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

    `hf_attn_plugin.ops.backend` says what computes it. Autocast changes nothing: the dtype of the
    inputs is what is computed.

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
    how = (scaling, softcap, sinks, need_lse)
    device = query.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # A model spread over GPUs: kernels written in Python start on the current one.
        with torch.cuda.device(device), torch.autocast(device.type, enabled=False):
            return _attention(query, key, value, pattern, *how)
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return _attention(query, key, value, pattern, *how)
    return _attention(query, key, value, pattern, *how)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    check_softmax("attention", query, softcap, sinks)
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (sinks is not None and sinks.requires_grad)
    )
    deterministic = (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )

    def examine() -> Choice:
        check_tensors("attention", query, key, value, pattern)
        call = call_of(
            query,
            key,
            value,
            softcap=softcap is not None,
            sinks=sinks is not None,
            need_lse=need_lse,
            needs_grad=needs_grad,
            deterministic=deterministic,
        )
        choice = choose_backend(pattern, call)
        if choice.warning is not None:
            _warn_once(choice.warning)
        return choice

    # All layers of a forward share one pattern and most calls one shape: checked and chosen once.
    tensors = (query, key, value) if sinks is None else (query, key, value, sinks)
    told = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
    flags = (softcap is None, need_lse, needs_grad, deterministic)
    choice = pattern.derive(("choice", told, flags), examine)

    backend = choice.backend
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if scale <= 0:  # kernels look for the largest product before they scale it
        query, scale = query * (-1.0 if scale < 0 else 0.0), -scale or 1.0
    if backend is Backend.FLASH_ATTENTION_4:
        return flash_attention_4(
            query,
            key,
            value,
            pattern,
            scaling=scale,
            softcap=softcap,
            sinks=sinks,
            need_lse=need_lse,
            deterministic=deterministic,
        )
    if backend in _CUDNN:
        causal = backend is Backend.CUDNN_CAUSAL
        return cudnn_attention(query, key, value, causal=causal, scaling=scale), None
    if backend in _SDPA:
        return _sdpa(query, key, value, pattern, scale, choice), None
    output, lse = _GENERAL[backend](
        query, key, value, pattern, scaling=scale, softcap=softcap, sinks=sinks
    )
    return output, lse if need_lse else None


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softcap: bool,
    sinks: bool,
    need_lse: bool,
    needs_grad: bool = False,
    deterministic: bool = False,
) -> Call:
    """What `choose_backend` may depend on, of tensors ``[batch, heads, tokens, dim]`` here.

    Args:
        query: Of the call, as the next two.
        key: See there.
        value: See there.
        softcap: As in `Call`, as all that follow.
        sinks: See there.
        need_lse: See there.
        needs_grad: See there.
        deterministic: See there.
    """
    return Call(
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        dtype=query.dtype,
        device_type=query.device.type,
        capability=capability_of(query.device),
        softcap=softcap,
        sinks=sinks,
        need_lse=need_lse,
        needs_grad=needs_grad,
        compiling=torch.compiler.is_compiling(),
        deterministic=deterministic,
        installed=_INSTALLED,
    )


def _triton_decode(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from hf_attn_plugin.ops.triton.decode import triton_decode

    return triton_decode(*args, **kwargs)


def _triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from hf_attn_plugin.ops.triton.attention import triton_attention

    return triton_attention(*args, **kwargs)


# Those that take every pattern, and return the log-sum-exp in any case.
_GENERAL: dict[Backend, Callable[..., tuple[Tensor, Tensor]]] = {
    Backend.TRITON: _triton,
    Backend.TRITON_DECODE: _triton_decode,
    Backend.BLOCKED: blocked_attention,
    Backend.DENSE: reference_attention,
}


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(text, SlowAttentionWarning, stacklevel=7)


def _warn_once(text: str) -> None:
    """Warn, at most once per text; under torch.compile while it traces."""
    _warn(text)


# What torch.compiler.assume_constant_result does, without importing Dynamo and with it Triton.
_warn_once.__dict__["_dynamo_marked_constant"] = True


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scaling: float, choice: Choice
) -> Tensor:
    repeat = choice.repeats_heads
    if choice.backend is not Backend.SDPA_MASK:
        causal = choice.backend is Backend.SDPA_CAUSAL
        return sdpa_attention(
            query, key, value, scaling=scaling, causal=causal, repeat_heads=repeat
        )
    mask, empty = pattern.derive(
        ("sdpa mask", str(query.device)), lambda: _dense_mask(pattern, query)
    )
    output = sdpa_attention(query, key, value, scaling=scaling, mask=mask, repeat_heads=repeat)
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
