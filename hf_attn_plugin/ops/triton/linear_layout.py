"""Tiles and chunks of linear attention's kernels: a pure function of a call's sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of a call. Tiles are chosen by dtype and widths only, never by lengths.

    Attributes:
        mode: Operands of products: ``"bf16"``, ``"tf32"`` (for float16: as many bits, more range)
            or ``"tf32x3"`` (for float32).
        chunk: Positions in a chunk.
        tile: Tokens in a tile.
        warps: Warps of a program that computes a tile of output or gradient.
        stages: Tiles that such a program loads ahead.
        registers: The most that a thread of it may have; None for no limit.
        feature_tile: Features in a tile.
        feature_tiles: Tiles along the features.
        value_tile: Values in a tile.
        value_tiles: Tiles along the values.
        chunks: Chunks that have keys.
        lead: Position of the first query; positions count from the first key.
        first: Chunk of the first query.
        count: Chunks that queries are in.
    """

    mode: str
    chunk: int
    tile: int
    warps: int
    stages: int
    registers: int | None
    feature_tile: int
    feature_tiles: int
    value_tile: int
    value_tiles: int
    chunks: int
    lead: int
    first: int
    count: int

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the states as they are multiplied; they are summed in float32."""
        return torch.bfloat16 if self.mode == "bf16" else torch.float32

    @property
    def features(self) -> int:
        """Rows of a state in memory."""
        return self.feature_tile * self.feature_tiles

    @property
    def values(self) -> int:
        """Columns of a state in memory."""
        return self.value_tile * self.value_tiles

    @property
    def launch(self) -> dict[str, int]:
        """How a program that computes a tile of output or gradient is launched."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    @property
    def tiles(self) -> dict[str, Any]:
        """Constants of the kernels."""
        return {
            "MODE": self.mode, "CHUNK": self.chunk, "T": self.tile,
            "BF": self.feature_tile, "NF": self.feature_tiles,
            "BV": self.value_tile, "NV": self.value_tiles,
        }  # fmt: skip


def lay_out(
    dtype: torch.dtype,
    q_len: int,
    kv_len: int,
    value_dim: int,
    num_features: int,
    lead: int | None,
    chunk: int | None = None,
    *,
    tile: int | None = None,
    warps: int = 4,
    stages: int = 2,
    registers: int | None = None,
) -> Layout:
    """Tiles and chunks of a call.

    Args:
        dtype: Of the inputs.
        q_len: Number of queries.
        kv_len: Number of keys.
        value_dim: Width of the values.
        num_features: Number of features.
        lead: Position of the first query among the keys; None: every query sees every key.
        chunk: Positions in a chunk, rounded up to whole tiles; None for the measured best.
        tile: Tokens in a tile; None for the measured best.
        warps: Warps of a program.
        stages: Tiles to load ahead.
        registers: Limit for a thread.
    """
    mode = {torch.bfloat16: "bf16", torch.float16: "tf32"}.get(dtype, "tf32x3")
    widest = 128 if mode == "bf16" else 64
    feature_tile = min(widest, max(16, _power_of_two(num_features)))
    if num_features > 256:  # fewer columns of zeros
        feature_tile = 64
    value_tile = min(widest, max(16, _power_of_two(value_dim)))
    if tile is None:
        tile = 64 if mode == "bf16" else 32
    if chunk is None:
        # A longer chunk has fewer states to write and read, a shorter one fewer pairs to compute.
        # Where all queries see all keys there are no pairs.
        chunk = 128 if lead is not None else 1024
    chunk = tile * _ceil(chunk, tile)
    chunks = _ceil(kv_len, chunk)
    if lead is None or lead >= kv_len:
        lead = chunks * chunk
    lead = max(lead, -q_len)
    first = lead // chunk
    return Layout(
        mode=mode,
        chunk=chunk,
        tile=tile,
        warps=warps,
        stages=stages,
        registers=registers,
        feature_tile=feature_tile,
        feature_tiles=_ceil(num_features, feature_tile),
        value_tile=value_tile,
        value_tiles=_ceil(value_dim, value_tile),
        chunks=chunks,
        lead=lead,
        first=first,
        count=_ceil(lead + q_len - first * chunk, chunk),
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
