"""Launches of the attention kernels: memory, descriptors, arguments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_attn_plugin.ops.triton.forward import forward_kernel
from hf_attn_plugin.ops.triton.grad_key import grad_key_kernel
from hf_attn_plugin.ops.triton.grad_query import grad_query_kernel
from hf_attn_plugin.ops.triton.merge import merge_outputs_kernel, merge_sums_kernel
from hf_attn_plugin.ops.triton.plan import Pass, Plan
from hf_attn_plugin.ops.triton.tiles import Tile, Tiles
from hf_attn_plugin.ops.triton.work import Work

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: its tensors and numbers, and what they imply.

    Attributes:
        query: ``[batch, heads, q_len, head_dim]``, the last dimension contiguous, as of all.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        sinks: ``[heads]`` or None.
        plan: Of the pattern.
        tiles: Sizes of tiles.
        scaling: Factor on the scores, above 0.
        softcap: Cap of the scores or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    plan: Plan
    tiles: Tiles
    scaling: float
    softcap: float | None

    @property
    def batch(self) -> int:
        """Batch size."""
        return self.query.shape[0]

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.key.shape[1]

    def work(self, step: Pass, tile: Tile, of_keys: bool = False) -> Work:
        """The work items of a pass for programs with tiles of queries, or of keys."""
        tokens = tile.rows // tile.heads(self.groups)
        return step.work(tokens, tile.keys, of_keys=of_keys, split=self.tiles.split)

    def runtime(self, step: Pass, tile: Tile, work: Work) -> dict[str, Any]:
        """Arguments that all three kernels take and that differ between lengths and layouts."""
        dense = self.plan.pattern.dense
        mask_strides = [0, 0, 0, 0]
        if dense is not None:
            mask_strides = [
                0 if size == 1 and axis < 2 else stride
                for axis, (size, stride) in enumerate(zip(dense.shape, dense.stride(), strict=True))
            ]
        to_log2, cap_rate = self.scaling * _LOG2E, 0.0
        if self.softcap is not None:
            to_log2, cap_rate = self.softcap * _LOG2E, 2 * _LOG2E * self.scaling / self.softcap
        names = ("mask_batch", "mask_head", "mask_query", "mask_key")
        return {
            "items": work.items,
            "entries": work.entries,
            "item_batch": work.num_items if work.items.shape[0] > 1 else 0,
            "q_info": step.q_info,
            "kv_info": step.kv_info,
            "q_info_batch": _batch_stride(step.q_info),
            "kv_info_batch": _batch_stride(step.kv_info),
            "q_order": step.q_order,
            "kv_order": step.kv_order,
            "dense": None if dense is None else dense.view(torch.int8),
            **dict(zip(names, mask_strides, strict=True)),
            "group_packs": self.groups // tile.heads(self.groups),
            "q_len": self.query.shape[2],
            "kv_len": self.key.shape[2],
            **step.numbers,
            "to_log2": to_log2,
            "cap_rate": cap_rate,
        }

    def fixed(self, step: Pass, tile: Tile) -> dict[str, Any]:
        """What a kernel is compiled for."""
        heads = tile.heads(self.groups)
        head_dim, value_dim = self.query.shape[3], self.value.shape[3]
        return {
            "TERMS": step.terms,
            "SOFTCAP": self.softcap is not None,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "WIDTH": width(head_dim),
            "VALUE_WIDTH": width(value_dim),
            "HEADS": heads,
            "TOKENS": tile.rows // heads,
            "KEYS": tile.keys,
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
            "TWO_LOOPS": tile.two_loops,
            "STAGES": tile.stages,
            "num_warps": tile.warps,
        }


def width(dim: int) -> int:
    """Columns of a tile that holds ``dim`` of them."""
    return max(16, triton.next_power_of_2(dim))


def run_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, in new memory."""
    query, key, value = problem.query, problem.key, problem.value
    output, lse = empty_results(query, value)
    if not lse.numel():
        return output, lse
    tile = problem.tiles.forward
    heads = tile.heads(problem.groups)
    packs = query.shape[1] // heads
    earlier = None
    for last, step in _passes(problem):
        work = problem.work(step, tile)
        target = output if last else torch.empty_like(output, dtype=torch.float32)
        tma = _by_descriptor(step, key, value)
        unit = _unit(query, key, value)
        slices = work.num_slots * problem.batch * packs * tile.rows
        state = _scratch(query, slices, 2)
        partial = _scratch(query, slices, width(value.shape[3]))
        forward_kernel[(work.num_items * problem.batch * packs,)](
            query,
            _keys_descriptor(key, tile.keys) if tma else key,
            _keys_descriptor(value, tile.keys) if tma else value,
            target,
            lse,
            problem.sinks,
            earlier,
            partial_output=partial,
            partial_state=state,
            **_strides("q", query, unit),
            **_strides("k", key, unit),
            **_strides("v", value, unit),
            **_strides("o", target),
            batch_packs=problem.batch * packs,
            packs=packs,
            UNIT=unit,
            TMA=tma,
            **problem.runtime(step, tile, work),
            **problem.fixed(step, tile),
        )
        if work.num_splits:
            merge_outputs_kernel[(work.num_splits * problem.batch * packs,)](
                partial,
                state,
                target,
                lse,
                work.splits,
                step.q_order,
                **_strides("out", target),
                **_merging(problem, step, tile, work, packs, value.shape[3]),
            )
        earlier = target
    return output, lse


