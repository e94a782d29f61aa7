"""Tile sizes of the attention kernels: a pure function of what is computed, measured on one H200.

Nothing is tuned in a user's run, so that a new call compiles one variant of each kernel.
"""

from __future__ import annotations

import dataclasses
import enum
import functools

import torch

from hf_attn_plugin.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work.

    Attributes:
        rows: Rows of a tile of queries: tokens times the query heads packed into it.
        keys: Keys of a tile.
        warps: Warps of a program.
        stages: Depth of the pipeline of loads.
        pack: Most query heads of one KV group in a tile: a window then spans fewer tokens of
            queries, and visits fewer pairs outside of it, with the same matrix products.
        two_loops: Whether the visits that need no mask get a loop of their own before the others,
            rather than a branch: better where they are many.
        apart: Whether the gradients of keys and of values are computed one after the other: a
            fifth product, and room for larger tiles.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    pack: int = 1
    two_loops: bool = False
    apart: bool = False

    def heads(self, groups: int) -> int:
        """Query heads in one tile: the largest power of two that divides the group and fits."""
        heads = 1
        while groups % (heads * 2) == 0 and heads * 2 <= min(self.pack, self.rows // 16):
            heads *= 2
        return heads


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels, and how heavy work is cut.

    Attributes:
        forward: Of the forward kernel.
        grad_query: Of the kernel of the queries' gradients.
        grad_key: Of the kernel of the keys' and values' gradients.
        split: Fewest visits of a slice when a row or column is split over programs.
    """

    forward: Tile
    grad_query: Tile
    grad_key: Tile
    split: int = 64


class Shape(enum.Enum):
    """What a pattern leaves to visit."""

    LONG = "long runs of blocks: causal or full attention"
    DOCUMENTS = "runs of many lengths: packed documents"
    SHORT = "short runs: windows"


def shape_of(pattern: Pattern) -> Shape:
    """Which of these a pattern is."""
    if pattern.is_sparse or pattern.band is not None:
        return Shape.SHORT
    return Shape.LONG if pattern.q_documents is None else Shape.DOCUMENTS


@functools.cache
def choose_tiles(head_dim: int, value_dim: int, dtype: torch.dtype, shape: Shape) -> Tiles:
    """The tiles for a call.

    Args:
        head_dim: Of queries and keys.
        value_dim: Of values.
        dtype: Of the inputs.
        shape: What the pattern leaves to visit.

    Returns:
        Tiles that fit in 227 KiB of shared memory.

    Measured in bfloat16 with 32 heads over 8, in milliseconds for the forward kernel, the queries'
    gradients and the keys'.

    Heads of 128: causal attention at 16384 tokens: 4.2, 4.9, 8.4 (keys' gradients with the tiles
    for windows 9.0). A window of 1024 at 131072 tokens: 4.9, 6.2, 9.6 (with the tiles for long runs
    11.5). 64 documents in 131072 tokens: keys' gradients 13.5 (15.1 with the tiles for long runs,
    15.3 with those for windows).

    Other heads, causal at 8192 tokens and a window of 1024 at 32768: 80: 0.82, 1.03, 1.97 and 0.98,
    1.20, 2.14 (with the tiles of 128: 0.89, 1.35, 2.47 and 1.02, 1.71, 2.30); 96: 0.98, 1.17, 2.01
    and 1.07, 1.30, 2.25; 192 with values of 128: 1.40, 1.94, 3.05 and 1.75, 2.45, 3.33. On eight
    warps, tiles of 64 rows split their columns and take twice as long (4.3, 5.2, 6.2). 256: 2.17
    forward; the gradients' tiles are those of like shape that were best for 192, and that leave no
    register spilled in the loop (sums of 512 columns do, hence apart).
    """
    columns, widest = head_dim + value_dim, max(head_dim, value_dim)
    if dtype == torch.float32:
        size = 32 if widest <= 128 else 16
        tile = Tile(size, size, 4, 2, pack=2)
        return Tiles(tile, tile, tile)
    if columns > 320:
        return Tiles(
            Tile(128, 64, 8, 2, pack=4),
            Tile(128, 32, 8, 2, pack=4),
            Tile(64, 64, 4, 2, pack=4, apart=True),
        )
    if columns > 256:
        return Tiles(Tile(128, 64, 8, 3, pack=4), Tile(64, 32, 4, 3), Tile(32, 64, 4, 2, pack=2))
    if 64 < widest <= 96:
        return Tiles(Tile(128, 64, 4, 3, pack=4), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3, pack=4))
    forward, grad_query = Tile(64, 64, 4, 3), Tile(128, 64, 8, 3, pack=4)
    grad_key = {
        Shape.LONG: Tile(64, 128, 8, 3, two_loops=True),
        Shape.DOCUMENTS: Tile(64, 128, 8, 3, pack=4, two_loops=True),
        Shape.SHORT: Tile(64, 64, 4, 2, pack=4),
    }
    return Tiles(forward, grad_query, grad_key[shape])


def width(dim: int) -> int:
    """Columns of a tile that holds ``dim`` of them."""
    return max(16, 1 << (dim - 1).bit_length())


def pieces(dim: int) -> tuple[int, int]:
    """Columns of the two pieces of a tile that holds ``dim`` of them; 0: there is no second."""
    whole = width(dim)
    main = whole // 2
    tail = width(dim - main)
    return (main, tail) if main >= 16 and tail < main else (whole, 0)
