"""Work items of the keys' gradients on Hopper: blocks of keys in pairs, one for each warpgroup.

Both warpgroups of a program see the same stream of queries, all that either of their blocks needs;
each skips what only the other needs. Where a block is seen by far more queries than most (that of
global tokens), its stream is cut into slices, and the warpgroups share each: both hold the block,
and take turns.
"""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import torch
from torch import Tensor

from hf_attn_plugin.ops.triton.plan import Pass
from hf_attn_plugin.ops.triton.work import (
    Bools,
    Ints,
    Runs,
    Split,
    _block_runs,
    _most_visits,
    _upload,
)

# Keys of one warpgroup.
ROWS = 64
COLUMNS = 10


@dataclasses.dataclass(frozen=True)
class PairWork:
    """What the programs of the kernel do, on the device.

    Attributes:
        items: int32 ``[batch or 1, items, 10]``, the longest first:

            - the blocks of 64 keys of the two warpgroups (one beyond the last: nothing to do);
            - the slots of their partial results, or -1;
            - visits to blocks of queries, begin and end;
            - how many visits belong to the first run of blocks, what to add to a visit's number for
              its block in the first run, and in the second;
            - whether the warpgroups take turns at the visits.
        parts: int32 ``[batch or 1, key blocks + 1, 8]``: of each of two runs of queries the blocks
            that a block of keys sees, from, to, and those that it sees whole, from, to. The last
            row, for blocks beyond the last, is empty.
        splits: int32 ``[batch or 1, blocks cut into slices, 3]``: block, first slot, last slot + 1.
        num_items: Items per batch row.
        num_splits: Cut blocks per batch row.
        num_slots: Partial results per batch row.
    """

    items: Tensor
    parts: Tensor
    splits: Tensor
    num_items: int
    num_splits: int
    num_slots: int


# The work of a pass lives as long as the pass does.
_kept: weakref.WeakKeyDictionary[Pass, dict[tuple[int, Split], PairWork]]
_kept = weakref.WeakKeyDictionary()


def pair_work(step: Pass, tokens: int, split: Split) -> PairWork:
    """The work items of a pass of runs, made once.

    Args:
        step: The pass.
        tokens: Queries of a tile.
        split: When a heavy block is cut.
    """
    assert step.runs is not None
    made = _kept.setdefault(step, {})
    if (tokens, split) not in made:
        made[tokens, split] = make_pair_work(step.runs[True], tokens, split, step.q_info.device)
    return made[tokens, split]


def make_pair_work(runs: Runs, tokens: int, split: Split, device: torch.device) -> PairWork:
    """Items for the runs of queries that see each key.

    Args:
        runs: Of the keys.
        tokens: Queries of a tile.
        split: When a heavy block is cut.
        device: Where the work goes.
    """
    both = [(runs.start, runs.length), (runs.start2, runs.length2)]
    parts = np.concatenate([_block_runs(*run, ROWS, tokens) for run in both]).transpose(1, 2, 0)
    batch, beyond, _ = parts.shape
    parts = np.concatenate([parts, np.zeros((batch, 1, 8), np.int64)], 1)
    counts = _visits(parts[:, :beyond, None])[..., 1]
    limit = _most_visits(counts, split)
    slices = _slice_length(counts, limit, split)
    made = [_of_row(parts[row], counts[row] > limit, slices, split.every) for row in range(batch)]
    num_items = max(len(items) for items, _, _ in made)
    num_splits = max(len(splits) for _, splits, _ in made)
    all_items = np.zeros((batch, num_items, COLUMNS), np.int64)
    all_items[..., :4] = beyond, beyond, -1, -1
    all_splits = np.zeros((batch, num_splits, 3), np.int64)
    all_splits[..., 0] = beyond
    for row, (items, splits, _) in enumerate(made):
        all_items[row, : len(items)] = items
        all_splits[row, : len(splits)] = splits
    return PairWork(
        _upload(all_items, device),
        _upload(parts, device),
        _upload(all_splits, device),
        num_items,
        num_splits,
        max(slots for _, _, slots in made),
    )