def run_backward(
    problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value; and per row the mean of d weight, ``[batch, heads, q]``."""
    query, key, value = problem.query, problem.key, problem.value
    d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
    delta, base_lse = torch.empty_like(lse), torch.empty_like(lse)
    if lse.numel():
        _grad_query(problem, output, lse, grad_output, grad_lse, d_query, base_lse, delta)
    if key.numel():
        _grad_key(problem, grad_output, base_lse, delta, d_key, d_value)
    return d_query, d_key, d_value, delta


def _grad_query(
    problem: Problem,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    grad_query: Tensor,
    base_lse: Tensor,
    delta: Tensor,
) -> None:
    query, key, value = problem.query, problem.key, problem.value
    tile = problem.tiles.grad_query
    packs = query.shape[1] // tile.heads(problem.groups)
    earlier = None
    for last, step in _passes(problem):
        work = problem.work(step, tile)
        target = grad_query if last else torch.empty_like(grad_query, dtype=torch.float32)
        tma = _by_descriptor(step, key, value)
        unit = _unit(query, key, value, grad_output)
        slices = work.num_slots * problem.batch * packs * tile.rows
        partial = _scratch(query, slices, width(query.shape[3]))
        grad_query_kernel[(work.num_items * problem.batch * packs,)](
            query,
            _keys_descriptor(key, tile.keys) if tma else key,
            _keys_descriptor(value, tile.keys) if tma else value,
            output,
            lse,
            grad_output,
            grad_lse,
            target,
            base_lse,
            delta,
            earlier,
            partial=partial,
            **_strides("q", query, unit),
            **_strides("k", key, unit),
            **_strides("v", value, unit),
            **_strides("o", output),
            **_strides("go", grad_output, unit),
            **_strides("d", target),
            batch_packs=problem.batch * packs,
            packs=packs,
            scaling=problem.scaling,
            UNIT=unit,
            TMA=tma,
            **problem.runtime(step, tile, work),
            **problem.fixed(step, tile),
        )
        if work.num_splits:
            merge_sums_kernel[(work.num_splits * problem.batch * packs,)](
                partial,
                target,
                work.splits,
                step.q_order,
                **_strides("out", target),
                **_merging(problem, step, tile, work, packs, query.shape[3]),
            )
        earlier = target


def _grad_key(
    problem: Problem,
    grad_output: Tensor,
    base_lse: Tensor,
    delta: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    query, key, value = problem.query, problem.key, problem.value
    tile = problem.tiles.grad_key
    heads = tile.heads(problem.groups)
    kv_heads = key.shape[1]
    earlier: tuple[Tensor | None, Tensor | None] = (None, None)
    for last, step in _passes(problem):
        work = problem.work(step, tile, of_keys=True)
        targets = (grad_key, grad_value)
        if not last:
            targets = (
                torch.empty_like(grad_key, dtype=torch.float32),
                torch.empty_like(grad_value, dtype=torch.float32),
            )
        tma = _by_descriptor(step, query, grad_output)
        unit = _unit(query, key, value, grad_output)
        slices = work.num_slots * problem.batch * kv_heads * tile.keys
        partials = [_scratch(query, slices, width(t.shape[3])) for t in targets]
        grad_key_kernel[(work.num_items * problem.batch * kv_heads,)](
            _queries_descriptor(query, heads, tile.rows // heads) if tma else query,
            key,
            value,
            _queries_descriptor(grad_output, heads, tile.rows // heads) if tma else grad_output,
            base_lse,
            delta,
            *targets,
            *earlier,
            partial_key=partials[0],
            partial_value=partials[1],
            **_strides("q", query, unit),
            **_strides("k", key, unit),
            **_strides("v", value, unit),
            **_strides("go", grad_output, unit),
            **_strides("dk", targets[0]),
            **_strides("dv", targets[1]),
            batch_heads=problem.batch * kv_heads,
            kv_heads=kv_heads,
            scaling=problem.scaling,
            UNIT=unit,
            TMA=tma,
            **problem.runtime(step, tile, work),
            **problem.fixed(step, tile),
        )
        if work.num_splits:
            for partial, target in zip(partials, targets, strict=True):
                merge_sums_kernel[(work.num_splits * problem.batch * kv_heads,)](
                    partial,
                    target,
                    work.splits,
                    step.kv_order,
                    **_strides("out", target),
                    **_merging(problem, step, tile, work, kv_heads, target.shape[3], of_keys=True),
                )
        earlier = targets


def empty_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for output and log-sum-exp.

    The output lies as ``[batch, q_len, heads, value_dim]``, which is how models read it.
    """
    batch, heads, q_len, _ = query.shape
    output = query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)
    return output, query.new_empty(batch, heads, q_len, dtype=torch.float32)


