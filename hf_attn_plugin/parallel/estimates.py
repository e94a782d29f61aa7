"""How long the slowest rank takes: pairs in the blocks that it visits, bytes that it sends.

Rates are those measured on H200s (docstrings of the constants); on other GPUs of one host their
ratio is much the same. Nothing but the arguments enters, neither a device nor what is installed, so
that every rank comes to the same numbers. With FlashAttention-4 causal attention takes a tenth less
than estimated, windows as long.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from hf_attn_plugin.parallel.grouping import Load, count_groups
from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.parallel.plan import Plan, Transfer, make_plan
from hf_attn_plugin.parallel.reach import merged
from hf_attn_plugin.parallel.traffic import Calls
from hf_attn_plugin.patterns import Pattern

if TYPE_CHECKING:
    from torch import Tensor

# Bytes per second that a GPU sends, and as many that it receives, over NVLink: measured between two
# H200s. Over the switch of a host, to all others together.
_LINK = 280e9
# Floating-point operations per second of attention in 16 bits over blocks that need no mask.
_FORWARD, _BACKWARD = 600e12, 550e12
# Gradients of keys that several calls see are added. They must come in float32 for that, which the
# fastest kernels cannot: what the backward pass of others takes more, for every doubling of the
# keys that a query sees beyond 2,048, and at most. Measured on H200s for FlashAttention-4's: 64
# documents 1.0 times as long, a window of 4,096 1.12, causal rows of 16,384 tokens 1.24, gathered
# causal keys at 32,768 tokens 1.27, at 131,072 1.28 to 1.36.
_SUMMED, _MOST_SUMMED, _UNSUMMED_KEYS = 0.1, 0.3, 2048
# Bytes per second in a GPU's own memory. An exchange of heads copies what it moves once each way
# (two H200s: 10.8 and 5.8 ms, of them 9.7 and 4.9 on the link).
_MEMORY_RATE = 4.0e12
# The ring's pieces: slower by this factor, plus so many passes over the queries in float32, plus
# seconds of each piece. Fits two H200s within a tenth: causal at 32,768 tokens 33.7 ms, at 131,072
# 524, a window of 4096 at 262,144 72.0, 64 documents at 131,072 17.3.
_RING_PACE, _RING_PASSES, _RING_PIECE = 1.12, 18, 300e-6
# Seconds of a call of attention, forward and backward, beyond its pairs: launches, the ends of
# its grids.
_CALL = 60e-6
# Seconds of a batch of transfers beyond its bytes, and batches of an exchange of heads.
_LATENCY, _EXCHANGES = 30e-6, 4


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

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Shapes:
        """Of tensors ``[batch, heads, tokens, dim]``."""
        return cls(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=query.shape[3],
            value_dim=value.shape[3],
            batch=query.shape[0],
            itemsize=query.element_size(),
        )

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
        groups: Into how many groups a rank's KV heads are split, of which one travels while another
            is computed.
    """

    schedule: str
    ulysses: int
    seconds: float
    hidden: float
    exposed: float
    balance: float
    groups: int = 1

    @property
    def name(self) -> str:
        """What it is, without numbers."""
        between = self.ulysses > 1 and self.schedule != "ulysses"
        name = f"ulysses {self.ulysses} x {self.schedule}" if between else self.schedule
        return name if self.groups == 1 else f"{name} in {self.groups} groups of heads"

    def __str__(self) -> str:
        return (
            f"{self.name} ({1e3 * self.seconds:.1f} ms a layer, {1e3 * self.exposed:.1f} of them "
            f"transfers not hidden, balance {100 * self.balance:.0f} %)"
        )


def ideal_seconds(plan: Plan, shapes: Shapes) -> float:
    """Seconds of perfect balance without transfers, forward and backward."""
    return sum(_work(_all_visited(plan) / plan.layout.ranks, shapes))


