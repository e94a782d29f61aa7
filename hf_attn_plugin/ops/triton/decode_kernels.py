"""Attention of a few queries over a long cache: split over the keys, then merged."""

# mypy: disallow-untyped-defs=False
# ruff: noqa: N803, SIM102, SIM108 - upper case marks what is known when a kernel is compiled, and
# conditions on it stay statements of their own

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Numbers that differ from call to call: a kernel compiled for one serves all.
_NUMBERS = [
    "stride_qb", "stride_qh", "stride_qn", "stride_qd",
    "stride_kb", "stride_kh", "stride_kn", "stride_kd",
    "stride_vb", "stride_vh", "stride_vn", "stride_vd",
    "stride_mb", "stride_mh", "stride_mq", "stride_mn",
    "stride_bb", "stride_cb", "stride_ob", "stride_sb",
    "kv_heads", "groups", "q_len", "kv_len", "splits", "row_tiles",
    "first", "back", "ahead", "near", "prefix", "global_rows", "dilation", "stride", "parts",
]  # fmt: skip


@triton.jit
def _tanh(x):
    """Hyperbolic tangent, exact to float32 for small arguments too."""
    small = x * x
    series = x * (1.0 - small * (1.0 / 3.0 - small * (2.0 / 15.0 - small * (17.0 / 315.0))))
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    value = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0, -value, value))


