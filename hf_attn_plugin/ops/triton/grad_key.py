"""The kernel of the keys' and values' gradients."""

# mypy: ignore-errors
# ruff: noqa: F821, N803 - Triton's types, constants of the compiler in upper case

import triton
import triton.language as tl

from hf_attn_plugin.ops.triton.forward import RUNTIME
from hf_attn_plugin.ops.triton.loads import (
    ALWAYS,
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

_RUNTIME = [
    *RUNTIME,
    *[f"{name}_{axis}" for name in ("go", "dk", "dv") for axis in ("batch", "head", "token")],
    "batch_heads",
    "kv_heads",
]


@triton.jit
def grad_key_step(
    turn,
    pack,
    acc_key,
    acc_value,
    k,
    v,
    query,
    grad_output,
    q_strides,
    go_strides,
    base_lse,
    delta,
    batch,
    first_row,
    entries,
    blocks,
    full,
    own,
    in_kv,
    kv_dense,
    q_info,
    q_order,
    q_len,
    dense,
    mask_strides,
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
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_KEYS: tl.constexpr,
    OF_VALUES: tl.constexpr,
    MASKING: tl.constexpr,
):
    """The gradients after one more tile of queries; scores lie transposed, [keys, rows].

    Rows beyond the queries have a log-sum-exp of +inf, hence weights of 0.
    """
    block = visited(entries, blocks, turn, (RUNS & TERMS) == 0)
    row = tl.arange(0, HEADS * TOKENS)
    index = block * TOKENS + row % TOKENS
    in_q = index < q_len
    token = tokens_at(q_order, index, in_q)
    head = pack * HEADS + row // TOKENS
    q = load_queries(
        query, batch, pack, block, head, token, in_q, q_strides,
        UNIT, HEAD_DIM, WIDTH, TAIL, HEADS, TOKENS, TMA,
    )  # fmt: skip
    d_out = load_queries(
        grad_output, batch, pack, block, head, token, in_q, go_strides,
        UNIT, VALUE_DIM, VALUE_WIDTH, VALUE_TAIL, HEADS, TOKENS, TMA,
    )  # fmt: skip
    # A scalar in 64 bits and rows in 32: addresses of rows would fill the registers.
    origin = (first_row + pack * HEADS).to(tl.int64) * q_len
    place = row // TOKENS * q_len + token
    base = tl.load(base_lse + origin + place, mask=in_q, other=float("inf"))
    row_delta = tl.load(delta + origin + place, mask=in_q, other=0.0)
    score = capped(products(k, q, TAIL, PRECISION), cap_rate, SOFTCAP)
    slope = score
    if SOFTCAP:
        slope = 1.0 - score * score
    masked = MASKING == ALWAYS
    if MASKING == WHERE_NEEDED:
        masked = needs_mask(full, turn)
    if masked:
        q_dense = index.to(tl.int64)
        if DENSE & TERMS:
            of_batch, of_head, of_query = mask_strides
            q_dense = batch * of_batch + head * of_head + token * of_query
        score = hide(
            score, own, in_kv, kv_dense, q_info, index, in_q, q_len, q_dense, dense,
            numbers, False, TERMS,
        )  # fmt: skip
    weight = tl.exp2(score * to_log2 - base[None, :])
    if OF_VALUES:
        acc_value = add_weighted(acc_value, weight, d_out, VALUE_TAIL, PRECISION)
    if OF_KEYS:
        d_weight = products(v, d_out, VALUE_TAIL, PRECISION) - row_delta[None, :]
        if SOFTCAP:
            d_weight = d_weight * slope
        acc_key = add_weighted(acc_key, weight * d_weight, q, TAIL, PRECISION)
    return acc_key, acc_value


@triton.jit
def store_sums(
    acc,
    target,
    earlier,
    partial,
    batch,
    head,
    token,
    inside,
    strides,
    slot,
    lead,
    kept,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Write the sums of keys, or those of a slice; ``earlier`` sums are added."""
    rows = row_starts(batch, head, token, strides, 1)
    if earlier is not None:
        acc = plus(acc, load_rows(earlier, rows, inside & lead, DIM, WIDTH, TAIL), TAIL)
    if slot < 0:
        store_rows(target, rows, inside, acc, DIM, WIDTH, TAIL)
    else:
        store_slice(partial, kept, acc, WIDTH, TAIL)


@triton.jit(do_not_specialize=_RUNTIME)
def grad_key_kernel(
    query,
    query_tail,
    key,
    value,
    grad_output,
    grad_output_tail,
    base_lse,
    delta,
    grad_key,
    grad_value,
    earlier_key,
    earlier_value,
    items,
    entries,
    q_info,
    kv_info,
    q_order,
    kv_order,
    dense,
    partial_key,
    partial_value,
    q_batch: "i64",
    q_head: "i64",
    q_token: "i64",
    k_batch: "i64",
    k_head: "i64",
    k_token: "i64",
    v_batch: "i64",
    v_head: "i64",
    v_token: "i64",
    go_batch: "i64",
    go_head: "i64",
    go_token: "i64",
    dk_batch: "i64",
    dk_head: "i64",
    dk_token: "i64",
    dv_batch: "i64",
    dv_head: "i64",
    dv_token: "i64",
    mask_batch: "i64",
    mask_head: "i64",
    mask_query: "i64",
    mask_key: "i64",
    item_batch: "i32",
    q_info_batch: "i64",
    kv_info_batch: "i64",
    batch_heads: "i32",
    kv_heads: "i32",
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
    OF_KEYS: tl.constexpr,
    OF_VALUES: tl.constexpr,
    TWO_LOOPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of keys of one KV head over the tiles of queries that see it.

    ``earlier_key`` and ``earlier_value`` are None or the float32 gradients of a pass before this
    one. Keys beyond the end fill rows that are never stored.
    """
    batch_head = tl.program_id(0) % batch_heads
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    block, slot, lead, bounds, blocks, full = work_item(
        items, batch, tl.program_id(0) // batch_heads, item_batch
    )
    begin, end = bounds
    key_row = tl.arange(0, KEYS)
    place = block * KEYS + key_row
    in_kv = place < kv_len
    token = tokens_at(kv_order, place, in_kv)
    k = load_keys(
        (key,), batch, kv_head, block, token, in_kv, (k_batch, k_head, k_token),
        UNIT, HEAD_DIM, WIDTH, TAIL, KEYS, False,
    )  # fmt: skip
    v = load_keys(
        (value,), batch, kv_head, block, token, in_kv, (v_batch, v_head, v_token),
        UNIT, VALUE_DIM, VALUE_WIDTH, VALUE_TAIL, KEYS, False,
    )  # fmt: skip
    own = token_facts(kv_info + batch * kv_info_batch, place, in_kv, kv_len, TERMS)
    numbers = (lowest, band, reach, dilation, stride, residue)
    mask_strides = (mask_batch, mask_head, mask_query)
    kv_dense = token * mask_key
    q_info += batch * q_info_batch
    q_strides = (q_batch, q_head, q_token)
    go_strides = (go_batch, go_head, go_token)
    first_row = batch * kv_heads * group_packs * HEADS
    queries, d_outputs = (query, query_tail), (grad_output, grad_output_tail)
    acc_key, acc_value = (), ()
    if OF_KEYS:
        acc_key = blank(KEYS, WIDTH, TAIL)
    if OF_VALUES:
        acc_value = blank(KEYS, VALUE_WIDTH, VALUE_TAIL)
    if TWO_LOOPS:
        full_from, full_to = full_range(bounds, full)
        for pack in range(kv_head * group_packs, (kv_head + 1) * group_packs):
            for turn in tl.range(full_from, full_to, num_stages=STAGES):
                acc_key, acc_value = grad_key_step(
                    turn, pack, acc_key, acc_value, k, v, queries, d_outputs, q_strides,
                    go_strides, base_lse, delta, batch, first_row, entries, blocks, full, own,
                    in_kv, kv_dense, q_info, q_order, q_len, dense, mask_strides, numbers,
                    to_log2, cap_rate, TERMS, SOFTCAP, UNIT, TMA, HEAD_DIM, VALUE_DIM, WIDTH,
                    TAIL, VALUE_WIDTH, VALUE_TAIL, HEADS, TOKENS, PRECISION, OF_KEYS, OF_VALUES,
                    NEVER,
                )  # fmt: skip
            for other in tl.range(begin, end - (full_to - full_from), num_stages=STAGES):
                turn = tl.where(other < full_from, other, other + (full_to - full_from))
                acc_key, acc_value = grad_key_step(
                    turn, pack, acc_key, acc_value, k, v, queries, d_outputs, q_strides,
                    go_strides, base_lse, delta, batch, first_row, entries, blocks, full, own,
                    in_kv, kv_dense, q_info, q_order, q_len, dense, mask_strides, numbers,
                    to_log2, cap_rate, TERMS, SOFTCAP, UNIT, TMA, HEAD_DIM, VALUE_DIM, WIDTH,
                    TAIL, VALUE_WIDTH, VALUE_TAIL, HEADS, TOKENS, PRECISION, OF_KEYS, OF_VALUES,
                    ALWAYS,
                )  # fmt: skip
    else:
        # One loop over the packs of the group: a loop for each would refill the pipeline.
        count = end - begin
        for step in tl.range(0, count * group_packs, num_stages=STAGES):
            pack = kv_head * group_packs + step // count
            acc_key, acc_value = grad_key_step(
                begin + step % count, pack, acc_key, acc_value, k, v, queries, d_outputs,
                q_strides, go_strides, base_lse, delta, batch, first_row, entries, blocks, full,
                own, in_kv, kv_dense, q_info, q_order, q_len, dense, mask_strides, numbers,
                to_log2, cap_rate, TERMS, SOFTCAP, UNIT, TMA, HEAD_DIM, VALUE_DIM, WIDTH,
                TAIL, VALUE_WIDTH, VALUE_TAIL, HEADS, TOKENS, PRECISION, OF_KEYS, OF_VALUES,
                WHERE_NEEDED,
            )  # fmt: skip
    kept = (slot.to(tl.int64) * batch_heads + batch_head) * KEYS + key_row
    if OF_KEYS:
        store_sums(
            scaled(acc_key, scaling, TAIL), grad_key, earlier_key, partial_key, batch, kv_head,
            token, in_kv, (dk_batch, dk_head, dk_token), slot, lead, kept, HEAD_DIM, WIDTH, TAIL,
        )  # fmt: skip
    if OF_VALUES:
        store_sums(
            acc_value, grad_value, earlier_value, partial_value, batch, kv_head,
            token, in_kv, (dv_batch, dv_head, dv_token), slot, lead, kept,
            VALUE_DIM, VALUE_WIDTH, VALUE_TAIL,
        )  # fmt: skip
