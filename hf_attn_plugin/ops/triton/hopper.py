"""Launches of the warp-specialised Hopper kernels, for the calls that they serve.

They compute what the kernels of `launch` do for the commonest calls, with the same conventions for
what one kernel leaves to the next, so that each can stand in for its counterpart. Measured on one
H200 in bfloat16 with head_dim 128 and 32 heads over 8, milliseconds for forward, queries' and keys'
gradients: causal attention at 16384 tokens 3.1, 4.7, 6.2; a window of 1024 at 131072 tokens 3.9,
5.7, 6.9; a window of 4096 there 14.4, 19.8, 26.2; 64 documents there 6.2, 8.3, 11.0; a window of
512 with 64 global tokens at 32768 tokens 0.63, 0.85, 1.09. (`launch`'s kernels, on another day:
4.1, 4.7, 10.7; 5.4, 6.6, 10.1; 17.8, 20.7, 37.3; 6.6, 7.9, 14.9; 0.88, 1.16, 1.59.)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_attn_plugin.ops.triton import masks
from hf_attn_plugin.ops.triton.hopper_descriptors import DTYPES, descriptor, is_hopper, of_keys
from hf_attn_plugin.ops.triton.hopper_forward import hopper_forward_kernel
from hf_attn_plugin.ops.triton.hopper_grad_key import hopper_grad_key_kernel
from hf_attn_plugin.ops.triton.hopper_grad_query import hopper_grad_query_kernel
from hf_attn_plugin.ops.triton.hopper_rows import merge_blocks_kernel, pad_rows_kernel
from hf_attn_plugin.ops.triton.hopper_work import PairWork, pair_work
from hf_attn_plugin.ops.triton.merge import merge_outputs_kernel, merge_sums_kernel
from hf_attn_plugin.ops.triton.plan import Pass
from hf_attn_plugin.ops.triton.problem import LOG2E, Problem, batch_stride
from hf_attn_plugin.ops.triton.recording import Recording
from hf_attn_plugin.ops.triton.tiles import Tile
from hf_attn_plugin.ops.triton.work import Split, Work
from hf_attn_plugin.patterns import Pattern

_HEAD_DIMS = (64, 128)
# Rows of one warpgroup, in `hopper_pieces`.
_ROWS = 64
# Depth of the ring of queries of the keys' gradients: the visits that one warpgroup of a window's
# last skips are as many, so that it can go on to its next keys.
_KEY_STAGES = 4
# Programs to a multiprocessor where others need some of these at the same time.
_SHARES = 4
# Numbers that one program copies where rows have to be padded.
_PADDED = 1024
# From how many keys on a query's run is long: larger tiles then waste little at its ends. The first
# call on either side compiles its own kernels.
_LONG_RUN = 2048


def serves(problem: Problem, *tensors: Tensor, results: tuple[Tensor, ...] = ()) -> bool:
    """Whether these kernels compute a call.

    They do on Hopper GPUs, in 16 bits, for queries that see one or two runs of neighbouring keys
    (causal attention, windows, sinks, leading global tokens, packed documents, padding at the
    ends), with equal sizes of queries and values and no softcap.

    Results may be in float32: every block then becomes a slice, which the kernels leave in float32
    in any case, and the kernels that merge slices write them, for one more pass over the results.

    Args:
        problem: The call.
        tensors: All that are loaded by TMA, ``[batch, heads, tokens, dim]``.
        results: What is stored.
    """
    query, value, passes = problem.query, problem.value, problem.plan.passes
    return (
        problem.softcap is None
        and query.dtype in DTYPES
        and query.shape[3] in _HEAD_DIMS
        and query.shape[3] == value.shape[3]
        and len(passes) == 1
        and passes[0].runs is not None
        and passes[0].q_order is None
        and passes[0].kv_order is None
        and is_hopper(query.device)
        and all(t.dtype == query.dtype and _by_tma(t) for t in tensors)
        and (_in_slices(*results) or all(t.dtype == query.dtype and _by_tma(t) for t in results))
    )


def _in_slices(*results: Tensor) -> bool:
    """Whether all results are written by the kernels that merge slices."""
    return bool(results) and all(t.dtype == torch.float32 and t.stride(3) == 1 for t in results)


def forward(calls: Recording, problem: Problem, output: Tensor, lse: Tensor) -> None:
    """Write output and log-sum-exp."""
    query, key, value = problem.query, problem.key, problem.value
    step = problem.plan.passes[0]
    tile = _query_tile(problem, forward=True)
    in_slices = _in_slices(output)
    work, heads, packs = _query_work(problem, step, tile, in_slices)
    dim = query.shape[3]
    slices = work.num_slots * problem.batch * packs * tile.rows
    partial, state = calls.scratch(max(slices, 1), dim), calls.scratch(max(slices, 1), 2)
    programs = work.num_items * problem.batch * packs
    arguments, fixed = _over_queries(problem, step, work, tile)
    own = {
        "query": _of_queries(query, heads, tile.rows),
        "key": of_keys(key, tile.keys),
        "value": of_keys(value, tile.keys),
        # Where all is in slices nothing is stored through it.
        "output": _of_queries(query if in_slices else output, heads, tile.rows),
        "lse": lse,
        "sinks": problem.sinks,
        "partial_output": partial,
        "partial_state": state,
    }
    fixed["SINKS"] = problem.sinks is not None
    programs = _persistent(query, programs, in_slices)
    calls.launch(hopper_forward_kernel, programs, own | arguments, fixed)
    if work.num_splits:
        partials = {"partial_output": partial, "partial_state": state, "lse": lse}
        _merge(
            calls, merge_outputs_kernel, problem, work, output, partials, heads, tile.rows // heads
        )


def grad_query(
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
    """Write the queries' gradients, and what the keys' need of every row."""
    query = problem.query
    step = problem.plan.passes[0]
    tile = _query_tile(problem, forward=False)
    in_slices = _in_slices(grad_query)
    work, heads, packs = _query_work(problem, step, tile, in_slices)
    slices = work.num_slots * problem.batch * packs * tile.rows
    partial = calls.scratch(max(slices, 1), query.shape[3])
    programs = work.num_items * problem.batch * packs
    arguments, fixed = _over_queries(problem, step, work, tile)
    own = {
        "query": _of_queries(query, heads, tile.rows),
        "grad_output": _of_queries(grad_output, heads, tile.rows),
        "output": _of_queries(output, heads, tile.rows),
        "key": of_keys(problem.key, tile.keys),
        "value": of_keys(problem.value, tile.keys),
        "grad_query": _of_queries(query if in_slices else grad_query, heads, tile.rows),
        "lse": lse,
        "grad_lse": grad_lse,
        "base_lse": base_lse,
        "delta": delta,
        "partial": partial,
        "scaling": problem.scaling,
    }
    programs = _persistent(query, programs, in_slices)
    calls.launch(hopper_grad_query_kernel, programs, own | arguments, fixed)
    if work.num_splits:
        partials = {"partial": partial}
        _merge(
            calls, merge_sums_kernel, problem, work, grad_query, partials, heads, tile.rows // heads
        )


def grad_key(
    calls: Recording,
    problem: Problem,
    grad_output: Tensor,
    base_lse: Tensor,
    delta: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Write the keys' and values' gradients."""
    query, key, value = problem.query, problem.key, problem.value
    step = problem.plan.passes[0]
    heads = _visiting_heads(problem)
    tokens = _ROWS // heads
    batch, kv_heads, dim = problem.batch, key.shape[1], query.shape[3]
    in_slices = _in_slices(grad_key, grad_value)
    work = pair_work(step, tokens, Split(problem.tiles.split, batch * kv_heads, in_slices))
    slices = max(work.num_slots * batch * kv_heads * _ROWS, 1)
    partials = [calls.scratch(slices, dim) for _ in range(2)]
    arguments = {
        "query": _of_query_tiles(query, heads, tokens),
        "key": of_keys(key, _ROWS),
        "value": of_keys(value, _ROWS),
        "grad_output": _of_query_tiles(grad_output, heads, tokens),
        "grad_key": of_keys(key if in_slices else grad_key, _ROWS),
        "grad_value": of_keys(value if in_slices else grad_value, _ROWS),
        "base_lse": _of_numbers(calls, base_lse, heads, tokens),
        "delta": _of_numbers(calls, delta, heads, tokens),
        "partial_key": partials[0],
        "partial_value": partials[1],
        "items": work.items,
        "parts": work.parts,
        "kv_info": step.kv_info,
        "item_batch": _item_stride(work),
        "part_batch": batch_stride(work.parts) // work.parts.shape[2],
        "kv_info_batch": batch_stride(step.kv_info),
        "num_items": work.num_items,
        "batch_heads": batch * kv_heads,
        "kv_heads": kv_heads,
        "group_packs": problem.groups // heads,
        "kv_len": key.shape[2],
        "scaling": problem.scaling,
        "to_log2": problem.scaling * LOG2E,
    }
    fixed = {
        "HEADS": heads,
        "TOKENS": tokens,
        "DIM": dim,
        "STAGES": _KEY_STAGES,
        "SECOND": _has_second(step),
        "num_warps": 4,
    }
    programs = _persistent(query, work.num_items * batch * kv_heads, in_slices)
    calls.launch(hopper_grad_key_kernel, programs, arguments, fixed)
    if work.num_splits:
        for partial, target in zip(partials, (grad_key, grad_value), strict=True):
            _merge_blocks(calls, work, partial, target, in_slices)


