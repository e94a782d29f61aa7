"""Linear attention over a sharded sequence: what travels is the state of earlier tokens.

Every rank sums up its keys, run of tokens by run. The state before a run is the sum over all runs
that precede it in the sequence (or over all others, where tokens are seen both ways), so that one
exchange of these sums, whose size does not grow with the sequence, is all that ranks have to say to
each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.linear import check_pattern, feature_map_named, linear_attention
from hf_attn_plugin.ops.linear_backend import LinearBackend
from hf_attn_plugin.ops.linear_state import LinearState
from hf_attn_plugin.ops.torch.linear_features import FeatureMap
from hf_attn_plugin.parallel.exchange import start_exchange
from hf_attn_plugin.parallel.layout import Layout, concatenate
from hf_attn_plugin.parallel.shard import Shard
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.part import part


def ring_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    shard: Shard,
    *,
    feature_map: FeatureMap | str = "elu",
    scaling: float | None = None,
    chunk: int | None = None,
    backend: LinearBackend | None = None,
) -> Tensor:
    """What one process would compute by `ops.linear.linear_attention`, differentiable once.

    A collective call: every rank of the group makes it, forward and backward, in the same order.
    Keys are summed up twice, once for the other ranks and once for their own queries; sums are
    exchanged in float32 (float64 for float64 inputs), and their gradients return.

    Args:
        query: ``[batch, heads, tokens / ranks, head_dim]``, this rank's tokens.
        key: ``[batch, kv_heads, tokens / ranks, head_dim]``.
        value: ``[batch, kv_heads, tokens / ranks, value_dim]``.
        pattern: Of the whole sequence; the same on every rank.
        shard: This rank's part.
        feature_map: As in `linear_attention`.
        scaling: As in `linear_attention`.
        chunk: As in `linear_attention`.
        backend: As in `linear_attention`.

    Returns:
        ``[batch, heads, tokens / ranks, value_dim]`` in the inputs' dtype.

    Raises:
        ValueError: `linear_attention` refuses the pattern, or the tensors are not this rank's share
            of its tokens.
    """
    layout = shard.layout
    _check(query, key, value, pattern, layout)
    if isinstance(feature_map, str):
        feature_map = feature_map_named(feature_map)
    options: dict[str, Any] = {
        "feature_map": feature_map,
        "scaling": scaling,
        "chunk": chunk,
        "backend": backend,
    }
    links = pattern.derive(("links", layout), lambda: _Links.of(pattern, layout))
    own = [unit for unit, rank in links.owner.items() if rank == shard.rank]
    states = {}
    for unit in own:
        if not links.readers_of(unit):
            continue
        # The last query stands for all: what is asked for is the state after it.
        q, k, v = _cut(unit, shard, query, key, value)
        last = _pattern_of(pattern, unit, unit.tokens[-1:])
        _, state = linear_attention(q[:, :, -1:], k, v, last, **options)
        assert state is not None
        states[unit] = state
    like = _like(key, value, feature_map)
    query, states = _exchange(query, key, value, states, like, links, shard)
    outputs: dict[int | None, list[Tensor]] = {}
    for unit in own:
        q, k, v = _cut(unit, shard, query, key, value)
        whole = _pattern_of(pattern, unit, unit.tokens)
        state = _sum(states, links.reads[unit])
        output, _ = linear_attention(q, k, v, whole, state=state, **options)
        outputs.setdefault(unit.row, []).append(output)
    rows = [
        concatenate(outputs[row], 2) if len(outputs[row]) > 1 else outputs[row][0]
        for row in outputs
    ]
    return rows[0] if len(rows) == 1 else concatenate(rows)


def _check(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, layout: Layout) -> None:
    check_pattern(pattern)
    if not pattern.q_len == pattern.kv_len == layout.length:
        raise ValueError(
            f"ring_linear_attention: the pattern must be that of the whole sequence, "
            f"{layout.length} x {layout.length}; got {pattern.q_len} x {pattern.kv_len}."
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape[2] != layout.share:
            raise ValueError(
                f"ring_linear_attention: {name} must hold a rank's {layout.share} tokens, got "
                f"{tuple(tensor.shape)}."
            )


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Neighbouring tokens of one rank that are summed up together.

    Attributes:
        tokens: Of the whole sequence.
        row: The batch row; None: all of them.
    """

    tokens: range
    row: int | None = None


def _cut(unit: _Unit, shard: Shard, *tensors: Tensor) -> list[Tensor]:
    """A unit's tokens of this rank's tensors."""
    local = shard.layout.local(shard.rank, unit.tokens)
    rows = slice(None) if unit.row is None else slice(unit.row, unit.row + 1)
    return [tensor[rows, :, local.start : local.stop] for tensor in tensors]


