"""Which layout and which schedule: a pure function of patterns, shapes and numbers of ranks.

An estimate of the slowest rank's time decides: the pairs in the blocks that it visits, and what it
sends and receives without computing meanwhile. Rates are those measured on H200s (docstrings of the
constants); on other GPUs of one host their ratio is much the same. Every rank comes to the same
choice, since nothing but the arguments enters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from hf_attn_plugin.parallel.layout import Layout, padded_length
from hf_attn_plugin.parallel.plan import Plan, Transfer, make_plan
from hf_attn_plugin.parallel.reach import merged
from hf_attn_plugin.patterns import Pattern

SCHEDULES = ("gather", "ring", "ulysses")
# Chunks per rank of the layouts that are considered, from simple to fine.
CHUNKS = (1, 2, 4, 8)

# Bytes per second that a GPU sends, and as many that it receives, over NVLink: measured between two
# H200s. Over the switch of a host, to all others together.
_LINK = 280e9
# Floating-point operations per second of attention in 16 bits over blocks that need no mask.
_FORWARD, _BACKWARD = 600e12, 550e12
# Gradients of keys that several calls see are added. They must come in float32 for that, which the
# fastest kernels cannot: what others cost more where all keys are such (14.6 ms for 12.6 of
# FlashAttention-4, causal, 16,384 tokens).
_SUMMED = 0.12
# Bytes per second in a GPU's own memory. An exchange of heads copies what it moves once each way
# (two H200s: 10.8 and 5.8 ms, of them 9.7 and 4.9 on the link).
_MEMORY_RATE = 4.0e12
# The ring's pieces: slower by this factor, plus so many passes over the queries in float32, plus
# seconds of each piece. Fits two H200s within a tenth: causal at 32,768 tokens 36 ms where
# gathering takes 31, at 131,072 548 for 516, a window of 4096 at 262,144 73 to 76 for 62.
_RING_PACE, _RING_PASSES, _RING_PIECE = 1.05, 18, 300e-6
# Seconds of a call of attention, forward and backward, beyond its pairs: launches, the ends of
# its grids.
_CALL = 60e-6
# Seconds of a batch of transfers beyond its bytes.
_EXCHANGE = 30e-6
# Into how many groups of KV heads gathering is cut at most; all but the first travel meanwhile.
_HEAD_GROUPS = 4
# What is within this share of the best counts as equally fast: then the simpler is taken.
_MARGIN = 0.02

# Bytes of a GPU, and the share that what is gathered in one layer may take of it.
MEMORY = 140e9
GATHERED_SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of attention in one process.

    Attributes:
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Of queries and keys.
        value_dim: Of values; None: as ``head_dim``.
        batch: Rows.
        itemsize: Bytes of a number.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    batch: int = 1
    itemsize: int = 2

    def __post_init__(self) -> None:
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"Shapes: heads must be a multiple of kv_heads, got {self.heads} and "
                f"{self.kv_heads}."
            )

    @property
    def dims(self) -> int:
        """Numbers in a key and a value."""
        return self.head_dim + (self.head_dim if self.value_dim is None else self.value_dim)

    def exchanged(self, ranks: int) -> Shapes:
        """What a rank computes with after heads were exchanged for tokens among ``ranks``."""
        return dataclasses.replace(
            self, heads=self.heads // ranks, kv_heads=max(self.kv_heads, ranks) // ranks
        )

    def refuses(self, ulysses: int) -> str | None:
        """Why heads cannot be exchanged among so many ranks; None if they can."""
        if self.heads % ulysses:
            return f"{self.heads} heads do not divide among {ulysses} ranks"
        if self.kv_heads % ulysses and ulysses % self.kv_heads:
            return (
                f"{self.kv_heads} KV heads neither divide among {ulysses} ranks nor repeat evenly"
            )
        return None


@dataclasses.dataclass(frozen=True)
class Way:
    """How one pattern is computed under a layout.

    Attributes:
        schedule: ``"ulysses"``: heads for tokens among all ranks; ``"gather"``: keys and values
            that are needed come first; ``"ring"``: they come while others are computed with.
        ulysses: Ranks among which heads are exchanged first: all, 1 for none, or between.
        seconds: Estimated time of the slowest rank, forward and backward.
        hidden: Seconds of transfers that computation hides.
        exposed: Seconds of transfers that it does not, which are part of ``seconds``.
        balance: Mean work over the work of the busiest rank.
    """

    schedule: str
    ulysses: int
    seconds: float
    hidden: float
    exposed: float
    balance: float

    def __str__(self) -> str:
        between = self.ulysses > 1 and self.schedule != "ulysses"
        name = f"ulysses {self.ulysses} x {self.schedule}" if between else self.schedule
        return (
            f"{name} ({1e3 * self.seconds:.1f} ms a layer, {1e3 * self.exposed:.1f} of them "
            f"transfers not hidden, balance {100 * self.balance:.0f} %)"
        )


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
    ideal = sum(_ideal(pattern, layouts[0], shapes) * layers for pattern, layers in given)
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
    by_heads = schedule in (None, "ulysses") and ulysses in (None, layout.ranks)
    if by_heads and shapes.refuses(layout.ranks) is None:
        found.append(_by_heads(make_plan(pattern, layout), shapes, layout.ranks))
    between = 1 if ulysses is None else ulysses
    if schedule != "ulysses" and not (schedule is None and ulysses == layout.ranks > 1):
        plan = make_plan(pattern, layout.grouped(between))
        fits = _gathered_bytes(plan, shapes.exchanged(between)) <= memory * GATHERED_SHARE
        if schedule == "gather" or (schedule is None and fits):
            found.append(_gathered(plan, shapes, between))
        if schedule == "ring" or (schedule is None and not fits):
            found.append(_ring(plan, shapes, between))
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
    percent = 100 * (seconds / ideal - 1) if ideal else 0.0
    reason = (
        f"{_name(layout)}, {' and '.join(sorted(schedules))}: estimated {1e3 * seconds:.1f} ms, "
        f"{percent:.1f} % above perfect balance without transfers"
    )
    # Where some exchange heads among all and others not at all, that is the schedule's part.
    factors = {way.ulysses for way in ways if len(schedules) == 1 or way.schedule != "ulysses"}
    schedule = ways[0].schedule if len(schedules) == 1 else None
    return Choice(layout, schedule, max(factors), tuple(ways), seconds, reason)


def _name(layout: Layout) -> str:
    kind = "contiguous" if layout.chunks == 1 else f"zigzag of {layout.chunks} chunks a rank"
    return f"{kind} over {layout.ranks} ranks"


# -- estimates -------------------------------------------------------------------------------------


def _work(visited: float, shapes: Shapes) -> tuple[float, float]:
    """Seconds of pairs of one batch row, forward and backward (five products for two)."""
    operations = 2.0 * visited * shapes.batch * shapes.heads * shapes.dims
    return operations / _FORWARD, 2.5 * operations / _BACKWARD


def _ideal(pattern: Pattern, layout: Layout, shapes: Shapes) -> float:
    plan = make_plan(pattern, layout)
    return sum(_work(_all_visited(plan) / layout.ranks, shapes))


def _all_visited(plan: Plan) -> int:
    return sum(plan.visited(rank) for rank in range(plan.layout.ranks))


def _exchange(layout: Layout, shapes: Shapes, ulysses: int, length: int) -> float:
    """Seconds of exchanging heads for tokens and back, forward and backward."""
    if ulysses == 1:
        return 0.0
    kv_heads = max(shapes.kv_heads, ulysses)
    token = (shapes.heads + kv_heads) * shapes.dims * shapes.itemsize
    sent = shapes.batch * length * token * (ulysses - 1) / ulysses
    return 2 * (sent / _LINK + 2 * _EXCHANGE)


def _copies(shapes: Shapes, ulysses: int, length: int) -> float:
    """Seconds of putting what is exchanged in order."""
    if ulysses == 1:
        return 0.0
    token = (shapes.heads + max(shapes.kv_heads, ulysses)) * shapes.dims * shapes.itemsize
    return 2 * shapes.batch * length * token / _MEMORY_RATE


def _by_heads(plan: Plan, shapes: Shapes, ranks: int) -> Way:
    work = sum(_work(_all_visited(plan) / ranks, shapes))
    exposed = _exchange(plan.layout, shapes, ranks, plan.layout.share)
    copies = _copies(shapes, ranks, plan.layout.share)
    return Way("ulysses", ranks, work + exposed + copies + _CALL, 0.0, exposed, 1.0)


def _gathered(plan: Plan, shapes: Shapes, ulysses: int) -> Way:
    """The keys and values of the first group of heads come before all; the others meanwhile."""
    layout, own = plan.layout, shapes.exchanged(ulysses)
    groups = min(own.kv_heads, _HEAD_GROUPS)
    pace = 1.0 if own.itemsize >= 4 else 1.0 + _SUMMED * _summed_share(plan)
    first = _exchange(layout, shapes, ulysses, layout.share // ulysses)
    copies = _copies(shapes, ulysses, layout.share // ulysses)
    slowest, hidden, exposed = 0.0, 0.0, 0.0
    for rank in range(layout.ranks):
        works = _work(plan.visited(rank), own)
        calls = _CALL * len(plan.reached(rank)) * groups
        seen, unseen = 0.0, 0.0
        for work, width in zip(works, (own.itemsize, 4), strict=True):
            travel = _busiest(plan, rank) * own.batch * own.kv_heads * own.dims * width / _LINK
            waited = travel / groups + max(0.0, (travel - work) * (1 - 1 / groups))
            seen += waited + (_EXCHANGE if travel else 0.0)
            unseen += travel - waited
        total = first + copies + pace * sum(works) + calls + seen
        if total > slowest:
            slowest, hidden, exposed = total, unseen, first + seen
    return Way("gather", ulysses, slowest, hidden, exposed, plan.balance)


def _ring(plan: Plan, shapes: Shapes, ulysses: int) -> Way:
    """While a rank computes with one rank's keys, those of the next come."""
    layout, own = plan.layout, shapes.exchanged(ulysses)
    first = _exchange(layout, shapes, ulysses, layout.share // ulysses)
    copies = _copies(shapes, ulysses, layout.share // ulysses)
    # Once over a rank's queries.
    sweep = 4.0 * own.batch * own.heads * layout.share * own.dims / 2 / _MEMORY_RATE
    slowest, hidden, exposed = 0.0, 0.0, 0.0
    for rank in range(layout.ranks):
        total, seen, unseen, before = first + copies + _RING_PASSES * sweep, first, 0.0, 0.0
        for step in range(layout.ranks):
            source = (rank - step) % layout.ranks
            tokens = _tokens(plan.receives(rank), source)
            # Keys and values twice, and their gradients home in float32.
            width = own.batch * own.kv_heads * own.dims * (2 * own.itemsize + 4)
            travel = tokens * width / _LINK + (3 * _EXCHANGE if tokens else 0.0)
            waited = max(0.0, travel - before)
            before = _RING_PACE * sum(_work(plan.visited(rank, source), own))
            before += _RING_PIECE * len(plan.pieces(rank, source))
            total += waited + before
            seen += waited
            unseen += travel - waited
        if total > slowest:
            slowest, hidden, exposed = total, unseen, seen
    return Way("ring", ulysses, slowest, hidden, exposed, plan.balance)


def _tokens(transfers: tuple[Transfer, ...], source: int) -> int:
    return sum(len(t.tokens) for t in transfers if t.source == source)


def _busiest(plan: Plan, rank: int) -> int:
    """Tokens that a rank receives or sends, whichever are more."""
    received = sum(len(t.tokens) for t in plan.receives(rank))
    return max(received, sum(len(t.tokens) for t in plan.sends(rank)))


def _summed_share(plan: Plan) -> float:
    """Keys that several runs of queries see, as a share of all."""
    runs = [
        run for rank in range(plan.layout.ranks) for each in plan.reached(rank) for run in each.runs
    ]
    edges = np.array([run.start for run in runs] + [run.stop for run in runs], np.int64)
    order = np.argsort(edges, kind="stable")
    seen_by = np.cumsum(np.repeat([1, -1], len(runs))[order])
    several = np.diff(edges[order])[seen_by[:-1] > 1]
    return float(several.sum()) / plan.layout.length if runs else 0.0


def _gathered_bytes(plan: Plan, shapes: Shapes) -> float:
    """Keys, values and their float32 gradients, beyond a rank's own.

    What a run of queries sees is held from the first token to the last.
    """
    token = shapes.batch * shapes.kv_heads * shapes.dims * (shapes.itemsize + 4)
    most = 0
    for rank in range(plan.layout.ranks):
        hulls = [(reached.hull.start, reached.hull.stop) for reached in plan.reached(rank)]
        bounds = np.array(hulls, np.int64)
        start, stop = merged(bounds[:, 0], bounds[:, 1])
        most = max(most, int((stop - start).sum()) - plan.layout.share)
    return most * token
