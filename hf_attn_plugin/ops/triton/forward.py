"""The forward kernel: online softmax over the blocks that a plan names (arXiv 2205.14135)."""

# mypy: ignore-errors
# ruff: noqa: F821, N803, N806, SIM102 - Triton's types, constants of the compiler in upper case

import triton
import triton.language as tl

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

# Everything that varies with length or layout: a new one must not compile a new kernel.
RUNTIME = [
    *[f"{name}_{axis}" for name in "qkvo" for axis in ("batch", "head", "token")],
    *[f"mask_{axis}" for axis in ("batch", "head", "query", "key")],
    "item_batch",
    "q_info_batch",
    "kv_info_batch",
    "batch_packs",
    "packs",
    "group_packs",
    "q_len",
    "kv_len",
    "lowest",
    "band",
    "reach",
    "dilation",
    "stride",
    "residue",
]


@triton.jit
def forward_step(
    turn,
    top,
    total,
    acc,
    q,
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
    """One block of keys: the running maximum (in units of log 2), sum and output after it."""
    block = visited(entries, blocks, turn, (RUNS & TERMS) == 0)
    index = block * KEYS + tl.arange(0, KEYS)
    in_kv = index < kv_len
    token = tokens_at(kv_order, index, in_kv)
    k = load_keys(
        key, batch, kv_head, block, token, in_kv, k_strides,
        UNIT, HEAD_DIM, WIDTH, TAIL, KEYS, TMA,
    )  # fmt: skip
    score = capped(products(q, k, TAIL, PRECISION), cap_rate, SOFTCAP)
    masked = MASKING == ALWAYS
    if MASKING == WHERE_NEEDED:
        masked = needs_mask(full, turn)
    if masked:
        score = hide(
            score, own, in_q, q_dense, kv_info, index, in_kv, kv_len, token * mask_key, dense,
            numbers, True, TERMS,
        )  # fmt: skip
    new_top = tl.maximum(top, tl.max(score, 1) * to_log2)
    # Rows that have seen nothing yet are at -inf; 0 keeps -inf - -inf out.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score * to_log2 - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weight, 1)
    v = load_keys(
        value, batch, kv_head, block, token, in_kv, v_strides,
        UNIT, VALUE_DIM, VALUE_WIDTH, VALUE_TAIL, KEYS, TMA,
    )  # fmt: skip
    acc = scaled(acc, shrink[:, None], VALUE_TAIL)
    return new_top, total, add_weighted(acc, weight, v, VALUE_TAIL, PRECISION)


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    query,
    key,
    key_tail,
    value,
    value_tail,
    output,
    lse,
    sinks,
    earlier,
    items,
    entries,
    q_info,
    kv_info,
    q_order,
    kv_order,
    dense,
    partial_output,
    partial_state,
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
    """One tile of queries (HEADS heads of one KV group x TOKENS tokens) over its blocks of keys.

    ``lse`` [batch, heads, q_len] is natural. ``earlier`` is None, or the float32 output of a pass
    before this one, whose log-sum-exp ``lse`` then holds: the softmax goes on from there.
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
    own = token_facts(q_info + batch * q_info_batch, place, in_q, q_len, TERMS)
    numbers = (lowest, band, reach, dilation, stride, residue)
    q_dense = place.to(tl.int64)
    if DENSE & TERMS:
        q_dense = batch * mask_batch + head * mask_head + token * mask_query
    kv_info += batch * kv_info_batch
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = blank(ROWS, VALUE_WIDTH, VALUE_TAIL)
    index = (batch * packs * HEADS + head).to(tl.int64) * q_len + token
    out_rows = row_starts(batch, head, token, (o_batch, o_head, o_token), 1)
    if earlier is not None:
        if lead:
            top = tl.load(lse + index, mask=in_q, other=float("-inf")) * LOG2E
            acc = load_rows(earlier, out_rows, in_q, VALUE_DIM, VALUE_WIDTH, VALUE_TAIL)
            total = tl.where(top == float("-inf"), 0.0, 1.0)
    elif sinks is not None:
        if lead:
            top = tl.load(sinks + head).to(tl.float32) * LOG2E
            total = tl.where(top == float("-inf"), 0.0, 1.0)
    k_strides = (k_batch, k_head, k_token)
    v_strides = (v_batch, v_head, v_token)
    kv_head = pack // group_packs
    keys, values = (key, key_tail), (value, value_tail)
    if TWO_LOOPS:
        full_from, full_to = full_range(bounds, full)
        for turn in tl.range(full_from, full_to, num_stages=STAGES):
            top, total, acc = forward_step(
                turn, top, total, acc, q, keys, values, k_strides, v_strides, batch, kv_head,
                entries, blocks, full, own, in_q, q_dense, kv_info, kv_order, kv_len,
                dense, mask_key, numbers, to_log2, cap_rate,
                TERMS, SOFTCAP, UNIT, TMA, HEAD_DIM, VALUE_DIM, WIDTH, TAIL, VALUE_WIDTH,
                VALUE_TAIL, KEYS, PRECISION, NEVER,
            )  # fmt: skip
        for other in tl.range(begin, end - (full_to - full_from), num_stages=STAGES):
            turn = tl.where(other < full_from, other, other + (full_to - full_from))
            top, total, acc = forward_step(
                turn, top, total, acc, q, keys, values, k_strides, v_strides, batch, kv_head,
                entries, blocks, full, own, in_q, q_dense, kv_info, kv_order, kv_len,
                dense, mask_key, numbers, to_log2, cap_rate,
                TERMS, SOFTCAP, UNIT, TMA, HEAD_DIM, VALUE_DIM, WIDTH, TAIL, VALUE_WIDTH,
                VALUE_TAIL, KEYS, PRECISION, ALWAYS,
            )  # fmt: skip
    else:
        for turn in tl.range(begin, end, num_stages=STAGES):
            top, total, acc = forward_step(
                turn, top, total, acc, q, keys, values, k_strides, v_strides, batch, kv_head,
                entries, blocks, full, own, in_q, q_dense, kv_info, kv_order, kv_len,
                dense, mask_key, numbers, to_log2, cap_rate,
                TERMS, SOFTCAP, UNIT, TMA, HEAD_DIM, VALUE_DIM, WIDTH, TAIL, VALUE_WIDTH,
                VALUE_TAIL, KEYS, PRECISION, WHERE_NEEDED,
            )  # fmt: skip
    if slot < 0:
        empty = total == 0.0
        safe = tl.where(empty, 1.0, total)
        out = scaled(acc, (1.0 / safe)[:, None], VALUE_TAIL)
        store_rows(output, out_rows, in_q, out, VALUE_DIM, VALUE_WIDTH, VALUE_TAIL)
        result = tl.where(empty, float("-inf"), (top + tl.log2(safe)) / LOG2E)
        tl.store(lse + index, result, mask=in_q)
    else:
        kept = (slot.to(tl.int64) * batch_packs + batch_pack) * ROWS + row
        store_slice(partial_output, kept, acc, VALUE_WIDTH, VALUE_TAIL)
        tl.store(partial_state + 2 * kept, top)
        tl.store(partial_state + 2 * kept + 1, total)