@triton.jit
def _visible(
    at, low, high, cols, near, prefix, row_global, dilation, stride,
    SPARSE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The pairs of a tile that attend, bool [rows, keys]."""
    seen = (cols[None, :] >= low[:, None]) & (cols[None, :] < high[:, None])
    if SPARSE:
        distance = at[:, None] - cols[None, :]
        kept = tl.abs(distance) < near
        if STEPS:
            kept = kept & (distance % dilation == 0)
            kept = kept | ((stride > 0) & (distance % tl.maximum(stride, 1) == 0))
        kept = kept | (cols < prefix)[None, :] | row_global[:, None]
        seen = seen & kept
    return seen


@triton.jit(
    do_not_specialize=_NUMBERS,
    do_not_specialize_on_alignment=["query", "mask", "blocks", "counts", "offset", "starts"],
)
def split_kernel(
    query, key, value, mask, blocks, counts, offset, starts, partial,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64, stride_qd: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64, stride_kd: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64, stride_vd: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mq: tl.int64, stride_mn: tl.int64,
    stride_bb, stride_cb, stride_ob, stride_sb,
    kv_heads, groups, q_len, kv_len, splits, row_tiles,
    first, back, ahead, near, prefix, global_rows, dilation, stride,
    parts: tl.int64, scaling, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    K_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
    MASK_ROWS: tl.constexpr, HAS_LIST: tl.constexpr, HAS_OFFSET: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    SPARSE: tl.constexpr, STEPS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One part of the keys, for one tile of the queries of one KV group.

    Strides of keys and values count K_UNIT and V_UNIT elements, which tells the compiler how they
    are aligned; a unit of 0 stands for any strides, the last dimension's included. The queries of a
    KV group are rows ``head in group * q_len + query``. MASK_ROWS is 0 without a mask, 1 where all
    rows share one, 2 where each has its own. ``partial`` receives the weighted values of every part
    (a split of a row), then the maximum of every part, in base 2, then the sum of every part.
    """
    program = tl.program_id(0)
    row_tile = program % row_tiles
    split = (program // row_tiles) % splits
    pair = program // row_tiles // splits
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    num_rows = groups * q_len
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    inside_rows = rows < num_rows
    q_index = rows % q_len
    head = kv_head * groups + rows // q_len

    # Which keys each row may see by position, and which keys any query of the call may see.
    if HAS_OFFSET:
        first += tl.load(offset + batch * stride_ob).to(tl.int32)
    last = first + q_len - 1
    at = first + q_index
    low = tl.maximum(at - back + 1, 0)
    high = tl.where(inside_rows, tl.minimum(at + ahead, kv_len), 0)
    row_global = (at >= 0) & (at < tl.minimum(global_rows, kv_len))
    begin = tl.maximum(first - back + 1, 0)
    if HAS_STARTS:
        begin = tl.maximum(begin, tl.load(starts + batch * stride_sb).to(tl.int32))
    end = tl.maximum(tl.minimum(last + ahead, kv_len), begin)
    near_begin, near_end, prefix_end = begin, end, begin
    if SPARSE:
        if (stride == 0) & ((first >= global_rows) | (last < 0)):
            near_begin = tl.minimum(tl.maximum(first - near + 1, begin), end)
            near_end = tl.maximum(tl.minimum(last + near, end), near_begin)
            near_end = tl.maximum(near_end, tl.minimum(prefix, end))
            prefix_end = tl.maximum(tl.minimum(prefix, near_begin), begin)
    prefix_blocks = tl.cdiv(prefix_end - begin, KEYS)
    total = prefix_blocks + tl.cdiv(near_end - near_begin, KEYS)
    if HAS_LIST:
        total = tl.load(counts + batch * stride_cb)
    from_block = (split.to(tl.int64) * total // splits).to(tl.int32)
    to_block = ((split + 1).to(tl.int64) * total // splits).to(tl.int32)

    dims = tl.arange(0, MAIN)
    v_dims = tl.arange(0, BLOCK_V)
    slots = tl.arange(0, KEYS)
    q_rows = query + batch * stride_qb + head * stride_qh + q_index * stride_qn
    q_ok = inside_rows[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_rows[:, None] + dims[None, :] * stride_qd, mask=q_ok, other=0.0)
    if TAIL > 0:
        tail_dims = MAIN + tl.arange(0, TAIL)
        tail_ok = inside_rows[:, None] & (tail_dims < HEAD_DIM)[None, :]
        q_tail = tl.load(q_rows[:, None] + tail_dims[None, :] * stride_qd, mask=tail_ok, other=0.0)

    if K_UNIT > 0:
        key += (batch * stride_kb + kv_head * stride_kh) * K_UNIT
        k_step = stride_kn * K_UNIT
        k_dims = dims[None, :]
    else:
        key += batch * stride_kb + kv_head * stride_kh
        k_step = stride_kn
        k_dims = dims[None, :] * stride_kd
    k_tile = slots[:, None] * k_step + k_dims
    if TAIL > 0:
        if K_UNIT > 0:
            k_tail_tile = slots[:, None] * k_step + tail_dims[None, :]
        else:
            k_tail_tile = slots[:, None] * k_step + tail_dims[None, :] * stride_kd
    if V_UNIT > 0:
        value += (batch * stride_vb + kv_head * stride_vh) * V_UNIT
        v_step = stride_vn * V_UNIT
        v_tile = slots[:, None] * v_step + v_dims[None, :]
    else:
        value += batch * stride_vb + kv_head * stride_vh
        v_step = stride_vn
        v_tile = slots[:, None] * v_step + v_dims[None, :] * stride_vd
    if MASK_ROWS == 1:
        mask += batch * stride_mb
    if MASK_ROWS == 2:
        mask_rows = mask + batch * stride_mb + head * stride_mh + q_index * stride_mq

    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for index in range(from_block, to_block):
        stop = near_end
        if HAS_LIST:
            start = tl.load(blocks + batch * stride_bb + index) * KEYS
            stop = kv_len
        else:
            start = near_begin + (index - prefix_blocks) * KEYS
            if SPARSE:
                in_prefix = index < prefix_blocks
                start = tl.where(in_prefix, begin + index * KEYS, start)
                stop = tl.where(in_prefix, prefix_end, near_end)
        cols = start + slots
        inside = cols < stop
        k_at = key + start.to(tl.int64) * k_step
        if MAIN > HEAD_DIM:
            k_ok = inside[:, None] & (dims < HEAD_DIM)[None, :]
        else:
            k_ok = inside[:, None]
        k = tl.load(k_at + k_tile, mask=k_ok, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TAIL > 0:
            k_tail_ok = inside[:, None] & (tail_dims < HEAD_DIM)[None, :]
            k_tail = tl.load(k_at + k_tail_tile, mask=k_tail_ok, other=0.0)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
        if SOFTCAP:
            scores = _tanh(scores * (scaling / softcap)) * (softcap * LOG2E)
        else:
            scores = scores * (scaling * LOG2E)
        seen = _visible(
            at, low, tl.minimum(high, stop), cols, near, prefix, row_global, dilation, stride,
            SPARSE, STEPS,
        )  # fmt: skip
        if MASK_ROWS == 1:
            shared = tl.load(mask + cols * stride_mn, mask=inside, other=0)
            seen = seen & (shared != 0)[None, :]
        if MASK_ROWS == 2:
            mask_ok = inside_rows[:, None] & inside[None, :]
            pairs = tl.load(mask_rows[:, None] + cols[None, :] * stride_mn, mask=mask_ok, other=0)
            seen = seen & (pairs != 0)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Rows that have seen nothing yet are at -inf; 0 keeps -inf - -inf out.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        if BLOCK_V > VALUE_DIM:
            v_ok = inside[:, None] & (v_dims < VALUE_DIM)[None, :]
        else:
            v_ok = inside[:, None]
        v = tl.load(value + start.to(tl.int64) * v_step + v_tile, mask=v_ok, other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top

    if OVERLAP:  # the merging programs may be launched now; they wait for what is written below
        gdc_launch_dependents()
    place = (pair.to(tl.int64) * num_rows + rows) * splits + split
    tl.store(partial + parts * VALUE_DIM + place, top, mask=inside_rows)
    tl.store(partial + parts * (VALUE_DIM + 1) + place, weight_sum, mask=inside_rows)
    acc_ok = inside_rows[:, None] & (v_dims < VALUE_DIM)[None, :]
    tl.store(partial + place[:, None] * VALUE_DIM + v_dims[None, :], acc, mask=acc_ok)


@triton.jit(
    do_not_specialize=["heads", "q_len", "splits", "parts"],
    do_not_specialize_on_alignment=["sinks"],
)
def merge_kernel(
    partial, sinks, output, lse, heads, q_len, splits, parts: tl.int64,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr, HAS_SINKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The parts of one row, in their order; writes output ``[batch, q_len, heads, dim]``, lse."""
    row = tl.program_id(0).to(tl.int64)
    query, head, batch = row % q_len, (row // q_len) % heads, row // q_len // heads
    slots = tl.arange(0, PARTS)
    dims = tl.arange(0, BLOCK_V)
    top_in = partial + parts * VALUE_DIM + row * splits
    sum_in = top_in + parts
    acc_in = partial + row * splits * VALUE_DIM
    if OVERLAP:
        gdc_wait()
    tops = tl.full([PARTS], float("-inf"), tl.float32)
    for start in range(0, splits, PARTS):
        at = start + slots
        tops = tl.maximum(tops, tl.load(top_in + at, mask=at < splits, other=float("-inf")))
    top = tl.max(tops, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = base * 0.0
    if HAS_SINKS:
        total = tl.exp2(sink - base)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, splits, PARTS):
        at = start + slots
        inside = at < splits
        share = tl.exp2(tl.load(top_in + at, mask=inside, other=float("-inf")) - base)
        total += tl.sum(share * tl.load(sum_in + at, mask=inside, other=0.0), 0)
        ok = inside[:, None] & (dims < VALUE_DIM)[None, :]
        values = tl.load(acc_in + at[:, None] * VALUE_DIM + dims[None, :], mask=ok, other=0.0)
        acc += tl.sum(values * share[:, None], 0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    place = ((batch * q_len + query) * heads + head) * VALUE_DIM
    tl.store(output + place + dims, acc.to(output.dtype.element_ty), mask=dims < VALUE_DIM)
    seen = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), (base + tl.log2(seen)) * LN2))
