"""The launches of one SparQ step: how the work is cut, and what each kernel is given."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hf_attn_plugin.ops.sparq.key_copy import GROUP
from hf_attn_plugin.ops.triton.dispatch import on_device
from hf_attn_plugin.ops.triton.hopper_descriptors import is_hopper, of_keys
from hf_attn_plugin.ops.triton.sparq_attend import attend_kernel, whole_kernel
from hf_attn_plugin.ops.triton.sparq_hopper import (
    BLOCK_BYTES,
    STAGES,
    hopper_whole_kernel,
    serves,
)
from hf_attn_plugin.ops.triton.sparq_quantized import quantized_score_kernel
from hf_attn_plugin.ops.triton.sparq_scores import score_kernel, sum_kernel

# Positions that the scratch memory is a multiple of: at least every kernel's block.
_PAD = 2048
# Strides that are multiples of this many elements let loads be 16 bytes wide in every dtype.
_UNIT = 8
_BYTES = 16  # the same for codes
_LINE = 32  # the scratch memory's parts begin at multiples of so many elements


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A call's tensors, as `triton_sparq` describes them; the copy of the keys by its parts."""

    query: Tensor
    keys: Tensor
    values: Tensor
    keys_t: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    tail: Tensor | None = None
    tail_at: Tensor | None = None
    value_sum: Tensor | None = None
    value_count: Tensor | None = None
    first: Tensor | None = None
    stop: Tensor | None = None
    visible: Tensor | None = None
    recent: Tensor | None = None
    sinks: Tensor | None = None


class Layout(NamedTuple):
    """What a kernel is compiled for, and told, of a tensor; ``aligned`` to 16 bytes or not."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool


Told = dict[str, Layout]


@dataclasses.dataclass(frozen=True)
class Settings:
    """A call's numbers, as `triton_sparq` describes them; ``bits`` of the copy's codes, or 0."""

    rank: int
    top_k: int
    local_window: int
    bits: int
    coverage: float | None
    rank_coverage: float | None
    scaling: float
    softcap: float | None


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the kernels cut their work.

    Attributes:
        score_block: Positions whose scores are computed at a time.
        score_warps: Warps of a program that does.
        score_stages: Depth of its pipeline of loads.
        dot: Whether it multiplies matrices, which several query heads need.
        positions: About how many positions it goes through, at most.
        per_sm: How many of them run on one multiprocessor at a time.
        whole: Whether it goes on to choose keys and attend, which one query head can.
        once: Whether it does so by `hopper_whole_kernel`, which reads every key once.
        sum_block: Positions that a program of `sum_kernel` takes.
        sum_warps: Its warps.
        chunk: Keys that are attended to at a time.
        attend_warps: Warps of a program of `attend_kernel`.
        run: Positions of which the largest score is kept.
    """

    score_block: int
    score_warps: int
    score_stages: int
    dot: bool
    positions: int
    per_sm: int
    whole: bool = False
    once: bool = False
    sum_block: int = 1024
    sum_warps: int = 4
    chunk: int = 64
    attend_warps: int = 8
    run: int = 32


