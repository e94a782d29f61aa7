"""Ring attention: keys come by, rank after rank, while queries stay (arXiv 2310.01889).

At step d every rank computes with the keys of the rank d before it, of which it gets those that its
queries see and no others. They come straight from that rank, and their gradients go straight back.
What a rank computes of every step is a few pieces, merged in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.parallel.exchange import Exchange, start_exchange
from hf_attn_plugin.parallel.merge import RunningSoftmax, RunningSum, empty_rows, sinks_gradient
from hf_attn_plugin.parallel.pieces import Pieces, choose_pieces
from hf_attn_plugin.parallel.plan import Piece, Plan, make_plan
from hf_attn_plugin.parallel.shard import Shard
from hf_attn_plugin.parallel.wide import Keep
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.part import part


@dataclasses.dataclass(frozen=True)
class Step:
    """What one rank does at one step.

    Attributes:
        offset: How many ranks before this one the keys come from; 0: its own.
        source: That rank.
        target: The rank that computes with this rank's keys.
        received: Runs of tokens whose keys and values come from ``source``.
        sent: Those that go to ``target``.
        pieces: What is computed; its keys lie within ``received`` (its own, at offset 0).
    """

    offset: int
    source: int
    target: int
    received: tuple[range, ...]
    sent: tuple[range, ...]
    pieces: tuple[Piece, ...]


def ring_steps(plan: Plan, rank: int) -> tuple[Step, ...]:
    """The steps of one rank.

    All ranks have the same offsets, ascending, and so issue transfers in one order, which cannot
    wait for each other in a circle. Offsets at which nothing is sent are left out.
    """
    ranks = plan.layout.ranks
    offsets = {(transfer.target - transfer.source) % ranks for transfer in plan.transfers}
    steps = []
    for offset in sorted({0} | offsets):
        source, target = (rank - offset) % ranks, (rank + offset) % ranks
        steps.append(
            Step(
                offset,
                source,
                target,
                tuple(t.tokens for t in plan.receives(rank) if t.source == source),
                tuple(t.tokens for t in plan.sends(rank) if t.target == target),
                plan.pieces(rank, source),
            )
        )
    return tuple(steps)


def ring_attention(
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
    pieces: Pieces | None = None,
) -> Tensor:
    """Attention over a sharded sequence by schedule "ring"; see `attention.sharded_attention`.

    Deterministic: partial results are merged, and gradients added, in the order of the steps.
    Memory beyond inputs, output and gradients: keys and values of two other ranks, float32
    accumulators of the output, or of all gradients, and of the gradients that travel; and the
    results of one piece in float32, on Hopper GPUs twice.

    Args:
        query: ``[batch, heads, tokens / ranks, head_dim]``.
        key: ``[batch, kv_heads, tokens / ranks, head_dim]``.
        value: ``[batch, kv_heads, tokens / ranks, value_dim]``.
        pattern: Of the whole sequence.
        shard: This rank's part.
        scaling: Factor on the scores.
        softcap: As in `ops.attention`.
        sinks: As in `ops.attention`.
        keep: Gets the gradients of keys and values, in float32 or wider, which autograd then does
            not. None: they are rounded.
        pieces: What computes each piece; None for the fastest that can.

    Returns:
        ``[batch, heads, tokens / ranks, value_dim]``.
    """
    if scaling <= 0:  # kernels look for the largest product before they scale it
        query, scaling = query * (-1.0 if scaling < 0 else 0.0), -scaling or 1.0
    if pieces is None:
        pieces = choose_pieces(query, key, value, pattern, scaling, softcap)
    call = _Call(pattern, shard, pieces, keep)
    return _RingAttention.apply(query, key, value, sinks, call)


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What both directions share."""

    pattern: Pattern
    shard: Shard
    pieces: Pieces
    keep: Keep | None

    @property
    def steps(self) -> tuple[Step, ...]:
        layout, rank = self.shard.layout, self.shard.rank
        return self.pattern.derive(
            ("ring steps", layout, rank), lambda: ring_steps(make_plan(self.pattern, layout), rank)
        )

    @property
    def runs(self) -> tuple[range, ...]:
        """The runs of tokens that this rank holds."""
        return self.shard.layout.runs(self.shard.rank)

    def own(self, tokens: range) -> slice:
        """Where some of this rank's tokens lie in its tensors."""
        local = self.shard.layout.local(self.shard.rank, tokens)
        return slice(local.start, local.stop)

    def pattern_of(self, piece: Piece) -> Pattern:
        rows, cols = piece.rows, piece.cols
        return self.pattern.derive(("part", rows, cols), lambda: part(self.pattern, rows, cols))

    def start(
        self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]
    ) -> Exchange:
        """Transfers of ``[batch, heads, tokens, dim]``, received in memory of `empty_rows`."""
        exchange = start_exchange(
            self.shard.group,
            [(peer, tensor.transpose(1, 2).contiguous()) for peer, tensor in sends],
            [(peer, tensor.transpose(1, 2)) for peer, tensor in receives],
        )
        self.shard.bytes_sent += exchange.bytes_sent
        return exchange


