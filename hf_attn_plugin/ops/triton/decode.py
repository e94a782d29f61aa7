"""Decoding: attention of one or a few queries over a long cache, on the GPU, forward only."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from hf_attn_plugin.ops.checks import check_tensors
from hf_attn_plugin.ops.triton.decode_kernels import merge_kernel, split_kernel
from hf_attn_plugin.ops.triton.decode_plan import (
    Plan,
    Tile,
    choose_splits,
    choose_tile,
    derive_anew,
    is_capturing,
    make_plan,
)
from hf_attn_plugin.ops.triton.support_decode import refuses_pattern, refuses_shapes
from hf_attn_plugin.patterns import Pattern

# Parts of a row that are merged at a time.
_MERGED_PARTS = 64
# Strides that are multiples of this many elements let loads be 16 bytes wide in every dtype.
_UNIT = 8


def triton_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of up to 16 queries over ``pattern``, split over the keys (arXiv 2311.01282).

    The queries of all heads that share a KV head form one tile, so that keys and values are read
    once. The keys are split over as many programs as fill the device; a second kernel merges the
    parts in a fixed order, so that equal inputs give equal bits. Only key blocks that may be seen
    are read: a window's, those of first tokens, those before a static cache's offset, which stays
    on the device. Nothing waits for the device, so calls can be captured in a CUDA graph.

    Args:
        query: ``[batch, heads, q_len, head_dim]`` in float16, bfloat16 or float32, any strides.
        key: ``[batch, kv_heads, kv_len, head_dim]``, any strides; query head h reads KV head
            ``h // (heads / kv_heads)``.
        value: ``[batch, kv_heads, kv_len, value_dim]``, any strides.
        pattern: Which pairs attend. Its ``q_offset`` may be a tensor of one entry per batch row,
            each below 2**30 in absolute value, which is not checked of one on a GPU.
        scaling: Factor on the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[heads]``, one more logit per head in the softmax's denominator, without a value.

    Returns:
        The output ``[batch, heads, q_len, value_dim]`` in the inputs' dtype, laid out in memory as
        ``[batch, q_len, heads, value_dim]``, and the natural log-sum-exp ``[batch, heads, q_len]``
        in float32, sinks included. A query that sees nothing gets 0 and -inf (the sink).

    Raises:
        ValueError: Shapes do not fit each other, the kernel does not take them (see
            `support_decode`), or a gradient is wanted.
    """
    inputs = (query, key, value) if sinks is None else (query, key, value, sinks)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise ValueError(
            "triton_decode has no backward pass. Use triton_attention, or torch.no_grad()."
        )
    if torch.compiler.is_compiling():
        plan = _examine(query, key, value, pattern, sinks)
        rest = (plan.mask, plan.blocks, plan.counts, plan.offset, plan.starts)
        numbers = list(plan.numbers)
        output, lse = _decode_op(
            query,
            key,
            value,
            sinks,
            *rest,
            numbers,
            plan.sparse,
            plan.steps,
            plan.keys,
            scaling,
            softcap,
        )
        return output.transpose(1, 2), lse

    def prepare() -> _Launch:
        plan = _examine(query, key, value, pattern, sinks)
        return _prepare(query, key, value, plan, scaling, softcap, sinks is not None)

    if is_capturing(query.device):
        launch = prepare()  # a replay must evaluate the pattern anew
    else:
        # All layers of a forward share one pattern and most calls one shape.
        told = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (query, key, value))
        aligned = (key.data_ptr() | value.data_ptr()) % 16  # kernels are compiled for it
        kind = None if sinks is None else sinks.dtype
        launch = derive_anew(pattern, ("decode", told, aligned, scaling, softcap, kind), prepare)
    output, lse = launch(query, key, value, sinks)
    return output.transpose(1, 2), lse


def _examine(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, sinks: Tensor | None
) -> Plan:
    """The plan of a call that the kernel takes."""
    check_tensors("triton_decode", query, key, value, pattern)
    heads = query.shape[1]
    if sinks is not None and sinks.numel() != heads:
        raise ValueError(
            f"triton_decode: sinks must hold {heads} logits, one per query head; "
            f"got {tuple(sinks.shape)}."
        )
    refused = refuses_shapes(query.dtype, query.shape[-1], value.shape[-1])
    refused = refused or refuses_pattern(pattern)
    if refused is not None:
        raise ValueError(f"triton_decode: {refused}. Use triton_attention or ops.attention.")
    return make_plan(pattern.to(query.device), query.device, _tile(query, key, value).keys)


def _tile(query: Tensor, key: Tensor, value: Tensor) -> Tile:
    rows = query.shape[1] // max(key.shape[1], 1) * query.shape[2]
    return choose_tile(rows, query.shape[3], value.shape[3], query.element_size())


