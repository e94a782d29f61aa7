"""What one rank sends, receives and computes by schedule "gather": plain integers."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.parallel.plan import Plan, make_plan
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.part import part


@dataclasses.dataclass(frozen=True)
class Use:
    """One call of attention.

    Attributes:
        rows: Its queries among the rank's tokens.
        cols: Its keys in the rank's buffer.
        pattern: Which of them attend.
        summed: Whether to keys that are more than a few, other calls contribute gradients too.
    """

    rows: range
    cols: range
    pattern: Pattern
    summed: bool


@dataclasses.dataclass(frozen=True)
class Return:
    """Gradients of some keys on their way home.

    Attributes:
        peer: The rank where they go, or from where they come.
        tokens: In the buffer of the rank that sends, among the own tokens of the one that receives.
        summed: Whether other calls, of any rank, contribute to the same keys' gradients: these
            travel in float32 and are rounded once, at home.
    """

    peer: int
    tokens: range
    summed: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one rank sends, receives and computes; token ranges, without a tensor.

    The rank's buffer has for every run of its queries the keys from the first to the last that
    they reach. Those in between that none of them reaches (between a window and far away sink
    tokens) do not travel and are zero.

    Attributes:
        length: Keys in the buffer.
        own: Runs of the rank's own tokens that it reaches, and their places in the buffer.
        gaps: Runs of the buffer that nobody fills.
        sends: Rank, and which of the own tokens it gets.
        receives: Rank, and where in the buffer its tokens go.
        leaving: Gradients of what was received.
        returning: Gradients of what was sent.
        uses: The calls of attention.
    """

    length: int
    own: tuple[tuple[range, range], ...]
    gaps: tuple[range, ...]
    sends: tuple[tuple[int, range], ...]
    receives: tuple[tuple[int, range], ...]
    leaving: tuple[Return, ...]
    returning: tuple[Return, ...]
    uses: tuple[Use, ...]


def make_traffic(pattern: Pattern, layout: Layout, rank: int) -> Traffic:
    """What a rank has to do for attention over ``pattern``, the whole sequence's."""
    plan = make_plan(pattern, layout)
    calls = Calls(plan)
    places = _Places([each.hull for each in plan.reached(rank)])
    own = [
        (layout.local(rank, both), places.of(both))
        for run in layout.runs(rank)
        for island in places.islands
        if (both := overlap(run, island))
    ]
    receives = [(move.source, places.of(move.tokens)) for move in plan.receives(rank)]
    return Traffic(
        length=places.length,
        own=tuple(own),
        gaps=_gaps([place for _, place in own + receives], places.length),
        sends=tuple((move.target, layout.local(rank, move.tokens)) for move in plan.sends(rank)),
        receives=tuple(receives),
        leaving=tuple(
            Return(move.source, places.of(tokens), summed)
            for move in plan.receives(rank)
            for tokens, summed in calls.shared(move.tokens)
        ),
        returning=tuple(
            Return(move.target, layout.local(rank, tokens), summed)
            for move in plan.sends(rank)
            for tokens, summed in calls.shared(move.tokens)
        ),
        uses=tuple(
            Use(
                layout.local(rank, each.rows),
                places.of(each.hull),
                part(pattern, each.rows, each.hull),
                calls.mostly_shared(each.runs),
            )
            for each in plan.reached(rank)
        ),
    )


class _Places:
    """A rank's buffer: the hulls of what its runs of queries reach, one after another.

    Attributes:
        islands: The hulls, those that overlap or touch joined, ascending.
    """

    def __init__(self, hulls: list[range]) -> None:
        self.islands: list[range] = []
        for hull in sorted((hull for hull in hulls if hull), key=lambda hull: hull.start):
            if self.islands and hull.start <= self.islands[-1].stop:
                last = self.islands.pop()
                hull = range(last.start, max(last.stop, hull.stop))
            self.islands.append(hull)

    @property
    def length(self) -> int:
        return sum(map(len, self.islands))

    def of(self, tokens: range) -> range:
        """Where a run of tokens, all of one island, lies."""
        before = 0
        for island in self.islands:
            if tokens and tokens.start < island.stop:
                return moved(tokens, before - island.start)
            before += len(island)
        return range(0)


class Calls:
    """How many calls of attention, of all ranks together, reach each key."""

    def __init__(self, plan: Plan) -> None:
        runs = [
            run
            for rank in range(plan.layout.ranks)
            for each in plan.reached(rank)
            for run in each.runs
        ]
        self.starts = np.sort([run.start for run in runs])
        self.stops = np.sort([run.stop for run in runs])
        self.edges = np.union1d(self.starts, self.stops)

    def shared(self, tokens: range) -> list[tuple[range, bool]]:
        """``tokens``, cut into those that several calls reach and those that one does."""
        first, last = np.searchsorted(self.edges, [tokens.start + 1, tokens.stop])
        edges = [tokens.start, *self.edges[first:last].tolist(), tokens.stop]
        begun = np.searchsorted(self.starts, edges[:-1], side="right")
        several = begun - np.searchsorted(self.stops, edges[:-1], side="right") > 1
        cut: list[tuple[range, bool]] = []
        for (start, stop), many in zip(itertools.pairwise(edges), several.tolist(), strict=True):
            if cut and cut[-1][1] == many:
                start = cut.pop()[0].start
            cut.append((range(start, stop), many))
        return cut

    def mostly_shared(self, runs: tuple[range, ...]) -> bool:
        """Whether several calls reach more than an eighth of some runs of keys."""
        many = sum(len(piece) for run in runs for piece, several in self.shared(run) if several)
        return many * 8 > sum(map(len, runs))


def pieces(tokens: range, runs: list[range]) -> list[tuple[range, list[int]]]:
    """``tokens`` cut where one of the runs begins or ends, and which runs hold each piece."""
    begins: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for index, run in enumerate(runs):
        if both := overlap(tokens, run):
            begins.setdefault(both.start, []).append(index)
            ends.setdefault(both.stop, []).append(index)
    held: set[int] = set()
    found = []
    for start, stop in itertools.pairwise(sorted({tokens.start, tokens.stop, *begins, *ends})):
        held = held.difference(ends.get(start, ())).union(begins.get(start, ()))
        found.append((range(start, stop), sorted(held)))
    return found


def overlap(first: range, second: range) -> range:
    """The tokens of both runs; empty where there are none."""
    both = range(max(first.start, second.start), min(first.stop, second.stop))
    return both if both else range(0)


def moved(tokens: range, by: int) -> range:
    """A run of tokens elsewhere."""
    return range(tokens.start + by, tokens.stop + by)


def _gaps(filled: list[range], length: int) -> tuple[range, ...]:
    """What of ``range(length)`` is in none of the runs."""
    gaps, at = [], 0
    for run in sorted(filled, key=lambda run: run.start):
        if run.start > at:
            gaps.append(range(at, run.start))
        at = max(at, run.stop)
    return tuple([*gaps, range(at, length)] if at < length else gaps)