class _Keys:
    """Keys and values of every step; those of the next step travel during this one.

    Iterating gives every step, and the keys and values of each run of tokens. On a GPU, the kernels
    of a transfer need some multiprocessors, and those of a piece take all of them for long. If they
    come first, the transfer waits for them, the other rank's half of it waits too, and what runs
    there waits for the multiprocessors that it holds. So after a step is given, short work is done
    before its pieces: what was left over from the last step, or memory to be cleared.
    """

    def __init__(self, call: _Call, key: Tensor, value: Tensor) -> None:
        self.call, self.key, self.value = call, key, value

    def __iter__(self) -> Iterator[tuple[Step, dict[range, tuple[Tensor, Tensor]]]]:
        call, steps = self.call, self.call.steps
        own = {}
        for run in call.runs:
            rows = call.own(run)
            own[run] = self.key[:, :, rows], self.value[:, :, rows]
        arriving, exchange = own, None
        for number, step in enumerate(steps):
            if exchange is not None:
                exchange.wait()
            here = arriving
            # Before this step's pieces: on a GPU it would otherwise wait for these.
            if number + 1 < len(steps):
                arriving, exchange = self._start(steps[number + 1])
            yield step, here

    def _start(self, step: Step) -> tuple[dict[range, tuple[Tensor, Tensor]], Exchange]:
        call, tensors = self.call, (self.key, self.value)
        received = {
            run: (empty_rows(self.key, len(run)), empty_rows(self.value, len(run)))
            for run in step.received
        }
        sends = [(step.target, t[:, :, call.own(run)]) for run in step.sent for t in tensors]
        receives = [(step.source, t) for pair in received.values() for t in pair]
        return received, call.start(sends, receives)


