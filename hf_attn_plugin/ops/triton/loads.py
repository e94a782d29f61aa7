"""What the attention kernels share: work items, tiles of rows, scores.

Triton's tiles have powers of two as sizes. A tile of rows is a tuple of one or two pieces of its
columns, WIDTH of them and TAIL more (192 are 128 + 64, 80 are 64 + 16), so that little is computed
for nothing.
"""

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
def inside_columns(inside, FIRST: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The elements of [rows, WIDTH] from column FIRST on that lie inside, broadcastable."""
    mask = inside[:, None]
    if DIM < FIRST + WIDTH:
        mask = mask & (FIRST + tl.arange(0, WIDTH) < DIM)[None, :]
    return mask


@triton.jit
def row_starts(batch, head, token, strides, UNIT: tl.constexpr):
    """Offsets of the first elements of rows; strides count UNIT elements, which tells alignment."""
    of_batch, of_head, of_token = strides
    offsets = (
        batch.to(tl.int64) * of_batch + head.to(tl.int64) * of_head + token.to(tl.int64) * of_token
    )
    return offsets * UNIT


@triton.jit
def load_columns(
    source,
    rows,
    inside,
    FIRST: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Columns FIRST to FIRST + WIDTH of rows at these offsets, zeros outside and beyond DIM."""
    offsets = rows[:, None] + (FIRST + tl.arange(0, WIDTH))[None, :]
    return tl.load(source + offsets, mask=inside_columns(inside, FIRST, DIM, WIDTH), other=0.0)


@triton.jit
def load_rows(source, rows, inside, DIM: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Rows at these offsets in their pieces of columns."""
    tile = (load_columns(source, rows, inside, 0, DIM, WIDTH),)
    if TAIL:
        tile = (tile[0], load_columns(source, rows, inside, WIDTH, DIM, TAIL))
    return tile


@triton.jit
def store_rows(
    target, rows, inside, tile, DIM: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr
):
    """Write rows in their pieces of columns."""
    kind: tl.constexpr = target.dtype.element_ty
    offsets = rows[:, None] + tl.arange(0, WIDTH)[None, :]
    mask = inside_columns(inside, 0, DIM, WIDTH)
    tl.store(target + offsets, tile[0].to(kind), mask=mask)
    if TAIL:
        offsets = rows[:, None] + (WIDTH + tl.arange(0, TAIL))[None, :]
        mask = inside_columns(inside, WIDTH, DIM, TAIL)
        tl.store(target + offsets, tile[1].to(kind), mask=mask)


@triton.jit
def store_slice(partial, places, tile, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Write a slice's rows at their places in the scratch memory, whose rows are powers of two."""
    length: tl.constexpr = 2 * WIDTH if TAIL else WIDTH
    store_rows(partial, places * length, places >= 0, tile, WIDTH + TAIL, WIDTH, TAIL)


@triton.jit
def blank(ROWS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Sums of [ROWS, columns] before the first."""
    tile = (tl.zeros([ROWS, WIDTH], tl.float32),)
    if TAIL:
        tile = (tile[0], tl.zeros([ROWS, TAIL], tl.float32))
    return tile


@triton.jit
def scaled(tile, factor, TAIL: tl.constexpr):
    """A tile in pieces times a factor: a number, or one for every row ([rows, 1])."""
    result = (tile[0] * factor,)
    if TAIL:
        result = (result[0], tile[1] * factor)
    return result


@triton.jit
def plus(tile, other, TAIL: tl.constexpr):
    """The sum of two tiles in pieces."""
    result = (tile[0] + other[0],)
    if TAIL:
        result = (result[0], tile[1] + other[1])
    return result


@triton.jit
def products(left, right, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """The product left @ right.T of two tiles in pieces."""
    result = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    if TAIL:
        result = tl.dot(left[1], tl.trans(right[1]), result, input_precision=PRECISION)
    return result


@triton.jit
def add_weighted(acc, weight, tile, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """Add weight @ tile, both sums and tile in pieces."""
    weight = weight.to(tile[0].dtype)
    result = (tl.dot(weight, tile[0], acc[0], input_precision=PRECISION),)
    if TAIL:
        result = (result[0], tl.dot(weight, tile[1], acc[1], input_precision=PRECISION))
    return result


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
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    """BLOCK keys or values of one head in their pieces, zeros outside.

    ``source`` holds a descriptor for each piece, or a pointer.
    """
    if TMA:
        tile = (source[0].load([batch, head, block * BLOCK, 0]).reshape([BLOCK, WIDTH]),)
        if TAIL:
            tail = source[1].load([batch, head, block * BLOCK, WIDTH]).reshape([BLOCK, TAIL])
            tile = (tile[0], tail)
    else:
        rows = row_starts(batch, head, token, strides, UNIT)
        tile = load_rows(source[0], rows, inside, DIM, WIDTH, TAIL)
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
    TAIL: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    TMA: tl.constexpr,
):
    """HEADS * TOKENS rows of queries, or of what is shaped like them, head by head, in pieces."""
    if TMA:
        if HEADS == 1:
            tile = load_keys(
                source, batch, pack, block, token, inside, strides,
                UNIT, DIM, WIDTH, TAIL, TOKENS, True,
            )  # fmt: skip
        else:
            first = source[0].load([batch, pack, 0, block * TOKENS, 0])
            tile = (first.reshape([HEADS * TOKENS, WIDTH]),)
            if TAIL:
                tail = source[1].load([batch, pack, 0, block * TOKENS, WIDTH])
                tile = (tile[0], tail.reshape([HEADS * TOKENS, TAIL]))
    else:
        rows = row_starts(batch, head, token, strides, UNIT)
        tile = load_rows(source[0], rows, inside, DIM, WIDTH, TAIL)
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