@functools.cache
def _sm_count(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter: enough for small calls to be split
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it ends (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _strides(tensor: Tensor) -> tuple[list[int], int]:
    """The strides in units that tell alignment, and that unit; 0 for strides as they are."""
    *outer, last = tensor.stride()
    if last != 1 or any(stride % _UNIT for stride in outer):
        return [*outer, last], 1 if last == 1 else 0
    return [*(stride // _UNIT for stride in outer), last], _UNIT


@dataclasses.dataclass(frozen=True)
class _Launch:
    """A call of both kernels on tensors of known shapes and strides.

    Attributes:
        plan: The pairs; its tensors are arguments.
        programs: Of the first kernel.
        splits: Parts of each row.
        numbers: The first kernel's numbers.
        constants: What it is compiled for, in the order of its arguments, and options.
        merging: The same of the second kernel.
        compiled: Both kernels, once they are: called again, they need no look at their arguments,
            which takes the host as long as everything else here.
    """

    plan: Plan
    programs: int
    splits: int
    numbers: tuple[float, ...]
    constants: tuple[dict[str, Any], dict[str, Any]]
    merging: tuple[dict[str, Any], dict[str, Any]]
    compiled: list[Any] = dataclasses.field(default_factory=list)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output ``[batch, q_len, heads, value_dim]`` and log-sum-exp ``[batch, heads, q_len]``."""
        batch, heads, q_len, _ = query.shape
        value_dim = value.shape[-1]
        output = query.new_empty(batch, q_len, heads, value_dim)
        lse = query.new_empty(batch, heads, q_len, dtype=torch.float32)
        rows = batch * heads * q_len
        if rows == 0:
            return output, lse
        parts = rows * self.splits
        partial = query.new_empty(parts * (value_dim + 2), dtype=torch.float32)
        if sinks is not None:
            sinks = sinks.contiguous()
        plan = self.plan
        tensors = (plan.mask, plan.blocks, plan.counts, plan.offset, plan.starts, partial)
        (constants, options), (merging, merge_options) = self.constants, self.merging
        splitting = (query, key, value, *tensors, *self.numbers, *constants.values())
        sizes = (heads, q_len, self.splits, parts)
        joining = (partial, sinks, output, lse, *sizes, *merging.values())
        split_grid, merge_grid = (self.programs, 1, 1), (rows, 1, 1)
        with torch.cuda.device_of(query):
            if self.compiled:
                split, merge = self.compiled
                split[split_grid](*splitting)
                merge[merge_grid](*joining)
                return output, lse
            split = split_kernel[split_grid](*splitting, **options)
            merge = merge_kernel[merge_grid](*joining, **merge_options)
            if split is not None:  # Triton's interpreter compiles nothing
                self.compiled[:] = (split, merge)  # whichever thread comes first
        return output, lse


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scaling: float,
    softcap: float | None,
    sinks: bool,
) -> _Launch:
    """What does not change between calls of one shape."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    tile = _tile(query, key, value)
    groups = heads // max(kv_heads, 1)
    row_tiles = -(-groups * q_len // tile.rows)
    tiles = max(batch * kv_heads * row_tiles, 1)
    splits = choose_splits(tiles, plan.keys, _sm_count(query.device), tile)
    k_strides, k_unit = _strides(key)
    v_strides, v_unit = _strides(value)
    mask_strides = _broadcast_strides(plan.mask, 4)
    # The largest power of two in head_dim, and one that holds the rest.
    main = max(1 << (head_dim.bit_length() - 1), 16)
    rest = head_dim - main
    overlap = _overlaps(query.device)
    block_v = max(triton.next_power_of_2(value_dim), 16)
    numbers = (
        *query.stride(),
        *k_strides,
        *v_strides,
        *mask_strides,
        *_broadcast_strides(plan.blocks, 2)[:1],
        *_broadcast_strides(plan.counts, 1),
        *_broadcast_strides(plan.offset, 1),
        *_broadcast_strides(plan.starts, 1),
        kv_heads,
        groups,
        q_len,
        kv_len,
        splits,
        row_tiles,
        *plan.numbers,
        batch * heads * q_len * splits,
        scaling,
        1.0 if softcap is None else softcap,
    )
    constants = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "MAIN": main,
        "TAIL": max(triton.next_power_of_2(rest), 16) if rest > 0 else 0,
        "BLOCK_V": block_v,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "K_UNIT": k_unit,
        "V_UNIT": v_unit,
        "MASK_ROWS": 0 if plan.mask is None else 1 if mask_strides[1:3] == (0, 0) else 2,
        "HAS_LIST": plan.blocks is not None,
        "HAS_OFFSET": plan.offset is not None,
        "HAS_STARTS": plan.starts is not None,
        "SPARSE": plan.sparse,
        "STEPS": plan.steps,
        "SOFTCAP": softcap is not None,
        # Single tf32 products are not float32; three of them are.
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
        "OVERLAP": overlap,
    }
    merging = {
        "VALUE_DIM": value_dim,
        "BLOCK_V": block_v,
        "PARTS": _MERGED_PARTS,
        "HAS_SINKS": sinks,
        "OVERLAP": overlap,
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    merge_options = {"num_warps": 4, **({"launch_pdl": True} if overlap else {})}
    if plan.mask is not None:
        plan = dataclasses.replace(plan, mask=plan.mask.view(torch.uint8))
    return _Launch(
        plan, tiles * splits, splits, numbers, (constants, options), (merging, merge_options)
    )


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    mask: Tensor | None,
    blocks: Tensor | None,
    counts: Tensor | None,
    offset: Tensor | None,
    starts: Tensor | None,
    numbers: list[int],
    sparse: bool,
    steps: bool,
    keys: int,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The call as ``torch.compile`` sees it; arguments as in `Plan`."""
    plan = Plan(tuple(numbers), sparse, steps, keys, offset, starts, mask, blocks, counts)
    launch = _prepare(query, key, value, plan, scaling, softcap, sinks is not None)
    return launch(query, key, value, sinks)


def _broadcast_strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides that repeat what has a size of 1."""
    if tensor is None:
        return (0,) * dims
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(0 if size == 1 else stride for size, stride in sizes)


_decode_op = torch.library.custom_op("hf_attn_plugin::decode", _decode, mutates_args=())


@_decode_op.register_fake
def _decode_fake(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, _ = query.shape
    output = query.new_empty(batch, q_len, heads, value.shape[-1])
    return output, query.new_empty(batch, heads, q_len, dtype=torch.float32)