def choose_tiles(told: Told, settings: Settings, sm_count: int, *, hopper: bool = False) -> Tiles:
    """The tiles for a call: what was fast on an H200, and no more than its registers hold.

    Measured there in bfloat16, 32 query heads of 128, r=32, k=128, in microseconds: choosing and
    attending in one kernel with the scores takes 181, in two 212 (batch 8, 32768 keys, 32 KV
    heads); with keys in 8 bits 256 positions by one warp take 216, 1024 by four 430.
    """
    heads, kv_heads, length = told["query"].shape[1], *told["keys"].shape[1:3]
    groups, itemsize = heads // kv_heads, told["query"].dtype.itemsize
    pairs = told["query"].shape[0] * kv_heads
    head_dim, value_dim = (_power(told[name].shape[3]) for name in ("keys", "values"))
    rank = _power(settings.rank)
    # While some programs choose, others read: there must be several on every multiprocessor.
    whole = groups == 1 and not settings.bits and 2 * pairs >= 3 * sm_count
    if whole and hopper and serves(told, settings):
        block = BLOCK_BYTES // (head_dim * itemsize)
        return Tiles(block, 4, STAGES, True, length, 1, whole=True, once=True)
    if settings.bits:
        one = groups == 1
        tiles = Tiles(256, 1, 2, False, 4096, 8) if one else Tiles(GROUP, 2, 4, True, 4096, 6)
    elif "keys_t" not in told:
        tiles = Tiles(max(16, 16384 // (head_dim * itemsize)), 4, 3, True, 4096, 3)
    elif groups == 1 and rank <= 32:
        tiles = Tiles(1024 // itemsize, 4, 3 if whole else 4, False, 8192, 2)
    else:
        tiles = Tiles(max(16, min(256, 16384 // (rank * itemsize))), 4, 3, True, 4096, 3)
    # One number of every run is looked at, and then those of ``top_k`` runs: the fewest in all. As
    # for the next power of two, so that only there kernels are compiled for a cache that grows.
    room = _power(length)
    sizes = (size for size in (8, 16, 32, 64) if size <= tiles.score_block)
    run = min(sizes, key=lambda size: room // size + settings.top_k * size)
    looked_at = max(room // run, settings.top_k * run)
    # More keys at a time take more registers, which matters where programs share a multiprocessor.
    chunk = 32 if whole else 128 if pairs <= sm_count else 64
    chunk = chunk * 512 // ((head_dim + value_dim) * itemsize)
    return dataclasses.replace(
        tiles,
        whole=whole and looked_at <= 8192,
        sum_block=max(128, 4096 // _power(groups, 4)),
        chunk=min(max(16, 1 << (chunk.bit_length() - 1)), 128),
        attend_warps=16 if looked_at > 8192 else 8,
        run=run,
    )


def launch(inputs: Inputs, settings: Settings, tiles: Tiles | None = None) -> Tensor:
    """One step; the output ``[batch, heads, 1, value_dim]``."""
    query, values = inputs.query, inputs.values
    output = query.new_empty(*query.shape[:2], 1, values.shape[3])
    if values.shape[2] == 0 or output.numel() == 0:
        return output.zero_()
    given: dict[str, Any] = {n: t for n, t in vars(inputs).items() if t is not None}
    if inputs.visible is not None:
        given["visible"] = inputs.visible.view(torch.uint8)
    told = tuple(
        (name, Layout(t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0))
        for name, t in given.items()
    )
    calls, size = _prepare(query.device, told, settings, tiles)
    if calls[0].kernel is hopper_whole_kernel:
        given["key_tiles"] = of_keys(inputs.keys, calls[0].constants["BLOCK"])
    given["scratch"] = query.new_empty(size, dtype=torch.float32)
    given["output"] = output
    with on_device(query):
        for call in calls:
            call(given)
    return output


@dataclasses.dataclass(frozen=True)
class _Call:
    """One kernel's call on tensors of known layouts.

    Attributes:
        kernel: The kernel.
        programs: How many.
        tensors: The names of those it takes.
        numbers: What follows them.
        constants: What it is compiled for, in the order of its arguments.
        options: How it is compiled.
        compiled: The kernel compiled, once it is: called directly, it needs no look at its
            arguments, which takes the host longest.
    """

    kernel: Any
    programs: int
    tensors: tuple[str, ...]
    numbers: tuple[float, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    compiled: list[Any]

    def __call__(self, given: dict[str, Any]) -> None:
        tensors = [given.get(name) for name in self.tensors]
        grid = (self.programs, 1, 1)
        if self.compiled:
            self.compiled[0][grid](*tensors, *self.numbers, *self.constants.values())
            return
        made = self.kernel[grid](*tensors, *self.numbers, *self.constants.values(), **self.options)
        if made is not None:  # Triton's interpreter compiles nothing
            self.compiled[:] = [made]


@functools.lru_cache(maxsize=128)
def _prepare(
    device: torch.device,
    layouts: tuple[tuple[str, Layout], ...],
    settings: Settings,
    tiles: Tiles | None,
) -> tuple[list[_Call], int]:
    """The calls of one step, and the size of their scratch memory.

    All layers of a forward share them.
    """
    told = dict(layouts)
    (batch, heads, _, head_dim), q_stride = told["query"].shape, told["query"].stride
    kv_heads, length, value_dim = told["values"].shape[1:]
    groups, pairs = heads // kv_heads, batch * kv_heads
    sm_count = _sm_count(device)
    tiles = tiles or choose_tiles(told, settings, sm_count, hopper=is_hopper(device))
    splits = 1 if tiles.whole else _splits(pairs, length, tiles, sm_count)
    slots = _power(settings.top_k)
    size, (ranked_at, tops_at, stats_at, lists_at) = _places(
        pairs, groups, length, splits, slots, tiles.run
    )
    overlap = _overlaps(device)
    rows, split_slots = _power(groups), _power(splits, 1)
    copy = next((name for name in ("keys_t", "codes") if name in told), "keys")

    def made(
        kernel: Any,
        programs: int,
        names: str,
        numbers: tuple[float, ...],
        constants: dict[str, Any],
        **options: Any,
    ) -> _Call:
        tensors = tuple(names.split())
        constants = {n: constants[n] for n in kernel.arg_names if n.isupper()}
        # Of these a kernel is compiled for the dtype alone.
        any_place = getattr(kernel, "do_not_specialize_on_alignment", ())
        kinds = tuple(
            None if n not in told else (told[n].dtype, None if n in any_place else told[n].aligned)
            for n in tensors
        )
        kept = _compiled(kernel, (device, kinds, *constants.values(), *options.values()))
        return _Call(kernel, programs, tensors, numbers, constants, options, kept)

    run = (_row_stride(told, "first"), _row_stride(told, "stop"))
    masked_run = (*run, _row_stride(told, "visible"), _row_stride(told, "recent"))
    sizes = (kv_heads, length, -(-length // _PAD))
    has_run = {"HAS_FIRST": "first" in told, "HAS_STOP": "stop" in told}
    has_mask = {"HAS_MASK": "visible" in told}
    # Single tf32 products are not float32; three of them are.
    precision = {"PRECISION": "tf32x3" if told["query"].dtype == torch.float32 else "ieee"}
    q_strides = (q_stride[0], q_stride[1], q_stride[3])
    query_dims = {"HEAD_DIM": head_dim, "BLOCK_D": _power(head_dim)}
    softcap = 1.0 if settings.softcap is None else settings.softcap
    has_softcap = {"SOFTCAP": settings.softcap is not None}
    score_factors = (settings.scaling, softcap, settings.rank_coverage or 1.0)

    unit, copy_strides = _in_units(told[copy])
    of_scores = {"RANK": settings.rank, "BLOCK_R": _power(settings.rank)}
    of_scores |= {"BLOCK_N": tiles.score_block, "COPY": copy != "keys"}
    of_scores |= {"DOT": tiles.dot, "STAGES": tiles.score_stages}
    of_scores |= {"UNIT": unit, "RANK_COVERAGE": settings.rank_coverage is not None}
    score_rows = rows if tiles.dot else 1
    # The loops over positions tell their own number of stages.
    score_options = {"num_warps": tiles.score_warps, "num_stages": 1}

    (k_unit, k_strides), (v_unit, v_strides) = (_in_units(told[n]) for n in ("keys", "values"))
    tops = _power(-(-length // tiles.run))
    sums = told["value_sum"].stride[:2] if "value_sum" in told else (0, 0)
    attend_strides = (*k_strides, *v_strides, *sums, _row_stride(told, "value_count"))
    of_attention = {
        **query_dims,
        "VALUE_DIM": value_dim,
        "BLOCK_V": _power(value_dim),
        "GROUPS": groups,
        "ROWS": rows,
        "TOP_K": settings.top_k,
        "SLOTS": slots,
        "TOPS": tops,
        "CANDIDATES": min(slots, tops) * tiles.run,
        "CHUNK": min(tiles.chunk, slots),
        "SUB": tiles.run,
        "K_UNIT": k_unit,
        "V_UNIT": v_unit,
        "MEAN": "value_sum" in told,
        "HAS_COUNT": "value_count" in told,
        "COVERAGE": settings.coverage is not None,
        **has_softcap,
        **has_mask,
        "HAS_SINKS": "sinks" in told,
        **precision,
    }
    if tiles.once:
        of_rows = (*v_strides, *sums, _row_stride(told, "value_count"), *masked_run)
        at_most = (pairs, kv_heads, length, settings.local_window)
        return [
            made(
                hopper_whole_kernel,
                min(pairs, sm_count),
                "query key_tiles values value_sum value_count first stop visible recent sinks "
                "scratch output",
                (*q_strides, *of_rows, *at_most, *score_factors),
                {
                    **of_attention,
                    **of_scores,
                    **has_run,
                    "DIM": head_dim,
                    "ROOM": _power(length, 1024),
                    "BLOCK": tiles.score_block,
                },
                num_warps=4,
            )
        ], 2 * slots * pairs
    if tiles.whole:
        return [
            made(
                whole_kernel,
                pairs,
                f"query {copy} keys values value_sum value_count first stop visible recent sinks "
                "scratch output",
                (
                    *(*q_strides, *copy_strides, *attend_strides, *masked_run, *sizes),
                    *(settings.local_window, tops_at, lists_at),
                    *(*score_factors, settings.coverage or 1.0),
                ),
                {**of_attention, "SCORE_ROWS": score_rows, **of_scores, "PAD": _PAD, **has_run},
                **score_options,
            )
        ], size

    parts = (*sizes, splits, settings.local_window)
    scoring = (*masked_run, *parts, tops_at, stats_at, *score_factors)
    after_query = {**query_dims, "GROUPS": groups, "ROWS": score_rows, **of_scores}
    at_the_end = {**has_softcap, **has_run, **has_mask, **precision}
    padding = {"PAD": _PAD, "SUB": tiles.run, "OVERLAP": overlap}
    if settings.bits:
        narrow = [n for name in ("scale", "offset", "tail") for n in told[name].stride[:3]]
        scores = made(
            quantized_score_kernel,
            pairs * splits,
            "query codes scale offset tail tail_at first stop visible recent scratch",
            (
                *(*q_strides, *copy_strides, *narrow),
                *(told["tail"].shape[3], told["codes"].shape[3], *scoring),
            ),
            {
                **after_query,
                "GROUP": GROUP,
                "BITS": settings.bits,
                "HAS_TAIL_AT": "tail_at" in told,
                **at_the_end,
                **padding,
            },
            **score_options,
        )
    else:
        scores = made(
            score_kernel,
            pairs * splits,
            f"query {copy} first stop visible recent scratch",
            (*q_strides, *copy_strides, *scoring),
            {**after_query, **at_the_end, **padding},
            **score_options,
        )
    calls = [scores]
    ahead = {"launch_pdl": True} if overlap else {}
    summing = (*run, _row_stride(told, "recent"), *parts, ranked_at, tops_at, stats_at)
    if groups > 1:
        calls.append(
            made(
                sum_kernel,
                pairs * (sizes[2] * _PAD // tiles.sum_block),
                "first stop recent sinks scratch",
                summing,
                {
                    "GROUPS": groups,
                    "ROWS": _power(groups, 1),
                    "SPLITS": split_slots,
                    "BLOCK_N": tiles.sum_block,
                    **has_run,
                    **has_mask,
                    "HAS_SINKS": "sinks" in told,
                    **padding,
                },
                num_warps=tiles.sum_warps,
                **ahead,
            )
        )
    calls.append(
        made(
            attend_kernel,
            pairs,
            "query keys values value_sum value_count first stop recent sinks scratch output",
            (
                *(*q_strides, *attend_strides, *summing, lists_at),
                *(settings.scaling, softcap, settings.coverage or 1.0),
            ),
            {
                **of_attention,
                "SPLITS": split_slots,
                "PAD": _PAD,
                **has_run,
                "OVERLAP": overlap,
            },
            num_warps=tiles.attend_warps,
            num_stages=1,
            **ahead,
        )
    )
    return calls, size


def _places(
    pairs: int, groups: int, length: int, splits: int, slots: int, run: int
) -> tuple[int, tuple[int, int, int, int]]:
    """The size of the scratch memory, and where in it what follows the scores begins, in lines.

    What keys are ranked by (the scores themselves, unless heads share keys), the largest of every
    run, each part's softmax, the lists of what is chosen.
    """
    padded = -(-length // _PAD) * _PAD
    scores = pairs * groups * padded
    ranked_at = scores if groups > 1 else 0
    tops_at = scores + (pairs * padded if groups > 1 else 0)
    stats_at = tops_at + -(-pairs * (padded // run) // _LINE) * _LINE
    lists_at = stats_at + -(-pairs * groups * 2 * splits // _LINE) * _LINE
    size = lists_at + pairs * 3 * slots
    return size, (ranked_at // _LINE, tops_at // _LINE, stats_at // _LINE, lists_at // _LINE)


def _splits(pairs: int, length: int, tiles: Tiles, sm_count: int) -> int:
    """Into how many parts the positions are split, so that the programs fill the device."""
    most = max(1, -(-length // tiles.score_block))
    fill = -(-tiles.per_sm * sm_count // pairs)
    long = -(-length // tiles.positions)
    return min(max(fill, long), most)


def _in_units(layout: Layout) -> tuple[int, tuple[int, ...]]:
    """The unit of a tensor's first three strides, which tells how it is aligned; and them in it."""
    unit = _BYTES if layout.dtype == torch.uint8 else _UNIT
    strides = layout.stride[:3]
    if not layout.aligned or any(stride % unit for stride in strides):
        unit = 1
    return unit, tuple(stride // unit for stride in strides)


def _row_stride(told: Told, name: str) -> int:
    """From one sequence's numbers to the next one's; 0 if they share them."""
    layout = told.get(name)
    return 0 if layout is None or not layout.shape or layout.shape[0] == 1 else layout.stride[0]


def _power(number: int, least: int = 16) -> int:
    return max(int(triton.next_power_of_2(number)), least)


@functools.cache
def _sm_count(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter: enough for small calls to be split
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it ends (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache(maxsize=512)
def _compiled(kernel: Any, told: tuple[Any, ...]) -> list[Any]:
    """Where a kernel compiled for such arguments is kept, whatever the lengths."""
    return []