class _RingAttention(torch.autograd.Function):
    """Forward and backward over the steps of a ring."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, call: _Call
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            output, lse = _forward(call, query, key, value, sinks)
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.call = call
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, lse = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            grads = _backward(ctx.call, query, key, value, output, lse, grad_output)
            grad_sinks = None
            if sinks is not None:
                grad_sinks = sinks_gradient(sinks, output, lse, grad_output).to(sinks.dtype)
        if ctx.call.keep is not None:
            ctx.call.keep(*grads[1:])
            return grads[0], None, None, grad_sinks, None
        return *grads, grad_sinks, None


def _forward(
    call: _Call, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    partial = {run: RunningSoftmax(len(run)) for run in call.runs}
    batch, heads, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)
    late: Callable[[], object] = output.zero_
    for step, keys in _Keys(call, key, value):
        for piece in step.pieces:
            late()
            run, rows = _within(partial, piece.rows)
            k, v = _cut(keys, piece.cols)
            q = query[:, :, call.own(piece.rows)]
            result = call.pieces.forward(q, k, v, call.pattern_of(piece))
            late = functools.partial(partial[run].add, rows, *result)
    late()
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    for run, softmax in partial.items():
        if sinks is not None:
            softmax.add_sinks(sinks)
        rows = call.own(run)
        if softmax.output is None or softmax.lse is None:
            lse[:, :, rows] = float("-inf") if sinks is None else sinks.view(1, -1, 1)
        else:
            output[:, :, rows] = softmax.output
            lse[:, :, rows] = softmax.lse
    return output, lse


def _backward(
    call: _Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    grad_query = {run: RunningSum(len(run)) for run in call.runs}
    own = _KeyGradients(call.runs)
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    d_keys_dtype = key.dtype if call.keep is None else wide
    d_inputs = [
        empty_rows(tensor, tensor.shape[2], dtype)
        for tensor, dtype in ((query, query.dtype), (key, d_keys_dtype), (value, d_keys_dtype))
    ]
    late: Callable[[], object] = functools.partial(_clear, d_inputs)
    returning: _Returning | None = None
    for step, keys in _Keys(call, key, value):
        grad_keys = own if not step.offset else _KeyGradients(step.received)
        for piece in step.pieces:
            late()
            run, in_run = _within(grad_query, piece.rows)
            rows = call.own(piece.rows)
            d_query, *d_keys = call.pieces.backward(
                query[:, :, rows],
                *_cut(keys, piece.cols),
                call.pattern_of(piece),
                output[:, :, rows],
                lse[:, :, rows],
                grad_output[:, :, rows],
            )
            grad_keys.add(piece.cols, *d_keys)
            late = functools.partial(grad_query[run].add, in_run, d_query)
        if returning is not None:
            returning.finish(own)
        if step.offset:
            returning = _Returning(call, step, grad_keys, key, value)
    late()
    if returning is not None:
        returning.finish(own)
    for d_input, sums in zip(d_inputs, (grad_query, *own.sums), strict=True):
        for run, of_run in sums.items():
            if of_run.total is not None:
                d_input[:, :, call.own(run)] = of_run.total
    return d_inputs[0], d_inputs[1], d_inputs[2]


def _clear(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()


class _KeyGradients:
    """Gradients of keys and of values of some runs of tokens."""

    def __init__(self, runs: tuple[range, ...]) -> None:
        self.sums = tuple({run: RunningSum(len(run)) for run in runs} for _ in range(2))

    def add(self, tokens: range, *grads: Tensor) -> None:
        for sums, grad in zip(self.sums, grads, strict=True):
            run, rows = _within(sums, tokens)
            sums[run].add(rows, grad)


class _Returning:
    """Gradients on their way to the ranks whose keys they are."""

    def __init__(
        self, call: _Call, step: Step, grads: _KeyGradients, key: Tensor, value: Tensor
    ) -> None:
        dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
        self.received = [
            (run, [empty_rows(t, len(run), dtype) for t in (key, value)]) for run in step.sent
        ]
        totals = [sums[run].total for run in step.received for sums in grads.sums]
        sends = [(step.source, total) for total in totals if total is not None]
        assert len(sends) == len(totals)  # every run has keys that are seen
        receives = [(step.target, t) for _, pair in self.received for t in pair]
        self.exchange = call.start(sends, receives)

    def finish(self, own: _KeyGradients) -> None:
        """Add what has come to a rank's own."""
        self.exchange.wait()
        for run, pair in self.received:
            own.add(run, *pair)


def _within(runs: dict[range, Any], tokens: range) -> tuple[range, slice]:
    """The run that holds some tokens, and where in it."""
    for run in runs:
        if run.start <= tokens.start and tokens.stop <= run.stop:
            return run, slice(tokens.start - run.start, tokens.stop - run.start)
    raise AssertionError(f"{tokens} lie in none of {list(runs)}")


def _cut(keys: dict[range, tuple[Tensor, Tensor]], tokens: range) -> tuple[Tensor, Tensor]:
    run, rows = _within(keys, tokens)
    key, value = keys[run]
    return key[:, :, rows], value[:, :, rows]