def _has_long_runs(pattern: Pattern) -> bool:
    spans = [pattern.kv_len]
    if pattern.band is not None:
        spans.append(pattern.band)
    if pattern.is_sparse:
        spans.append(pattern.reach or 0)
    return min(spans) >= _LONG_RUN


def _query_tile(problem: Problem, *, forward: bool) -> Tile:
    """Tiles of queries: two warpgroups of 64 rows, all heads of a group packed where they fit."""
    if forward and _has_long_runs(problem.plan.pattern):
        return Tile(2 * _ROWS, 128, 4, 2, pack=4)
    return Tile(2 * _ROWS, 64, 4, 4 if forward else 3, pack=4)


def _visiting_heads(problem: Problem) -> int:
    """How many heads share the 64 queries that a block of keys visits at a time."""
    pack = 1 if _has_long_runs(problem.plan.pattern) else 4
    return Tile(_ROWS, _ROWS, 4, _KEY_STAGES, pack).heads(problem.groups)


def _query_work(problem: Problem, step: Pass, tile: Tile, in_slices: bool) -> tuple[Work, int, int]:
    """The items, heads in a tile, and tiles that hold all heads."""
    heads = tile.heads(problem.groups)
    work = problem.work(step, tile, in_slices=in_slices)
    return work, heads, problem.query.shape[1] // heads


