"""The features of queries and keys, made before linear attention's kernels, and their gradient.

The kernels read features from memory. For favor: its projection takes part in an exponent, so it
needs more precision than the products of features, and six kernels would each do it again. For elu:
made inside the kernels they are a quarter fewer bytes, but each token's exponentials are computed
six times over, and a tile that must be computed cannot be copied ahead while others are multiplied.
Features are not kept between forward and backward.
"""

# mypy: disallow-untyped-defs=False
# ruff: noqa: N803 - upper case marks what is known when a kernel is compiled

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_attn_plugin.ops.torch.linear_features import EluFeatures, FavorFeatures, FeatureMap
from hf_attn_plugin.ops.triton.linear_tiles import FLOOR, LENGTHS, load_tile

_FAVOR_TILE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Features of queries or keys.

    Attributes:
        values: ``[batch, heads, tokens, width]``, between exp(-64) and 1, and 0 in the columns
            beyond the map's number of features.
        scales: float32 ``[batch, heads, tokens]``, the logarithm of what they were divided by.
    """

    values: Tensor
    scales: Tensor


@triton.jit(do_not_specialize=LENGTHS)
def elu_features(
    x, phi, scales, x_b, x_h, x_t, x_d, heads, q_len, count, head_dim,
    T: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``elu(x) + 1`` over the token's largest. Grid: tiles of tokens, heads."""
    bh = (tl.program_id(0) // count).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = tl.program_id(0) % count * T + tl.arange(0, T)
    inside = rows < q_len
    columns = tl.arange(0, BLOCK)
    real = (columns < head_dim)[None]
    x = load_tile(x + b * x_b + h * x_h, rows, inside, x_t, 0, x_d, head_dim, BLOCK)
    x = x.to(tl.float32)
    largest = tl.max(tl.where(real, x, float("-inf")), 1)  # elu(x) + 1 grows with x
    scale = tl.where(largest > 0, tl.log(1 + tl.maximum(largest, 0.0)), largest)
    over = tl.exp(tl.minimum(x - scale[:, None], 0.0))
    values = tl.where(x > 0, (1 + x) * tl.exp(-scale)[:, None], over)
    values = tl.where(real, tl.maximum(values, FLOOR), 0.0).to(phi.dtype.element_ty)
    places = (bh * q_len + rows)[:, None] * WIDTH + columns[None]
    tl.store(phi + places, values, mask=inside[:, None] & (columns < WIDTH)[None])
    tl.store(scales + bh * q_len + rows, scale, mask=inside)


@triton.jit
def favor_logs(
    x, high, low, rows, inside, x_t, x_d, f, head_dim, num_features,
    SPLIT: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, ND: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """``w_i x'`` of tile ``f`` of the features; -inf beyond their number."""
    features = f * BF + tl.arange(0, BF)
    real = features < num_features
    logs = tl.zeros([T, BF], tl.float32)
    for d in tl.static_range(ND):
        tokens = load_tile(x, rows, inside, x_t, d * BD, x_d, head_dim, BD)
        weights = load_tile(high, features, real, head_dim, d * BD, 1, head_dim, BD)
        if SPLIT:  # the tokens are bfloat16, and two bfloat16 hold 16 bits of a weight
            rest = load_tile(low, features, real, head_dim, d * BD, 1, head_dim, BD)
            logs = tl.dot(tokens, tl.trans(rest), logs)
            logs = tl.dot(tokens, tl.trans(weights), logs)
        else:
            tokens = tokens.to(tl.float32)
            logs = tl.dot(tokens, tl.trans(weights), logs, input_precision="tf32x3")
    return tl.where(real[None], logs, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def favor_features(
    x, high, low, phi, scales, x_b, x_h, x_t, x_d,
    heads, q_len, count, head_dim, num_features, scaling,
    SPLIT: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, ND: tl.constexpr,
    BF: tl.constexpr, NF: tl.constexpr,
):  # fmt: skip
    """``exp(w_i x' - |x'|^2 / 2)`` over the token's largest. Grid: tiles of tokens, heads."""
    bh = (tl.program_id(0) // count).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = tl.program_id(0) % count * T + tl.arange(0, T)
    inside = rows < q_len
    x += b * x_b + h * x_h
    squares = tl.zeros([T], tl.float32)
    for d in tl.static_range(ND):
        tokens = load_tile(x, rows, inside, x_t, d * BD, x_d, head_dim, BD).to(tl.float32)
        squares += tl.sum(tokens * tokens, 1)
    largest = tl.full([T], float("-inf"), tl.float32)
    for f in tl.range(NF, num_stages=1):
        logs = favor_logs(
            x, high, low, rows, inside, x_t, x_d, f, head_dim, num_features, SPLIT, T, BD, ND, BF
        )
        largest = tl.maximum(largest, tl.max(logs, 1))
    for f in tl.range(NF, num_stages=1):  # once more: what would be kept are megabytes
        logs = favor_logs(
            x, high, low, rows, inside, x_t, x_d, f, head_dim, num_features, SPLIT, T, BD, ND, BF
        )
        values = tl.exp(tl.maximum(logs - largest[:, None], -64.0))
        values = tl.where(logs > float("-inf"), values, 0.0).to(phi.dtype.element_ty)
        columns = f * BF + tl.arange(0, BF)
        places = (bh * q_len + rows)[:, None] * (NF * BF) + columns[None]
        tl.store(phi + places, values, mask=inside[:, None])
    tl.store(scales + bh * q_len + rows, largest - squares * scaling / 2, mask=inside)


def make_features(
    feature_map: FeatureMap, x: Tensor, scaling: float, width: int, dtype: torch.dtype
) -> Features:
    """The features of ``x``.

    Args:
        feature_map: The map.
        x: ``[batch, heads, tokens, head_dim]``, any strides.
        scaling: Factor on the scores that favor approximates.
        width: Columns to make, at least the map's number of features; a multiple of 64, or a power
            of two below.
        dtype: bfloat16 (from bfloat16 only) or float32.
    """
    batch, heads, length, head_dim = x.shape
    values = torch.empty(batch, heads, length, width, dtype=dtype, device=x.device)
    scales = torch.empty(batch, heads, length, dtype=torch.float32, device=x.device)
    if isinstance(feature_map, EluFeatures):
        block = triton.next_power_of_2(width)
        tile = 4096 // block
        count = triton.cdiv(length, tile)
        elu_features[(count * batch * heads,)](
            x, values, scales, *x.stride(), heads, length, count, head_dim,
            T=tile, WIDTH=width, BLOCK=block, num_warps=4,
        )  # fmt: skip
        return Features(values, scales)
    weights = _weights(feature_map, head_dim, scaling, x.device)
    high, low = weights, weights
    split = dtype == torch.bfloat16
    if split:
        high = weights.bfloat16()
        low = (weights - high.float()).bfloat16()
    columns = min(128 if split else 64, max(16, triton.next_power_of_2(head_dim)))
    count = triton.cdiv(length, _FAVOR_TILE)
    favor_features[(count * batch * heads,)](
        x, high, low, values, scales, *x.stride(),
        heads, length, count, head_dim, weights.shape[0], scaling,
        SPLIT=split, T=_FAVOR_TILE, BD=columns, ND=triton.cdiv(head_dim, columns),
        BF=min(64, width), NF=triton.cdiv(width, 64), num_warps=4, num_stages=1,
    )  # fmt: skip
    return Features(values, scales)


def favor_backward(
    feature_map: FavorFeatures, x: Tensor, log_grad: Tensor, scaling: float
) -> Tensor:
    """The gradient of ``x``, from that of its features' logarithms, ``[..., width]``."""
    weights = _weights(feature_map, x.shape[-1], scaling, x.device).to(log_grad.dtype)
    grad = torch.empty_like(x)
    total = log_grad.sum(-1, keepdim=True, dtype=torch.float32) * scaling
    with torch.autocast(x.device.type, enabled=False):
        grad.copy_(log_grad[..., : weights.shape[0]] @ weights)
    return grad.sub_(total * x)


def _weights(
    feature_map: FavorFeatures, head_dim: int, scaling: float, device: torch.device
) -> Tensor:
    weights = feature_map.projection(head_dim, device, torch.float32)
    return weights * feature_map.root(scaling)
