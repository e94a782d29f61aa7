"""Exact attention over any pattern in Triton: forward, backward, and the operators of both."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.triton.launch import empty_results, run_backward, run_forward
from hf_attn_plugin.ops.triton.plan import Plan
from hf_attn_plugin.ops.triton.problem import Problem
from hf_attn_plugin.ops.triton.support import DTYPES, MAX_HEAD_DIM, refuses_pattern
from hf_attn_plugin.ops.triton.tiles import choose_tiles, shape_of
from hf_attn_plugin.patterns import Pattern

# How a pattern crosses into an operator: the tensors it has, and numbers, of which the first tells
# by its bits which tensors these are, and -1 is None. Its lengths are those of queries and keys.
_TENSORS = (
    "global_tokens",
    "q_offset",
    "key_valid",
    "q_documents",
    "kv_documents",
    "q_positions",
    "kv_positions",
    "kv_ranks",
    "global_queries",
    "dense",
)
_OPTIONAL_NUMBERS = ("band", "window", "stride")
_NUMBERS = ("causal", "dilation", "num_sink_tokens", "num_global_tokens", "kv_offset")


def triton_attention(
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

    Deterministic: the backward pass adds in a fixed order. Rows of float16 and bfloat16 are
    multiplied in their own precision and added in float32; float32 is computed as IEEE float32.
    Memory beyond inputs, output and gradients: 12 bytes per query and head in the backward pass,
    float32 copies of what a pattern with a stride computes in two passes, and float32 slices of
    the few rows and columns that are split over programs, at most the size of a 16-bit output.
    Work is planned once per `Pattern` object, whose tensors must not change afterwards. Transforms
    of torch.func (vmap, grad) cannot enter; `reference_attention` takes them.

    Raises:
        ValueError: The kernels do not honour the call; see `support.refuses`.
    """
    _refuse(query, value, sinks)
    if scaling <= 0:  # kernels compare products of query and key before they are scaled
        query, scaling = query * (-1.0 if scaling < 0 else 0.0), -scaling or 1.0
    # Kernels read rows of neighbouring elements; other layouts (rare) are copied.
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if sinks is not None:
        sinks = sinks.float()  # of any other type they would be compiled anew
    if torch.compiler.is_compiling() or type(query) not in (Tensor, torch.nn.Parameter):
        _refuse_pattern(pattern)
        tensors, numbers = _encode(pattern)
        return _forward(query, key, value, sinks, tensors, numbers, float(scaling), softcap)
    return _EagerAttention.apply(
        query,
        key,
        value,
        sinks,
        _plan_of(pattern, query.device),
        pattern.dense,
        float(scaling),
        softcap,
    )


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    scaling: float,
    softcap: float | None,
) -> Problem:
    """A call for `launch.run_forward` and `launch.run_backward`, which autograd does not see.

    Args:
        query: ``[batch, heads, q_len, head_dim]``, as all any strides.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        pattern: Which pairs attend. Its plan is kept with it.
        scaling: Factor on the scores, above 0.
        softcap: Cap of the scores or None.

    Raises:
        ValueError: The kernels do not honour the call; see `support.refuses`.
    """
    _refuse(query, value, None)
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    plan = _plan_of(pattern, query.device)
    return _planned(plan, query, key, value, None, pattern.dense, scaling, softcap)


def _plan_of(pattern: Pattern, device: torch.device) -> Plan:
    def find_plan() -> Plan:
        _refuse_pattern(pattern)
        if pattern.tensors():  # whether their values have changed since another pattern's plan
            return Plan(pattern, device)  # nothing tells for sure
        return _plans.find(pattern.q_len, pattern.kv_len, *_encode(pattern), device)

    return pattern.derive(("triton plan", device), find_plan)


