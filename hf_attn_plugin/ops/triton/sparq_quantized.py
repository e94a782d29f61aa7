"""SparQ's approximate scores from a component-major copy of the keys in 8 or 4 bits."""

# mypy: disallow-untyped-defs=False
# ruff: noqa: N803 - upper case marks what is known when a kernel is compiled

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from hf_attn_plugin.ops.triton.sparq_choice import choose_components, most_recent, visible_run
from hf_attn_plugin.ops.triton.sparq_scores import keep_scores

_TINY = tl.constexpr(1e-30)


@triton.jit
def _products(high, low, codes):
    """Weights of several heads, in two float16 parts, times codes."""
    # A byte's bits under the exponent of 1024 are the float16 1024 + byte: no slow conversion.
    x = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    return tl.dot(high, x, tl.dot(low, x))


@triton.jit
def _sums(weights, codes):
    """Weights of one head [rank, groups, 1] times codes [rank, groups, bytes], over the rank."""
    # Likewise of float32, where 2**23 is the number whose last bit counts ones.
    x = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return tl.sum(x * weights, 0)


@triton.jit
def _affine(
    scale_rows, offset_rows, block, blocks, used_slots, groups, numbers,
    MANY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Scales and offsets of a block's groups [rank, groups], of a single one [rank]."""
    if DOT:
        ok = used_slots & (block < blocks)
        s = tl.load(scale_rows + block, mask=ok, other=0.0)
        o = tl.load(offset_rows + block, mask=ok, other=0.0)
    else:
        group = block * MANY + numbers
        ok = used_slots[:, None] & (group < groups)[None, :]
        s = tl.load(scale_rows[:, None] + group[None, :], mask=ok, other=0.0)
        o = tl.load(offset_rows[:, None] + group[None, :], mask=ok, other=0.0)
    return s, o


QUANTIZED_NUMBERS = [
    "stride_qb", "stride_qh", "stride_qd", "stride_cb", "stride_ch", "stride_cr",
    "stride_sb", "stride_sh", "stride_sr", "stride_ob", "stride_oh", "stride_or",
    "stride_tb", "stride_th", "stride_tr", "tail_width", "full_groups",
    "stride_first", "stride_stop", "stride_visible", "stride_recent",
    "kv_heads", "length", "blocks", "splits", "local_window", "tops_at", "stats_at",
]  # fmt: skip


@triton.jit(
    do_not_specialize=QUANTIZED_NUMBERS,
    do_not_specialize_on_alignment=[
        "query", "scale", "offset", "tail", "tail_at", "first", "stop", "visible", "recent",
    ],
)  # fmt: skip
def quantized_score_kernel(
    query, codes, scale, offset, tail, tail_at, first, stop, visible, recent, scratch,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qd: tl.int64,
    stride_cb: tl.int64, stride_ch: tl.int64, stride_cr: tl.int64,
    stride_sb: tl.int64, stride_sh: tl.int64, stride_sr: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_or: tl.int64,
    stride_tb: tl.int64, stride_th: tl.int64, stride_tr: tl.int64,
    tail_width, full_groups,
    stride_first, stride_stop, stride_visible, stride_recent,
    kv_heads, length, blocks: tl.int64, splits, local_window, tops_at: tl.int64, stats_at: tl.int64,
    scaling, softcap, share,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr, PAD: tl.constexpr, SUB: tl.constexpr,
    UNIT: tl.constexpr, RANK_COVERAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_TAIL_AT: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_STOP: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`score_kernel` for a copy in codes: an element is ``offset + code * scale``.

    Scale and offset are those of a component and GROUP positions. The last positions are in
    ``tail`` in full, from ``tail_at`` or group ``full_groups`` on. With DOT, weight times scale is
    split into two float16 parts, so that the products with codes are those of float32, a group at a
    time; without (one query head) each thread adds up products itself, of BLOCK_N positions.
    """
    pair = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    batch = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64)
    begin, end = visible_run(
        first, stop, stride_first, stride_stop, batch, length, HAS_FIRST, HAS_STOP
    )
    recent = most_recent(recent, stride_recent, batch, begin, end, local_window, HAS_MASK)
    if HAS_MASK:
        visible += batch * stride_visible
    query += batch * stride_qb + head * GROUPS * stride_qh
    components, used, _, factor = choose_components(
        query, stride_qh, stride_qd, scaling, share, RANK, RANK_COVERAGE,
        HEAD_DIM, BLOCK_D, BLOCK_R, GROUPS, ROWS,
    )  # fmt: skip
    slots = tl.arange(0, BLOCK_R)
    rows = tl.arange(0, ROWS)
    used_slots = slots < used
    if DOT:
        q_at = query + rows[:, None] * stride_qh + components[None, :] * stride_qd
        q = tl.load(q_at, mask=(rows < GROUPS)[:, None] & used_slots[None, :], other=0.0)
    else:
        q = tl.load(query + components * stride_qd, mask=used_slots, other=0.0)
    q_exact = q.to(tl.float32)
    row = components.to(tl.int64)
    bytes_of_group: tl.constexpr = GROUP * BITS // 8
    many: tl.constexpr = BLOCK_N // GROUP
    bytes_of_block: tl.constexpr = bytes_of_group * many
    within = tl.arange(0, bytes_of_block)
    numbers = tl.arange(0, many)
    codes += (batch * stride_cb + head * stride_ch) * UNIT
    code_rows = codes + row[:, None] * (stride_cr * UNIT) + within[None, :]
    scale_rows = scale + batch * stride_sb + head * stride_sh + row * stride_sr
    offset_rows = offset + batch * stride_ob + head * stride_oh + row * stride_or
    tail_rows = tail + batch * stride_tb + head * stride_th + row * stride_tr

    tail_group = full_groups
    if HAS_TAIL_AT:
        tail_group = (tl.load(tail_at) // GROUP).to(tl.int32)
    block = begin // BLOCK_N
    count = tl.cdiv(end, BLOCK_N) - block
    from_block = block + (split.to(tl.int64) * count // splits).to(tl.int32)
    to_block = block + ((split + 1).to(tl.int64) * count // splits).to(tl.int32)
    coded = tl.minimum(to_block, tl.cdiv(tail_group, many))
    coded_end = tl.minimum(end, tail_group * GROUP)

    if DOT:
        # float16 has few exponents: weights are taken relative to the largest.
        next_groups = tl.arange(0, 16)
        largest = tl.zeros([BLOCK_R], tl.float32)
        for index in range(from_block, coded, 16):
            ok = used_slots[:, None] & (index + next_groups < coded)[None, :]
            at = index + next_groups[None, :]
            scales = tl.load(scale_rows[:, None] + at, mask=ok, other=0.0)
            largest = tl.maximum(largest, tl.max(scales.to(tl.float32), 1))
        unit = tl.maximum(tl.max(tl.max(tl.abs(q_exact), 1), 0) * tl.max(largest, 0), _TINY)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    tops = scratch + tops_at * 32
    padded = blocks * PAD
    # Too narrow for asynchronous copies, scales and offsets are asked for a block ahead.
    next_s, next_o = _affine(
        scale_rows, offset_rows, from_block, coded, used_slots, tail_group, numbers, many, DOT
    )
    for index in tl.range(from_block, coded, num_stages=STAGES):
        start = index * BLOCK_N
        s, o = next_s.to(tl.float32), next_o.to(tl.float32)
        next_s, next_o = _affine(
            scale_rows, offset_rows, index + 1, coded, used_slots, tail_group, numbers, many, DOT
        )
        if DOT:
            c = tl.load(code_rows + index * bytes_of_block, mask=used_slots[:, None], other=0)
            weights = q_exact * s[None, :] / unit
            high = weights.to(tl.float16)
            low = (weights - high.to(tl.float32)).to(tl.float16)
            base = (tl.sum(q_exact * o[None, :], 1) * factor)[:, None]
            step = (factor * unit)[:, None]
            if BITS == 8:
                scores = _products(high, low, c) * step + base
            else:
                first_half = _products(high, low, c & 15) * step + base
                both = tl.join(first_half, _products(high, low, c >> 4) * step + base)
                scores = tl.reshape(tl.permute(both, (0, 2, 1)), [ROWS, BLOCK_N])
        else:
            ok = used_slots[:, None] & (index * bytes_of_block + within
                                        < tail_group * bytes_of_group)[None, :]  # fmt: skip
            c = tl.load(code_rows + index * bytes_of_block, mask=ok, other=0)
            base = tl.sum(o * q_exact[:, None], 0)[:, None]
            weights = (s * q_exact[:, None])[:, :, None]
            c = tl.reshape(c, [BLOCK_R, many, bytes_of_group])
            if BITS == 8:
                sums = _sums(weights, c) + base
            else:
                both = tl.join(_sums(weights, c & 15) + base, _sums(weights, c >> 4) + base)
                sums = tl.permute(both, (0, 2, 1))
            scores = tl.reshape(sums, [1, BLOCK_N]) * factor[:, None]
        top, total = keep_scores(
            scores, start, begin, coded_end, recent, visible, top, total, scratch, tops, pair,
            padded, softcap, SOFTCAP, HAS_MASK, GROUPS, ROWS, BLOCK_N, SUB,
        )  # fmt: skip
    start = tail_group * GROUP
    if (from_block <= tail_group // many) & (tail_group // many < to_block) & (start < end):
        # It lies in a block that was written above.
        tl.debug_barrier()
        last = tl.arange(0, GROUP)
        ok = used_slots[:, None] & ((last < tail_width) & (start + last < end))[None, :]
        k = tl.load(tail_rows[:, None] + last[None, :], mask=ok, other=0.0)
        if DOT:
            scores = tl.dot(q, k, input_precision=PRECISION)
        else:
            scores = tl.sum(k.to(tl.float32) * q_exact[:, None], 0)[None, :]
        top, total = keep_scores(
            scores * factor[:, None], start, begin, end, recent,
            visible, top, total, scratch, tops, pair, padded, softcap, SOFTCAP, HAS_MASK,
            GROUPS, ROWS, GROUP, SUB,
        )  # fmt: skip
    if OVERLAP:  # the next kernel may be launched now; it waits for what is written below
        gdc_launch_dependents()
    place = stats_at * 32 + (pair.to(tl.int64) * GROUPS + rows) * 2 * splits + split
    tl.store(scratch + place, top, mask=rows < GROUPS)
    tl.store(scratch + place + splits, total, mask=rows < GROUPS)
