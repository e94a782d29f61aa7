"""Heads exchanged for tokens: every rank gets all tokens of some heads, and back.

DeepSpeed-Ulysses (arXiv 2309.14509): between two exchanges attention is what one process does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.parallel.exchange import start_exchange
from hf_attn_plugin.parallel.layout import concatenate
from hf_attn_plugin.parallel.shard import Shard


@dataclasses.dataclass(frozen=True)
class Heads:
    """Which heads each of some ranks computes.

    Where there are fewer KV heads than ranks, a KV head goes to several of them.

    Attributes:
        query: Query heads by rank.
        kv: KV heads by rank.
    """

    query: tuple[range, ...]
    kv: tuple[range, ...]

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


class KeyGradients:
    """Gradients of keys and values that are not rounded before those of other ranks are added.

    Attributes:
        grads: Set by `keep`, in the backward pass.
    """

    def __init__(self) -> None:
        self.grads: tuple[Tensor, Tensor] | None = None

    def keep(self, *grads: Tensor) -> None:
        """For `wide.attend`."""
        self.grads = (grads[0], grads[1])

    def instead_of(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What was kept, or what came by autograd."""
        kept, self.grads = self.grads, None
        return (key, value) if kept is None else kept


def heads_for_tokens(
    query: Tensor, key: Tensor, value: Tensor, shard: Shard
) -> tuple[Tensor, Tensor, Tensor, KeyGradients | None]:
    """This rank's heads over all tokens of its group of ``shard.ulysses`` neighbours.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, this rank's tokens.
        key: ``[batch, kv_heads, tokens, head_dim]``.
        value: ``[batch, kv_heads, tokens, value_dim]``.
        shard: This rank's part.

    Returns:
        Query, key and value with some of the heads, and the group's tokens in global order; and
        where KV heads go to several ranks, what takes gradients in float32.
    """
    heads = Heads.among(shard.ulysses, query.shape[1], key.shape[1])
    wide = KeyGradients() if key.shape[1] < shard.ulysses else None
    shares = (heads.query, heads.kv, heads.kv)
    return *_HeadsForTokens.apply(shard, shares, wide, query, key, value), wide


def tokens_for_heads(output: Tensor, shard: Shard) -> Tensor:
    """The inverse: ``[batch, heads / ulysses, group's tokens, dim]`` to all heads of own tokens."""
    own = output.shape[1]
    heads = tuple(range(rank * own, (rank + 1) * own) for rank in range(shard.ulysses))
    return _TokensForHeads.apply(shard, heads, output)


class _HeadsForTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shard: Shard,
        heads: tuple[tuple[range, ...], ...],
        wide: KeyGradients | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.shard, ctx.heads, ctx.wide = shard, heads, wide
        ctx.totals = [tensor.shape[1] for tensor in tensors]
        return tuple(_to_heads(shard, heads, tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = grads
        if ctx.wide is not None:
            key, value = ctx.wide.instead_of(key, value)
        given = (query, key, value)
        made = _to_tokens(ctx.shard, ctx.heads, ctx.totals, given)
        return None, None, None, *(grad.to(query.dtype) for grad in made)


class _TokensForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Shard, heads: tuple[range, ...], output: Tensor) -> Tensor:
        ctx.shard, ctx.heads = shard, heads
        return _to_tokens(shard, (heads,), [heads[-1].stop], [output])[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, _to_heads(ctx.shard, (ctx.heads,), [grad])[0]


def _to_heads(shard: Shard, heads: tuple[tuple[range, ...], ...], tensors: Any) -> list[Tensor]:
    """Every tensor's own heads over all tokens; the exchange of one and of the other at once."""
    layout = shard.layout.within(shard.ulysses)
    own = shard.rank % shard.ulysses
    gathered, sends, receives = [], [], []
    for tensor, shares in zip(tensors, heads, strict=True):
        # Laid out token by token, so that every run of tokens is one piece of memory.
        local = tensor.permute(2, 0, 1, 3)
        shape = (layout.length, *local.shape[1:2], len(shares[own]), local.shape[3])
        whole = local.new_empty(shape)
        for peer, share in enumerate(shares):
            for run in layout.runs(peer):
                if peer == own:
                    tokens = layout.local(peer, run)
                    whole[run.start : run.stop] = local[tokens.start : tokens.stop, :, _cut(share)]
                else:
                    receives.append((peer, whole[run.start : run.stop]))
            if peer != own:
                packed = local[:, :, _cut(share)].contiguous()
                for run in layout.runs(own):
                    tokens = layout.local(own, run)
                    sends.append((peer, packed[tokens.start : tokens.stop]))
        gathered.append(whole.permute(1, 2, 0, 3))
    _exchange(shard, sends, receives)
    return gathered


def _to_tokens(
    shard: Shard, heads: tuple[tuple[range, ...], ...], totals: list[int], tensors: Any
) -> list[Tensor]:
    """The inverse of `_to_heads`; what came from a head that several ranks have is added up."""
    layout = shard.layout.within(shard.ulysses)
    own = shard.rank % shard.ulysses
    shares_of, sends, receives = [], [], []
    for tensor, shares in zip(tensors, heads, strict=True):
        whole = tensor.permute(2, 0, 1, 3)
        arrived = []
        for peer, share in enumerate(shares):
            if peer == own:
                mine = [whole[run.start : run.stop] for run in layout.runs(own)]
                arrived.append(mine[0] if len(mine) == 1 else concatenate(mine))
                continue
            shape = (layout.share, *whole.shape[1:2], len(share), whole.shape[3])
            incoming = whole.new_empty(shape)
            for run in layout.runs(own):
                tokens = layout.local(own, run)
                receives.append((peer, incoming[tokens.start : tokens.stop]))
            for run in layout.runs(peer):
                sends.append((peer, whole[run.start : run.stop].contiguous()))
            arrived.append(incoming)
        shares_of.append(arrived)
    _exchange(shard, sends, receives)
    return [
        _all_heads(arrived, shares, total)
        for arrived, shares, total in zip(shares_of, heads, totals, strict=True)
    ]


def _all_heads(arrived: list[Tensor], shares: tuple[range, ...], total: int) -> Tensor:
    """``[tokens, batch, some heads, dim]`` of every rank as ``[batch, all heads, tokens, dim]``."""
    if len(shares) * len(shares[0]) == total:
        return concatenate(arrived, dim=2).permute(1, 2, 0, 3)
    wide = torch.float64 if arrived[0].dtype == torch.float64 else torch.float32
    by_head = [
        sum(
            (part.to(wide) for part, share in zip(arrived, shares, strict=True) if head in share),
            start=torch.zeros_like(arrived[0], dtype=wide),
        )
        for head in range(total)
    ]
    return concatenate(by_head, dim=2).to(arrived[0].dtype).permute(1, 2, 0, 3)


def _exchange(
    shard: Shard, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]
) -> None:
    exchange = start_exchange(shard.neighbours, sends, receives)
    shard.bytes_sent += exchange.bytes_sent
    exchange.wait()


def _cut(share: range) -> slice:
    return slice(share.start, share.stop)
