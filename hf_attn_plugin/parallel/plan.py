"""Who needs which keys of whom: plain integers, worked out by every rank alike.

No process and no device takes part. Ranks see the same pattern and the same layout, and so make the
same plan.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.parallel.reach import BLOCK, Ints, Rectangles, merged, rectangles_of
from hf_attn_plugin.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Reached:
    """What a run of queries sees.

    Attributes:
        rows: The queries.
        runs: The keys that any of them sees, ascending and apart.
    """

    rows: range
    runs: tuple[range, ...]

    @property
    def hull(self) -> range:
        """From the first to the last key."""
        return range(self.runs[0].start, self.runs[-1].stop) if self.runs else range(0)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Keys and values that travel, and their gradients back.

    Attributes:
        source: The rank that holds them.
        target: The rank whose queries see them.
        tokens: Which tokens of the sequence.
    """

    source: int
    target: int
    tokens: range


@dataclasses.dataclass(frozen=True)
class Piece:
    """Queries of one rank and keys of one rank between which there are pairs.

    Attributes:
        rows: A run of queries; those before and after it see none of the keys.
        cols: A run of keys.
    """

    rows: range
    cols: range


class Plan:
    """What every rank needs for a pattern under a layout; see `make_plan`.

    Keys are counted in blocks of 128 tokens from the start of their chunk. Where a pattern leaves
    queries with runs of keys (`patterns.intervals`), a block is named if and only if one of its
    keys is seen; else (strides, dilation, scattered global tokens, masks of the caller's own)
    blocks may be larger, and named although no key in them is seen.

    Attributes:
        layout: Which tokens every rank holds.
    """

    def __init__(self, pattern: Pattern, layout: Layout) -> None:
        for name, length in (("queries", pattern.q_len), ("keys", pattern.kv_len)):
            if length != layout.length:
                raise ValueError(
                    f"make_plan: the pattern has {length} {name}, the layout {layout.length} "
                    "tokens; give the pattern of the whole sequence."
                )
        self.layout = layout
        self._rectangles = rectangles_of(pattern, max(layout.chunk, 1))
        self._reached: dict[int, tuple[Reached, ...]] = {}
        self._pieces: dict[tuple[int, int], tuple[Piece, ...]] = {}

    def reached(self, rank: int) -> tuple[Reached, ...]:
        """What each run of a rank's queries (`Layout.runs`) sees."""
        if rank not in self._reached:
            self._reached[rank] = tuple(
                Reached(rows, self._rounded(*self._rectangles.of_queries(rows).key_runs()))
                for rows in self.layout.runs(rank)
            )
        return self._reached[rank]

    @functools.cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """All transfers, by target and then by token: what is seen and not held, and no more."""
        return tuple(
            transfer for target in range(self.layout.ranks) for transfer in self._incoming(target)
        )

    def receives(self, rank: int) -> tuple[Transfer, ...]:
        """What a rank gets, by token."""
        return tuple(t for t in self.transfers if t.target == rank)

    def sends(self, rank: int) -> tuple[Transfer, ...]:
        """What a rank gives, by target and then by token."""
        return tuple(t for t in self.transfers if t.source == rank)

    def pieces(self, rank: int, source: int) -> tuple[Piece, ...]:
        """The pairs of a rank's queries and a rank's keys (its own too), cut into rectangles.

        No pair lies in two. The keys of a piece are all among those of one transfer.
        """
        if (rank, source) not in self._pieces:
            found = []
            for part in self._between(rank, source):
                for keys in self._rounded(*part.key_runs()):
                    seeing = part.of_keys(keys)
                    rows = range(int(seeing.q_start.min()), int(seeing.q_stop.max()))
                    found.append(Piece(rows, keys))
            self._pieces[rank, source] = tuple(found)
        return self._pieces[rank, source]

    def visited(self, rank: int, source: int | None = None) -> int:
        """Pairs in the blocks that a rank visits, per batch row: its work.

        Args:
            rank: The rank of the queries.
            source: The rank of the keys; None for all.
        """
        if source is None:
            return sum(map(self.visited_by, self.layout.runs(rank)))
        return sum(part.visited for part in self._between(rank, source))

    def visited_by(self, rows: range) -> int:
        """The same of a run of queries."""
        return self._rectangles.of_queries(rows).visited

    @property
    def balance(self) -> float:
        """Mean work over the work of the busiest rank: 1 is perfect."""
        work = [self.visited(rank) for rank in range(self.layout.ranks)]
        return sum(work) / (len(work) * max(work)) if max(work) else 1.0

    def describe(self, token_bytes: int | None = None) -> str:
        """The plan in words, a paragraph per rank.

        Args:
            token_bytes: Bytes of a token's keys and values, to name sizes of transfers.
        """
        layout = self.layout
        kind = "contiguous" if layout.chunks == 1 else f"zigzag, {layout.chunks} chunks each"
        lines = [
            f"{layout.length} tokens over {layout.ranks} ranks ({kind}), "
            f"balance {100 * self.balance:.1f} %"
        ]
        every = sum(self.visited(rank) for rank in range(layout.ranks))
        for rank in range(layout.ranks):
            work = self.visited(rank)
            share = 100 * work / every if every else 0.0
            held = _in_words(layout.runs(rank))
            lines.append(f"rank {rank}: tokens {held}; {work} pairs in blocks ({share:.1f} %)")
            for source in range(layout.ranks):
                got = [t.tokens for t in self.receives(rank) if t.source == source]
                if not got:
                    continue
                count = sum(map(len, got))
                size = "" if token_bytes is None else f" ({count * token_bytes / 2**20:.1f} MiB)"
                lines.append(f"  from rank {source}: {count} tokens{size}: {_in_words(got)}")
        return "\n".join(lines)

    def _between(self, rank: int, source: int) -> Iterator[Rectangles]:
        for rows in self.layout.runs(rank):
            own = self._rectangles.of_queries(rows)
            for keys in self.layout.runs(source):
                yield own.of_keys(keys)

    def _incoming(self, target: int) -> Iterator[Transfer]:
        """Walks along what a rank sees, chunk by chunk."""
        layout = self.layout
        runs = [run for reached in self.reached(target) for run in reached.runs]
        bounds = np.array([(run.start, run.stop) for run in runs], np.int64).reshape(-1, 2)
        pending: Transfer | None = None
        for start, stop in zip(*merged(bounds[:, 0], bounds[:, 1]), strict=True):
            for chunk in range(int(start) // layout.chunk, -(-int(stop) // layout.chunk)):
                source = layout.owner(chunk)
                first = max(int(start), chunk * layout.chunk)
                last = min(int(stop), (chunk + 1) * layout.chunk)
                if pending and pending.source == source and pending.tokens.stop == first:
                    first = pending.tokens.start
                elif pending:
                    yield pending
                pending = None if source == target else Transfer(source, target, range(first, last))
        if pending:
            yield pending

    def _rounded(self, start: Ints, stop: Ints) -> tuple[range, ...]:
        """Runs of keys in whole blocks of their chunks, those that touch joined."""
        chunk = max(self.layout.chunk, 1)
        within = start % chunk
        start = start - within % BLOCK
        last = stop - 1 - (stop - 1) % chunk  # where the chunk of the last key begins
        blocks = -(-(stop - last) // BLOCK)
        stop = np.minimum(last + blocks * BLOCK, last + chunk)
        return tuple(range(int(a), int(b)) for a, b in zip(*merged(start, stop), strict=True))


def make_plan(pattern: Pattern, layout: Layout) -> Plan:
    """The plan of a pattern under a layout, made once per pattern.

    Args:
        pattern: Of the whole sequence: as many queries and keys as the layout has tokens.
        layout: Which tokens every rank holds.

    Raises:
        ValueError: The pattern is not that of the whole sequence.
    """
    return pattern.derive(("plan", layout), lambda: Plan(pattern, layout))


def _in_words(runs: list[range] | tuple[range, ...]) -> str:
    shown = [f"{run.start}..{run.stop}" for run in runs[:4]]
    more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    return ", ".join(shown) + more
