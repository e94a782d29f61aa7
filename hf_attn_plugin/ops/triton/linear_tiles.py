"""What linear attention's kernels share: products, tiles, features, documents.

Keys and queries share one axis of positions: query i sits at position ``i + lead``, and a chunk is
``CHUNK`` positions. Tiles along tokens are ``T`` long; along features ``BF`` wide and ``NF`` many,
along values ``BV`` wide and ``NV`` many. Beyond the real widths features and states are 0.
"""

# mypy: disallow-untyped-defs=False
# ruff: noqa: N803 - upper case marks what is known when a kernel is compiled

from __future__ import annotations

import triton
import triton.language as tl

# As in ops.torch.linear_features: no feature is below exp(-64) of its token's largest.
FLOOR = tl.constexpr(1.6038108905486378e-28)
# A length, an offset or a number of chunks must not make a new kernel when it changes.
LENGTHS = ("q_len", "kv_len", "lead", "first", "chunks", "count", "steps", "start",
           "valid_b", "q_docs_b", "kv_docs_b")  # fmt: skip


@triton.jit
def to_tf32(x):
    """Rounded to the 10 bits of mantissa that TF32 multiplies; the hardware would truncate."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, MODE: tl.constexpr):
    """``acc + a @ b`` summed in float32, with operands as precise as the inputs."""
    if MODE == "bf16":
        result = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif MODE == "tf32":
        result = tl.dot(to_tf32(a), to_tf32(b), acc, input_precision="tf32")
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    return result


@triton.jit
def load_tile(ptr, rows, inside, row_stride, start, column_stride, width, SIZE: tl.constexpr):
    """``[rows, SIZE]`` from column ``start`` on; 0 outside."""
    columns = start + tl.arange(0, SIZE)
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None] * column_stride
    return tl.load(ptr + offsets, mask=inside[:, None] & (columns < width)[None], other=0.0)


@triton.jit
def store_tile(
    ptr, tile, rows, inside, row_stride, start, column_stride, width, SIZE: tl.constexpr
):
    """What `load_tile` would load."""
    columns = start + tl.arange(0, SIZE)
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None] * column_stride
    tile = tile.to(ptr.dtype.element_ty)
    tl.store(ptr + offsets, tile, mask=inside[:, None] & (columns < width)[None])


@triton.jit
def load_state(ptr, f, d, BF: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr):
    """Tile ``[BF, BV]`` of the state ``[NF * BF, NV * BV]`` at ``ptr``."""
    rows = f * BF + tl.arange(0, BF)
    columns = d * BV + tl.arange(0, BV)
    return tl.load(ptr + rows[:, None] * (NV * BV) + columns[None])


@triton.jit
def load_features(ptr, base, rows, inside, f, BF: tl.constexpr, NF: tl.constexpr):
    """``[rows, BF]``, tile ``f`` of the features that start with row ``base``; 0 outside."""
    columns = f * BF + tl.arange(0, BF)
    offsets = (base + rows)[:, None] * (NF * BF) + columns[None]
    return tl.load(ptr + offsets, mask=inside[:, None], other=0.0)


@triton.jit
def through_features(grad, phi, scales, ELU: tl.constexpr):
    """From the gradient of features to that of the tokens; if not ELU, of the logarithms."""
    phi = phi.to(tl.float32)
    # A feature at the floor is a constant (1.01: it may have been rounded when it was stored).
    slope = tl.where(phi > 1.01 * FLOOR, phi, 0.0)
    if ELU:  # it is 1 + x for positive x, which is where it is above 1
        slope = tl.minimum(slope, tl.exp(-scales)[:, None])
    return grad * slope


@triton.jit
def finite(x):
    """The exponent to subtract; -inf says that nothing was seen, and -inf - -inf would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def document_after(kv_docs, chunk, kv_len, CHUNK: tl.constexpr):
    """The document of a chunk's last key, whose state it leaves; of the first key for chunk -1."""
    return tl.load(kv_docs + tl.maximum(tl.minimum((chunk + 1) * CHUNK, kv_len) - 1, 0))
