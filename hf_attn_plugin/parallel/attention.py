"""Attention over a sequence that is spread over ranks."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hf_attn_plugin.ops.checks import check_softmax, check_tensors
from hf_attn_plugin.parallel.choice import choose_way
from hf_attn_plugin.parallel.estimates import Shapes, Way, exchange_groups
from hf_attn_plugin.parallel.gather import gather_attention
from hf_attn_plugin.parallel.ring import ring_attention
from hf_attn_plugin.parallel.shard import Shard
from hf_attn_plugin.parallel.ulysses import Heads, ulysses_attention
from hf_attn_plugin.parallel.wide import Keep, attend
from hf_attn_plugin.patterns import Pattern


class _Schedule(Protocol):
    def __call__(
        self,
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
    ) -> Tensor: ...


def sharded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    shard: Shard,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What one process would compute by `ops.attention`, of which every rank holds its tokens.

    A collective call: every rank of the group makes it, forward and backward, in the same order.

    Gradients of query, key and value are complete: what other ranks' queries contribute to a key
    has come home. ``sinks`` is a parameter of the model like any other: the gradient on a rank is
    its share (of its queries; with ulysses, of its heads), and one process' gradient is the sum
    over ranks. Data parallelism that takes the mean over ranks leaves 1 / ranks of it.

    Args:
        query: ``[batch, heads, tokens / ranks, head_dim]``, this rank's segments one after another.
        key: ``[batch, kv_heads, tokens / ranks, head_dim]``.
        value: ``[batch, kv_heads, tokens / ranks, value_dim]``.
        pattern: Which pairs of the whole sequence attend; the same on every rank. Plans are kept
            with it, so all layers should share one. Tokens that pad the sequence to the layout's
            length are hidden by its ``key_valid``.
        shard: This rank's part.
        scaling: Factor on the scores.
        softcap: As in `ops.attention`.
        sinks: As in `ops.attention`, all heads, the same on every rank.

    Returns:
        ``[batch, heads, tokens / ranks, value_dim]``.

    Raises:
        ValueError: Tensors, pattern and layout do not fit together, or heads cannot be exchanged.
    """
    _check(query, key, value, pattern, shard)
    check_softmax("sharded_attention", query, softcap, sinks)
    if sinks is not None:
        sinks = sinks.reshape(-1)
    schedule = shard.schedule
    if schedule is None:
        way = _way(Shapes.of(query, key, value), pattern, shard)
        schedule, shard = way.schedule, shard.by_heads if way.schedule == "ulysses" else shard
    if shard.layout.ranks == 1:
        return attend(query, key, value, pattern, scaling, softcap, sinks, None)
    if shard.ulysses == 1:
        return _SCHEDULES[schedule](
            query, key, value, pattern, shard, scaling=scaling, softcap=softcap, sinks=sinks
        )
    heads = Heads.among(shard.ulysses, query.shape[1], key.shape[1])
    inner = shard.inner

    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        sinks: Tensor | None,
        keep: Keep | None,
    ) -> Tensor:
        if inner.layout.ranks == 1:
            return attend(query, key, value, pattern, scaling, softcap, sinks, keep)
        return _SCHEDULES[schedule](
            query,
            key,
            value,
            pattern,
            inner,
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
            keep=keep,
        )

    shapes = Shapes.of(query, key, value)
    count = exchange_groups(pattern, shard.layout, shapes, shard.ulysses, shard.head_groups)
    return ulysses_attention(
        query, key, value, pattern, shard, heads.groups(count), compute, sinks=sinks
    )


def _way(shapes: Shapes, pattern: Pattern, shard: Shard) -> Way:
    ulysses = None if shard.ulysses == 1 else shard.ulysses
    return choose_way(pattern, shard.layout, shapes, ulysses=ulysses, memory=shard.memory)


_SCHEDULES: dict[str, _Schedule] = {"gather": gather_attention, "ring": ring_attention}


def _check(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, shard: Shard) -> None:
    layout = shard.layout
    if (pattern.q_len, pattern.kv_len) != (layout.length, layout.length):
        raise ValueError(
            f"sharded_attention: the pattern must be that of the whole sequence, {layout.length} "
            f"queries and keys; got {pattern.q_len} and {pattern.kv_len}."
        )
    if query.shape[2] != layout.share or key.shape[2] != layout.share:
        raise ValueError(
            f"sharded_attention: each of {layout.ranks} ranks holds {layout.share} of "
            f"{layout.length} tokens; got query {tuple(query.shape)}, key {tuple(key.shape)}."
        )
    check_tensors("sharded_attention", query, key, value, pattern, layout.ranks)
