"""Keys and values gathered from the ranks that hold them; queries stay where they are.

All-gather of keys and values (as in Llama 3's training, arXiv 2407.21783, section 3.3.2), of which
only those travel that a query of the receiving rank reaches: a window's halo, sink tokens, the
other half of a document. Then each run of queries is one call of `ops.attention` over one run of
keys, by whatever kernel that has. In the backward pass keys' gradients go home and are added there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.parallel.estimates import Shapes, gather_groups
from hf_attn_plugin.parallel.exchange import Exchange, Moves, start_exchange
from hf_attn_plugin.parallel.grouping import groups_of, some_heads
from hf_attn_plugin.parallel.plan import make_plan
from hf_attn_plugin.parallel.shard import Shard
from hf_attn_plugin.parallel.traffic import Return, Traffic, make_traffic, moved, overlap, pieces
from hf_attn_plugin.parallel.wide import Keep, attend
from hf_attn_plugin.patterns import Pattern

# Parts of a sum over tokens: (tokens, ``[tokens, batch, heads, dim]``), which may overlap.
Parts = list[tuple[range, Tensor]]


def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    shard: Shard,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """`sharded_attention` by schedule "gather"; its arguments.

    With ``keep``, gradients of keys and values go there, in float32 or wider, and not to autograd.
    """
    layout, rank = shard.layout, shard.rank
    traffic = pattern.derive(("traffic", layout, rank), lambda: make_traffic(pattern, layout, rank))
    shapes, wanted = Shapes.of(query, key, value), shard.head_groups
    repeated = keep is not None
    count = pattern.derive(
        ("gather groups", layout, shapes, repeated, wanted),
        lambda: gather_groups(make_plan(pattern, layout), shapes, repeated, wanted),
    )
    groups = groups_of(key.shape[1], count)
    per_kv = query.shape[1] // key.shape[1]
    heads = [range(group.start * per_kv, group.stop * per_kv) for group in groups]
    logits = [None] * len(groups)
    if sinks is not None:
        logits = list(sinks.reshape(-1).split([len(own) for own in heads]))
    call = _Call(shard, traffic, groups, keep)
    places = [(own, use.rows) for own in heads for use in traffic.uses]
    queries = iter(_Split.apply(query, places))
    outputs = []
    for number, anchor in enumerate(_Start.apply(key, value, call)):
        arrived = iter(_Finish.apply(anchor, call, number))
        for index, use in enumerate(traffic.uses):
            parts = next(queries), next(arrived), next(arrived)
            own = some_heads(use.pattern, heads[number])
            summed = use.summed or keep is not None
            kept = functools.partial(call.keep, number, index) if summed else None
            output = attend(*parts, own, scaling, softcap, logits[number], kept)
            outputs.append(output)
    return outputs[0] if len(outputs) == 1 else _Join.apply(places, *outputs)


class _Split(torch.autograd.Function):
    """Some heads of some tokens each. Slices would leave autograd with sums of padded parts."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, places: list[tuple[range, range]]) -> tuple[Tensor, ...]:
        ctx.places = places
        return _split(whole, places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _join(ctx.places, grads), None


class _Join(torch.autograd.Function):
    """The inverse of `_Split`."""

    @staticmethod
    def forward(ctx: Any, places: list[tuple[range, range]], *parts: Tensor) -> Tensor:
        ctx.places = places
        return _join(places, parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_split(grad, ctx.places)


def _split(whole: Tensor, places: list[tuple[range, range]]) -> tuple[Tensor, ...]:
    return tuple(whole[:, _cut(heads), _cut(rows)] for heads, rows in places)


def _join(places: list[tuple[range, range]], parts: tuple[Tensor, ...]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    heads, tokens = (max(place[axis].stop for place in places) for axis in (0, 1))
    batch, _, _, dim = parts[0].shape
    # Laid out as models lay out queries and outputs.
    whole = parts[0].new_empty(batch, tokens, heads, dim).transpose(1, 2)
    for part_of, target in zip(parts, _split(whole, places), strict=True):
        target.copy_(part_of)
    return whole


class _Call:
    """What the two autograd functions of one call hand each other, past autograd."""

    def __init__(
        self, shard: Shard, traffic: Traffic, groups: tuple[range, ...], keep_sum: Keep | None
    ) -> None:
        self.shard, self.traffic, self.groups = shard, traffic, groups
        # Takes the sums of gradients where they are added to others.
        self.keep_sum = keep_sum
        # By group of heads: keys, values and their transfers; emptied as they are used.
        self.arriving: dict[int, tuple[Tensor, Tensor, Exchange]] = {}
        # By group: contributions to the gradients of own keys and of own values.
        self.leaving: dict[int, tuple[list[Parts], Exchange]] = {}
        # By group and use: gradients of keys and values that did not go through autograd.
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # Whether keys and values need gradients.
        self.wanted: tuple[bool, ...] = (False, False)

    def keep(self, group: int, use: int, *grads: Tensor) -> None:
        self.kept[group, use] = (grads[0], grads[1])

    def travelling(self, like: Tensor, move: Return) -> Tensor:
        """For gradients that travel."""
        summed = move.summed or self.keep_sum is not None
        dtype = _wide(like.dtype) if summed else like.dtype
        return like.new_empty(len(move.tokens), *like.shape[1:], dtype=dtype)

    def start(self, sends: Moves, receives: Moves) -> Exchange:
        exchange = start_exchange(self.shard.group, sends, receives)
        self.shard.bytes_sent += exchange.bytes_sent
        return exchange


class _Start(torch.autograd.Function):
    """All transfers of a call set out, group by group; in backward, gradients come home.

    Returns a number for each group, so that autograd knows what depends on what: its gradients set
    out when the attention of this group is done, and are waited for when that of all groups is.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, call: _Call) -> tuple[Tensor, ...]:
        ctx.call, ctx.dtype = call, key.dtype
        ctx.shapes = [tensor.shape for tensor in (key, value)]
        call.wanted = tuple(ctx.needs_input_grad[:2])
        traffic = call.traffic
        for group, heads in enumerate(call.groups):
            buffers: list[Tensor] = []
            sends: Moves = []
            receives: Moves = []
            for tensor in (key, value):
                # Token by token: every run of tokens is one piece of memory.
                local = tensor.detach()[:, _cut(heads)].permute(2, 0, 1, 3)
                buffer = _buffer(local, traffic)
                packed = {run: local[_cut(run)].contiguous() for _, run in traffic.sends}
                sends += [(rank, packed[run]) for rank, run in traffic.sends]
                receives += [(rank, buffer[_cut(place)]) for rank, place in traffic.receives]
                buffers.append(buffer)
            call.arriving[group] = (buffers[0], buffers[1], call.start(sends, receives))
        return tuple(key.new_zeros(()) for _ in call.groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        totals: list[Tensor | None] = []
        dtype = ctx.dtype if call.keep_sum is None else _wide(ctx.dtype)
        for wanted, (batch, heads, tokens, dim) in zip(call.wanted, ctx.shapes, strict=True):
            # Laid out as models lay out keys.
            laid_out = grads[0].new_empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
            totals.append(laid_out if wanted else None)
        # In the order in which they set out.
        for group in reversed(range(len(call.groups))):
            contributions, exchange = call.leaving.pop(group)
            exchange.wait()
            for total, parts in zip(totals, contributions, strict=True):
                if total is not None:
                    home = total[:, _cut(call.groups[group])].permute(2, 0, 1, 3)
                    _add_up(parts, range(len(home)), home)
        if call.keep_sum is not None:
            call.keep_sum(*totals)
            return None, None, None
        return totals[0], totals[1], None


class _Finish(torch.autograd.Function):
    """Keys and values of one group of heads, for every use; in backward, gradients set out."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, group: int) -> tuple[Tensor, ...]:
        ctx.call, ctx.group = call, group
        ctx.set_materialize_grads(False)
        keys, values, exchange = call.arriving.pop(group)
        ctx.likes = [buffer.new_empty(0, *buffer.shape[1:]) for buffer in (keys, values)]
        exchange.wait()
        return tuple(
            buffer[_cut(use.cols)].permute(1, 2, 0, 3)
            for use in call.traffic.uses
            for buffer in (keys, values)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        traffic = call.traffic
        uses = range(len(traffic.uses))
        kept = {i: call.kept.pop((ctx.group, i)) for i in uses if (ctx.group, i) in call.kept}
        home: list[Parts] = [[], []]
        sends: Moves = []
        receives: Moves = []
        for which, (wanted, like) in enumerate(zip(call.wanted, ctx.likes, strict=True)):
            if not wanted:
                continue
            made: Parts = [
                (use.cols, grad.permute(2, 0, 1, 3))
                for index, use in enumerate(traffic.uses)
                if (grad := kept.get(index, grads[2 * index : 2 * index + 2])[which]) is not None
            ]
            for move in traffic.leaving:
                sum_of = call.travelling(like, move)
                _add_up(made, move.tokens, sum_of)
                sends.append((move.peer, sum_of))
            for tokens, place in traffic.own:
                for run, grad in made:
                    if both := overlap(run, place):
                        part_of = grad[_cut(moved(both, -run.start))]
                        home[which].append((moved(both, tokens.start - place.start), part_of))
            for move in traffic.returning:
                incoming = call.travelling(like, move)
                receives.append((move.peer, incoming))
                home[which].append((move.tokens, incoming))
        call.leaving[ctx.group] = (home, call.start(sends, receives))
        return ctx.likes[0].new_zeros(()), None, None


def _buffer(local: Tensor, traffic: Traffic) -> Tensor:
    """The rank's buffer with its own tokens in it: these themselves where that is all of it."""
    in_place = len(local) == traffic.length and all(own == place for own, place in traffic.own)
    if in_place and not traffic.receives and not traffic.gaps:
        return local
    buffer = local.new_empty(traffic.length, *local.shape[1:])
    for tokens, place in traffic.own:
        buffer[_cut(place)] = local[_cut(tokens)]
    for gap in traffic.gaps:
        buffer[_cut(gap)] = 0
    return buffer


def _add_up(parts: Parts, tokens: range, out: Tensor) -> None:
    """Sums over ``tokens`` into ``out``, in float32 or wider, in the same order in every run."""
    wide = _wide(out.dtype)
    for piece, which in pieces(tokens, [run for run, _ in parts]):
        target = out[_cut(moved(piece, -tokens.start))]
        own = [parts[index][1][_cut(moved(piece, -parts[index][0].start))] for index in which]
        if len(own) < 2:
            target.copy_(own[0]) if own else target.zero_()
            continue
        total = own[0].to(wide)
        for each in own[1:-1]:
            total = total + each
        torch.add(total, own[-1], out=target)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cut(run: range) -> slice:
    return slice(run.start, run.stop)
