"""SparQ's choice of keys and attention to them, by themselves and with the scores in one kernel."""

# mypy: disallow-untyped-defs=False
# ruff: noqa: N803 - upper case marks what is known when a kernel is compiled

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from hf_attn_plugin.ops.triton.decode_kernels import LOG2E, _tanh
from hf_attn_plugin.ops.triton.sparq_choice import (
    LOWEST,
    log_sum_exp,
    merge_parts,
    most_recent,
    ordered,
    places_of,
    threshold_of,
    visible_run,
)
from hf_attn_plugin.ops.triton.sparq_scores import score_part


@triton.jit
def keep_until_covered(
    chosen, ranks, at, masses, recent, target, used, slots, SLOTS: tl.constexpr
):  # fmt: skip
    """Of the keys ``chosen``, in order, those needed to reach ``target``: see `ops.choice`.

    A key is needed if all that are ranked before it have less mass. All that are ranked above a
    level are, and of those at the level the first: the level is found by halving. Overwrites
    ``chosen`` [SLOTS], and returns how many are left.
    """
    forced = used & (at >= recent)
    keys = tl.where(used, ordered(tl.where(forced, float("inf"), ranks)), LOWEST)
    low = tl.min(tl.where(used, keys, 2147483647), 0).to(tl.int64)
    high = tl.max(keys, 0).to(tl.int64) + 1
    # The largest level that those not below it reach the target at; the lowest if none does.
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        enough = tl.sum(tl.where(keys >= middle.to(tl.int32), masses, 0.0), 0) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    level = low.to(tl.int32)
    above = used & (keys > level)
    equal = used & (keys == level)
    here = tl.where(equal, masses, 0.0)
    before = tl.sum(tl.where(above, masses, 0.0), 0) + tl.cumsum(here, 0) - here
    first = tl.min(tl.where(used & (keys == tl.max(keys, 0)), slots, SLOTS), 0)
    kept = forced | above | (equal & (before < target)) | (slots == first)
    kept = kept & used
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(chosen + place, at, mask=kept)
    return tl.sum(kept.to(tl.int32), 0)