@torch.library.custom_op("hf_attn_plugin::triton_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return run_forward(_problem(query, key, value, sinks, tensors, numbers, scaling, softcap))


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return empty_results(query, value)


@torch.library.custom_op("hf_attn_plugin::triton_attention_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (empty where there are none)."""
    problem = _problem(query, key, value, sinks, tensors, numbers, scaling, softcap)
    *grads, grad_sinks = _gradients(problem, output, lse, grad_output, grad_lse)
    if grad_sinks is None:
        grad_sinks = query.new_empty(0)
    return grads[0], grads[1], grads[2], grad_sinks


@_backward.register_fake
def _(
    grad_output: Tensor,
    grad_lse: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(t) for t in (query, key, value)]
    grad_sinks = query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return grads[0], grads[1], grads[2], grad_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, tensors, numbers, scaling, softcap = inputs
    ctx.save_for_backward(*output, query, key, value, sinks, *tensors)
    ctx.numbers, ctx.scaling, ctx.softcap = numbers, scaling, softcap


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    output, lse, query, key, value, sinks, *tensors = ctx.saved_tensors
    *d_inputs, d_sinks = _backward(
        *grads,
        output,
        lse,
        query,
        key,
        value,
        sinks,
        tensors,
        ctx.numbers,
        ctx.scaling,
        ctx.softcap,
    )
    nothing = [None] * len(tensors)
    return *d_inputs, None if sinks is None else d_sinks, nothing, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _EagerAttention(torch.autograd.Function):
    """The operators without their dispatch, which takes the host longer than all launches."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        plan: Plan,
        dense: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        problem = _planned(plan, query, key, value, sinks, dense, scaling, softcap)
        output, lse = run_forward(problem)
        ctx.save_for_backward(query, key, value, sinks, dense, output, lse)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.scaling, ctx.softcap = plan, scaling, softcap
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        query, key, value, sinks, dense, output, lse = ctx.saved_tensors
        problem = _planned(ctx.plan, query, key, value, sinks, dense, ctx.scaling, ctx.softcap)
        grad_output, grad_lse = grads
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        d_inputs = _gradients(problem, output, lse, grad_output, grad_lse)
        return *d_inputs, None, None, None, None


def _gradients(
    problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and sinks."""
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    *grads, delta = run_backward(problem, output, lse, grad_output, grad_lse)
    sinks, grad_sinks = problem.sinks, None
    if sinks is not None:
        # A row without pairs has the sink as its log-sum-exp; without a sink either, no weight.
        weights = torch.exp(sinks.float().view(1, -1, 1) - torch.where(lse.isneginf(), 0.0, lse))
        grad_sinks = -(weights * delta).sum((0, 2)).view(sinks.shape).to(sinks.dtype)
    return grads[0], grads[1], grads[2], grad_sinks


def _encode(pattern: Pattern) -> tuple[list[Tensor], list[int]]:
    """A pattern as an operator takes it."""
    tensors, given = [], 0
    for place, name in enumerate(_TENSORS):
        field = getattr(pattern, name)
        if isinstance(field, Tensor):
            tensors.append(field)
            given |= 1 << place
    numbers = [given, *(int(getattr(pattern, name)) for name in _NUMBERS)]
    for name in _OPTIONAL_NUMBERS:
        number = getattr(pattern, name)
        numbers.append(-1 if number is None else number)
    offset = pattern.q_offset
    if offset is None or isinstance(offset, Tensor):
        return tensors, [*numbers, 0, 0]
    return tensors, [*numbers, 1, offset]


def _decode(q_len: int, kv_len: int, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Pattern:
    """The inverse of `_encode`."""
    given, *plain, has_offset, offset = numbers
    names = [name for place, name in enumerate(_TENSORS) if given >> place & 1]
    fields: dict[str, Any] = dict(zip(names, tensors, strict=True))
    fields |= zip(_NUMBERS, plain, strict=False)
    fields["causal"] = bool(fields["causal"])
    for name, number in zip(_OPTIONAL_NUMBERS, plain[len(_NUMBERS) :], strict=True):
        fields[name] = None if number < 0 else number
    if has_offset:
        fields["q_offset"] = offset
    return Pattern(q_len=q_len, kv_len=kv_len, **fields)


class _Plans:
    """The last plans, found by the numbers of a pattern and the identity of its tensors.

    The operators need it, which get no pattern: the backward pass, and every layer but the first,
    find what the first has made. Writes that leave no trace in a tensor's version (through numpy
    or ``.data``) are not noticed, so that eager calls use it only for patterns without tensors.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[
            tuple[Any, ...], tuple[list[weakref.ref[Tensor]], Plan]
        ] = collections.OrderedDict()

    def find(
        self,
        q_len: int,
        kv_len: int,
        tensors: Sequence[Tensor],
        numbers: Sequence[int],
        device: torch.device,
    ) -> Plan:
        if any(t.is_inference() for t in tensors):  # nothing tells whether they were changed
            return Plan(_decode(q_len, kv_len, tensors, numbers), device)
        versions = tuple((id(t), t._version) for t in tensors)
        key = (q_len, kv_len, tuple(numbers), versions, device)
        held, plan = self._kept.get(key, ([], None))
        # An id names another tensor once the first is gone.
        if plan is None or any(ref() is not t for t, ref in zip(tensors, held, strict=True)):
            plan = Plan(_decode(q_len, kv_len, tensors, numbers), device)
        with self._lock:  # the backward pass runs in threads of its own
            self._kept[key] = ([weakref.ref(t) for t in tensors], plan)
            self._kept.move_to_end(key)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        return plan


_plans = _Plans(16)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    scaling: float,
    softcap: float | None,
) -> Problem:
    plan = _plans.find(query.shape[2], key.shape[2], tensors, numbers, query.device)
    dense = tensors[-1] if numbers[0] >> _TENSORS.index("dense") & 1 else None
    return _planned(plan, query, key, value, sinks, dense, scaling, softcap)


def _planned(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    dense: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Problem:
    if sinks is not None:
        sinks = sinks.contiguous()  # kernels read the logit of head h at h
    if dense is not None:
        dense = dense.view(torch.int8)
    tiles = choose_tiles(query.shape[3], value.shape[3], query.dtype, shape_of(plan.pattern))
    return Problem(query, key, value, sinks, plan, tiles, scaling, softcap, dense)


def _refuse(query: Tensor, value: Tensor, sinks: Tensor | None) -> None:
    heads, head_dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    if sinks is not None and sinks.numel() != heads:
        raise ValueError(f"triton_attention: one sink for each of {heads} heads, not {sinks.shape}")
    if query.dtype not in DTYPES:
        reason = f"it computes {', '.join(map(str, DTYPES))}, not {query.dtype}"
    elif max(head_dim, value_dim) > MAX_HEAD_DIM:
        sizes = f"{head_dim} and {value_dim}"
        reason = f"head_dim and value_dim may be up to {MAX_HEAD_DIM}, not {sizes}"
    else:
        return
    raise ValueError(f"triton_attention: {reason}; use blocked_attention.")


def _refuse_pattern(pattern: Pattern) -> None:
    reason = refuses_pattern(pattern)
    if reason is not None:
        raise ValueError(f"triton_attention: {reason}; use blocked_attention.")
