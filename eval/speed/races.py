"""A kernel whose warps hand each other shared memory, in order or not, for racecheck."""

# mypy: ignore-errors
# ruff: noqa: N803 - upper case marks what is known when a kernel is compiled

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

_ROUNDS = 8
_SIZE = gl.constexpr(128)


@gluon.jit
def _give(tile, full, empty, ROUNDS: gl.constexpr, WAITS: gl.constexpr):
    """One warp: write the tile of every round, when the last one's has been read."""
    lanes: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    for turn in range(ROUNDS):
        if WAITS:
            mbarrier.wait(empty.index(0), (turn & 1) ^ 1)
        tile.store(gl.arange(0, _SIZE, layout=lanes) + turn)
        mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def _take(tile, full, empty, target, ROUNDS: gl.constexpr, WAITS: gl.constexpr):
    """Four warps: add up the tiles."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = gl.zeros([_SIZE], gl.int32, lanes)
    for turn in range(ROUNDS):
        if WAITS:
            mbarrier.wait(full.index(0), turn & 1)
        total += tile.load(lanes)
        mbarrier.arrive(empty.index(0), count=1)
    gl.store(target + gl.arange(0, _SIZE, layout=lanes), total)


@gluon.jit
def handing_kernel(target, ROUNDS: gl.constexpr, WAITS: gl.constexpr):
    """Hand ROUNDS tiles over; without WAITS nothing orders writes and reads."""
    tile = gl.allocate_shared_memory(gl.int32, [_SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(empty.index(0), count=1)
    gl.warp_specialize(
        [
            (_take, (tile, full, empty, target, ROUNDS, WAITS)),
            (_give, (tile, full, empty, ROUNDS, WAITS)),
        ],
        [1],
        [24],
    )


def hand_over(device: torch.device, ordered: bool) -> None:
    """Run the kernel.

    Args:
        device: A GPU of compute capability 9.0 or later.
        ordered: Whether the warps wait for each other.

    Raises:
        SystemExit: They did, and still the sums are wrong.
    """
    target = torch.empty(_SIZE.value, dtype=torch.int32, device=device)
    handing_kernel[(4,)](target, _ROUNDS, ordered)
    index = torch.arange(_SIZE.value, dtype=torch.int32)
    if ordered and not torch.equal(target.cpu(), _ROUNDS * index + sum(range(_ROUNDS))):
        raise SystemExit("warps that wait for each other did not get what they were handed")