def _pattern_of(pattern: Pattern, unit: _Unit, queries: range) -> Pattern:
    """Of some queries of a unit, and all of its keys."""

    def make() -> Pattern:
        cols = unit.tokens
        if pattern.causal or pattern.kv_documents is None:
            return part(pattern, queries, cols)
        valid = pattern.key_valid  # of one document, which its queries see whole
        if valid is not None:
            row = (
                slice(None)
                if unit.row is None or valid.shape[0] == 1
                else slice(unit.row, unit.row + 1)
            )
            valid = valid[row, cols.start : cols.stop]
        return Pattern(q_len=len(queries), kv_len=len(cols), causal=False, key_valid=valid)

    return pattern.derive(("part of unit", unit, queries), make)


@dataclasses.dataclass(frozen=True, eq=False)
class _Links:
    """Which units see which others', and who holds them.

    Units are the runs of tokens that ranks hold. Where documents are seen both ways, each document
    has its own in every run.

    Attributes:
        owner: The rank of every unit, in the order of the sequence.
        reads: For every unit the others whose keys its queries see all of, or in some batch rows:
            bool ``[batch or 1, 1]``, in which (None: in all). With documents these are the keys of
            the last one.
    """

    owner: dict[_Unit, int]
    reads: dict[_Unit, dict[_Unit, Tensor | None]]

    @classmethod
    def of(cls, pattern: Pattern, layout: Layout) -> _Links:
        runs = [(run, rank) for rank in range(layout.ranks) for run in layout.runs(rank)]
        runs.sort(key=lambda entry: entry[0].start)
        given = pattern.kv_documents
        if given is None:
            owner = {_Unit(run): rank for run, rank in runs}
            return cls(owner, _all_others(owner, pattern.causal, lambda unit, other: None))
        documents = given.cpu()
        if pattern.causal:
            owner = {_Unit(run): rank for run, rank in runs}

            def shared(unit: _Unit, other: _Unit) -> Tensor:
                # In ascending order: what lies between is of the same document then.
                first, last = unit.tokens.start, other.tokens.stop - 1
                return (documents[:, first, None] == documents[:, last, None]).to(given.device)

            return cls(owner, _all_others(owner, True, shared))
        return cls(*_by_document(documents, runs))

    def readers_of(self, unit: _Unit) -> list[int]:
        """The ranks that need the state of a unit, ascending."""
        return sorted({self.owner[reader] for reader, read in self.reads.items() if unit in read})


def _all_others(
    owner: dict[_Unit, int], causal: bool, shared: Callable[[_Unit, _Unit], Tensor | None]
) -> dict[_Unit, dict[_Unit, Tensor | None]]:
    """Every unit reads those before it, or all others, in the batch rows that they share."""
    units = list(owner)
    reads: dict[_Unit, dict[_Unit, Tensor | None]] = {}
    for place, unit in enumerate(units):
        others = units[:place] + ([] if causal else units[place + 1 :])
        found = {other: shared(unit, other) for other in others}
        reads[unit] = {o: some for o, some in found.items() if some is None or bool(some.any())}
    return reads


def _by_document(
    documents: Tensor, runs: list[tuple[range, int]]
) -> tuple[dict[_Unit, int], dict[_Unit, dict[_Unit, Tensor | None]]]:
    """Owners and reads where every document is a unit of its own in each run that it is in."""
    owner: dict[_Unit, int] = {}
    of_document: dict[tuple[int, int], list[_Unit]] = {}
    for row, numbers in enumerate(documents):
        for run, rank in runs:
            start = run.start
            inside, counts = numbers[run.start : run.stop].unique_consecutive(return_counts=True)
            for number, count in zip(inside.tolist(), counts.tolist(), strict=True):
                tokens = range(start, start + count)
                unit = _Unit(tokens, None if len(documents) == 1 else row)
                owner[unit] = rank
                of_document.setdefault((row, number), []).append(unit)
                start += count
    reads: dict[_Unit, dict[_Unit, Tensor | None]] = {}
    for units in of_document.values():
        reads |= {unit: {other: None for other in units if other != unit} for unit in units}
    return owner, reads


@dataclasses.dataclass(frozen=True)
class _Like:
    """What states look like: sums ``[batch, kv_heads, features, value_dim + 1]``."""

    sums: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    feature_map: FeatureMap

    def empty(self, unit: _Unit) -> tuple[Tensor, Tensor]:
        rows = self.sums[0] if unit.row is None else 1
        return (
            torch.empty(rows, *self.sums[1:], dtype=self.dtype, device=self.device),
            torch.empty(rows, self.sums[1], dtype=self.dtype, device=self.device),
        )


