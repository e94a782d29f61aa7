"""Linear attention on a GPU: the kernels of `linear_kernels` as two operators of torch.

What the operators return is new memory of known shape, so that torch.compile traces through them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from hf_attn_plugin.ops.linear_state import LinearState
from hf_attn_plugin.ops.torch.linear_features import EluFeatures, FavorFeatures, FeatureMap
from hf_attn_plugin.ops.triton.linear_backward_kernels import (
    key_gradients,
    output_deltas,
    query_gradients,
    value_gradients,
)
from hf_attn_plugin.ops.triton.linear_features import favor_backward, make_features
from hf_attn_plugin.ops.triton.linear_kernels import chunk_states, read_states, scan_states
from hf_attn_plugin.ops.triton.linear_layout import Layout, lay_out
from hf_attn_plugin.patterns import Pattern

_SCAN_BLOCK = 1024
# Two programs share a multiprocessor with so few registers, and nothing is spilled.
_STATES_LAUNCH = {"num_warps": 8, "num_stages": 2, "maxnreg": 128}


def triton_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    state: LinearState,
    *,
    scaling: float,
    chunk: int | None = None,
) -> tuple[Tensor, LinearState]:
    """Linear attention by Triton kernels; see `hf_attn_plugin.ops.linear.linear_attention`.

    Sums are in float32. Operands of products are bfloat16 for bfloat16 inputs, TF32 (which has
    float16's mantissa) for float16, and three TF32 products for float32. Backward is
    deterministic, and differentiable no second time.

    Args:
        query: ``[batch, heads, q_len, head_dim]``, any strides, at least one query.
        key: ``[batch, kv_heads, kv_len, head_dim]``, any strides, at least one key.
        value: ``[batch, kv_heads, kv_len, value_dim]``, any strides.
        pattern: Causality, padding, offsets; documents if causal.
        state: Of earlier keys; its features are those of the call.
        scaling: Factor on the scores that favor approximates.
        chunk: Tokens in a chunk, rounded up to whole tiles; None for the measured best.

    Returns:
        The output ``[batch, heads, q_len, value_dim]`` and the state after all keys.

    Raises:
        ValueError: The tensors are not on a GPU (and Triton does not interpret its kernels).
    """
    if query.device.type != "cuda" and isinstance(read_states, triton.JITFunction):
        raise ValueError(
            f"linear_attention: Triton's kernels need a GPU, the tensors are on {query.device}. "
            "Pass backend=None."
        )
    lead = pattern.first_query - pattern.kv_offset if pattern.causal else None
    results = linear_attention_forward(
        query, key, value, state.sums, state.log_scale,
        pattern.key_valid, pattern.q_documents, pattern.kv_documents,
        _encode(state.feature_map), lead, scaling, chunk,
    )  # fmt: skip
    output, sums, log_scale = results[:3]
    return output, LinearState(sums, log_scale.detach(), state.feature_map)


def _encode(feature_map: FeatureMap) -> list[int]:
    """A feature map as an operator takes it: nothing for elu, favor's fields."""
    if isinstance(feature_map, EluFeatures):
        return []
    number = -1 if feature_map.num_features is None else feature_map.num_features
    return [number, feature_map.seed, feature_map.redraw, feature_map.layer]


def _decode(fields: list[int]) -> FeatureMap:
    if not fields:
        return EluFeatures()
    number, seed, redraw, layer = fields
    return FavorFeatures(None if number < 0 else number, seed, redraw, layer)


def _layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fields: list[int],
    lead: int | None,
    chunk: int | None,
) -> Layout:
    num_features = _decode(fields).width(query.shape[-1])
    return lay_out(
        query.dtype, query.shape[2], key.shape[2], value.shape[-1], num_features, lead, chunk
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Masks:
    """Padding and documents as kernels take them: ``query`` stands in for what is not there."""

    key_valid: Tensor | None
    q_documents: Tensor | None
    kv_documents: Tensor | None

    def pointers(self, absent: Tensor) -> tuple[Tensor, ...]:
        given = (self.key_valid, self.q_documents, self.kv_documents)
        rows = [absent if t is None else t for t in given]
        return tuple(t.view(torch.uint8) if t.dtype == torch.bool else t for t in rows)

    @property
    def strides(self) -> tuple[int, ...]:
        given = (self.key_valid, self.q_documents, self.kv_documents)
        return tuple(0 if t is None or t.shape[0] == 1 else t.stride(0) for t in given)

    @property
    def flags(self) -> dict[str, bool]:
        return {
            "HAS_VALID": self.key_valid is not None,
            "HAS_DOCS": self.q_documents is not None,
        }


def _rows(tensor: Tensor | None) -> Tensor | None:
    """With its tokens next to each other."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("hf_attn_plugin::linear_attention_forward", mutates_args=())
def linear_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sums: Tensor,
    log_scale: Tensor,
    key_valid: Tensor | None,
    q_documents: Tensor | None,
    kv_documents: Tensor | None,
    fields: list[int],
    lead: int | None,
    scaling: float,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, state after all keys, and what the backward pass needs.

    That is the logarithms of the normalisers, ``[batch, heads, q_len]``, and of the states before
    each chunk the sums, the sums of the features alone and the scales.
    """
    layout = _layout(query, key, value, fields, lead, chunk)
    masks = _Masks(_rows(key_valid), _rows(q_documents), _rows(kv_documents))
    output, end_sums, end_top, normalisers, *before = _empty(
        layout, query, key, value, sums, log_scale
    )
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    num_features = sums.shape[2]
    with torch.cuda.device_of(query):
        q, k = (
            make_features(_decode(fields), x, scaling, layout.features, layout.state_dtype)
            for x in (query, key)
        )
        kind = {"GROUPS": heads // kv_heads, **masks.flags, **layout.tiles}
        own = _chunk_sums(
            layout, masks, k.values, value, (k.scales, k.scales),
            (kv_heads, q_len, kv_len, 0, 0, layout.chunks, layout.chunks, value_dim),
            {**kind, "GROUPS": 1, "QUERIES": False},
        )  # fmt: skip
        _scan(
            layout, masks, own, (sums.contiguous(), log_scale.contiguous()),
            (*before, end_sums, end_top), kv_len, value_dim, num_features,
            first=0, count=layout.chunks, start=0, steps=layout.chunks, step=1,
        )  # fmt: skip
        grid = (layout.value_tiles * layout.count * (layout.chunk // layout.tile) * batch * heads,)
        read_states[grid](
            q.values, k.values, value, k.scales, *masks.pointers(query), *before,
            output, normalisers, *value.stride(), *output.stride(), *masks.strides,
            kv_heads, q_len, kv_len, layout.lead, layout.first, layout.chunks, layout.count,
            value_dim,
            **kind, **layout.launch,
        )  # fmt: skip
    states, columns, tops = before
    return output, end_sums, end_top, normalisers, states, columns, tops


@linear_attention_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sums: Tensor,
    log_scale: Tensor,
    key_valid: Tensor | None,
    q_documents: Tensor | None,
    kv_documents: Tensor | None,
    fields: list[int],
    lead: int | None,
    scaling: float,
    chunk: int | None,
) -> tuple[Tensor, ...]:
    layout = _layout(query, key, value, fields, lead, chunk)
    return _empty(layout, query, key, value, sums, log_scale)


def _empty(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, sums: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what the forward pass returns."""
    batch, heads, q_len, _ = query.shape
    kv_heads, _, value_dim = value.shape[1:]
    states = (batch, kv_heads, layout.chunks + 1)
    return (
        # Laid out as [batch, q_len, heads, dim], which is how models read it: no copy for them.
        query.new_empty(batch, q_len, heads, value_dim).transpose(1, 2),
        sums.new_empty(sums.shape),
        log_scale.new_empty(log_scale.shape),
        sums.new_empty(batch, heads, q_len),
        sums.new_empty(*states, layout.features, layout.values, dtype=layout.state_dtype),
        sums.new_empty(*states, layout.features),
        sums.new_empty(states),
    )


@torch.library.custom_op("hf_attn_plugin::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    grad: Tensor,
    sums_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    key_valid: Tensor | None,
    q_documents: Tensor | None,
    kv_documents: Tensor | None,
    output: Tensor,
    end_top: Tensor,
    normalisers: Tensor,
    before: Tensor,
    column_before: Tensor,
    top_before: Tensor,
    fields: list[int],
    lead: int | None,
    scaling: float,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and of the state that was passed in."""
    layout = _layout(query, key, value, fields, lead, chunk)
    masks = _Masks(_rows(key_valid), _rows(q_documents), _rows(kv_documents))
    batch, heads, q_len, width = query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    num_features = sums_grad.shape[2]
    grads = [torch.empty_like(t) for t in (query, key, value)]
    feature_map = _decode(fields)
    deltas = torch.empty_like(normalisers)
    with torch.cuda.device_of(query):
        q, k = (
            make_features(feature_map, x, scaling, layout.features, layout.state_dtype)
            for x in (query, key)
        )
        q_grad, k_grad = grads[:2]
        if fields:  # gradients of the features' logarithms
            width = layout.features
            q_grad, k_grad = torch.empty_like(q.values), torch.empty_like(k.values)
        rows = triton.cdiv(q_len, layout.tile)
        output_deltas[(rows * batch * heads,)](
            output, grad, deltas, *output.stride(), *grad.stride(), heads, q_len, rows, value_dim,
            T=layout.tile, BV=triton.next_power_of_2(value_dim), num_warps=4,
        )  # fmt: skip
        sizes = (kv_heads, q_len, kv_len, layout.lead, layout.first, layout.chunks, layout.count)
        kind = {"GROUPS": heads // kv_heads, **masks.flags, **layout.tiles}
        own = _chunk_sums(
            layout, masks, q.values, grad, (normalisers, deltas), (*sizes, value_dim),
            {**kind, "QUERIES": True},
        )  # fmt: skip
        shape = (batch, kv_heads, layout.chunks)
        after = before.new_empty(*shape, layout.features, layout.values)
        column_after = column_before.new_empty(*shape, layout.features)
        top_after = top_before.new_empty(shape)
        # What the end of the state gives back. The state's sums are over exp(its scale).
        start = sums_grad.contiguous()
        start_top = torch.where(end_top.isneginf(), end_top, -end_top)
        state_grad, state_top = torch.empty_like(start), torch.empty_like(start_top)
        last = max(layout.first + layout.count, layout.chunks) - 1
        _scan(
            layout, masks, own, (start, start_top),
            (after, column_after, top_after, state_grad, state_top),
            kv_len, value_dim, num_features,
            first=layout.first, count=layout.count,
            start=last, steps=last + 1 - min(layout.first, 0), step=-1,
        )  # fmt: skip
        state_grad *= (state_top + log_scale).exp()[..., None, None]

        inputs = (q.values, k.values, value, grad)
        pointers = masks.pointers(query)
        strides = (*value.stride(), *grad.stride())
        options = {"ELU": not fields, **kind, **layout.launch}
        tiles = layout.chunk // layout.tile
        query_gradients[(layout.feature_tiles * layout.count * tiles * batch * heads,)](
            *inputs, q.scales, k.scales, normalisers, deltas, *pointers,
            before, column_before, top_before, q_grad,
            *strides, *q_grad.stride(), *masks.strides, *sizes, width, value_dim, **options,
        )  # fmt: skip
        of_keys = layout.chunks * tiles * batch * kv_heads
        key_gradients[(layout.feature_tiles * of_keys,)](
            *inputs, k.scales, normalisers, deltas, *pointers,
            after, column_after, top_after, k_grad,
            *strides, *k_grad.stride(), *masks.strides, *sizes, width, value_dim, **options,
        )  # fmt: skip
        value_gradients[(layout.value_tiles * of_keys,)](
            q.values, k.values, grad, k.scales, normalisers, *pointers,
            after, top_after, grads[2],
            *grad.stride(), *grads[2].stride(), *masks.strides,
            *sizes, value_dim, **kind, **layout.launch,
        )  # fmt: skip
        if isinstance(feature_map, FavorFeatures):
            grads[0] = favor_backward(feature_map, query, q_grad, scaling)
            grads[1] = favor_backward(feature_map, key, k_grad, scaling)
    return grads[0], grads[1], grads[2], state_grad


@linear_attention_backward.register_fake
def _(
    grad: Tensor,
    sums_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    state_grad = torch.empty_like(sums_grad, memory_format=torch.contiguous_format)
    return (*(torch.empty_like(t) for t in (query, key, value)), state_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, _, log_scale, *masks_and_options = inputs
    masks, ctx.options = masks_and_options[:3], masks_and_options[3:]
    out, sums, *kept = output
    ctx.save_for_backward(query, key, value, log_scale, *masks, out, *kept)
    ctx.sums_like = sums.shape, sums.dtype


def _backward(ctx: Any, grad: Tensor | None, sums_grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    out = saved[7]
    if grad is None:
        grad = torch.zeros_like(out)
    if sums_grad is None:
        shape, dtype = ctx.sums_like
        sums_grad = out.new_zeros(shape, dtype=dtype)
    grads = linear_attention_backward(grad, sums_grad, *saved, *ctx.options)
    return *grads, *[None] * 8


linear_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _chunk_sums(
    layout: Layout,
    masks: _Masks,
    phi: Tensor,
    v: Tensor,
    weights: tuple[Tensor, Tensor],
    sizes: tuple[int, ...],
    kind: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `chunk_states` over keys and their scales, or queries, normalisers and deltas."""
    kv_heads, count = sizes[0], sizes[6]
    shape = (v.shape[0], kv_heads, count)
    own = (
        weights[0].new_empty(*shape, layout.features, layout.values),
        weights[0].new_empty(*shape, layout.features),
        weights[0].new_empty(shape),
    )
    grid = (layout.feature_tiles * layout.value_tiles * count * v.shape[0] * kv_heads,)
    chunk_states[grid](
        phi, v, *weights, *masks.pointers(v), *own, *v.stride(), *masks.strides, *sizes,
        **kind, **_STATES_LAUNCH,
    )  # fmt: skip
    return own


def _scan(
    layout: Layout,
    masks: _Masks,
    own: tuple[Tensor, Tensor, Tensor],
    start_state: tuple[Tensor, Tensor],
    results: tuple[Tensor, ...],
    kv_len: int,
    value_dim: int,
    num_features: int,
    *,
    first: int,
    count: int,
    start: int,
    steps: int,
    step: int,
) -> None:
    """Launch `scan_states`."""
    batch, kv_heads = own[2].shape[:2]
    blocks = triton.cdiv(layout.features * (layout.values + 1), _SCAN_BLOCK)
    scan_states[(blocks, batch * kv_heads)](
        *own, *start_state, masks.pointers(own[0])[2], *results,
        masks.strides[2], kv_heads, kv_len, first, layout.chunks, count, start, steps,
        num_features, value_dim,
        STEP=step, HAS_DOCS=masks.q_documents is not None, CHUNK=layout.chunk,
        FEATURES=layout.features, VALUES=layout.values, BLOCK=_SCAN_BLOCK, num_warps=4,
    )  # fmt: skip
