"""Attention whose keys' gradients are float32 although its inputs are of 16 bits.

Autograd would round them to the keys' dtype at once. Where gradients of several calls, or of
several ranks, are added, each would then have been rounded before. So there the backward pass is
Triton's, whatever is the fastest; the forward pass is by the fastest that returns the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.attention import attention, call_of
from hf_attn_plugin.ops.backend import Backend, refuses
from hf_attn_plugin.parallel.merge import sinks_gradient
from hf_attn_plugin.parallel.pieces import PieceKernel, Pieces
from hf_attn_plugin.patterns import Pattern

# Takes the gradients of keys and of values, ``[batch, kv_heads, tokens, dim]``; None for one that
# nobody needs.
Keep = Callable[[Tensor | None, Tensor | None], None]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    keep: Keep | None,
) -> Tensor:
    """`ops.attention`'s output; keys' gradients in float32 where that makes a difference.

    Args:
        query: As in `ops.attention`, as are the others.
        key: See there.
        value: See there.
        pattern: Which pairs attend.
        scaling: Factor on the scores.
        softcap: See there.
        sinks: See there.
        keep: Gets the gradients of keys and values, which autograd then does not, where inputs are
            of 16 bits and a kernel has them in float32. None: gradients are rounded.
    """
    if keep is not None and scaling > 0:
        capped, sinking = softcap is not None, sinks is not None
        kernel = wide_kernel(query, key, value, pattern, softcap=capped, sinks=sinking)
        if kernel is not None:
            return wide_attention(
                query,
                key,
                value,
                pattern,
                kernel,
                keep,
                scaling=scaling,
                softcap=softcap,
                sinks=sinks,
            )
    output, _ = attention(
        query,
        key,
        value,
        pattern,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
        need_lse=False,
    )
    return output


def wide_kernel(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, *, softcap: bool, sinks: bool
) -> PieceKernel | None:
    """The kernel that gives keys' gradients in float32, or None for one that does not.

    None for inputs that are not rounded to 16 bits, and on a GPU where Triton's kernels refuse.
    """
    wanted = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    if not wanted or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    call = call_of(query, key, value, softcap=softcap, sinks=sinks, need_lse=True, needs_grad=True)

    def choose() -> PieceKernel | None:
        if pattern.q_len and pattern.kv_len and refuses(Backend.TRITON, pattern, call) is None:
            return PieceKernel.TRITON
        return None if call.device_type == "cuda" else PieceKernel.BLOCKED

    return pattern.derive(("wide kernel", call), choose)


def wide_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    kernel: PieceKernel,
    keep: Keep,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`ops.attention`'s output; keys' gradients go to ``keep`` and not to autograd.

    Args:
        query: As in `ops.attention`, as are the others.
        key: Requires a gradient; autograd goes on from it with none.
        value: The same.
        pattern: Which pairs attend.
        kernel: Of the backward pass (`wide_kernel`).
        keep: Called in the backward pass.
        scaling: Factor on the scores, above 0.
        softcap: As in `ops.attention`.
        sinks: As in `ops.attention`.
    """
    pieces = Pieces(kernel, scaling, softcap)
    return _WideAttention.apply(query, key, value, sinks, pattern, pieces, keep)


class _WideAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        pattern: Pattern,
        pieces: Pieces,
        keep: Keep,
    ) -> Tensor:
        output, lse = attention(
            query,
            key,
            value,
            pattern,
            scaling=pieces.scaling,
            softcap=pieces.softcap,
            sinks=sinks,
            need_lse=True,
        )
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.pattern, ctx.pieces, ctx.keep = pattern, pieces, keep
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, lse = ctx.saved_tensors
        if grad_output.stride(-1) != 1:
            grad_output = grad_output.contiguous()
        grad_sinks = None
        with torch.autocast(query.device.type, enabled=False):
            grads = ctx.pieces.backward(query, key, value, ctx.pattern, output, lse, grad_output)
            if sinks is not None:
                grad_sinks = sinks_gradient(sinks, output, lse, grad_output).to(sinks.dtype)
        ctx.keep(*grads[1:])
        return grads[0].to(query.dtype), None, None, grad_sinks, None, None, None
