"""Which layout and which schedule: a pure function of patterns, shapes and numbers of ranks.

An estimate of the slowest rank's time decides (`estimates`). Every rank comes to the same choice,
since nothing but the arguments enters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from hf_attn_plugin.parallel.estimates import (
    Shapes,
    Way,
    by_heads,
    gathered,
    gathered_bytes,
    ideal_seconds,
    ring,
)
from hf_attn_plugin.parallel.layout import Layout, padded_length
from hf_attn_plugin.parallel.plan import make_plan
from hf_attn_plugin.patterns import Pattern

SCHEDULES = ("gather", "ring", "ulysses")
# Chunks per rank of the layouts that are considered, from simple to fine.
CHUNKS = (1, 2, 4, 8)

# What is within this share of the best counts as equally fast: then the simpler is taken.
_MARGIN = 0.02

# Bytes of a GPU, and the share that what is gathered in one layer may take of it.
MEMORY = 140e9
GATHERED_SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class Choice:
    """One layout for all layers, and a way for each pattern.

    Attributes:
        layout: Which tokens every rank holds.
        schedule: The schedule of all patterns; None where they differ (`ways`).
        ulysses: Ranks among which heads are exchanged; where schedules differ, before "gather" and
            "ring" alone.
        ways: One for each pattern, in order.
        seconds: Estimated time of all layers.
        reason: Why, in a sentence.
    """

    layout: Layout
    schedule: str | None
    ulysses: int
    ways: tuple[Way, ...]
    seconds: float
    reason: str

    def __str__(self) -> str:
        return f"{_name(self.layout)}: {'; '.join(dict.fromkeys(map(str, self.ways)))}"


def suggested_length(length: int, ranks: int) -> int:
    """What to pad a sequence to, so that it divides under every layout that `choose` considers.

    Chunks are multiples of 128 tokens, as kernels like them, or of less where that would pad by
    more than a fiftieth.
    """
    for multiple in (128, 32, 4):
        padded = padded_length(length, ranks, CHUNKS[-1], multiple)
        if padded - length <= length // 50:
            return padded
    return padded_length(length, ranks, CHUNKS[-1])


def choose(
    patterns: Pattern | Sequence[tuple[Pattern, int]],
    ranks: int,
    shapes: Shapes,
    *,
    schedule: str | None = None,
    ulysses: int | None = None,
    layout: Layout | None = None,
    memory: float = MEMORY,
) -> Choice:
    """The layout, and for every pattern the schedule, with the least estimated time.

    Args:
        patterns: Of the whole sequence, all of one length; with how many layers have each.
        ranks: How many share the sequence.
        shapes: Of a layer.
        schedule: Only this one: ``"ulysses"``, ``"gather"`` or ``"ring"``.
        ulysses: Heads are exchanged among exactly so many ranks.
        layout: Only this one.
        memory: Bytes of the smallest GPU: where other ranks' keys, values and their gradients in
            one layer would take more than 15 % of it, the ring is taken.

    Raises:
        ValueError: Nothing honours what was asked, and why.
    """
    given = [(patterns, 1)] if isinstance(patterns, Pattern) else list(patterns)
    if not given:
        raise ValueError("choose: no pattern given.")
    layouts = [layout] if layout is not None else list(_layouts(given[0][0].q_len, ranks))
    if layouts[0].ranks != ranks:
        raise ValueError(f"choose: a layout of {layouts[0].ranks} ranks was given for {ranks}.")
    factors: list[int | None] = [ulysses]
    if ulysses is None and schedule != "ulysses":
        between = (size for size in range(2, ranks) if ranks % size == 0)
        factors += [size for size in between if shapes.refuses(size) is None]
    ideal = sum(
        ideal_seconds(make_plan(pattern, layouts[0]), shapes) * layers for pattern, layers in given
    )
    best: Choice | None = None
    # From simple to fine: what is equally fast does not replace what came before.
    for candidate in layouts:
        for factor in factors:
            ways = [
                choose_way(
                    pattern, candidate, shapes, schedule=schedule, ulysses=factor, memory=memory
                )
                for pattern, _ in given
            ]
            seconds = sum(w.seconds * layers for w, (_, layers) in zip(ways, given, strict=True))
            if best is None or seconds < best.seconds * (1 - _MARGIN):
                best = _choice(candidate, ways, seconds, ideal)
            if best.seconds <= ideal * (1 + _MARGIN):
                return best
    assert best is not None
    return best


def choose_way(
    pattern: Pattern,
    layout: Layout,
    shapes: Shapes,
    *,
    schedule: str | None = None,
    ulysses: int | None = None,
    memory: float = MEMORY,
) -> Way:
    """The schedule with the least estimated time for one pattern under a layout.

    Args:
        pattern: Of the whole sequence.
        layout: Which tokens every rank holds.
        shapes: Of the layer.
        schedule: Only this one.
        ulysses: Heads are exchanged among exactly so many ranks; None: among all or none.
        memory: See `choose`.

    Raises:
        ValueError: Nothing honours what was asked, and why.
    """
    key = ("way", layout, shapes, schedule, ulysses, memory)
    return pattern.derive(
        key, lambda: _choose_way(pattern, layout, shapes, schedule, ulysses, memory)
    )


def _choose_way(
    pattern: Pattern,
    layout: Layout,
    shapes: Shapes,
    schedule: str | None,
    ulysses: int | None,
    memory: float,
) -> Way:
    _check(layout.ranks, shapes, schedule, ulysses)
    found = []
    whole = schedule in (None, "ulysses") and ulysses in (None, layout.ranks)
    if whole and shapes.refuses(layout.ranks) is None:
        found.append(by_heads(make_plan(pattern, layout), shapes))
    between = 1 if ulysses is None else ulysses
    if schedule != "ulysses" and not (schedule is None and ulysses == layout.ranks > 1):
        plan = make_plan(pattern, layout.grouped(between))
        fits = gathered_bytes(plan, shapes.exchanged(between)) <= memory * GATHERED_SHARE
        if schedule == "gather" or (schedule is None and fits):
            found.append(gathered(plan, shapes, between))
        if schedule == "ring" or (schedule is None and not fits):
            found.append(ring(plan, shapes, between))
    least = min(way.seconds for way in found)
    return next(way for way in found if way.seconds <= least * (1 + _MARGIN))


def _check(ranks: int, shapes: Shapes, schedule: str | None, ulysses: int | None) -> None:
    if schedule not in (None, *SCHEDULES):
        raise ValueError(
            f"choose: schedule must be one of {', '.join(SCHEDULES)}, or None to choose by "
            f"estimated time; got {schedule!r}."
        )
    if ulysses is not None and (ulysses < 1 or ranks % ulysses):
        raise ValueError(f"choose: ulysses must divide the {ranks} ranks, got {ulysses}.")
    if schedule == "ulysses" and ulysses not in (None, ranks):
        raise ValueError(
            f"choose: schedule 'ulysses' exchanges heads among all {ranks} ranks; for "
            f"ulysses={ulysses} ask for 'gather' or 'ring'."
        )
    wanted = ranks if schedule == "ulysses" else ulysses or 1
    refusal = shapes.refuses(wanted)
    if refusal is not None:
        raise ValueError(f"choose: {refusal}; use schedule 'gather' or 'ring' with ulysses=1.")


def _layouts(length: int, ranks: int) -> Iterator[Layout]:
    fitting = [chunks for chunks in CHUNKS if length % (ranks * chunks) == 0]
    if ranks == 1 and fitting:
        fitting = [1]
    if not fitting:
        Layout(length, ranks)  # says what to pad to
    for chunks in fitting:
        yield Layout(length, ranks, chunks)


def _choice(layout: Layout, ways: list[Way], seconds: float, ideal: float) -> Choice:
    schedules = {way.schedule for way in ways}
    names = " and ".join(sorted({way.name for way in ways}))
    more = f"{1e3 * (seconds - ideal):.2f} ms"
    if seconds < 2 * ideal:  # a share of next to nothing says nothing
        more += f" ({100 * (seconds / ideal - 1):.1f} %)"
    reason = (
        f"{_name(layout)}, {names}: estimated {1e3 * seconds:.2f} ms of attention a step, {more} "
        "above perfect balance without transfers"
    )
    # Where some exchange heads among all and others not at all, that is the schedule's part.
    factors = {way.ulysses for way in ways if len(schedules) == 1 or way.schedule != "ulysses"}
    schedule = ways[0].schedule if len(schedules) == 1 else None
    return Choice(layout, schedule, max(factors), tuple(ways), seconds, reason)


def _name(layout: Layout) -> str:
    kind = "contiguous" if layout.chunks == 1 else f"zigzag of {layout.chunks} chunks a rank"
    return f"{kind} over {layout.ranks} ranks"