def _passes(problem: Problem) -> list[tuple[bool, Pass]]:
    """The passes in order; whether one is the last, which writes what is returned."""
    passes = problem.plan.passes
    return [(step is passes[-1], step) for step in passes]


def _scratch(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(max(rows, 1), columns, dtype=torch.float32)


def _merging(
    problem: Problem,
    step: Pass,
    tile: Tile,
    work: Work,
    packs: int,
    dim: int,
    of_keys: bool = False,
) -> dict[str, Any]:
    """Arguments of the merge kernels for tiles of queries, or of keys."""
    heads = 1 if of_keys else tile.heads(problem.groups)
    return {
        "batch_packs": problem.batch * packs,
        "packs": packs,
        "length": problem.key.shape[2] if of_keys else problem.query.shape[2],
        "split_batch": work.num_splits if work.splits.shape[0] > 1 else 0,
        "DIM": dim,
        "WIDTH": width(dim),
        "HEADS": heads,
        "TOKENS": tile.keys if of_keys else tile.rows // heads,
    }


def _strides(name: str, tensor: Tensor, unit: int = 1) -> dict[str, int]:
    """Strides of batch, head and token, in units of ``unit`` elements."""
    axes = ("batch", "head", "token")
    strides = zip(axes, tensor.shape, tensor.stride(), strict=False)
    # A dimension of one entry has a stride that nobody uses: any will do.
    return {f"{name}_{axis}": 0 if size == 1 else step // unit for axis, size, step in strides}


def _batch_stride(tensor: Tensor) -> int:
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def _aligned(tensor: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(
        stride * size % 16 == 0
        for count, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
        if count > 1
    )


def _unit(*tensors: Tensor) -> int:
    """Elements in 16 bytes where all rows are aligned to them, else 1.

    Kernels multiply by it, and so know how far their loads are aligned without being compiled anew
    for every length.
    """
    return 16 // tensors[0].element_size() if all(_aligned(t) for t in tensors) else 1


def _by_descriptor(step: Pass, *tensors: Tensor) -> bool:
    """Whether the loop's tiles can be loaded by tensor descriptors (TMA) rather than pointers.

    Descriptors need neighbouring tokens, 16-byte strides that are not 0, and something to load.
    """
    if step.q_order is not None or step.kv_order is not None:
        return False
    return all(
        t.numel() > 0
        and _aligned(t)
        and t.shape[3] * t.element_size() >= 16
        and all(stride > 0 for n, stride in zip(t.shape[:3], t.stride()[:3], strict=True) if n > 1)
        for t in tensors
    )


def _descriptor(base: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """A descriptor of a rank below 6; strides of dimensions of one entry become valid ones."""
    unit = 16 // base.element_size()
    safe = [s if n > 1 else unit for n, s in zip(shape, strides, strict=True)]
    return TensorDescriptor(base, shape, [*safe[:-1], 1], block)


def _keys_descriptor(tensor: Tensor, keys: int) -> Any:
    return _descriptor(
        tensor, list(tensor.shape), list(tensor.stride()), [1, 1, keys, width(tensor.shape[3])]
    )


def _queries_descriptor(tensor: Tensor, heads: int, tokens: int) -> Any:
    """Of tiles of ``heads`` neighbouring heads x ``tokens`` tokens."""
    if heads == 1:
        return _keys_descriptor(tensor, tokens)
    batch, all_heads, length, dim = tensor.shape
    b, h, t, _ = tensor.stride()
    shape = [batch, all_heads // heads, heads, length, dim]
    return _descriptor(tensor, shape, [b, heads * h, h, t, 1], [1, 1, heads, tokens, width(dim)])