def _work(visited: float, shapes: Shapes, wide: float = 0.0) -> tuple[float, float]:
    """Seconds of pairs of one batch row, forward and backward (five products for two).

    Args:
        visited: Pairs.
        shapes: Of what a rank computes.
        wide: What keys' gradients in float32 add to the backward pass, as a share of it.
    """
    operations = 2.0 * visited * shapes.batch * shapes.heads * shapes.dims
    pace = 1.0 if shapes.itemsize >= 4 else 1.0 + wide
    return operations / _FORWARD, 2.5 * operations / _BACKWARD * pace


def _wide(visited: float, queries: int) -> float:
    """What keys' gradients in float32 add to a backward pass, as a share of it."""
    doublings = math.log2(max(1.0, visited / (max(1, queries) * _UNSUMMED_KEYS)))
    return min(_MOST_SUMMED, _SUMMED * doublings)


def _all_visited(plan: Plan) -> int:
    return sum(plan.visited(rank) for rank in range(plan.layout.ranks))


# -- heads for tokens ------------------------------------------------------------------------------


def exchange_groups(
    pattern: Pattern, layout: Layout, shapes: Shapes, ulysses: int, wanted: int | None = None
) -> int:
    """Into how many groups of heads an exchange of heads is split.

    Where another schedule follows, which hides its own transfers, there is one unless another
    number is wanted.

    Args:
        pattern: Of the whole sequence.
        layout: Which tokens every rank holds.
        shapes: Of all heads.
        ulysses: Ranks among which heads are exchanged.
        wanted: See `count_groups`.
    """
    kv_heads = shapes.exchanged(ulysses).kv_heads
    if wanted is None and ulysses < layout.ranks:
        return 1
    key = ("exchange groups", layout, shapes, ulysses, wanted)
    return pattern.derive(
        key,
        lambda: count_groups(kv_heads, _exchange_load(make_plan(pattern, layout), shapes), wanted),
    )


def _exchange_load(plan: Plan, shapes: Shapes) -> Load:
    """Of heads exchanged among all ranks."""
    layout, visited = plan.layout, _all_visited(plan)
    wide = _wide(visited, layout.length) if shapes.kv_heads < layout.ranks else 0.0
    return Load(
        travel=_exchange(shapes, layout.ranks, layout.share),
        work=sum(_work(visited / layout.ranks, shapes, wide)),
        calls=1,
        batches=_EXCHANGES,
        queries=shapes.batch * shapes.heads * layout.share,
    )


def _exchange(shapes: Shapes, ulysses: int, length: int) -> float:
    """Seconds in which heads travel there and back, forward and backward."""
    kv_heads = max(shapes.kv_heads, ulysses)
    token = (shapes.heads + kv_heads) * shapes.dims * shapes.itemsize
    sent = shapes.batch * length * token * (ulysses - 1) / ulysses
    return 2 * sent / _LINK


def _before(shapes: Shapes, ulysses: int, length: int) -> tuple[float, float]:
    """Seconds of an exchange before another schedule: what it exposes, and what it copies."""
    if ulysses == 1:
        return 0.0, 0.0
    seconds = _exchange(shapes, ulysses, length) + _EXCHANGES * _LATENCY
    return seconds, _copies(shapes, ulysses, length)


def _copies(shapes: Shapes, ulysses: int, length: int) -> float:
    """Seconds of putting what is exchanged in order."""
    token = (shapes.heads + max(shapes.kv_heads, ulysses)) * shapes.dims * shapes.itemsize
    return 2 * shapes.batch * length * token / _MEMORY_RATE


