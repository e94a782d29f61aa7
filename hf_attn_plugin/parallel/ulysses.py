"""Heads exchanged for tokens: every rank gets all tokens of some heads, and back.

DeepSpeed-Ulysses (arXiv 2309.14509): between two exchanges attention is what one process does. Of
several groups of heads all set out at once; while one is computed, the next comes and the results
of the last go home.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_attn_plugin.parallel.exchange import Exchange, Moves, start_exchange
from hf_attn_plugin.parallel.grouping import groups_of, some_heads
from hf_attn_plugin.parallel.layout import concatenate
from hf_attn_plugin.parallel.shard import Shard
from hf_attn_plugin.parallel.wide import Keep
from hf_attn_plugin.patterns import Pattern

# The heads of one tensor, by rank.
Shares = tuple[range, ...]


@dataclasses.dataclass(frozen=True)
class Heads:
    """Which heads each of some ranks computes.

    Where there are fewer KV heads than ranks, a KV head goes to several of them.

    Attributes:
        query: Query heads by rank.
        kv: KV heads by rank.
    """

    query: Shares
    kv: Shares

    @classmethod
    def among(cls, ranks: int, heads: int, kv_heads: int) -> Heads:
        """Equal numbers of heads for every rank.

        Raises:
            ValueError: The heads do not divide.
        """
        if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
            raise ValueError(
                f"ulysses: {heads} query heads and {kv_heads} KV heads cannot be shared by {ranks} "
                f"ranks: the query heads must be a multiple of the ranks, and the KV heads a "
                f"multiple or a divisor. Use a smaller ulysses, or schedule 'gather' or 'ring'."
            )
        own, own_kv = heads // ranks, max(1, kv_heads // ranks)
        first_kv = [rank * kv_heads // ranks for rank in range(ranks)]
        return cls(
            tuple(range(rank * own, (rank + 1) * own) for rank in range(ranks)),
            tuple(range(first, first + own_kv) for first in first_kv),
        )

    def groups(self, count: int) -> tuple[Heads, ...]:
        """The same in groups: of every rank's heads an equal part."""
        return tuple(
            Heads(_part(self.query, number, count), _part(self.kv, number, count))
            for number in range(count)
        )


def _part(shares: Shares, number: int, count: int) -> Shares:
    return tuple(share[_cut(groups_of(len(share), count)[number])] for share in shares)


