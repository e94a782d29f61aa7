"""Work items: which blocks every program of a kernel visits, and in what order they start."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_attn_plugin.patterns import Pattern, Schedule

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

# Columns of an item.
BLOCK, SLOT, LEAD, BEGIN, END = 0, 1, 2, 3, 4
FIRST_COUNT, FIRST_BASE, SECOND_BASE = 5, 6, 7
FULL_RANGES = slice(8, 12)
COLUMNS = 12

# Eight for each of the 132 multiprocessors of an H100 or H200; others have nearly as many.
_SHARES = 8 * 132
# So many slices per batch row are always allowed.
_FEW_SLICES = 16


@dataclasses.dataclass(frozen=True)
class Work:
    """What the programs of one kernel do, on the device.

    Attributes:
        items: int32 ``[batch or 1, items, 12]``, the longest first:

            - the block of own tokens (beyond the last: nothing to do);
            - the slot of a slice's partial result, or -1;
            - whether the item goes on from what was there before (the first slice of a block);
            - its visits, begin and end;
            - how many visits belong to the first run of blocks, what to add to a visit's number for
              its block in the first run (for its place in ``entries`` where visits are listed), and
              in the second;
            - two ranges of visits that need no mask, from, to, the second the longer one.
        entries: int32, the blocks of listed visits.
        splits: int32 ``[batch or 1, blocks cut into slices, 3]``: block, first slot, last slot + 1.
        num_items: Items per batch row.
        num_splits: Cut blocks per batch row.
        num_slots: Slices per batch row.
    """

    items: Tensor
    entries: Tensor
    splits: Tensor
    num_items: int
    num_splits: int
    num_slots: int


@dataclasses.dataclass(frozen=True)
class Runs:
    """Two runs of the others that own tokens see, int ``[batch or 1, own tokens]``.

    Attributes:
        start: First token of the first run.
        length: Its length; 0 where nothing is seen.
        start2: Of the second run.
        length2: Of the second run.
        others: How many others there are.
    """

    start: Ints
    length: Ints
    start2: Ints
    length2: Ints
    others: int


@dataclasses.dataclass(frozen=True)
class Visits:
    """Entries of a schedule, sorted by row and then column."""

    rows: Ints
    cols: Ints
    full: Bools
    num_rows: int
    num_cols: int

    def transposed(self) -> Visits:
        """Visits of the columns to the rows."""
        order = np.argsort(self.cols, kind="stable")
        return Visits(
            self.cols[order], self.rows[order], self.full[order], self.num_cols, self.num_rows
        )


def visits_of(schedule: Schedule, pattern: Pattern) -> Visits:
    """The entries of a schedule of ``pattern``."""
    num_rows = len(schedule.rows) - 1
    num_cols = -(-pattern.kv_len // schedule.block_kv)
    rows = np.repeat(np.arange(num_rows), np.diff(schedule.rows))
    return Visits(rows, schedule.cols, schedule.full, num_rows, num_cols)


@dataclasses.dataclass(frozen=True)
class Split:
    """When a row of visits is cut into slices for several programs.

    Attributes:
        visits: Fewest visits of a slice.
        programs: Programs for the items of all batch rows: batch times heads or packs of heads.
        every: Whether rows that are not heavy become a slice each: what leaves a kernel are then
            slices alone, in float32 whatever the results are in.
    """

    visits: int
    programs: int
    every: bool = False


def work_from_visits(visits: Visits, split: Split, device: torch.device) -> Work:
    """Items whose visits are listed, those that need no mask first.

    Raises:
        ValueError: They are too many for 32-bit numbers.
    """
    if len(visits.cols) >= 2**31:
        raise ValueError(
            f"triton_attention: the pattern leaves {len(visits.cols)} blocks to list, at most "
            f"{2**31 - 1} can be: use runs of tokens (causal attention, windows, packed documents, "
            "padding at the ends) at this length, or shorter sequences."
        )
    order = np.lexsort((~visits.full, visits.rows))
    counts = np.bincount(visits.rows, minlength=visits.num_rows)
    items = _blank_items(1, visits.num_rows)
    items[0, :, END] = counts
    items[0, :, FIRST_BASE] = np.cumsum(counts) - counts
    items[0, :, FULL_RANGES.stop - 1] = np.bincount(
        visits.rows[visits.full], minlength=visits.num_rows
    )
    return _work(items, visits.cols[order], split, device)


def work_from_runs(runs: Runs, own: int, others: int, split: Split, device: torch.device) -> Work:
    """Items for runs of tokens.

    Args:
        runs: What every token sees.
        own: Tokens of a block of a program's own.
        others: Tokens of a block that it visits.
        split: When a heavy row is cut.
        device: Where the work goes.
    """
    first = _block_runs(runs.start, runs.length, own, others)
    second = _block_runs(runs.start2, runs.length2, own, others)
    # The run that starts earlier comes first, and one that is empty last.
    swap = (second[0] < second[1]) & ((second[0] < first[0]) | (first[0] >= first[1]))
    first, second = np.where(swap, second, first), np.where(swap, first, second)
    some = second[0] < second[1]
    joined = some & (second[0] <= first[1])
    first[1] = np.where(joined, np.maximum(first[1], second[1]), first[1])
    count = first[1] - first[0]
    items = _blank_items(*count.shape)
    base = np.where(joined, first[0], second[0] - count)
    items[..., END] = count + np.where(some & ~joined, second[1] - second[0], 0)
    items[..., FIRST_COUNT] = count
    items[..., FIRST_BASE] = first[0]
    items[..., SECOND_BASE] = base
    full = [first[2] - first[0], first[3] - first[0], second[2] - base, second[3] - base]
    longer = (full[1] - full[0]) > (full[3] - full[2])
    short, long = np.where(longer, full[2:], full[:2]), np.where(longer, full[:2], full[2:])
    items[..., FULL_RANGES] = np.stack([*short, *long], -1)
    return _work(items, np.zeros(0, np.int64), split, device)


def _block_runs(start: Ints, length: Ints, own: int, others: int) -> Ints:
    """Blocks that a block's tokens see, and those that all of them see whole.

    Returns:
        ``[4, batch or 1, own blocks]``: first, end, first full, end of the full ones; an empty
        range has first = end, and the full range lies within the first.
    """
    rows, tokens = start.shape
    blocks = -(-tokens // own)
    start, stop = start.astype(np.int64), (start + length).astype(np.int64)
    if not blocks:
        return np.zeros((4, rows, 0), np.int64)
    heads = np.arange(blocks) * own
    never = np.iinfo(np.int64).max // 2
    some = stop > start
    low = np.minimum.reduceat(np.where(some, start, never), heads, axis=1)
    high = np.maximum.reduceat(np.where(some, stop, 0), heads, axis=1)
    first, end = low // others, -(-high // others)
    first = np.where(low < high, first, 0)
    end = np.where(low < high, end, 0)
    # An empty run holds no block in common: its stop is its start.
    common_low = np.maximum.reduceat(start, heads, axis=1)
    common_high = np.minimum.reduceat(stop, heads, axis=1)
    full_first = np.clip(-(-common_low // others), first, end)
    full_end = np.maximum(np.clip(common_high // others, first, end), full_first)
    return np.stack([first, end, full_first, full_end])


def _blank_items(rows: int, blocks: int) -> Ints:
    items = np.zeros((rows, blocks, COLUMNS), np.int64)
    items[..., BLOCK] = np.arange(blocks)
    items[..., SLOT] = -1
    items[..., LEAD] = 1
    return items


def _most_visits(counts: Ints, split: Split) -> int:
    """Visits ``[batch or 1, rows]`` up to which a row is left whole."""
    busy = counts[counts > 0]
    if not len(busy):
        return split.visits
    # What takes one multiprocessor a fraction of its whole share does not hold up the others, since
    # the longest start first; nor does what is not far above the median.
    share = int(counts.sum()) * split.programs // (len(counts) * _SHARES)
    limit = max(split.visits, int(4 * np.median(busy)), share)
    # Every slice is a tile of float32, and every batch row has room for as many as the one that is
    # cut most: together at most the size of a 16-bit result.
    most = max(_FEW_SLICES, counts.shape[1] // 2)
    while np.where(counts > limit, -(-counts // limit), 0).sum(1).max() > most:
        limit *= 2
    return limit


def _work(items: Ints, entries: Ints, split: Split, device: torch.device) -> Work:
    """The items of all batch rows, heavy ones cut, the longest first."""
    limit = _most_visits(items[..., END], split)
    cut = [_cut(row, limit, split.every) for row in items]
    num_items = max((len(part) for part, _, _ in cut), default=0)
    num_splits = max((len(splits) for _, splits, _ in cut), default=0)
    beyond = items.shape[1]
    all_items = np.zeros((len(cut), num_items, COLUMNS), np.int64)
    all_splits = np.zeros((len(cut), num_splits, 3), np.int64)
    all_items[..., BLOCK], all_items[..., SLOT], all_splits[..., 0] = beyond, -1, beyond
    for row, (part, splits, _) in enumerate(cut):
        order = np.argsort(part[:, BEGIN] - part[:, END], kind="stable")
        all_items[row, : len(part)] = part[order]
        all_splits[row, : len(splits)] = splits
    return Work(
        _upload(all_items, device),
        _upload(entries, device),
        _upload(all_splits, device),
        num_items,
        num_splits,
        max((slots for _, _, slots in cut), default=0),
    )


def _cut(items: Ints, limit: int, every: bool) -> tuple[Ints, Ints, int]:
    """Items of more than ``limit`` visits in slices; the cut blocks and their slots.

    With ``every`` the others are a slice each.
    """
    heavy = np.flatnonzero(items[:, END] > limit)
    others = np.delete(items, heavy, 0)
    slots = len(others) if every else 0
    splits: list[Any] = []
    if every:
        others[:, SLOT] = np.arange(slots)
        splits += zip(others[:, BLOCK], range(slots), range(1, slots + 1), strict=True)
    parts = [others]
    for row in heavy:
        count = int(items[row, END])
        begins = np.arange(0, count, limit)
        slices = np.repeat(items[row][None], len(begins), 0)
        slices[:, BEGIN] = begins
        slices[:, END] = np.minimum(begins + limit, count)
        slices[:, SLOT] = slots + np.arange(len(begins))
        slices[:, LEAD] = begins == 0
        parts.append(slices)
        splits.append((int(items[row, BLOCK]), slots, slots + len(begins)))
        slots += len(begins)
    return np.concatenate(parts), np.array(splits, np.int64).reshape(-1, 3), slots


def _upload(values: Ints, device: torch.device) -> Tensor:
    flat = np.ascontiguousarray(values, dtype=np.int32)
    # Kernels get a pointer even where they read nothing.
    return torch.from_numpy(flat if flat.size else np.zeros(1, np.int32)).to(device)