def by_heads(plan: Plan, shapes: Shapes) -> Way:
    """Heads exchanged for tokens among all ranks; all groups of heads but one travel meanwhile."""
    layout = plan.layout
    load = _exchange_load(plan, shapes)
    groups = count_groups(shapes.exchanged(layout.ranks).kv_heads, load)
    exposed = load.exposed(groups)
    hidden = load.travel - exposed
    exposed += _EXCHANGES * _LATENCY if layout.ranks > 1 else 0.0
    copies = _copies(shapes, layout.ranks, layout.share) if layout.ranks > 1 else 0.0
    seconds = load.work + exposed + load.extra(groups) + copies + _CALL
    return Way("ulysses", layout.ranks, seconds, hidden, exposed, 1.0, groups)


# -- keys that are gathered ------------------------------------------------------------------------


def gather_groups(
    plan: Plan, shapes: Shapes, repeated: bool = False, wanted: int | None = None
) -> int:
    """Into how many groups of heads gathering is split.

    Args:
        plan: Of the ranks that gather.
        shapes: Of what a rank computes.
        repeated: Whether other ranks have the same KV heads, after an exchange.
        wanted: See `count_groups`.
    """
    return count_groups(shapes.kv_heads, _most(_gather_loads(plan, shapes, repeated)), wanted)


def _gather_loads(plan: Plan, shapes: Shapes, repeated: bool) -> list[Load]:
    """Of every rank."""
    layout = plan.layout
    keys = Calls(plan)
    # Keys and values, and their gradients home in float32.
    token = shapes.batch * shapes.kv_heads * shapes.dims * (shapes.itemsize + 4)
    loads = []
    for rank in range(layout.ranks):
        reached = plan.reached(rank)
        visited = [plan.visited_by(each.rows) for each in reached]
        wide = sum(
            pairs * _wide(pairs, len(each.rows))
            for pairs, each in zip(visited, reached, strict=True)
            if repeated or keys.mostly_shared(each.runs)
        )
        loads.append(
            Load(
                travel=_busiest(plan, rank) * token / _LINK,
                work=sum(_work(sum(visited), shapes, wide / max(1, sum(visited)))),
                calls=len(reached),
                batches=2,
                queries=shapes.batch * shapes.heads * layout.share,
            )
        )
    return loads


def _most(loads: list[Load]) -> Load:
    """Every number of the rank that has the most of it."""
    fields = [field.name for field in dataclasses.fields(Load)]
    return Load(**{name: max(getattr(load, name) for load in loads) for name in fields})


def gathered(plan: Plan, shapes: Shapes, ulysses: int) -> Way:
    """The keys and values of the first group of heads come before all; the others meanwhile."""
    layout, own = plan.layout, shapes.exchanged(ulysses)
    first, copies = _before(shapes, ulysses, layout.share // ulysses)
    loads = _gather_loads(plan, own, repeated=shapes.kv_heads < ulysses)
    groups = count_groups(own.kv_heads, _most(loads))
    slowest, hidden, exposed = 0.0, 0.0, 0.0
    for load in loads:
        waited = load.exposed(groups)
        seen = first + waited + (load.batches * _LATENCY if load.travel else 0.0)
        total = copies + load.work + load.calls * _CALL + load.extra(groups) + seen
        if total > slowest:
            slowest, hidden, exposed = total, load.travel - waited, seen
    return Way("gather", ulysses, slowest, hidden, exposed, plan.balance, groups)


def _busiest(plan: Plan, rank: int) -> int:
    """Tokens that a rank receives or sends, whichever are more."""
    received = sum(len(t.tokens) for t in plan.receives(rank))
    return max(received, sum(len(t.tokens) for t in plan.sends(rank)))


def gathered_bytes(plan: Plan, shapes: Shapes) -> float:
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


# -- keys that come by -----------------------------------------------------------------------------


def ring(plan: Plan, shapes: Shapes, ulysses: int) -> Way:
    """While a rank computes with one rank's keys, those of the next come."""
    layout, own = plan.layout, shapes.exchanged(ulysses)
    first, copies = _before(shapes, ulysses, layout.share // ulysses)
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
            travel = tokens * width / _LINK + (3 * _LATENCY if tokens else 0.0)
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