def _over_queries(
    problem: Problem, step: Pass, work: Work, tile: Tile
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both kernels over tiles of queries take, and what they are compiled for."""
    heads = tile.heads(problem.groups)
    packs = problem.query.shape[1] // heads
    arguments = {
        "items": work.items,
        "q_info": step.q_info,
        "item_batch": _item_stride(work),
        "q_info_batch": batch_stride(step.q_info),
        "num_items": work.num_items,
        "batch_packs": problem.batch * packs,
        "packs": packs,
        "group_packs": problem.groups // heads,
        "q_len": problem.query.shape[2],
        "to_log2": problem.scaling * LOG2E,
    }
    fixed = {
        "HEADS": heads,
        "TOKENS": tile.rows // heads,
        "KEYS": tile.keys,
        "DIM": problem.query.shape[3],
        "STAGES": tile.stages,
        "SECOND": _has_second(step),
        "num_warps": 4,
    }
    return arguments, fixed


def _merge(
    calls: Recording,
    kernel: Any,
    problem: Problem,
    work: Work,
    target: Tensor,
    partials: dict[str, Any],
    heads: int,
    tokens: int,
) -> None:
    """Put the slices of tiles of heads x tokens together in ``target``."""
    packs = target.shape[1] // heads
    strides = zip(("batch", "head", "token"), target.shape, target.stride(), strict=False)
    arguments = {
        **partials,
        "output": target,
        "splits": work.splits,
        "order": None,
        **{f"out_{axis}": 0 if size == 1 else step for axis, size, step in strides},
        "batch_packs": problem.batch * packs,
        "packs": packs,
        "length": target.shape[2],
        "split_batch": work.num_splits if work.splits.shape[0] > 1 else 0,
    }
    dim = target.shape[3]
    fixed = {"DIM": dim, "WIDTH": dim, "HEADS": heads, "TOKENS": tokens}
    calls.launch(kernel, work.num_splits * problem.batch * packs, arguments, fixed)


def _merge_blocks(
    calls: Recording, work: PairWork, partial: Tensor, target: Tensor, in_slices: bool
) -> None:
    """Put the slices of blocks of keys together in ``target``.

    Few blocks have many slices, unless all are in slices: then most have one.
    """
    batch, heads, length, dim = target.shape
    arguments = {
        "partial": partial,
        "output": target,
        "splits": work.splits,
        "out_batch": target.stride(0),
        "out_head": target.stride(1),
        "out_token": target.stride(2),
        "batch_heads": batch * heads,
        "heads": heads,
        "length": length,
        "split_batch": work.num_splits if work.splits.shape[0] > 1 else 0,
    }
    part, slots = (32, 2) if in_slices else (4, 16)
    fixed = {"ROWS": _ROWS, "PART": part, "SLOTS": slots, "DIM": dim}
    programs = work.num_splits * batch * heads * (_ROWS // part)
    calls.launch(merge_blocks_kernel, programs, arguments, fixed)


def _has_second(step: Pass) -> bool:
    return bool(step.terms & masks.SECOND_RUN.value)


def _item_stride(work: Work | PairWork) -> int:
    return work.num_items if work.items.shape[0] > 1 else 0


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _persistent(tensor: Tensor, items: int, in_slices: bool = False) -> int:
    """Programs of a grid in which each goes through items: one to a multiprocessor.

    Where all is in slices, ring attention's transfers run at the same time, and hold a few
    multiprocessors for as long as the other rank takes. Their programs would start late and all
    others wait for them; of shorter programs, the other multiprocessors take over some. On two
    H200s at 32768 tokens, kernels took up to 1.1 ms longer beside a transfer of 0.2 ms.
    """
    return min(items, _multiprocessors(tensor.device) * (_SHARES if in_slices else 1))


def _by_tma(tensor: Tensor) -> bool:
    """Whether a descriptor can name a tensor: rows at multiples of 16 bytes, no stride of 0."""
    size = tensor.element_size()
    return (
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(3) == 1
        and all(
            step > 0 and step * size % 16 == 0
            for count, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
            if count > 1
        )
    )


def _of_query_tiles(tensor: Tensor, heads: int, tokens: int) -> Any:
    """Tiles of neighbouring heads x tokens."""
    batch, all_heads, length, dim = tensor.shape
    of_batch, of_head, of_token, _ = tensor.stride()
    return descriptor(
        tensor,
        [batch, all_heads // heads, heads, length, dim],
        [of_batch, heads * of_head, of_head, of_token, 1],
        [1, 1, heads, tokens, dim],
    )


def _of_queries(tensor: Tensor, heads: int, rows: int) -> Any:
    """The halves of tiles of ``rows`` rows: of their heads, or of the tokens of one head."""
    part = max(heads // 2, 1)
    return _of_query_tiles(tensor, part, rows // 2 // part)


def _of_numbers(calls: Recording, rows: Tensor, heads: int, tokens: int) -> Any:
    """Tiles of neighbouring heads x tokens of one number each, float32 ``[batch, heads, length]``.

    Beyond a row's end they are 0; so are queries and their gradients, and their scores are hidden.
    """
    batch, all_heads, length = rows.shape
    stride = length
    if length % 4:
        # Rows of a descriptor start at multiples of 16 bytes.
        stride += 4 - length % 4
        padded = calls.scratch(batch, all_heads, stride)
        arguments = {"rows": rows, "padded": padded, "length": length, "stride": stride}
        programs = batch * all_heads * -(-length // _PADDED)
        calls.launch(pad_rows_kernel, programs, arguments, {"BLOCK": _PADDED})
        rows = padded
    packs = all_heads // heads
    steps = [all_heads * stride, heads * stride, stride, 1]
    layout = gl.NVMMASharedLayout(0, 32, 4)
    return TensorDescriptor(
        rows, [batch, packs, heads, length], steps, [1, 1, heads, tokens], layout
    )
