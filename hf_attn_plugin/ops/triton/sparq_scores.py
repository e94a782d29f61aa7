"""SparQ's approximate scores: a few components of all keys, and their sum over a group of heads.

`score_kernel` reads the components, `sum_kernel` adds up what the query heads of a group make of
them. They leave in scratch memory every score, the largest of each run of SUB positions, by which
most scores need not be read again, and what each head's softmax divides by. Nothing is added
atomically: equal inputs give equal bits.
"""

# mypy: disallow-untyped-defs=False
# ruff: noqa: N803 - upper case marks what is known when a kernel is compiled

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_attn_plugin.ops.triton.decode_kernels import LOG2E, _tanh
from hf_attn_plugin.ops.triton.sparq_choice import (
    choose_components,
    hidden_or_forced,
    log_sum_exp,
    merge_parts,
    most_recent,
    visible_run,
)


@triton.jit
def keep_scores(
    scores, start, begin, end, recent, visible, top, total, logits, tops, pair, padded, softcap,
    SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Stores scores [ROWS, BLOCK_N], natural, in base 2; goes on with their maximum and sum."""
    if SOFTCAP:
        scores = _tanh(scores / softcap) * softcap
    scores = scores * LOG2E
    cols = start + tl.arange(0, BLOCK_N)
    seen = (cols >= begin) & (cols < end)
    if HAS_MASK:
        seen = seen & (tl.load(visible + cols, mask=seen, other=0) != 0)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    rows = tl.arange(0, ROWS)
    at = (pair.to(tl.int64) * GROUPS + rows) * padded
    tl.store(logits + at[:, None] + cols[None, :], scores, mask=(rows < GROUPS)[:, None])
    if GROUPS == 1:
        others = hidden_or_forced(
            scores, cols[None, :], seen[None, :], recent, HAS_MASK, float("-inf")
        )
        largest = tl.max(tl.reshape(others, [ROWS, BLOCK_N // SUB, SUB]), 2)
        place = start // SUB + tl.arange(0, BLOCK_N // SUB)
        place += pair.to(tl.int64) * (padded // SUB)
        tl.store(tops + place[None, :] + rows[:, None] * 0, largest, mask=(rows < 1)[:, None])
    new_top = tl.maximum(top, tl.max(scores, 1))
    # Heads that have seen nothing yet are at -inf; 0 keeps -inf - -inf out.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
    return new_top, total


@triton.jit
def score_part(
    query, key, scratch, tops, visible, pair, batch, head, part, parts, begin, end, recent,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kr, padded,
    scaling, softcap, share,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SUB: tl.constexpr,
    UNIT: tl.constexpr, COPY: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    RANK_COVERAGE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Approximate scores of one of ``parts`` of a KV head's keys; their maximum and sum, [ROWS].

    With COPY ``key`` is the component-major copy, stride_kr a component's, and each component one
    run in memory; else it is the keys, stride_kr a position's. Without DOT
    (one query head) each thread adds up products itself; STAGES blocks are on their way at a time.
    """
    query += batch * stride_qb + head * GROUPS * stride_qh
    components, used, q, factor = choose_components(
        query, stride_qh, stride_qd, scaling, share, RANK, RANK_COVERAGE,
        HEAD_DIM, BLOCK_D, BLOCK_R, GROUPS, ROWS,
    )  # fmt: skip
    key += (batch * stride_kb + head * stride_kh) * UNIT
    slots = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, ROWS)
    offsets = tl.arange(0, BLOCK_N)
    step = stride_kr * UNIT
    if COPY:
        used_slots = slots < used
        if DOT:
            q_at = query + rows[:, None] * stride_qh + components[None, :] * stride_qd
            q = tl.load(q_at, mask=(rows < GROUPS)[:, None] & used_slots[None, :], other=0.0)
        else:
            one = tl.load(query + components * stride_qd, mask=used_slots, other=0.0)
            one = one.to(tl.float32)[:, None]
        key_rows = key + components.to(tl.int64)[:, None] * step
        # Whole units are read: a mask that ends within one would undo the wide loads.
        limit = tl.cdiv(end, UNIT) * UNIT

    block = begin // BLOCK_N
    count = tl.cdiv(end, BLOCK_N) - block
    from_block = block + (part.to(tl.int64) * count // parts).to(tl.int32)
    to_block = block + ((part + 1).to(tl.int64) * count // parts).to(tl.int32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for index in tl.range(from_block, to_block, num_stages=STAGES):
        start = index * BLOCK_N
        cols = start + offsets
        if COPY:
            k_ok = used_slots[:, None] & (cols < limit)[None, :]
            k = tl.load(key_rows + cols[None, :], mask=k_ok, other=0.0)
            if DOT:
                scores = tl.dot(q, k, input_precision=PRECISION)
            else:
                scores = tl.sum(k.to(tl.float32) * one, 0)[None, :]
        else:
            k_ok = (cols < end)[:, None]
            if BLOCK_D > HEAD_DIM:
                k_ok = k_ok & (dims < HEAD_DIM)[None, :]
            k = tl.load(key + start.to(tl.int64) * step + offsets[:, None] * step + dims[None, :],
                        mask=k_ok, other=0.0)  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        top, total = keep_scores(
            scores * factor[:, None], start, begin, end, recent, visible, top, total, scratch, tops,
            pair, padded, softcap, SOFTCAP, HAS_MASK, GROUPS, ROWS, BLOCK_N, SUB,
        )  # fmt: skip
    return top, total


SCORE_NUMBERS = [
    "stride_qb", "stride_qh", "stride_qd", "stride_kb", "stride_kh", "stride_kr",
    "stride_first", "stride_stop", "stride_visible", "stride_recent", "kv_heads", "length",
    "blocks", "splits", "local_window", "tops_at", "stats_at",
]  # fmt: skip


@triton.jit(
    do_not_specialize=SCORE_NUMBERS,
    do_not_specialize_on_alignment=["query", "first", "stop", "visible", "recent"],
)
def score_kernel(
    query, key, first, stop, visible, recent, scratch,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qd: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kr: tl.int64,
    stride_first, stride_stop, stride_visible, stride_recent,
    kv_heads, length, blocks: tl.int64, splits, local_window, tops_at: tl.int64, stats_at: tl.int64,
    scaling, softcap, share,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr,
    SUB: tl.constexpr, UNIT: tl.constexpr, COPY: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr, RANK_COVERAGE: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_STOP: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`score_part`, for each of ``splits`` parts of each KV head's keys.

    Strides of keys count UNIT elements, which tells the compiler how they are aligned. ``blocks``
    counts PAD positions. ``scratch`` receives the scores, and at ``tops_at`` and ``stats_at`` (in
    units of 32 elements) the largest of each SUB positions, and each part's maximum and sum.
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
    top, total = score_part(
        query, key, scratch, scratch + tops_at * 32, visible, pair, batch, head, split, splits,
        begin, end, recent, stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kr,
        blocks * PAD, scaling, softcap, share, HEAD_DIM, BLOCK_D, GROUPS, ROWS, RANK, BLOCK_R,
        BLOCK_N, SUB, UNIT, COPY, DOT, STAGES, RANK_COVERAGE, SOFTCAP, HAS_MASK,
        PRECISION,
    )  # fmt: skip
    if OVERLAP:  # the next kernel may be launched now; it waits for what is written below
        gdc_launch_dependents()
    rows = tl.arange(0, ROWS)
    place = stats_at * 32 + (pair.to(tl.int64) * GROUPS + rows) * 2 * splits + split
    tl.store(scratch + place, top, mask=rows < GROUPS)
    tl.store(scratch + place + splits, total, mask=rows < GROUPS)


SUM_NUMBERS = [
    "stride_first", "stride_stop", "stride_recent", "kv_heads", "length", "blocks", "splits",
    "local_window", "ranked_at", "tops_at", "stats_at",
]  # fmt: skip


@triton.jit(
    do_not_specialize=SUM_NUMBERS,
    do_not_specialize_on_alignment=["first", "stop", "recent", "sinks"],
)
def sum_kernel(
    first, stop, recent, sinks, scratch, stride_first, stride_stop, stride_recent,
    kv_heads, length, blocks: tl.int64, splits, local_window,
    ranked_at: tl.int64, tops_at: tl.int64, stats_at: tl.int64,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
    PAD: tl.constexpr, SUB: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_STOP: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SINKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Softmax weights of BLOCK_N positions summed over a group, and the largest of each SUB."""
    padded = blocks * PAD
    parts = (padded // BLOCK_N).to(tl.int32)
    pair = tl.program_id(0) // parts
    start = tl.program_id(0) % parts * BLOCK_N
    batch, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    begin, end = visible_run(
        first, stop, stride_first, stride_stop, batch, length, HAS_FIRST, HAS_STOP
    )
    recent = most_recent(recent, stride_recent, batch, begin, end, local_window, HAS_MASK)
    if OVERLAP:
        gdc_wait()
    if (start < end) & (start + BLOCK_N > begin):
        rows = tl.arange(0, ROWS)
        cols = start + tl.arange(0, BLOCK_N)
        at = (pair.to(tl.int64) * GROUPS + rows)[:, None] * padded + cols[None, :]
        # All of the block: what is outside of the visible run was never written, or is -inf.
        scores = tl.load(scratch + at, mask=(rows < GROUPS)[:, None], other=float("-inf"))
        top, total = merge_parts(scratch + stats_at * 32, pair, splits, GROUPS, ROWS, SPLITS)
        lse = log_sum_exp(top, total, sinks, head, HAS_SINKS, GROUPS, ROWS)
        weights = tl.sum(tl.exp2(scores - lse[:, None]), 0)
        seen = (cols >= begin) & (cols < end)
        if HAS_MASK:  # a visible key has a score, whatever its weight underflows to
            seen = seen & (tl.max(scores, 0) > float("-inf"))
        ranked = scratch + ranked_at * 32 + pair.to(tl.int64) * padded
        tl.store(ranked + cols, tl.where(seen, weights, -1.0))
        others = hidden_or_forced(weights, cols, seen, recent, HAS_MASK, -1.0)
        largest = tl.max(tl.reshape(others, [BLOCK_N // SUB, SUB]), 1)
        tops = scratch + tops_at * 32 + pair.to(tl.int64) * (padded // SUB) + start // SUB
        tl.store(tops + tl.arange(0, BLOCK_N // SUB), largest)
    if OVERLAP:
        gdc_launch_dependents()
