"""Small kernels beside the warp-specialised ones: rows for TMA, and sums of slices."""

# mypy: ignore-errors
# ruff: noqa: F821, N803 - Triton's types, constants of the compiler in upper case

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "stride"])
def pad_rows_kernel(rows, padded, length: "i32", stride: "i32", BLOCK: tl.constexpr):
    """Contiguous ``rows`` of ``length`` numbers, in memory in which one starts every ``stride``."""
    blocks = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < length
    tl.store(padded + row * stride + column, tl.load(rows + row * length + column, inside), inside)


@triton.jit(
    do_not_specialize=[
        "out_batch", "out_head", "out_token", "batch_heads", "heads", "length", "split_batch",
    ]
)  # fmt: skip
def merge_blocks_kernel(
    partial,
    output,
    splits,
    out_batch: "i64",
    out_head: "i64",
    out_token: "i64",
    batch_heads: "i32",
    heads: "i32",
    length: "i32",
    split_batch: "i32",
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Sums of many slices of few blocks of ROWS rows: PART rows a program, SLOTS slices at once."""
    pieces: tl.constexpr = ROWS // PART
    piece = tl.program_id(0) % pieces
    batch_head = tl.program_id(0) // pieces % batch_heads
    batch = batch_head // heads
    split = splits + (batch * split_batch + tl.program_id(0) // pieces // batch_heads) * 3
    row = piece * PART + tl.arange(0, PART)
    columns = tl.arange(0, DIM)
    acc = tl.zeros([PART, DIM], tl.float32)
    last = tl.load(split + 2)
    for first in range(tl.load(split + 1), last, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        kept = (slot.to(tl.int64) * batch_heads + batch_head)[:, None] * ROWS + row[None, :]
        places = partial + kept[:, :, None] * DIM + columns[None, None, :]
        acc += tl.sum(tl.load(places, (slot < last)[:, None, None], other=0.0), 0)
    token = tl.load(split) * ROWS + row
    start = output + batch * out_batch + batch_head % heads * out_head
    places = start + token.to(tl.int64)[:, None] * out_token + columns[None, :]
    tl.store(places, acc.to(output.dtype.element_ty), (token < length)[:, None])
