"""Linear attention in chunks: O(N) time, and memory for a few states beside inputs and output.

Keys are taken up into a state, the sum of ``phi(k) (v, 1)^T``; queries read the state, and the
keys of their own chunk directly. A call is a list of `Step`s, each with queries, keys, or both.
The backward pass goes through the steps in reverse and computes each a second time, from states of
which the forward pass has kept every so many.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.torch.linear_features import FeatureMap, split_scale
from hf_attn_plugin.patterns import Pattern


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One chunk of a call.

    Attributes:
        queries: These read the state as it is before the step, and the step's own keys.
        keys: These are taken up into the state.
        visible: bool ``[batch or 1, 1, queries, keys]``, which of the step's own keys are read.
        reads_state: bool ``[batch or 1, 1, queries]``, which queries read the state; None is all.
        absorbed: bool ``[batch or 1, 1, keys]``, which keys are taken up; None is all.
        keeps_state: bool ``[batch or 1, 1]``, where the state lives on beyond the step's documents;
            None is everywhere.
    """

    queries: slice
    keys: slice
    visible: Tensor | None = None
    reads_state: Tensor | None = None
    absorbed: Tensor | None = None
    keeps_state: Tensor | None = None


_NONE = slice(0, 0)


def plan_steps(pattern: Pattern, chunk: int, device: torch.device) -> list[Step]:
    """The steps of a pattern of causality, padding, documents and offsets.

    Where it is not causal it must have no documents.
    """
    if not pattern.causal:
        return [
            Step(_NONE, keys, absorbed=_columns(pattern.key_valid, keys))
            for keys in _chunks(0, pattern.kv_len, chunk)
        ] + [Step(queries, _NONE) for queries in _chunks(0, pattern.q_len, chunk)]
    # Query i sits at key i + lead.
    lead = pattern.first_query - pattern.kv_offset
    first, last = max(lead, 0), min(lead + pattern.q_len, pattern.kv_len)
    ranges: list[tuple[slice, slice]] = [
        (queries, _NONE) for queries in _chunks(0, min(-lead, pattern.q_len), chunk)
    ]
    ranges += [(_NONE, keys) for keys in _chunks(0, min(first, pattern.kv_len), chunk)]
    ranges += [
        (slice(keys.start - lead, keys.stop - lead), keys) for keys in _chunks(first, last, chunk)
    ]
    ranges += [
        (queries, _NONE) for queries in _chunks(max(pattern.kv_len - lead, 0), pattern.q_len, chunk)
    ]
    steps = []
    at_state = None if pattern.kv_documents is None else pattern.kv_documents[:, :1]
    for queries, keys in ranges:
        valid = _columns(pattern.key_valid, keys)
        visible = None
        if queries.stop > queries.start and keys.stop > keys.start:
            size = keys.stop - keys.start
            visible = torch.ones(size, size, dtype=torch.bool, device=device).tril()[None, None]
            if valid is not None:
                visible = visible & valid[:, :, None]
        if at_state is None or pattern.q_documents is None or pattern.kv_documents is None:
            steps.append(Step(queries, keys, visible, absorbed=valid))
            continue
        of_query, of_key = pattern.q_documents[:, queries], pattern.kv_documents[:, keys]
        reads_state = (of_query == at_state)[:, None]
        if visible is not None:
            visible = visible & (of_query[:, :, None] == of_key[:, None, :])[:, None]
        keeps_state = None
        if keys.stop > keys.start:
            here = of_key[:, -1:]
            in_last = (of_key == here)[:, None]
            valid = in_last if valid is None else valid & in_last
            keeps_state = here == at_state
            at_state = here
        steps.append(Step(queries, keys, visible, reads_state, valid, keeps_state))
    return steps


def _chunks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _columns(valid: Tensor | None, keys: slice) -> Tensor | None:
    return None if valid is None else valid[:, None, keys]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What all steps of a call share."""

    steps: list[Step]
    feature_map: FeatureMap
    scaling: float
    dtype: torch.dtype
    groups: int

    @property
    def stretch(self) -> int:
        """Steps between two kept states: with sqrt(steps) kept, as many are made anew at a time."""
        return max(1, math.isqrt(len(self.steps)))


def _zero_where_empty(scale: Tensor) -> Tensor:
    """The exponent to subtract; -inf says that nothing was seen, and -inf - -inf would be NaN."""
    return torch.where(scale.isneginf(), 0.0, scale)


def run_step(
    problem: Problem,
    step: Step,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sums: Tensor,
    log_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step, differentiable by autograd.

    Args:
        problem: The call.
        step: The step.
        query: ``[B, H, queries, D]``, the step's.
        key: ``[B, Hkv, keys, D]``, the step's.
        value: ``[B, Hkv, keys, Dv]``.
        sums: ``[B, Hkv, F, Dv + 1]``, the state: sums of ``phi(k) (v, 1)^T`` times
            ``exp(-log_scale)``.
        log_scale: ``[B, Hkv]``; -inf where the state holds nothing.

    Returns:
        The output ``[B, H, queries, Dv]`` in the computing dtype, and the state after the step.
    """
    batch, _, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1:3]
    groups, dtype = problem.groups, problem.dtype
    value = value.to(dtype)
    value = torch.cat([value, value.new_ones(batch, kv_heads, kv_len, 1)], -1)
    if kv_len:
        phi_k, key_scale = split_scale(problem.feature_map, key.to(dtype), problem.scaling)
    output = query.new_empty(batch, query.shape[1], 0, value.shape[-1] - 1, dtype=dtype)
    if q_len:
        q = query.to(dtype).unflatten(1, (kv_heads, groups)).flatten(2, 3)
        phi_q, _ = split_scale(problem.feature_map, q, problem.scaling)
        top = log_scale[..., None].expand(batch, kv_heads, q_len)
        if step.reads_state is not None:
            top = top.masked_fill(~step.reads_state, float("-inf"))
        from_state = top
        if kv_len:
            assert step.visible is not None
            pair_scale = key_scale[:, :, None].masked_fill(~step.visible, float("-inf"))
            top = torch.maximum(top, pair_scale.amax(-1))
        base = _zero_where_empty(top)
        # Every sum is relative to the largest scale that its query sees, as in an online softmax.
        factor = torch.exp(from_state - base)[:, :, None, :, None]
        sums_read = (phi_q @ sums).unflatten(2, (groups, q_len)) * factor
        if kv_len:
            weights = (phi_q @ phi_k.transpose(-1, -2)).unflatten(2, (groups, q_len))
            weights = weights * torch.exp(pair_scale - base[..., None])[:, :, None]
            sums_read = sums_read + (weights.flatten(2, 3) @ value).unflatten(2, (groups, q_len))
        below = sums_read[..., -1:]
        output = (sums_read[..., :-1] / torch.where(below == 0, 1.0, below)).flatten(1, 2)
    if kv_len:
        if step.absorbed is not None:
            key_scale = key_scale.masked_fill(~step.absorbed, float("-inf"))
        if step.keeps_state is not None:
            log_scale = log_scale.masked_fill(~step.keeps_state, float("-inf"))
        top = torch.maximum(log_scale, key_scale.amax(-1))
        base = _zero_where_empty(top)
        sums = sums * torch.exp(log_scale - base)[..., None, None]
        scaled = phi_k * torch.exp(key_scale - base[..., None])[..., None]
        sums = sums + scaled.transpose(-1, -2) @ value
        log_scale = top
    return output, sums, log_scale


