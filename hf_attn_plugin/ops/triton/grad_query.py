"""The kernel of the queries' gradients, which also prepares what the keys' kernel reads."""

# mypy: ignore-errors
# ruff: noqa: F821, N803, N806 - Triton's types, constants of the compiler in upper case

import triton
import triton.language as tl

from hf_attn_plugin.ops.triton.forward import RUNTIME
from hf_attn_plugin.ops.triton.loads import (
    ALWAYS,
    LOG2E,
    NEVER,
    WHERE_NEEDED,
    add_weighted,
    blank,
    capped,
    full_range,
    load_keys,
    load_queries,
    load_rows,
    needs_mask,
    plus,
    products,
    row_starts,
    scaled,
    store_rows,
    store_slice,
    tokens_at,
    visited,
    work_item,
)
from hf_attn_plugin.ops.triton.masks import DENSE, RUNS, hide, token_facts

_RUNTIME = [*RUNTIME, "go_batch", "go_head", "go_token", "d_batch", "d_head", "d_token"]


@triton.jit
def grad_query_step(
    turn,
    acc,
    q,
    d_out,
    base,
    delta,
    key,
    value,
    k_strides,
    v_strides,
    batch,
    kv_head,
    entries,
    blocks,
    full,
    own,
    in_q,
    q_dense,
    kv_info,
    kv_order,
    kv_len,
    dense,
    mask_key,
    numbers,
    to_log2,
    cap_rate,
    TERMS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    TMA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKING: tl.constexpr,
):
    """The gradients (but for the scaling) after one more block of keys."""
    block = visited(entries, blocks, turn, (RUNS & TERMS) == 0)
    index = block * KEYS + tl.arange(0, KEYS)
    in_kv = index < kv_len
    token = tokens_at(kv_order, index, in_kv)
    k = load_keys(
        key, batch, kv_head, block, token, in_kv, k_strides,
        UNIT, HEAD_DIM, WIDTH, TAIL, KEYS, TMA,
    )  # fmt: skip
    v = load_keys(
        value, batch, kv_head, block, token, in_kv, v_strides,
        UNIT, VALUE_DIM, VALUE_WIDTH, VALUE_TAIL, KEYS, TMA,
    )  # fmt: skip
    score = capped(products(q, k, TAIL, PRECISION), cap_rate, SOFTCAP)
    d_weight = products(d_out, v, VALUE_TAIL, PRECISION) - delta[:, None]
    if SOFTCAP:
        d_weight = d_weight * (1.0 - score * score)
    masked = MASKING == ALWAYS
    if MASKING == WHERE_NEEDED:
        masked = needs_mask(full, turn)
    if masked:
        score = hide(
            score, own, in_q, q_dense, kv_info, index, in_kv, kv_len, token * mask_key, dense,
            numbers, True, TERMS,
        )  # fmt: skip
    weight = tl.exp2(score * to_log2 - base[:, None])
    return add_weighted(acc, weight * d_weight, k, TAIL, PRECISION)