class Compute(Protocol):
    """Attention of some heads over the tokens of a group of ranks."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        sinks: Tensor | None,
        keep: Keep | None,
        /,
    ) -> Tensor:
        """The output; ``keep`` as in `wide.attend`."""


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    shard: Shard,
    groups: tuple[Heads, ...],
    compute: Compute,
    *,
    sinks: Tensor | None,
) -> Tensor:
    """`sharded_attention` with heads exchanged for tokens among ``shard.ulysses`` neighbours.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, this rank's tokens.
        key: ``[batch, kv_heads, tokens, head_dim]``.
        value: ``[batch, kv_heads, tokens, value_dim]``.
        pattern: Of the whole sequence.
        shard: This rank's part.
        groups: Which heads are exchanged together (`Heads.groups`); one group where several ranks
            have the same KV head.
        compute: What is done between the exchanges, with the neighbours' tokens in global order.
            Called for each group; all ranks must send in one order there, too.
        sinks: ``[heads]``, or None.

    Returns:
        ``[batch, heads, tokens, value_dim]``.
    """
    call = _Call(shard, groups)
    own = [heads.query[shard.rank % shard.ulysses] for heads in groups]
    logits: Sequence[Tensor | None] = [None] * len(groups)
    if sinks is not None:
        logits = sinks[own[0].start : own[-1].stop].split([len(each) for each in own])
    # Where several ranks have the same KV head, gradients stay float32 until they are added.
    keep = call.keep if key.shape[1] < shard.ulysses else None
    leaving = []
    for number, anchor in enumerate(_Start.apply(query, key, value, call)):
        some_query, *keys = _Arrive.apply(anchor, call, number)
        output = compute(
            some_query, keys[0], keys[1], some_heads(pattern, own[number]), logits[number], keep
        )
        leaving.append(_Leave.apply(output, call, number))
    return _Finish.apply(call, *leaving)


class _Call:
    """What the autograd functions of one call hand each other, past autograd.

    Transfers are held here from the function that starts them to the one that waits for them.
    """

    def __init__(self, shard: Shard, groups: tuple[Heads, ...]) -> None:
        self.shard, self.groups = shard, groups
        # Gradients of keys and values that did not go through autograd.
        self.kept: Sequence[Tensor | None] = (None, None)
        # Which of queries, keys and values need gradients.
        self.wanted: tuple[bool, ...] = (False, False, False)
        # By group: queries, keys and values, or the gradient of the output, coming.
        self.coming: dict[int, tuple[list[Tensor], Exchange]] = {}
        # By group: the output, or gradients, going home: by tensor what comes from every rank.
        self.going: dict[int, tuple[list[list[Tensor]], Exchange]] = {}

    def keep(self, *grads: Tensor | None) -> None:
        """For `wide.attend`."""
        self.kept = grads

    def come(self, group: int, shares: Sequence[Shares], tensors: Sequence[Tensor]) -> None:
        """Set out: of every tensor this rank's heads, over all tokens."""
        made, sends, receives = _to_heads(self.shard, shares, tensors)
        self.coming[group] = made, self._start(sends, receives)

    def go(self, group: int, tensors: Sequence[Tensor]) -> None:
        """Set out: of every tensor this rank's tokens, from the ranks that have their heads."""
        made, sends, receives = _to_tokens(self.shard, tensors)
        self.going[group] = made, self._start(sends, receives)

    def arrived(self, group: int) -> list[Tensor]:
        """What `come` sent for, when it is here."""
        made, exchange = self.coming.pop(group)
        exchange.wait()
        return made

    def home(self, order: Sequence[int], heads: Sequence[Sequence[Shares]]) -> list[Tensor]:
        """What `go` sent for, when it is here: of every tensor all heads.

        Args:
            order: The groups as they set out.
            heads: Whose are the heads, by group and tensor.
        """
        parts: list[list[tuple[range, Tensor]]] = [[] for _ in heads[0]]
        for group in order:
            made, exchange = self.going.pop(group)
            exchange.wait()
            for own, arrived, shares in zip(parts, made, heads[group], strict=True):
                own += zip(shares, arrived, strict=True)
        return [_all_heads(own) for own in parts]

    @property
    def backwards(self) -> list[int]:
        """The groups as autograd goes through them."""
        return list(reversed(range(len(self.groups))))

    def _start(self, sends: Moves, receives: Moves) -> Exchange:
        exchange = start_exchange(self.shard.neighbours, sends, receives)
        self.shard.bytes_sent += exchange.bytes_sent
        return exchange


class _Start(torch.autograd.Function):
    """Queries, keys and values of all groups set out; in backward, their gradients are home.

    Returns a number for each group, so that autograd knows what depends on what.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: _Call
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.dtype = call, query.dtype
        call.wanted = ctx.needs_input_grad[:3]
        for group, heads in enumerate(call.groups):
            call.come(group, (heads.query, heads.kv, heads.kv), (query, key, value))
        return tuple(query.new_zeros(()) for _ in call.groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        heads = [_some((own.query, own.kv, own.kv), call.wanted) for own in call.groups]
        home = iter(call.home(call.backwards, heads))
        return *(next(home).to(ctx.dtype) if wanted else None for wanted in call.wanted), None


class _Arrive(torch.autograd.Function):
    """A group's queries, keys and values are here; in backward, their gradients set out."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, group: int) -> tuple[Tensor, ...]:
        ctx.call, ctx.group = call, group
        return tuple(call.arrived(group))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, query: Tensor, *keys: Tensor) -> tuple[Tensor, None, None]:
        call: _Call = ctx.call
        kept, call.kept = call.kept, (None, None)
        keys = tuple(grad if own is None else own for own, grad in zip(kept, keys, strict=True))
        call.go(ctx.group, _some((query, *keys), call.wanted))
        return query.new_zeros(()), None, None


