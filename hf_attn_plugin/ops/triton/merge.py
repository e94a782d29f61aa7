"""Kernels that put together what several programs computed of one row or column, in order."""

# mypy: ignore-errors
# ruff: noqa: F821, N803, N806 - Triton's types, constants of the compiler in upper case

import triton
import triton.language as tl

from hf_attn_plugin.ops.triton.loads import LOG2E, row_starts, store_rows, tokens_at

_RUNTIME = [
    "out_batch",
    "out_head",
    "out_token",
    "batch_packs",
    "packs",
    "length",
    "split_batch",
]


@triton.jit(do_not_specialize=_RUNTIME)
def merge_outputs_kernel(
    partial_output,
    partial_state,
    output,
    lse,
    splits,
    order,
    out_batch: "i64",
    out_head: "i64",
    out_token: "i64",
    batch_packs: "i32",
    packs: "i32",
    length: "i32",
    split_batch: "i32",
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The softmax over all slices of a tile of queries."""
    ROWS: tl.constexpr = HEADS * TOKENS
    batch_pack = tl.program_id(0) % batch_packs
    batch, pack = batch_pack // packs, batch_pack % packs
    split = splits + (batch * split_batch + tl.program_id(0) // batch_packs) * 3
    row = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for slot in range(tl.load(split + 1), tl.load(split + 2)):
        kept = (slot.to(tl.int64) * batch_packs + batch_pack) * ROWS + row
        slice_top = tl.load(partial_state + 2 * kept)
        new_top = tl.maximum(top, slice_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, factor = tl.exp2(top - base), tl.exp2(slice_top - base)
        total = total * shrink + tl.load(partial_state + 2 * kept + 1) * factor
        part = tl.load(partial_output + kept[:, None] * WIDTH + columns[None, :])
        acc = acc * shrink[:, None] + part * factor[:, None]
        top = new_top
    place = tl.load(split) * TOKENS + row % TOKENS
    in_q = place < length
    token = tokens_at(order, place, in_q)
    head = pack * HEADS + row // TOKENS
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    starts = row_starts(batch, head, token, (out_batch, out_head, out_token), 1)
    store_rows(output, starts, in_q, (acc / safe[:, None],), DIM, WIDTH, 0)
    index = (batch * packs * HEADS + head).to(tl.int64) * length + token
    result = tl.where(empty, float("-inf"), (top + tl.log2(safe)) / LOG2E)
    tl.store(lse + index, result, mask=in_q)


@triton.jit(do_not_specialize=_RUNTIME)
def merge_sums_kernel(
    partial,
    output,
    splits,
    order,
    out_batch: "i64",
    out_head: "i64",
    out_token: "i64",
    batch_packs: "i32",
    packs: "i32",
    length: "i32",
    split_batch: "i32",
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The sum of all slices of a tile of gradients."""
    ROWS: tl.constexpr = HEADS * TOKENS
    batch_pack = tl.program_id(0) % batch_packs
    batch, pack = batch_pack // packs, batch_pack % packs
    split = splits + (batch * split_batch + tl.program_id(0) // batch_packs) * 3
    row = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for slot in range(tl.load(split + 1), tl.load(split + 2)):
        kept = (slot.to(tl.int64) * batch_packs + batch_pack) * ROWS + row
        acc += tl.load(partial + kept[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    place = tl.load(split) * TOKENS + row % TOKENS
    inside = place < length
    token = tokens_at(order, place, inside)
    head = pack * HEADS + row // TOKENS
    starts = row_starts(batch, head, token, (out_batch, out_head, out_token), 1)
    store_rows(output, starts, inside, (acc,), DIM, WIDTH, 0)
