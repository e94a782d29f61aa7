"""Which keys the queries of a pattern reach, as rectangles of blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from hf_attn_plugin.patterns import Pattern, build_schedule
from hf_attn_plugin.patterns.intervals import Intervals, query_intervals

Ints = np.ndarray[Any, np.dtype[np.int64]]

# Tokens of a block, as in the kernels.
BLOCK = 128
# Blocks of a pattern whose schedule is listed: its entries, up to the square, take time.
_MOST_BLOCKS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Rectangles:
    """Queries and keys between which all visible pairs lie, by first query; integers.

    Attributes:
        q_start: First query of each, a few neighbouring ones of one chunk.
        q_stop: End of its queries.
        kv_start: First key.
        kv_stop: End of its keys. Where queries see runs of keys (`patterns.intervals`), every key
            between is seen by one of the queries; else every block of keys may be.
        rows: Batch rows of the pattern, whose rectangles are all here.
    """

    q_start: Ints
    q_stop: Ints
    kv_start: Ints
    kv_stop: Ints
    rows: int

    def _at(self, index: slice | Ints) -> Rectangles:
        fields = (self.q_start, self.q_stop, self.kv_start, self.kv_stop)
        q_start, q_stop, kv_start, kv_stop = (field[index] for field in fields)
        return Rectangles(q_start, q_stop, kv_start, kv_stop, self.rows)

    def by_query(self) -> Rectangles:
        """Sorted by their first query."""
        return self._at(np.argsort(self.q_start, kind="stable"))

    def of_queries(self, queries: range) -> Rectangles:
        """Those of a run of queries that does not cut any."""
        first, last = np.searchsorted(self.q_start, [queries.start, queries.stop])
        return self._at(slice(int(first), int(last)))

    def of_keys(self, keys: range) -> Rectangles:
        """What they have of a run of keys."""
        start = np.maximum(self.kv_start, keys.start)
        stop = np.minimum(self.kv_stop, keys.stop)
        some = start < stop
        return Rectangles(self.q_start[some], self.q_stop[some], start[some], stop[some], self.rows)

    def key_runs(self) -> tuple[Ints, Ints]:
        """Starts and ends of the runs of all keys, ascending and apart."""
        return merged(self.kv_start, self.kv_stop)

    @property
    def visited(self) -> int:
        """Pairs in the blocks of keys that they touch, per batch row."""
        blocks = -(-self.kv_stop // BLOCK) - self.kv_start // BLOCK
        return int(((self.q_stop - self.q_start) * blocks).sum()) * BLOCK // self.rows


def merged(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """Runs, those that overlap or touch made one."""
    if not len(start):
        return start, stop
    order = np.argsort(start, kind="stable")
    start, stop = start[order], np.maximum.accumulate(stop[order])
    begins = np.flatnonzero(np.concatenate([[True], start[1:] > stop[:-1]]))
    ends = np.concatenate([begins[1:] - 1, [len(stop) - 1]])
    return start[begins], stop[ends]


def rectangles_of(pattern: Pattern, chunk: int) -> Rectangles:
    """All pairs of a pattern, made once.

    Args:
        pattern: Any; its tensors are read on the host.
        chunk: No rectangle holds queries of two chunks of so many tokens.
    """
    return pattern.derive(("rectangles", chunk), lambda: _rectangles(pattern, chunk))


def _rectangles(pattern: Pattern, chunk: int) -> Rectangles:
    if not pattern.q_len or not pattern.kv_len:
        nothing = np.zeros(0, np.int64)
        return Rectangles(nothing, nothing, nothing, nothing, 1)
    host = pattern.to("cpu")  # which may be the pattern: kept with itself it would never be freed
    intervals = pattern.derive("host's intervals", lambda: query_intervals(host, "cpu"))
    found = _of_blocks(host, chunk) if intervals is None else _of_runs(intervals, chunk)
    return found.by_query()


def _of_runs(intervals: Intervals, chunk: int) -> Rectangles:
    """Exactly the keys that are seen by some query of every block of queries."""
    tokens = intervals.start.shape[1]
    firsts = np.arange(0, tokens, chunk)[:, None] + np.arange(0, chunk, BLOCK)
    firsts = firsts.ravel()
    runs = [(intervals.start, intervals.length)]
    if intervals.start2 is not None and intervals.length2 is not None:
        runs.append((intervals.start2, intervals.length2))
    found = []
    for starts, lengths in runs:
        for start, length in zip(starts.numpy(), lengths.numpy(), strict=True):
            found.append(_blocks_of_runs(start, start + length, firsts))
    parts = [np.concatenate(column).astype(np.int64) for column in zip(*found, strict=True)]
    return Rectangles(parts[0], parts[1], parts[2], parts[3], intervals.start.shape[0])


def _blocks_of_runs(start: Ints, stop: Ints, firsts: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Rectangles of one run of keys per query: blocks of queries, cut where runs are apart."""
    tokens = len(start)
    seeing = np.flatnonzero(stop > start)
    # Neighbours (those that see nothing left out) whose runs neither overlap nor touch.
    own, other = seeing[1:], seeing[:-1]
    apart = own[(start[own] > stop[other]) | (start[other] > stop[own])]
    begins = np.union1d(firsts, apart)
    low = np.minimum.reduceat(np.where(stop > start, start, np.iinfo(start.dtype).max), begins)
    high = np.maximum.reduceat(np.where(stop > start, stop, 0), begins)
    some = high > 0
    return begins[some], np.append(begins[1:], tokens)[some], low[some], high[some]


def _of_blocks(pattern: Pattern, chunk: int) -> Rectangles:
    """Blocks that may hold a pair."""
    block = _block_size(pattern, chunk)
    schedule = build_schedule(pattern, block, block)
    rows = np.repeat(np.arange(len(schedule.rows) - 1), np.diff(schedule.rows))
    cols = schedule.cols
    # A rectangle begins where a row does, or where the row does not go on with the next block.
    new = (np.diff(rows, prepend=-1) != 0) | (np.diff(cols, prepend=-1) != 1)
    begins = np.flatnonzero(new)
    ends = np.flatnonzero(np.append(new[1:], True)[: len(cols)])
    q_start = rows[begins] * block
    q_stop = np.minimum(q_start + block, pattern.q_len)
    kv_start = cols[begins] * block
    kv_stop = np.minimum((cols[ends] + 1) * block, pattern.kv_len)
    # A block of queries lies in one chunk or in two.
    border = q_stop - 1 - (q_stop - 1) % chunk
    cut = border > q_start
    return Rectangles(
        np.concatenate([q_start, border[cut]]),
        np.concatenate([np.where(cut, border, q_stop), q_stop[cut]]),
        np.concatenate([kv_start, kv_start[cut]]),
        np.concatenate([kv_stop, kv_stop[cut]]),
        1,
    )


def _block_size(pattern: Pattern, chunk: int) -> int:
    """At least BLOCK, a divisor of the chunk if there is one, and few blocks in all."""
    least = min(chunk, max(BLOCK, -(-max(pattern.q_len, pattern.kv_len) // _MOST_BLOCKS)))
    fitting = (size for size in range(least, min(2 * least, chunk) + 1) if chunk % size == 0)
    return next(fitting, least)