def _like(key: Tensor, value: Tensor, feature_map: FeatureMap) -> _Like:
    sums = (*key.shape[:2], feature_map.width(key.shape[-1]), value.shape[-1] + 1)
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    return _Like(sums, dtype, key.device, feature_map)


def _exchange(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: dict[_Unit, LinearState],
    like: _Like,
    links: _Links,
    shard: Shard,
) -> tuple[Tensor, dict[_Unit, LinearState]]:
    """The query as it is, and this rank's states with those that it needs of others."""
    scales = {unit: state.log_scale for unit, state in states.items()}
    sums = [state.sums for state in states.values()]
    call = _Call(scales, like, links, shard)
    query, *received = _ExchangeSums.apply(query, key, value, call, *sums)
    found = dict(states)
    for (_, unit), tensor in zip(call.incoming, received, strict=True):
        found[unit] = LinearState(tensor, scales[unit], like.feature_map)
    return query, found


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """One exchange of states.

    Attributes:
        scales: Logarithms of the factors of this rank's states, and then of those received.
        like: What states look like.
        links: Who needs whose.
        shard: This rank's part.
    """

    scales: dict[_Unit, Tensor]
    like: _Like
    links: _Links
    shard: Shard

    @property
    def outgoing(self) -> list[tuple[int, _Unit]]:
        """(rank, unit) of the states that this rank sends."""
        rank = self.shard.rank
        return [
            (reader, unit)
            for unit, owner in self.links.owner.items()
            if owner == rank
            for reader in self.links.readers_of(unit)
            if reader != rank
        ]

    @property
    def incoming(self) -> list[tuple[int, _Unit]]:
        """(rank, unit) of the states that this rank receives, in the order of the sequence."""
        rank = self.shard.rank
        return [
            (owner, unit)
            for unit, owner in self.links.owner.items()
            if owner != rank and rank in self.links.readers_of(unit)
        ]


class _ExchangeSums(torch.autograd.Function):
    """States to the ranks that need them; their gradients back, added in the order of ranks.

    The query passes through, so that every rank comes by here on its way back: also one that has
    received nothing, and whose states others have used. Keys and values come along for the case
    that the query needs no gradient: then a rank without states of its own would not come by, and
    the others would wait for its part.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: _Call, *sums: Tensor
    ) -> tuple[Tensor, ...]:
        own = dict(zip(call.scales, sums, strict=True))
        sends = [
            (rank, tensor.contiguous())
            for rank, unit in call.outgoing
            for tensor in (own[unit], call.scales[unit])
        ]
        received = [(rank, unit, *call.like.empty(unit)) for rank, unit in call.incoming]
        receives = [(rank, tensor) for rank, _, *pair in received for tensor in pair]
        exchange = start_exchange(call.shard.group, sends, receives)
        call.shard.bytes_sent += exchange.bytes_sent
        exchange.wait()
        ctx.call, ctx.own = call, list(own)
        for _, unit, _, log_scale in received:
            call.scales[unit] = log_scale
        return query.view_as(query), *(tensor for _, _, tensor, _ in received)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_query: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        sends = [
            (rank, grad.contiguous()) for (rank, _), grad in zip(call.incoming, grads, strict=True)
        ]
        received = [(rank, unit, call.like.empty(unit)[0]) for rank, unit in call.outgoing]
        exchange = start_exchange(
            call.shard.group, sends, [(rank, tensor) for rank, _, tensor in received]
        )
        call.shard.bytes_sent += exchange.bytes_sent
        exchange.wait()
        totals: dict[_Unit, Tensor] = {}
        for _, unit, tensor in received:
            totals[unit] = tensor if unit not in totals else totals[unit] + tensor
        return grad_query, None, None, None, *(totals.get(unit) for unit in ctx.own)


def _sum(states: dict[_Unit, LinearState], reads: dict[_Unit, Tensor | None]) -> LinearState | None:
    """The state of the units that are read, in the batch rows in which they are."""
    if not reads:
        return None
    scales = torch.stack(
        [
            states[unit].log_scale
            if some is None
            else states[unit].log_scale.masked_fill(~some, float("-inf"))
            for unit, some in reads.items()
        ]
    )
    top = scales.amax(0)
    # -inf says that nothing was seen, and -inf - -inf would be NaN.
    factors = torch.exp(scales - torch.where(top.isneginf(), 0.0, top))[..., None, None]
    total: Tensor | None = None
    for unit, factor in zip(reads, factors, strict=True):
        share = states[unit].sums * factor
        total = share if total is None else total + share
    assert total is not None
    return LinearState(total, top, states[next(iter(reads))].feature_map)