def run_all(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sums: Tensor,
    log_scale: Tensor,
    before: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps; ``before`` collects the state before each stretch of them."""
    batch, heads, q_len, _ = query.shape
    # Laid out as [batch, q_len, heads, dim], which is how models read it: no copy for them.
    output = query.new_zeros(batch, q_len, heads, value.shape[-1]).transpose(1, 2)
    for index, step in enumerate(problem.steps):
        if before is not None and index % problem.stretch == 0:
            before.append((sums, log_scale))
        part, sums, log_scale = run_step(
            problem,
            step,
            query[:, :, step.queries],
            key[:, :, step.keys],
            value[:, :, step.keys],
            sums,
            log_scale,
        )
        output[:, :, step.queries] = part.to(output.dtype)
    return output, sums, log_scale


class _ChunkedLinearAttention(torch.autograd.Function):
    """All steps forward; in reverse and computed again for the gradients."""

    # Both directions choose their own precision, so autocast stays out.

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sums: Tensor,
        log_scale: Tensor,
        problem: Problem,
    ) -> tuple[Tensor, Tensor, Tensor]:
        before: list[tuple[Tensor, Tensor]] = []
        with torch.autocast(query.device.type, enabled=False):
            output, end_sums, end_scale = run_all(
                problem, query, key, value, sums, log_scale, before
            )
        if end_sums is sums:  # no keys: autograd wants a tensor of its own
            end_sums, end_scale = sums.clone(), log_scale.clone()
        states = [tensor for pair in before for tensor in pair]
        ctx.save_for_backward(query, key, value, *states)
        ctx.problem = problem
        ctx.mark_non_differentiable(end_scale)
        return output, end_sums, end_scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, grad_sums: Tensor, _: Any
    ) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        problem: Problem = ctx.problem
        grads = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
        states: list[tuple[Tensor, Tensor]] = []  # before the stretch's first step, second, ...
        with torch.autocast(query.device.type, enabled=False):
            for index in reversed(range(len(problem.steps))):
                if not states:
                    states = _states_of_stretch(problem, index, key, value, kept)
                step = problem.steps[index]
                where = (step.queries, step.keys, step.keys)
                q, k, v = (
                    tensor[:, :, rows].detach().requires_grad_()
                    for tensor, rows in zip((query, key, value), where, strict=True)
                )
                sums, log_scale = states.pop()
                sums = sums.detach().requires_grad_()
                with torch.enable_grad():
                    output, after, _ = run_step(problem, step, q, k, v, sums, log_scale)
                results, given = [after], [grad_sums]
                if output.requires_grad:  # not without queries
                    results.append(output)
                    given.append(grad_output[:, :, step.queries].to(output.dtype))
                found = torch.autograd.grad(results, (q, k, v, sums), given, allow_unused=True)
                for grad, rows, part in zip(grads, where, found, strict=False):
                    if part is not None:
                        grad[:, :, rows] = part
                grad_sums = found[3]
        return *grads, grad_sums, None, None


def _states_of_stretch(
    problem: Problem, last: int, key: Tensor, value: Tensor, kept: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The states before each step of the stretch that ends with step ``last``."""
    number = last // problem.stretch
    states = [(kept[2 * number], kept[2 * number + 1])]
    for step in problem.steps[number * problem.stretch : last]:
        k, v = key[:, :, step.keys], value[:, :, step.keys]
        without_queries = key[:, :, _NONE]
        _, *after = run_step(problem, step, without_queries, k, v, *states[-1])
        states.append((after[0], after[1]))
    return states


def chunked_linear_attention(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, sums: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear attention over a problem's steps; see `hf_attn_plugin.ops.linear.linear_attention`.

    Returns:
        The output ``[B, H, queries, Dv]`` in the inputs' dtype, and the state after all keys.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, sums)):
        return _ChunkedLinearAttention.apply(query, key, value, sums, log_scale, problem)
    with torch.autocast(query.device.type, enabled=False):
        return run_all(problem, query, key, value, sums, log_scale)
