"""Launches of the attention kernels: memory, descriptors, arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_attn_plugin.ops.triton import hopper
from hf_attn_plugin.ops.triton.dispatch import on_device
from hf_attn_plugin.ops.triton.forward import forward_kernel
from hf_attn_plugin.ops.triton.grad_key import grad_key_kernel
from hf_attn_plugin.ops.triton.grad_query import grad_query_kernel
from hf_attn_plugin.ops.triton.merge import merge_outputs_kernel, merge_sums_kernel
from hf_attn_plugin.ops.triton.plan import Pass
from hf_attn_plugin.ops.triton.problem import Problem
from hf_attn_plugin.ops.triton.recording import Recording, layout
from hf_attn_plugin.ops.triton.tiles import Tile, pieces, width
from hf_attn_plugin.ops.triton.work import Work

# Layouts of calls that a plan keeps launches for: more come only where shapes change all the time.
_MOST_LAYOUTS = 64


def run_forward(problem: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Output, in the inputs' dtype or another, and log-sum-exp, in new memory."""
    output, lse = empty_results(problem.query, problem.value, dtype)
    if lse.numel():
        _run(problem, _forward, output, lse)
    return output, lse


def run_backward(
    problem: Problem,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value; and per row the mean of d weight, ``[batch, heads, q]``.

    The gradients are in the inputs' dtype, or in another. ``output`` and ``lse`` may be over more
    keys than the problem's: the gradients are then what these contribute.
    """
    inputs = (problem.query, problem.key, problem.value)
    d_query, d_key, d_value = (torch.empty_like(t, dtype=dtype) for t in inputs)
    delta, base_lse = torch.empty_like(lse), torch.empty_like(lse)
    if lse.numel():
        own = (output, lse, grad_output, grad_lse, d_query, base_lse, delta)
        _run(problem, _grad_query, *own)
    if problem.key.numel():
        _run(problem, _grad_key, grad_output, base_lse, delta, d_key, d_value)
    return d_query, d_key, d_value, delta


def _run(problem: Problem, direction: Callable[..., None], *own: Tensor | None) -> None:
    """Launch one direction: as it was recorded, or else as it comes, and then it is recorded.

    Args:
        problem: The call.
        direction: Takes a recording, a problem, and
        own: further tensors of this direction.
    """
    tensors = (*problem.tensors, *own)
    numbers = (problem.tiles, problem.scaling, problem.softcap)
    asked = (direction, numbers, *map(layout, tensors))
    kept = problem.plan.recordings
    recording = kept.get(asked)
    with on_device(problem.query):
        if recording is not None:
            recording.repeat(tensors)
            return
        # A tensor that is given twice is two objects here, since they may differ the next time.
        problem = dataclasses.replace(
            problem,
            query=problem.query.detach(),
            key=problem.key.detach(),
            value=problem.value.detach(),
            sinks=None if problem.sinks is None else problem.sinks.detach(),
            dense=None if problem.dense is None else problem.dense.detach(),
        )
        own = tuple(None if t is None else t.detach() for t in own)
        recording = Recording([*problem.tensors, *own])
        direction(recording, problem, *own)
        recording.close()
        if len(kept) >= _MOST_LAYOUTS:
            kept.clear()
        kept[asked] = recording


def _forward(calls: Recording, problem: Problem, output: Tensor, lse: Tensor) -> None:
    query, key, value = problem.query, problem.key, problem.value
    if hopper.serves(problem, query, key, value, results=(output,)):
        hopper.forward(calls, problem, output, lse)
        return
    tile = problem.tiles.forward
    heads = tile.heads(problem.groups)
    packs = query.shape[1] // heads
    earlier = None
    for last, step in _passes(problem):
        work = problem.work(step, tile)
        target = output if last else calls.scratch_like(output)
        unit = _unit(query, key, value)
        tma = _by_descriptor(step, unit, key, value)
        slices = work.num_slots * problem.batch * packs * tile.rows
        state = _scratch(calls, lse, slices, 2)
        partial = _scratch(calls, lse, slices, width(value.shape[3]))
        arguments = {
            "query": query,
            **_key_tiles("key", key, tile.keys, tma),
            **_key_tiles("value", value, tile.keys, tma),
            "output": target,
            "lse": lse,
            "sinks": problem.sinks,
            "earlier": earlier,
            "partial_output": partial,
            "partial_state": state,
            **_strides("q", query, unit),
            **_strides("k", key, unit),
            **_strides("v", value, unit),
            **_strides("o", target),
            "batch_packs": problem.batch * packs,
            "packs": packs,
            **problem.runtime(step, tile, work),
        }
        programs = work.num_items * problem.batch * packs
        calls.launch(forward_kernel, programs, arguments, problem.fixed(step, tile, unit, tma))
        if work.num_splits:
            arguments = {"partial_output": partial, "partial_state": state, "lse": lse}
            _merge(calls, problem, step, tile, work, target, merge_outputs_kernel, arguments)
        earlier = target


def _grad_query(
    calls: Recording,
    problem: Problem,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    grad_query: Tensor,
    base_lse: Tensor,
    delta: Tensor,
) -> None:
    query, key, value = problem.query, problem.key, problem.value
    if hopper.serves(problem, query, key, value, output, grad_output, results=(grad_query,)):
        rows = (lse, grad_output, grad_lse, grad_query, base_lse, delta)
        hopper.grad_query(calls, problem, output, *rows)
        return
    tile = problem.tiles.grad_query
    packs = query.shape[1] // tile.heads(problem.groups)
    earlier = None
    for last, step in _passes(problem):
        work = problem.work(step, tile)
        target = grad_query if last else calls.scratch_like(grad_query)
        unit = _unit(query, key, value, grad_output)
        tma = _by_descriptor(step, unit, key, value)
        slices = work.num_slots * problem.batch * packs * tile.rows
        partial = _scratch(calls, lse, slices, width(query.shape[3]))
        arguments = {
            "query": query,
            **_key_tiles("key", key, tile.keys, tma),
            **_key_tiles("value", value, tile.keys, tma),
            "output": output,
            "lse": lse,
            "grad_output": grad_output,
            "grad_lse": grad_lse,
            "grad_query": target,
            "base_lse": base_lse,
            "delta": delta,
            "earlier": earlier,
            "partial": partial,
            **_strides("q", query, unit),
            **_strides("k", key, unit),
            **_strides("v", value, unit),
            **_strides("o", output),
            **_strides("go", grad_output, unit),
            **_strides("d", target),
            "batch_packs": problem.batch * packs,
            "packs": packs,
            "scaling": problem.scaling,
            **problem.runtime(step, tile, work),
        }
        programs = work.num_items * problem.batch * packs
        calls.launch(grad_query_kernel, programs, arguments, problem.fixed(step, tile, unit, tma))
        if work.num_splits:
            arguments = {"partial": partial}
            _merge(calls, problem, step, tile, work, target, merge_sums_kernel, arguments)
        earlier = target


def _grad_key(
    calls: Recording,
    problem: Problem,
    grad_output: Tensor,
    base_lse: Tensor,
    delta: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    query, key, value = problem.query, problem.key, problem.value
    if hopper.serves(problem, query, key, value, grad_output, results=(grad_key, grad_value)):
        hopper.grad_key(calls, problem, grad_output, base_lse, delta, grad_key, grad_value)
        return
    tile = problem.tiles.grad_key
    heads = tile.heads(problem.groups)
    kv_heads = key.shape[1]
    earlier: tuple[Tensor | None, Tensor | None] = (None, None)
    for last, step in _passes(problem):
        work = problem.work(step, tile, of_keys=True)
        targets = (grad_key, grad_value)
        if not last:
            targets = (calls.scratch_like(grad_key), calls.scratch_like(grad_value))
        unit = _unit(query, key, value, grad_output)
        tma = _by_descriptor(step, unit, query, grad_output)
        slices = work.num_slots * problem.batch * kv_heads * tile.keys
        partials = [_scratch(calls, delta, slices, width(t.shape[3])) for t in targets]
        tokens = tile.rows // heads
        arguments = {
            **_query_tiles("query", query, heads, tokens, tma),
            "key": key,
            "value": value,
            **_query_tiles("grad_output", grad_output, heads, tokens, tma),
            "base_lse": base_lse,
            "delta": delta,
            "grad_key": targets[0],
            "grad_value": targets[1],
            "earlier_key": earlier[0],
            "earlier_value": earlier[1],
            "partial_key": partials[0],
            "partial_value": partials[1],
            **_strides("q", query, unit),
            **_strides("k", key, unit),
            **_strides("v", value, unit),
            **_strides("go", grad_output, unit),
            **_strides("dk", targets[0]),
            **_strides("dv", targets[1]),
            "batch_heads": problem.batch * kv_heads,
            "kv_heads": kv_heads,
            "scaling": problem.scaling,
            **problem.runtime(step, tile, work),
        }
        programs = work.num_items * problem.batch * kv_heads
        fixed = problem.fixed(step, tile, unit, tma)
        for keys, values in [(True, False), (False, True)] if tile.apart else [(True, True)]:
            parts = {"OF_KEYS": keys, "OF_VALUES": values}
            calls.launch(grad_key_kernel, programs, arguments, fixed | parts)
        if work.num_splits:
            for partial, target in zip(partials, targets, strict=True):
                sums: dict[str, Any] = {"partial": partial}
                _merge(
                    calls, problem, step, tile, work, target, merge_sums_kernel, sums, of_keys=True
                )
        earlier = targets


def empty_results(
    query: Tensor, value: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Memory for output and log-sum-exp.

    The output lies as ``[batch, q_len, heads, value_dim]``, which is how models read it.
    """
    batch, heads, q_len, _ = query.shape
    output = query.new_empty(batch, q_len, heads, value.shape[3], dtype=dtype or query.dtype)
    output = output.transpose(1, 2)
    return output, query.new_empty(batch, heads, q_len, dtype=torch.float32)


def _passes(problem: Problem) -> list[tuple[bool, Pass]]:
    """The passes in order; whether one is the last, which writes what is returned."""
    passes = problem.plan.passes
    return [(step is passes[-1], step) for step in passes]


def _scratch(calls: Recording, idle: Tensor, rows: int, columns: int) -> Tensor:
    """Memory for partial results; ``idle``, which nobody then writes, where there are none.

    Kernels get a pointer in any case: what is split must not change what is compiled.
    """
    return calls.scratch(rows, columns) if rows else idle


def _merge(
    calls: Recording,
    problem: Problem,
    step: Pass,
    tile: Tile,
    work: Work,
    target: Tensor,
    kernel: Any,
    arguments: dict[str, Any],
    of_keys: bool = False,
) -> None:
    """Put the slices of tiles of queries, or of keys, together in ``target``."""
    heads = 1 if of_keys else tile.heads(problem.groups)
    packs = target.shape[1] // heads
    dim = target.shape[3]
    arguments = {
        **arguments,
        "output": target,
        "splits": work.splits,
        "order": step.kv_order if of_keys else step.q_order,
        **_strides("out", target),
        "batch_packs": problem.batch * packs,
        "packs": packs,
        "length": target.shape[2],
        "split_batch": work.num_splits if work.splits.shape[0] > 1 else 0,
    }
    fixed = {
        "DIM": dim,
        "WIDTH": width(dim),
        "HEADS": heads,
        "TOKENS": tile.keys if of_keys else tile.rows // heads,
    }
    calls.launch(kernel, work.num_splits * problem.batch * packs, arguments, fixed)


def _strides(name: str, tensor: Tensor, unit: int = 1) -> dict[str, int]:
    """Strides of batch, head and token, in units of ``unit`` elements."""
    axes = ("batch", "head", "token")
    strides = zip(axes, tensor.shape, tensor.stride(), strict=False)
    # A dimension of one entry has a stride that nobody uses: any will do.
    return {f"{name}_{axis}": 0 if size == 1 else step // unit for axis, size, step in strides}


def _unit(*tensors: Tensor) -> int:
    """Elements in 16 bytes where all rows start at a multiple of these, else 1.

    Kernels multiply by it, and so know how far their loads are aligned without being compiled anew
    for every length.
    """
    unit = 16 // tensors[0].element_size()
    for tensor in tensors:
        if tensor.data_ptr() % 16:
            return 1
        for count, stride in zip(tensor.shape[:3], tensor.stride(), strict=False):
            if count > 1 and stride % unit:
                return 1
    return unit


def _by_descriptor(step: Pass, unit: int, *tensors: Tensor) -> bool:
    """Whether the loop's tiles can be loaded by tensor descriptors (TMA) rather than pointers.

    Descriptors need neighbouring tokens, 16-byte strides that are not 0, and something to load.
    """
    if unit == 1 or step.q_order is not None or step.kv_order is not None:
        return False
    for tensor in tensors:
        if not tensor.numel() or tensor.shape[3] < unit:
            return False
        for count, stride in zip(tensor.shape[:3], tensor.stride(), strict=False):
            if count > 1 and stride <= 0:
                return False
    return True


def _descriptor(base: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """A descriptor of a rank below 6; strides of dimensions of one entry become valid ones."""
    unit = 16 // base.element_size()
    safe = [s if n > 1 else unit for n, s in zip(shape, strides, strict=True)]
    return TensorDescriptor(base, shape, [*safe[:-1], 1], block)


def _key_tiles(name: str, tensor: Tensor, keys: int, tma: bool) -> dict[str, Any]:
    """A descriptor of tiles of keys for each piece of columns, or a pointer to all."""
    if not tma:
        return {name: tensor, f"{name}_tail": None}
    shape, strides = list(tensor.shape), list(tensor.stride())
    main, tail = (
        _descriptor(tensor, shape, strides, [1, 1, keys, columns]) if columns else None
        for columns in pieces(tensor.shape[3])
    )
    return {name: main, f"{name}_tail": tail}


def _query_tiles(name: str, tensor: Tensor, heads: int, tokens: int, tma: bool) -> dict[str, Any]:
    """The same of tiles of ``heads`` neighbouring heads x ``tokens`` tokens."""
    if not tma or heads == 1:
        return _key_tiles(name, tensor, tokens, tma)
    batch, all_heads, length, dim = tensor.shape
    b, h, t, _ = tensor.stride()
    shape = [batch, all_heads // heads, heads, length, dim]
    strides = [b, heads * h, h, t, 1]
    main, tail = (
        _descriptor(tensor, shape, strides, [1, 1, heads, tokens, columns]) if columns else None
        for columns in pieces(dim)
    )
    return {name: main, f"{name}_tail": tail}
