"""Pieces that the attention kernels share: work items, tiles of rows, scores."""

# mypy: ignore-errors
# ruff: noqa: N803, SIM108 - Triton's types, constants of the compiler in upper case

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Columns of a work item; see `plan.Work`.
ITEM_COLUMNS = tl.constexpr(12)

# How a loop masks: in a branch taken by the visits that need it, always, or never.
WHERE_NEEDED = tl.constexpr(0)
ALWAYS = tl.constexpr(1)
NEVER = tl.constexpr(2)


@triton.jit
def work_item(items, batch, item, item_batch):
    """What one program does: block, slot, lead, (begin, end), visits, ranges; see `plan.Work`."""
    row = items + (batch.to(tl.int64) * item_batch + item) * ITEM_COLUMNS
    bounds = (tl.load(row + 3), tl.load(row + 4))
    blocks = (tl.load(row + 5), tl.load(row + 6), tl.load(row + 7))
    full = (tl.load(row + 8), tl.load(row + 9), tl.load(row + 10), tl.load(row + 11))
    return tl.load(row), tl.load(row + 1), tl.load(row + 2) != 0, bounds, blocks, full


@triton.jit
def visited(entries, blocks, turn, LISTED: tl.constexpr):
    """The block of one visit."""
    first_count, first_base, second_base = blocks
    if LISTED:
        block = tl.load(entries + first_base + turn)
    else:
        block = tl.where(turn < first_count, first_base, second_base) + turn
    return block


@triton.jit
def needs_mask(full, turn):
    """Whether a visit is in neither of the ranges that need no mask."""
    from1, to1, from2, to2 = full
    return ((turn < from1) | (turn >= to1)) & ((turn < from2) | (turn >= to2))


@triton.jit
def full_range(bounds, full):
    """The longer full range within the program's visits."""
    begin, end = bounds
    _from1, _to1, from2, to2 = full
    first = tl.minimum(tl.maximum(from2, begin), end)
    return first, tl.maximum(tl.minimum(to2, end), first)


@triton.jit
def tokens_at(order, index, inside):
    """Where the tokens at these places of the order lie; ``order`` None: where they say."""
    if order is None:
        token = index
    else:
        token = tl.load(order + index, mask=inside, other=0)
    return token


@triton.jit
def inside_rows(inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The elements of [rows, WIDTH] that lie inside, broadcastable."""
    mask = inside[:, None]
    if DIM != WIDTH:
        mask = mask & (tl.arange(0, WIDTH) < DIM)[None, :]
    return mask


@triton.jit
def row_offsets(batch, head, token, strides, UNIT: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of [rows, WIDTH] elements; strides count UNIT elements, which tells alignment."""
    of_batch, of_head, of_token = strides
    row = (
        batch.to(tl.int64) * of_batch + head.to(tl.int64) * of_head + token.to(tl.int64) * of_token
    ) * UNIT
    return row[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_keys(
    source,
    batch,
    head,
    block,
    token,
    inside,
    strides,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BLOCK, WIDTH] keys or values of one head, zeros outside; ``source``: descriptor, pointer."""
    if TMA:
        tile = source.load([batch, head, block * BLOCK, 0]).reshape([BLOCK, WIDTH])
    else:
        offsets = row_offsets(batch, head, token, strides, UNIT, WIDTH)
        tile = tl.load(source + offsets, mask=inside_rows(inside, DIM, WIDTH), other=0.0)
    return tile


@triton.jit
def load_queries(
    source,
    batch,
    pack,
    block,
    head,
    token,
    inside,
    strides,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    TMA: tl.constexpr,
):
    """[HEADS * TOKENS, WIDTH] rows of queries, or of what is shaped like them, head by head."""
    if TMA:
        if HEADS == 1:
            tile = source.load([batch, pack, block * TOKENS, 0]).reshape([TOKENS, WIDTH])
        else:
            tile = source.load([batch, pack, 0, block * TOKENS, 0])
            tile = tile.reshape([HEADS * TOKENS, WIDTH])
    else:
        offsets = row_offsets(batch, head, token, strides, UNIT, WIDTH)
        tile = tl.load(source + offsets, mask=inside_rows(inside, DIM, WIDTH), other=0.0)
    return tile


@triton.jit
def capped(product, cap_rate, SOFTCAP: tl.constexpr):
    """Scores up to a positive factor: the product of query and key, or tanh of the scaled one."""
    score = product
    if SOFTCAP:
        rate = product * cap_rate
        # The difference from 1 has an error of 6e-8, which a large cap multiplies: a small argument
        # takes the series.
        small = rate * (0.5 / LOG2E)
        square = small * small
        series = small * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)))
        score = tl.where(square < 1e-2, series, 1.0 - 2.0 / (tl.exp2(rate) + 1.0))
    return score