@triton.jit(do_not_specialize=_RUNTIME)
def grad_query_kernel(
    query,
    key,
    key_tail,
    value,
    value_tail,
    output,
    lse,
    grad_output,
    grad_lse,
    grad_query,
    base_lse,
    delta,
    earlier,
    items,
    entries,
    q_info,
    kv_info,
    q_order,
    kv_order,
    dense,
    partial,
    q_batch: "i64",
    q_head: "i64",
    q_token: "i64",
    k_batch: "i64",
    k_head: "i64",
    k_token: "i64",
    v_batch: "i64",
    v_head: "i64",
    v_token: "i64",
    o_batch: "i64",
    o_head: "i64",
    o_token: "i64",
    go_batch: "i64",
    go_head: "i64",
    go_token: "i64",
    d_batch: "i64",
    d_head: "i64",
    d_token: "i64",
    mask_batch: "i64",
    mask_head: "i64",
    mask_query: "i64",
    mask_key: "i64",
    item_batch: "i32",
    q_info_batch: "i64",
    kv_info_batch: "i64",
    batch_packs: "i32",
    packs: "i32",
    group_packs: "i32",
    q_len: "i32",
    kv_len: "i32",
    lowest: "i32",
    band: "i32",
    reach: "i32",
    dilation: "i32",
    stride: "i32",
    residue: "i32",
    scaling: "fp32",
    to_log2: "fp32",
    cap_rate: "fp32",
    TERMS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    TMA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    TWO_LOOPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of queries over its blocks of keys, as in the forward kernel.

    Writes for every row ``delta``, the mean of d weight under the weights, and ``base_lse``, the
    log-sum-exp in units of log 2, +inf where a row sees nothing so that its weights are 0.
    ``earlier`` is None or the float32 gradients of a pass before this one.
    """
    ROWS: tl.constexpr = HEADS * TOKENS
    batch_pack = tl.program_id(0) % batch_packs
    batch = batch_pack // packs
    pack = batch_pack % packs
    block, slot, lead, bounds, blocks, full = work_item(
        items, batch, tl.program_id(0) // batch_packs, item_batch
    )
    begin, end = bounds
    row = tl.arange(0, ROWS)
    place = block * TOKENS + row % TOKENS
    in_q = place < q_len
    token = tokens_at(q_order, place, in_q)
    head = pack * HEADS + row // TOKENS
    q = load_queries(
        (query,), batch, pack, block, head, token, in_q, (q_batch, q_head, q_token),
        UNIT, HEAD_DIM, WIDTH, TAIL, HEADS, TOKENS, False,
    )  # fmt: skip
    d_out = load_queries(
        (grad_output,), batch, pack, block, head, token, in_q, (go_batch, go_head, go_token),
        UNIT, VALUE_DIM, VALUE_WIDTH, VALUE_TAIL, HEADS, TOKENS, False,
    )  # fmt: skip
    out = load_queries(
        (output,), batch, pack, block, head, token, in_q, (o_batch, o_head, o_token),
        1, VALUE_DIM, VALUE_WIDTH, VALUE_TAIL, HEADS, TOKENS, False,
    )  # fmt: skip
    index = (batch * packs * HEADS + head).to(tl.int64) * q_len + token
    row_lse = tl.load(lse + index, mask=in_q, other=float("-inf"))
    # d score = weight * (d weight - delta): the log-sum-exp's own gradient enters here too.
    row_delta = tl.sum(out[0].to(tl.float32) * d_out[0].to(tl.float32), 1)
    if VALUE_TAIL:
        row_delta += tl.sum(out[1].to(tl.float32) * d_out[1].to(tl.float32), 1)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + index, mask=in_q, other=0.0)
    empty = row_lse == float("-inf")
    row_delta = tl.where(empty, 0.0, row_delta)
    base = tl.where(empty, float("inf"), row_lse * LOG2E)
    if lead:
        tl.store(delta + index, row_delta, mask=in_q)
        tl.store(base_lse + index, base, mask=in_q)
    own = token_facts(q_info + batch * q_info_batch, place, in_q, q_len, TERMS)
    numbers = (lowest, band, reach, dilation, stride, residue)
    q_dense = place.to(tl.int64)
    if DENSE & TERMS:
        q_dense = batch * mask_batch + head * mask_head + token * mask_query
    kv_info += batch * kv_info_batch
    k_strides = (k_batch, k_head, k_token)
    v_strides = (v_batch, v_head, v_token)
    kv_head = pack // group_packs
    keys, values = (key, key_tail), (value, value_tail)
    acc = blank(ROWS, WIDTH, TAIL)
    if TWO_LOOPS:
        full_from, full_to = full_range(bounds, full)
        for turn in tl.range(full_from, full_to, num_stages=STAGES):
            acc = grad_query_step(
                turn, acc, q, d_out, base, row_delta, keys, values, k_strides, v_strides, batch,
                kv_head, entries, blocks, full, own, in_q, q_dense, kv_info, kv_order, kv_len,
                dense, mask_key, numbers, to_log2, cap_rate,
                TERMS, SOFTCAP, UNIT, TMA, HEAD_DIM, VALUE_DIM, WIDTH, TAIL, VALUE_WIDTH,
                VALUE_TAIL, KEYS, PRECISION, NEVER,
            )  # fmt: skip
        for other in tl.range(begin, end - (full_to - full_from), num_stages=STAGES):
            turn = tl.where(other < full_from, other, other + (full_to - full_from))
            acc = grad_query_step(
                turn, acc, q, d_out, base, row_delta, keys, values, k_strides, v_strides, batch,
                kv_head, entries, blocks, full, own, in_q, q_dense, kv_info, kv_order, kv_len,
                dense, mask_key, numbers, to_log2, cap_rate,
                TERMS, SOFTCAP, UNIT, TMA, HEAD_DIM, VALUE_DIM, WIDTH, TAIL, VALUE_WIDTH,
                VALUE_TAIL, KEYS, PRECISION, ALWAYS,
            )  # fmt: skip
    else:
        for turn in tl.range(begin, end, num_stages=STAGES):
            acc = grad_query_step(
                turn, acc, q, d_out, base, row_delta, keys, values, k_strides, v_strides, batch,
                kv_head, entries, blocks, full, own, in_q, q_dense, kv_info, kv_order, kv_len,
                dense, mask_key, numbers, to_log2, cap_rate,
                TERMS, SOFTCAP, UNIT, TMA, HEAD_DIM, VALUE_DIM, WIDTH, TAIL, VALUE_WIDTH,
                VALUE_TAIL, KEYS, PRECISION, WHERE_NEEDED,
            )  # fmt: skip
    acc = scaled(acc, scaling, TAIL)
    starts = row_starts(batch, head, token, (d_batch, d_head, d_token), 1)
    if earlier is not None:
        before = load_rows(earlier, starts, in_q & lead, HEAD_DIM, WIDTH, TAIL)
        acc = plus(acc, before, TAIL)
    if slot < 0:
        store_rows(grad_query, starts, in_q, acc, HEAD_DIM, WIDTH, TAIL)
    else:
        kept = (slot.to(tl.int64) * batch_packs + batch_pack) * ROWS + row
        store_slice(partial, kept, acc, WIDTH, TAIL)
