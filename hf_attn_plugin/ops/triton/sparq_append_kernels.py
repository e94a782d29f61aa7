"""Kernels that store one token per sequence in SparQ's cache and keep its sums of values."""

# mypy: disallow-untyped-defs=False
# ruff: noqa: N803, N806, SIM102 - upper case marks what is known when a kernel is compiled, and
# conditions on it stay statements of their own

import triton
import triton.language as tl

_STRIDES = [
    "key_b", "key_h", "value_b", "value_h", "keys_b", "keys_h", "keys_n",
    "values_b", "values_h", "values_n", "column_b", "column_h", "column_d",
    "kv_heads", "groups", "room", "position", "place",
]  # fmt: skip


@triton.jit
def _round(x):
    """The nearest integer, of two the even one; exact below 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _code(x, low, scale, LEVELS: tl.constexpr):
    """An element as a number of steps above the smallest one of its group."""
    steps = _round(tl.div_rn(x - low[:, None], tl.broadcast_to(scale[:, None], x.shape)))
    return tl.minimum(tl.maximum(steps, 0.0), LEVELS * 1.0).to(tl.uint8)


@triton.jit(
    do_not_specialize=_STRIDES,
    do_not_specialize_on_alignment=["key", "value", "length", "tail_at"],
)
def append_kernel(
    key, value, keys, values, column, codes, scale, offset, tail_at, length,
    key_b: tl.int64, key_h: tl.int64, value_b: tl.int64, value_h: tl.int64,
    keys_b: tl.int64, keys_h: tl.int64, keys_n: tl.int64,
    values_b: tl.int64, values_h: tl.int64, values_n: tl.int64,
    column_b: tl.int64, column_h: tl.int64, column_d: tl.int64,
    kv_heads: tl.int32, groups: tl.int64, room: tl.int64, position: tl.int64, place: tl.int64,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One token. Grid: batch x KV heads.

    KIND 0 stores keys and values, 1 the key in a column too; 2 in the column of a tail, which is
    quantised when it is full, as `hf_attn_plugin.ops.sparq.key_copy.quantize` does. A cache without
    room for the token gets NaN as its last value, seen as soon as a step attends to it (the local
    window does): the memory after it is somebody else's, and a kernel cannot raise an error.
    """
    bh = tl.program_id(0)
    b, h = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    if length is not None:
        position = tl.load(length).to(tl.int64) - 1
        place = position
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k = tl.load(key + b * key_b + h * key_h + d, mask=d < HEAD_DIM, other=0.0)
    v = tl.load(value + b * value_b + h * value_h + e, mask=e < VALUE_DIM, other=0.0)
    fits = position < room
    row = (d < HEAD_DIM) & fits
    tl.store(keys + b * keys_b + h * keys_h + position * keys_n + d, k, mask=row)
    at_value = b * values_b + h * values_h + tl.minimum(position, room - 1) * values_n
    tl.store(values + at_value + e, tl.where(fits, v, float("nan")), mask=e < VALUE_DIM)
    if KIND > 0:
        if KIND == 2:
            place = position % GROUP
        rows = column + b * column_b + h * column_h + d * column_d
        tl.store(rows + place, k, mask=row)
    if KIND == 2:
        if (bh == 0) & fits:
            tl.store(tail_at, (position + 1) // GROUP * GROUP)
        if (place == GROUP - 1) & fits:
            HALF: tl.constexpr = GROUP // 2
            BYTES: tl.constexpr = GROUP * BITS // 8
            LEVELS: tl.constexpr = 2**BITS - 1
            t = tl.arange(0, HALF)
            inside = (d < HEAD_DIM)[:, None] & (t >= 0)[None]
            first = tl.load(rows[:, None] + t, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(rows[:, None] + HALF + t, mask=inside, other=0.0).to(tl.float32)
            # This token's column may not have reached memory for the threads that load it here.
            second = tl.where((t == HALF - 1)[None], k.to(tl.float32)[:, None], second)
            low = tl.minimum(tl.min(first, 1), tl.min(second, 1))
            high = tl.maximum(tl.max(first, 1), tl.max(second, 1))
            step = tl.div_rn(high - low, tl.full([BLOCK_D], LEVELS, tl.float32))
            stored = step.to(scale.dtype.element_ty)
            stored = tl.where(stored > 0, stored, 1.0).to(scale.dtype.element_ty)
            step = stored.to(tl.float32)
            at = ((bh.to(tl.int64) * HEAD_DIM + d) * groups) + position // GROUP
            tl.store(scale + at, stored, mask=d < HEAD_DIM)
            tl.store(offset + at, low.to(offset.dtype.element_ty), mask=d < HEAD_DIM)
            first, second = _code(first, low, step, LEVELS), _code(second, low, step, LEVELS)
            to = codes + at[:, None] * BYTES + t
            if BITS == 4:
                tl.store(to, first | (second << 4), mask=inside)
            else:
                tl.store(to, first, mask=inside)
                tl.store(to + HALF, second, mask=inside)


@triton.jit(
    do_not_specialize=[
        "values_b",
        "values_h",
        "values_n",
        "visible_b",
        "wanted_b",
        "room",
        "last",
    ],
    do_not_specialize_on_alignment=["seen", "visible", "wanted", "length", "counted"],
)
def add_value_kernel(
    values, total, seen, visible, wanted, length, counted,
    values_b: tl.int64, values_h: tl.int64, values_n: tl.int64,
    visible_b: tl.int64, wanted_b: tl.int64, room: tl.int64, last: tl.int64,
    KV_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sums of one batch row. Grid: batch."""
    b = tl.program_id(0).to(tl.int64)
    if length is not None:
        last = tl.minimum(tl.load(length).to(tl.int64), room)
    e = tl.arange(0, BLOCK_V)
    inside = e < VALUE_DIM
    if visible is not None:
        new = (tl.load(visible + b * visible_b + last - 1) != 0).to(tl.int64)
        goal = tl.load(wanted + b * wanted_b).to(tl.int64)
    else:
        new = tl.full([], 1, tl.int64)
        goal = last
    follows = tl.load(seen + b) + new == goal
    for h in range(KV_HEADS):
        sums = total + (b * KV_HEADS + h) * VALUE_DIM + e
        base = values + b * values_b + h * values_h
        if follows:
            added = tl.load(base + (last - 1) * values_n + e, mask=inside & (new != 0), other=0.0)
            tl.store(sums, tl.load(sums, mask=inside) + added.to(tl.float32), mask=inside)
        else:
            acc = tl.zeros([BLOCK_V], tl.float32)
            for start in range(0, last, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                kept = n < last
                if visible is not None:
                    kept = kept & (tl.load(visible + b * visible_b + n, mask=kept, other=0) != 0)
                tile = tl.load(
                    base + n[:, None] * values_n + e[None],
                    mask=kept[:, None] & inside[None], other=0.0,
                )  # fmt: skip
                acc += tl.sum(tile.to(tl.float32), 0)
            tl.store(sums, acc, mask=inside)
    # Every thread must have read the number before it is another one.
    tl.debug_barrier()
    tl.store(seen + b, goal)
    if counted is not None:
        if b == 0:
            tl.store(counted, last)


@triton.jit(
    do_not_specialize=["visible_b", "length", "window"],
    do_not_specialize_on_alignment=["visible", "stop", "starts"],
)
def window_start_kernel(
    visible, stop, starts, visible_b: tl.int64, length: tl.int64, window: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Walks back from the end until so many visible keys are passed. Grid: batch."""
    b = tl.program_id(0).to(tl.int64)
    end = length
    if stop is not None:
        end = tl.minimum(end, tl.load(stop).to(tl.int64))
    left = window
    start = end
    while (left > 0) & (end > 0):
        n = end - 1 - tl.arange(0, BLOCK)
        seen = (tl.load(visible + b * visible_b + n, mask=n >= 0, other=0) != 0).to(tl.int32)
        nth = tl.cumsum(seen, 0)
        last = tl.sum(tl.where((seen > 0) & (nth == left), n, 0), 0)
        found = tl.sum(seen, 0) >= left
        start = tl.where(found, last, 0)
        left -= tl.sum(seen, 0)
        end -= BLOCK
    tl.store(starts + b, start)