@triton.jit
def load_query(
    query, batch, head, stride_qb, stride_qh, stride_qd, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The queries of a group, [ROWS, BLOCK_D]."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    query += batch * stride_qb + head * GROUPS * stride_qh
    inside = (rows < GROUPS)[:, None] & (dims < HEAD_DIM)[None, :]
    at = query + rows[:, None] * stride_qh + dims[None, :] * stride_qd
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def attend(
    q, key, value, value_sum, value_count, sinks, scratch, ranked, tops, lists, output, lse,
    pair, batch, head, begin, end, recent, padded,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_sb, stride_sh, stride_count, scaling, softcap, share,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    TOPS: tl.constexpr, CANDIDATES: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, MEAN: tl.constexpr, HAS_COUNT: tl.constexpr,
    COVERAGE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chooses the keys of one KV head and attends to them.

    The k-th largest of the largest scores of SUB positions each is no larger than the k-th largest
    score: so k such runs hold the k largest scores, and only they are looked at one by one.

    ``scratch`` holds the scores, ``ranked`` what keys are ranked by (the scores of one head, or the
    sums of a group's weights), ``tops`` its largest of each SUB positions. ``lists`` receives three
    lists of SLOTS numbers: the runs, the keys, and the keys' approximate mass.
    """
    candidates_end = recent
    if HAS_MASK:
        candidates_end = end
    window = end - candidates_end
    wanted = tl.minimum(TOP_K - window, candidates_end - begin)
    # What is no candidate is ranked as -inf by its score, -1 by a sum of weights.
    nothing: tl.constexpr = -1.0 if GROUPS > 1 else float("-inf")
    ranked += pair * padded
    masses = lists + pair * (3 * SLOTS) + 2 * SLOTS
    lists = (lists + pair * (3 * SLOTS)).to(tl.pointer_type(tl.int32))
    chosen = lists + SLOTS
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_V)
    chunk = tl.arange(0, CHUNK)
    key += (batch * stride_kb + head * stride_kh) * K_UNIT
    value += (batch * stride_vb + head * stride_vh) * V_UNIT
    logits = scratch + (pair * GROUPS + rows)[:, None] * padded

    if MEAN:  # loaded here, so that nothing waits for it in the end
        values_seen = end - begin
        if HAS_COUNT:
            values_seen = tl.load(value_count + batch * stride_count).to(tl.int32)
        sum_at = value_sum + batch * stride_sb + head * stride_sh + v_dims
        mean = tl.load(sum_at, mask=v_dims < VALUE_DIM, other=0.0)
        mean = mean / tl.maximum(values_seen, 1).to(tl.float32)
    runs = tl.arange(0, TOPS)
    first_run = begin // SUB
    tops += pair * (padded // SUB) + first_run
    ok = runs < tl.cdiv(candidates_end, SUB) - first_run
    largest = tl.load(tops + runs, mask=ok, other=0.0)
    if HAS_MASK:
        ok = ok & (largest > nothing)
    num_runs = tl.sum(ok.to(tl.int32), 0)
    keys = ordered(largest)
    low = tl.min(tl.where(ok, keys, 2147483647), 0)
    keys = tl.where(ok, keys, LOWEST)
    level = threshold_of(keys, low, tl.max(keys, 0), wanted, num_runs)
    taken, place = places_of(keys, level, wanted)
    tl.store(lists + place, first_run + runs, mask=taken)
    tl.debug_barrier()

    slots = tl.arange(0, CANDIDATES)
    filled = slots // SUB < tl.minimum(wanted, num_runs)
    at = tl.load(lists + slots // SUB, mask=filled, other=0) * SUB + slots % SUB
    filled = filled & (at >= begin) & (at < candidates_end)
    ranks = tl.load(ranked + at, mask=filled, other=0.0)
    if HAS_MASK:
        filled = filled & (ranks > nothing)
        ranks = tl.where(at >= recent, float("inf"), ranks)
    keys = ordered(ranks)
    keys = tl.where(filled, keys, LOWEST)
    number = tl.sum(filled.to(tl.int32), 0)
    wanted = tl.minimum(wanted, number)
    count = wanted + window
    if num_runs <= wanted:
        level = tl.min(tl.where(filled, keys, 2147483647), 0)
    level = threshold_of(keys, level, tl.max(keys, 0), wanted, number)
    taken, place = places_of(keys, level, wanted)
    tl.store(chosen + place, at, mask=taken)
    slots = tl.arange(0, SLOTS)
    tl.store(chosen + wanted + slots, candidates_end + slots, mask=slots < window)
    tl.debug_barrier()

    alpha = tl.zeros([ROWS], tl.float32)
    bound = tl.full([], SLOTS, tl.int32)
    if COVERAGE:
        for start in range(0, SLOTS, CHUNK):
            used = start + chunk < count
            spot = tl.load(chosen + start + chunk, mask=used, other=0)
            seen = (rows < GROUPS)[:, None] & used[None, :]
            scores = tl.load(logits + spot[None, :], mask=seen, other=float("-inf"))
            tl.store(masses + start + chunk, tl.sum(tl.exp2(scores - lse[:, None]), 0), mask=used)
        # What all visible keys have: all but the sinks' share.
        every = (rows < GROUPS).to(tl.float32)
        if HAS_SINKS:
            sink = tl.load(sinks + head * GROUPS + rows, mask=rows < GROUPS, other=0.0)
            every = tl.where(rows < GROUPS, 1.0 - tl.exp2(sink.to(tl.float32) * LOG2E - lse), 0.0)
        tl.debug_barrier()
        is_key = slots < count
        keys_at = tl.load(chosen + slots, mask=is_key, other=0)
        key_ranks = tl.load(ranked + keys_at, mask=is_key, other=0.0)
        mass = tl.load(masses + slots, mask=is_key, other=0.0)
        # All have read what is overwritten.
        tl.debug_barrier()
        target = share * tl.sum(every, 0)
        count = keep_until_covered(
            chosen, key_ranks, keys_at, mass, recent, target, is_key, slots, SLOTS
        )
        tl.debug_barrier()
        bound = count

    top = tl.full([ROWS], float("-inf"), tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head * GROUPS + rows, mask=rows < GROUPS, other=0.0)
        top = sink.to(tl.float32) * LOG2E
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for start in range(0, bound, CHUNK):
        slot = start + chunk
        used = slot < count
        spot = tl.load(chosen + slot, mask=used, other=0)
        k_at = key + spot.to(tl.int64)[:, None] * (stride_kn * K_UNIT) + dims[None, :]
        k = tl.load(k_at, mask=used[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        v_at = value + spot.to(tl.int64)[:, None] * (stride_vn * V_UNIT) + v_dims[None, :]
        v = tl.load(v_at, mask=used[:, None] & (v_dims < VALUE_DIM)[None, :], other=0.0)
        if MEAN:
            seen = (rows < GROUPS)[:, None] & used[None, :]
            approximate = tl.load(logits + spot[None, :], mask=seen, other=float("-inf"))
            alpha += tl.sum(tl.exp2(approximate - lse[:, None]), 1)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            scores = _tanh(scores * (scaling / softcap)) * (softcap * LOG2E)
        else:
            scores = scores * (scaling * LOG2E)
        scores = tl.where(used[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if MEAN:
        acc = acc * alpha[:, None] + (1.0 - alpha)[:, None] * mean[None, :]
    place = (pair * GROUPS + rows)[:, None] * VALUE_DIM + v_dims[None, :]
    out_ok = (rows < GROUPS)[:, None] & (v_dims < VALUE_DIM)[None, :]
    tl.store(output + place, acc.to(output.dtype.element_ty), mask=out_ok)


ATTEND_NUMBERS = [
    "stride_qb", "stride_qh", "stride_qd", "stride_kb", "stride_kh", "stride_kn",
    "stride_vb", "stride_vh", "stride_vn", "stride_sb", "stride_sh", "stride_count",
    "stride_first", "stride_stop", "stride_recent", "kv_heads", "length", "blocks", "splits",
    "local_window", "ranked_at", "tops_at", "stats_at", "lists_at",
]  # fmt: skip
UNALIGNED = ["query", "value_sum", "value_count", "first", "stop", "visible", "recent", "sinks"]


@triton.jit(
    do_not_specialize=ATTEND_NUMBERS,
    do_not_specialize_on_alignment=[name for name in UNALIGNED if name != "visible"],
)
def attend_kernel(
    query, key, value, value_sum, value_count, first, stop, recent, sinks, scratch, output,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qd: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_sb: tl.int64, stride_sh: tl.int64, stride_count,
    stride_first, stride_stop, stride_recent,
    kv_heads, length, blocks: tl.int64, splits, local_window,
    ranked_at: tl.int64, tops_at: tl.int64, stats_at: tl.int64, lists_at: tl.int64,
    scaling, softcap, share,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    TOPS: tl.constexpr, CANDIDATES: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, MEAN: tl.constexpr, HAS_COUNT: tl.constexpr,
    COVERAGE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr,
    SPLITS: tl.constexpr, PAD: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_STOP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """`attend` for each KV head, after `score_kernel` and, for groups, `sum_kernel`."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    begin, end = visible_run(
        first, stop, stride_first, stride_stop, batch, length, HAS_FIRST, HAS_STOP
    )
    recent = most_recent(recent, stride_recent, batch, begin, end, local_window, HAS_MASK)
    q = load_query(
        query, batch, head, stride_qb, stride_qh, stride_qd, HEAD_DIM, BLOCK_D, GROUPS, ROWS
    )
    if OVERLAP:
        gdc_wait()
    lse = tl.zeros([ROWS], tl.float32)
    if MEAN or COVERAGE:
        top, total = merge_parts(scratch + stats_at * 32, pair, splits, GROUPS, ROWS, SPLITS)
        lse = log_sum_exp(top, total, sinks, head, HAS_SINKS, GROUPS, ROWS)
    attend(
        q, key, value, value_sum, value_count, sinks, scratch, scratch + ranked_at * 32,
        scratch + tops_at * 32, scratch + lists_at * 32, output, lse, pair, batch, head,
        begin, end, recent, blocks * PAD, stride_kb, stride_kh, stride_kn,
        stride_vb, stride_vh, stride_vn, stride_sb, stride_sh, stride_count,
        scaling, softcap, share,
        HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, GROUPS, ROWS, TOP_K, SLOTS, TOPS, CANDIDATES,
        CHUNK, SUB, K_UNIT, V_UNIT, MEAN, HAS_COUNT, COVERAGE, SOFTCAP, HAS_MASK, HAS_SINKS,
        PRECISION,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *(name for name in ATTEND_NUMBERS if name not in ("splits", "stats_at", "ranked_at")),
        "stride_cb", "stride_ch", "stride_cr", "stride_visible",
    ],
    do_not_specialize_on_alignment=UNALIGNED,
)  # fmt: skip
def whole_kernel(
    query, source, key, value, value_sum, value_count, first, stop, visible, recent, sinks,
    scratch, output,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qd: tl.int64,
    stride_cb: tl.int64, stride_ch: tl.int64, stride_cr: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_sb: tl.int64, stride_sh: tl.int64, stride_count,
    stride_first, stride_stop, stride_visible, stride_recent,
    kv_heads, length, blocks: tl.int64, local_window, tops_at: tl.int64, lists_at: tl.int64,
    scaling, softcap, component_share, share,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    TOPS: tl.constexpr, CANDIDATES: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, MEAN: tl.constexpr, HAS_COUNT: tl.constexpr,
    COVERAGE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr,
    SCORE_ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr, COPY: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    RANK_COVERAGE: tl.constexpr,
    PAD: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_STOP: tl.constexpr,
):  # fmt: skip
    """The whole step of one KV head with one query head: scores, choice and attention.

    Where there are many KV heads: while some programs choose, others keep the memory busy.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    begin, end = visible_run(
        first, stop, stride_first, stride_stop, batch, length, HAS_FIRST, HAS_STOP
    )
    recent = most_recent(recent, stride_recent, batch, begin, end, local_window, HAS_MASK)
    if HAS_MASK:
        visible += batch * stride_visible
    padded = blocks * PAD
    part = tl.program_id(0) * 0
    top, total = score_part(
        query, source, scratch, scratch + tops_at * 32, visible, pair, batch, head, part, part + 1,
        begin, end, recent, stride_qb, stride_qh, stride_qd, stride_cb, stride_ch, stride_cr,
        padded, scaling, softcap, component_share, HEAD_DIM, BLOCK_D, GROUPS, SCORE_ROWS, RANK,
        BLOCK_R, BLOCK_N, SUB, UNIT, COPY, DOT, STAGES, RANK_COVERAGE, SOFTCAP, HAS_MASK, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()
    lse = log_sum_exp(top, total, sinks, head, HAS_SINKS, GROUPS, SCORE_ROWS)
    first_lse = tl.max(tl.where(tl.arange(0, SCORE_ROWS) < 1, lse, float("-inf")), 0)
    q = load_query(
        query, batch, head, stride_qb, stride_qh, stride_qd, HEAD_DIM, BLOCK_D, GROUPS, ROWS
    )
    attend(
        q, key, value, value_sum, value_count, sinks, scratch, scratch, scratch + tops_at * 32,
        scratch + lists_at * 32, output, tl.zeros([ROWS], tl.float32) + first_lse, pair, batch,
        head, begin, end, recent, padded, stride_kb, stride_kh, stride_kn,
        stride_vb, stride_vh, stride_vn, stride_sb, stride_sh, stride_count,
        scaling, softcap, share,
        HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_V, GROUPS, ROWS, TOP_K, SLOTS, TOPS, CANDIDATES,
        CHUNK, SUB, K_UNIT, V_UNIT, MEAN, HAS_COUNT, COVERAGE, SOFTCAP, HAS_MASK, HAS_SINKS,
        PRECISION,
    )  # fmt: skip