def _slice_length(counts: Ints, limit: int, split: Split) -> int:
    """Visits of a slice: for each warpgroup a few more than most blocks have, if memory allows."""
    busy = counts[counts > 0]
    length = max(split.visits, 5 * int(np.median(busy)) // 2) if len(busy) else 1
    heavy = np.where(counts > limit, counts, 0)
    # Every slice has two tiles of float32: together at most the size of a 16-bit result.
    while 2 * (-(-heavy // length)).sum(1).max(initial=0) > max(32, counts.shape[1] // 2):
        length *= 2
    return length


def _of_row(parts: Ints, heavy: Bools, length: int, every: bool) -> tuple[Ints, Ints, int]:
    """Items of one batch row, the longest first; the blocks that are cut; how many slots.

    With ``every`` the blocks that are not cut are a slice each.
    """
    beyond = len(heavy)
    blocks = np.where(heavy, beyond, np.arange(beyond))
    pairs = np.append(blocks, [beyond] * (beyond % 2)).astype(np.int64).reshape(-1, 2)
    pairs = pairs[(pairs < beyond).any(1)]
    items = _blank(pairs, _visits(parts[pairs]))
    found, slots = [items], 0
    splits: list[tuple[int, int, int]] = []
    if every:
        alone = pairs < beyond
        slots = int(alone.sum())
        items[:, 2:4][alone] = np.arange(slots)
        splits += zip(pairs[alone], range(slots), range(1, slots + 1), strict=True)
    for cut in np.flatnonzero(heavy):
        visits = _visits(parts[None, None, cut])
        begins = np.arange(0, visits[0, 1], length)
        part = _blank(np.full((len(begins), 2), cut), np.repeat(visits, len(begins), 0))
        part[:, 2:4] = slots + np.arange(2 * len(begins)).reshape(-1, 2)
        part[:, 4] = begins
        part[:, 5] = np.minimum(begins + length, visits[0, 1])
        part[:, 9] = 1
        found.append(part)
        splits.append((int(cut), slots, slots + 2 * len(begins)))
        slots += 2 * len(begins)
    items = np.concatenate(found)
    cost = (items[:, 5] - items[:, 4]) / (1 + items[:, 9])
    order = np.argsort(-cost, kind="stable")
    return items[order], np.array(splits, np.int64).reshape(-1, 3), slots


def _blank(pairs: Ints, visits: Ints) -> Ints:
    items = np.zeros((len(pairs), COLUMNS), np.int64)
    items[:, 0:2] = pairs
    items[:, 2:4] = -1
    items[:, 4:9] = visits
    return items


def _visits(parts: Ints) -> Ints:
    """What several blocks ``[..., blocks, 8]`` visit together: int ``[..., 5]``, as in an item."""
    runs = []
    for run in (0, 4):
        first, end = parts[..., run], parts[..., run + 1]
        some = first < end
        low = np.where(some, first, np.iinfo(np.int64).max).min(-1)
        runs.append((np.where(some.any(-1), low, 0), np.where(some, end, 0).max(-1)))
    (first, end), (first2, end2) = runs
    # The run that starts earlier comes first, and one that is empty last.
    swap = (first2 < end2) & ((first2 < first) | (first >= end))
    first, first2 = np.where(swap, first2, first), np.where(swap, first, first2)
    end, end2 = np.where(swap, end2, end), np.where(swap, end, end2)
    some = first2 < end2
    joined = some & (first2 <= end)
    end = np.where(joined, np.maximum(end, end2), end)
    count = end - first
    both = count + np.where(some & ~joined, end2 - first2, 0)
    base = np.where(joined, first, first2 - count)
    return np.stack([np.zeros_like(count), both, count, first, base], -1)
