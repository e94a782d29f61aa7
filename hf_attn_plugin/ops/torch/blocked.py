"""Exact attention over any pattern in plain PyTorch, with memory linear in the sequence.

Blocks of queries walk the runs of key blocks that the schedule names, with an online softmax;
the backward pass recomputes the scores from the saved log-sum-exp (arXiv 2112.05682, 2205.14135).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_attn_plugin.patterns import Pattern, Schedule, build_schedule

R = TypeVar("R")

# Scores held at a time, over batch and heads: 32 MiB in float32.
_MAX_SCORES = 8 * 1024 * 1024


def block_sizes(pattern: Pattern) -> tuple[int, int]:
    """Queries and keys per block.

    Fine blocks visit fewer pairs outside a window, coarse ones make longer matrix products; on a
    CPU with a window of 1024 keys, blocks of 64 to 256 queries run within 20 % of each other.
    """
    reach = min(x for x in (pattern.reach, pattern.band, pattern.kv_len) if x is not None)
    block = 64
    while block < 256 and block * 4 <= reach:
        block *= 2
    return block, block


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the forward and backward loops share."""

    pattern: Pattern
    schedule: Schedule
    scaling: float
    softcap: float | None
    compute_dtype: torch.dtype
    groups: int

    def query_blocks(self) -> Iterator[tuple[int, slice]]:
        """Number and range of every block of queries."""
        block = self.schedule.block_q
        for index, start in enumerate(range(0, self.pattern.q_len, block)):
            yield index, slice(start, min(start + block, self.pattern.q_len))

    def runs(self, index: int, rows: slice, batch_heads: int) -> Iterator[tuple[slice, bool]]:
        """The key ranges of one query block, short enough for the scores to stay small."""
        block = self.schedule.block_kv
        longest = max(1, _MAX_SCORES // max(1, batch_heads * (rows.stop - rows.start) * block))
        for start, stop, full in self.schedule.runs(index, longest):
            yield slice(start * block, min(stop * block, self.pattern.kv_len)), full

    def grouped(self, tensor: Tensor, rows: slice) -> Tensor:
        """``[B, H, S, D]`` to ``[B, Hkv, groups * rows, D]`` in the compute dtype."""
        part = tensor[:, :, rows].to(self.compute_dtype)
        return part.unflatten(1, (-1, self.groups)).flatten(2, 3)

    def ungrouped(self, tensor: Tensor, rows: slice) -> Tensor:
        """The inverse of `grouped`: ``[B, Hkv, groups * rows, D]`` to ``[B, H, rows, D]``."""
        return tensor.unflatten(2, (self.groups, rows.stop - rows.start)).flatten(1, 2)

    def mask(self, device: torch.device, rows: slice, cols: slice) -> Tensor:
        """Visible pairs of a block, ``[B or 1, Hkv or 1, groups or 1, rows, cols]``."""
        seen = self.pattern.visible(device, rows.start, rows.stop, cols.start, cols.stop)
        if seen.shape[1] == 1:
            return seen[:, :, None]
        return seen.unflatten(1, (-1, self.groups))

    def scores(self, q: Tensor, k: Tensor, rows: slice, cols: slice, full: bool) -> Tensor:
        """Scaled, capped and masked scores ``[B, Hkv, groups * rows, cols]``."""
        scores = (q @ k.transpose(-1, -2)).mul_(self.scaling)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if not full:
            split = scores.unflatten(2, (self.groups, rows.stop - rows.start))
            hidden = ~self.mask(scores.device, rows, cols)
            scores = split.masked_fill_(hidden, float("-inf")).flatten(2, 3)
        return scores


def _without_autocast(method: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(method)
    def wrapped(ctx: Any, first: Tensor, *rest: Any) -> R:
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return wrapped


def run_forward(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output in ``output_dtype`` and log-sum-exp; not differentiable."""
    batch, heads, q_len, _ = query.shape
    dtype = problem.compute_dtype
    # Laid out as [batch, q_len, heads, dim], which is how models read it: no copy for them.
    output = query.new_zeros(batch, q_len, heads, value.shape[-1], dtype=output_dtype)
    output = output.transpose(1, 2)
    lse = query.new_full((batch, heads, q_len), float("-inf"), dtype=dtype)
    for index, rows in problem.query_blocks():
        q = problem.grouped(query, rows)
        top = q.new_full((*q.shape[:3], 1), float("-inf"))
        if sinks is not None:
            per_row = sinks.to(dtype).view(-1, problem.groups, 1, 1)
            per_row = per_row.expand(-1, -1, rows.stop - rows.start, 1).flatten(1, 2)
            top = per_row[None].expand(batch, -1, -1, -1).contiguous()
        total = torch.where(top.isneginf(), 0.0, 1.0)
        acc = q.new_zeros(*q.shape[:3], value.shape[-1])
        for cols, full in problem.runs(index, rows, batch * heads):
            k, v = key[:, :, cols].to(dtype), value[:, :, cols].to(dtype)
            scores = problem.scores(q, k, rows, cols, full)
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            # Rows that have seen nothing yet are at -inf; 0 keeps -inf - -inf out.
            base = torch.where(new_top.isneginf(), 0.0, new_top)
            weights = scores.sub_(base).exp_()
            shrink = torch.exp(top - base)
            total = total * shrink + weights.sum(-1, keepdim=True)
            acc = acc.mul_(shrink).add_(weights @ v)
            top = new_top
        out = acc / torch.where(total == 0, 1.0, total)
        output[:, :, rows] = problem.ungrouped(out, rows).to(output.dtype)
        lse[:, :, rows] = problem.ungrouped(top + total.log(), rows)[..., 0]
    return output, lse if dtype == torch.float64 else lse.float()


def run_backward(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query (in ``query_dtype``), key, value and sinks (in the compute dtype).

    ``output`` and ``lse`` may be over more keys than these: the gradients are then these keys'
    part.
    """
    dtype = problem.compute_dtype
    batch, heads = query.shape[:2]
    grad_q = torch.zeros_like(query, dtype=query_dtype)
    grad_k = torch.zeros_like(key, dtype=dtype)
    grad_v = torch.zeros_like(value, dtype=dtype)
    grad_sinks = None if sinks is None else sinks.new_zeros(sinks.shape, dtype=dtype)
    for index, rows in problem.query_blocks():
        q, out, d_out = (problem.grouped(t, rows) for t in (query, output, grad_output))
        row_lse = problem.grouped(lse[..., None], rows)
        # d score = weight * (d_weight - delta): the log-sum-exp's own gradient enters here too.
        delta = (out * d_out).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - problem.grouped(grad_lse[..., None], rows)
        delta = torch.where(row_lse.isneginf(), 0.0, delta)
        base = torch.where(row_lse.isneginf(), 0.0, row_lse)
        if sinks is not None and grad_sinks is not None:
            logits = sinks.to(dtype).view(1, -1, 1, 1)
            weight = torch.exp(logits - problem.ungrouped(base, rows))
            grad_sinks -= (weight * problem.ungrouped(delta, rows)).sum((0, 2, 3))
        d_q = torch.zeros_like(q)
        for cols, full in problem.runs(index, rows, batch * heads):
            k, v = key[:, :, cols].to(dtype), value[:, :, cols].to(dtype)
            scores = problem.scores(q, k, rows, cols, full)
            weights = torch.exp(scores - base)
            grad_v[:, :, cols] += weights.transpose(-1, -2) @ d_out
            d_scores = (d_out @ v.transpose(-1, -2)).sub_(delta).mul_(weights)
            if problem.softcap is not None:
                capped = (scores / problem.softcap).square_()
                # Hidden pairs have a weight of 0 and a score of -inf: 0 * inf must stay 0.
                d_scores.mul_(torch.where(scores.isneginf(), 0.0, 1.0 - capped))
            d_scores.mul_(problem.scaling)
            d_q.add_(d_scores @ k)
            grad_k[:, :, cols] += d_scores.transpose(-1, -2) @ q
        grad_q[:, :, rows] = problem.ungrouped(d_q, rows).to(grad_q.dtype)
    return grad_q, grad_k, grad_v, grad_sinks


class _BlockedAttention(torch.autograd.Function):
    """Forward and backward of attention over a schedule."""

    # Both directions choose their own precision, so autocast stays out (it would round the scores).

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        problem: Problem,
    ) -> tuple[Tensor, Tensor]:
        output, lse = run_forward(problem, query, key, value, sinks, query.dtype)
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.problem = problem
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    @_without_autocast
    def backward(  # type: ignore[override]  # the decorators hide its arguments
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, lse = ctx.saved_tensors
        grad_output, grad_lse = grads
        grad_q, grad_k, grad_v, grad_sinks = run_backward(
            ctx.problem, query, key, value, sinks, output, lse, grad_output, grad_lse, query.dtype
        )
        if grad_sinks is not None:
            grad_sinks = grad_sinks.to(sinks.dtype)
        return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype), grad_sinks, None


def make_problem(
    query: Tensor, key: Tensor, pattern: Pattern, scaling: float, softcap: float | None
) -> Problem:
    """A call of these shapes; half precision is computed in float32."""
    block_q, block_kv = block_sizes(pattern)
    schedule = pattern.derive(
        ("schedule", block_q, block_kv), lambda: build_schedule(pattern, block_q, block_kv)
    )
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    return Problem(pattern, schedule, scaling, softcap, compute, groups)


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over ``pattern``; see `hf_attn_plugin.ops.attention`, whose arguments these are.

    Half precision is computed in float32. Memory beyond inputs, output and gradients is one block
    of scores, and float32 accumulators of the key and value gradients.
    """
    problem = make_problem(query, key, pattern, scaling, softcap)
    return _BlockedAttention.apply(query, key, value, sinks, problem)
