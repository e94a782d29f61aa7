"""One call of the attention kernels, and the arguments that follow from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.triton.plan import Pass, Plan
from hf_attn_plugin.ops.triton.tiles import Tile, Tiles, pieces
from hf_attn_plugin.ops.triton.work import Split, Work

LOG2E = math.log2(math.e)


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
        dense: The pattern's mask of the caller's own as int8, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    plan: Plan
    tiles: Tiles
    scaling: float
    softcap: float | None
    dense: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in a fixed order."""
        return self.query, self.key, self.value, self.sinks, self.dense

    @property
    def batch(self) -> int:
        """Batch size."""
        return self.query.shape[0]

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.key.shape[1]

    def work(self, step: Pass, tile: Tile, of_keys: bool = False, in_slices: bool = False) -> Work:
        """The work items of a pass for programs with tiles of queries, or of keys.

        With ``in_slices`` all of them leave slices in float32.
        """
        heads = tile.heads(self.groups)
        programs = self.batch * (self.key.shape[1] if of_keys else self.query.shape[1] // heads)
        split = Split(self.tiles.split, programs, in_slices)
        return step.work(tile.rows // heads, tile.keys, of_keys=of_keys, split=split)

    def runtime(self, step: Pass, tile: Tile, work: Work) -> dict[str, Any]:
        """Arguments that all three kernels take and that differ between lengths and layouts."""
        dense = self.dense
        mask_strides = [0, 0, 0, 0]
        if dense is not None:
            mask_strides = [
                0 if size == 1 and axis < 2 else stride
                for axis, (size, stride) in enumerate(zip(dense.shape, dense.stride(), strict=True))
            ]
        to_log2, cap_rate = self.scaling * LOG2E, 0.0
        if self.softcap is not None:
            to_log2, cap_rate = self.softcap * LOG2E, 2 * LOG2E * self.scaling / self.softcap
        names = ("mask_batch", "mask_head", "mask_query", "mask_key")
        return {
            "items": work.items,
            "entries": work.entries,
            "item_batch": work.num_items if work.items.shape[0] > 1 else 0,
            "q_info": step.q_info,
            "kv_info": step.kv_info,
            "q_info_batch": batch_stride(step.q_info),
            "kv_info_batch": batch_stride(step.kv_info),
            "q_order": step.q_order,
            "kv_order": step.kv_order,
            "dense": dense,
            **dict(zip(names, mask_strides, strict=True)),
            "group_packs": self.groups // tile.heads(self.groups),
            "q_len": self.query.shape[2],
            "kv_len": self.key.shape[2],
            **step.numbers,
            "to_log2": to_log2,
            "cap_rate": cap_rate,
        }

    def fixed(self, step: Pass, tile: Tile, unit: int, tma: bool) -> dict[str, Any]:
        """What a kernel is compiled for."""
        heads = tile.heads(self.groups)
        head_dim, value_dim = self.query.shape[3], self.value.shape[3]
        return {
            "TERMS": step.terms,
            "UNIT": unit,
            "TMA": tma,
            "SOFTCAP": self.softcap is not None,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "WIDTH": pieces(head_dim)[0],
            "TAIL": pieces(head_dim)[1],
            "VALUE_WIDTH": pieces(value_dim)[0],
            "VALUE_TAIL": pieces(value_dim)[1],
            "HEADS": heads,
            "TOKENS": tile.rows // heads,
            "KEYS": tile.keys,
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
            "TWO_LOOPS": tile.two_loops,
            "STAGES": tile.stages,
            "num_warps": tile.warps,
        }


def batch_stride(tensor: Tensor) -> int:
    """Of a tensor that all batch rows may share: then 0."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0