class _Leave(torch.autograd.Function):
    """A group's output sets out; in backward, its gradient is here.

    Returns a number, as `_Start` does.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, call: _Call, group: int) -> Tensor:
        ctx.call, ctx.group = call, group
        call.go(group, [output])
        return output.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.call.arrived(ctx.group)[0], None, None


class _Finish(torch.autograd.Function):
    """The output of all groups is home; in backward, its gradients set out."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *leaving: Tensor) -> Tensor:
        ctx.call = call
        if len(leaving) > 1:
            # What is computed again for a checkpoint ends with the last tensor that was saved. Here
            # nothing is on its way any more.
            ctx.save_for_backward(*leaving)
        groups = range(len(call.groups))
        return call.home(groups, [[heads.query] for heads in call.groups])[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        # The last group first, as autograd goes through them.
        for group in call.backwards:
            call.come(group, [call.groups[group].query], [grad])
        return None, *(grad.new_zeros(()) for _ in call.groups)


def _some(things: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    return [thing for thing, want in zip(things, wanted, strict=True) if want]


def _to_heads(
    shard: Shard, heads: Sequence[Shares], tensors: Sequence[Tensor]
) -> tuple[list[Tensor], Moves, Moves]:
    """Every tensor's own heads over all tokens, to be filled; what is sent and received for it."""
    layout = shard.layout.within(shard.ulysses)
    own = shard.rank % shard.ulysses
    gathered: list[Tensor] = []
    sends: Moves = []
    receives: Moves = []
    for tensor, shares in zip(tensors, heads, strict=True):
        # Laid out token by token, so that every run of tokens is one piece of memory.
        local = tensor.detach().permute(2, 0, 1, 3)
        shape = (layout.length, *local.shape[1:2], len(shares[own]), local.shape[3])
        whole = local.new_empty(shape)
        for peer, share in enumerate(shares):
            for run in layout.runs(peer):
                if peer == own:
                    tokens = layout.local(peer, run)
                    whole[_cut(run)] = local[_cut(tokens), :, _cut(share)]
                else:
                    receives.append((peer, whole[_cut(run)]))
            if peer != own:
                packed = local[:, :, _cut(share)].contiguous()
                for run in layout.runs(own):
                    sends.append((peer, packed[_cut(layout.local(own, run))]))
        gathered.append(whole.permute(1, 2, 0, 3))
    return gathered, sends, receives


def _to_tokens(shard: Shard, tensors: Sequence[Tensor]) -> tuple[list[list[Tensor]], Moves, Moves]:
    """The inverse of `_to_heads`: from every rank ``[tokens, batch, its heads, dim]``."""
    layout = shard.layout.within(shard.ulysses)
    own = shard.rank % shard.ulysses
    parts: list[list[Tensor]] = []
    sends: Moves = []
    receives: Moves = []
    for tensor in tensors:
        whole = tensor.detach().permute(2, 0, 1, 3)
        arrived = []
        for peer in range(layout.ranks):
            if peer == own:
                mine = [whole[_cut(run)] for run in layout.runs(own)]
                arrived.append(mine[0] if len(mine) == 1 else concatenate(mine))
                continue
            incoming = whole.new_empty(layout.share, *whole.shape[1:])
            for run in layout.runs(own):
                receives.append((peer, incoming[_cut(layout.local(own, run))]))
            for run in layout.runs(peer):
                sends.append((peer, whole[_cut(run)].contiguous()))
            arrived.append(incoming)
        parts.append(arrived)
    return parts, sends, receives


def _all_heads(parts: list[tuple[range, Tensor]]) -> Tensor:
    """``[batch, all heads, tokens, dim]`` of parts ``[tokens, batch, some heads, dim]``.

    What came of a head that several ranks have is added up.
    """
    parts = sorted(parts, key=lambda part: part[0].start)
    total = parts[-1][0].stop
    first = parts[0][1]
    if sum(len(heads) for heads, _ in parts) == total:
        return concatenate([part for _, part in parts], dim=2).permute(1, 2, 0, 3)
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    by_head = [
        sum(
            (part.to(wide) for heads, part in parts if head in heads),
            start=torch.zeros_like(first, dtype=wide),
        )
        for head in range(total)
    ]
    return concatenate(by_head, dim=2).to(first.dtype).permute(1, 2, 0, 3)


def _cut(share: range) -> slice:
    return slice(share.start, share.stop)
