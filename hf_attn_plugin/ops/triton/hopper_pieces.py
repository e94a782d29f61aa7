"""Pieces that the warp-specialised Hopper kernels share: work items, masks, rings of buffers.

Each kernel has one warp that loads tiles by TMA into rings of shared memory, and one or two
warpgroups that compute. A ring's stage has a barrier that says it is full and one that says it is
empty; the phase of a barrier flips every time it completes.
"""

# mypy: ignore-errors
# ruff: noqa: N803 - upper case marks what is known when a kernel is compiled

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

LOG2E = gl.constexpr(1.4426950408889634)

# A barrier among the warps of one partition: Triton 3.6 calls it so, 3.7 otherwise.
warps_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

# Rows that one warpgroup computes: those of a wgmma instruction.
ROWS = gl.constexpr(64)

# Columns of a work item; see `work.Work`.
_ITEM_COLUMNS = gl.constexpr(12)


@gluon.jit
def work_item(items, batch, item, item_batch):
    """Block, slot, lead, (begin, end), visits, ranges without a mask, as `loads.work_item`."""
    row = items + (batch.to(gl.int64) * item_batch + item) * _ITEM_COLUMNS
    bounds = (gl.load(row + 3), gl.load(row + 4))
    blocks = (gl.load(row + 5), gl.load(row + 6), gl.load(row + 7))
    full = (gl.load(row + 8), gl.load(row + 9), gl.load(row + 10), gl.load(row + 11))
    return gl.load(row), gl.load(row + 1), gl.load(row + 2) != 0, bounds, blocks, full


@gluon.jit
def visited(blocks, turn):
    """The block of one visit."""
    first_count, first_base, second_base = blocks
    return gl.where(turn < first_count, first_base, second_base) + turn


@gluon.jit
def turns_of_program(count):
    """How many of ``count`` items, sorted by work, this program of a persistent grid takes."""
    programs = gl.num_programs(0)
    rounds = count // programs
    last = _place(rounds)
    return rounds + (last < count - rounds * programs).to(gl.int32)


@gluon.jit
def nth_of_program(turn):
    """The program's item of one round. Odd rounds go backwards, so that the sums even out."""
    return turn * gl.num_programs(0) + _place(turn)


@gluon.jit
def _place(turn):
    program = gl.program_id(0)
    return gl.where(turn % 2 == 1, gl.num_programs(0) - 1 - program, program)


@gluon.jit
def run_facts(info, index, inside, length, SECOND: gl.constexpr):
    """Starts and lengths of the runs that tokens see, from int32 ``info`` [4, length]."""
    start = gl.load(info + index, mask=inside, other=0)
    size = gl.load(info + length + index, mask=inside, other=0)
    start2, size2 = start, size
    if SECOND:
        start2 = gl.load(info + 2 * length + index, mask=inside, other=0)
        size2 = gl.load(info + 3 * length + index, mask=inside, other=0)
    return start, size, start2, size2


@gluon.jit
def _in_run(index, start, size):
    distance = (index - start).to(gl.uint32, bitcast=True)
    return distance < size.to(gl.uint32, bitcast=True)


@gluon.jit
def needs_mask(full, turn):
    """Whether a visit is in neither of the ranges that need no mask."""
    from1, to1, from2, to2 = full
    return ((turn < from1) | (turn >= to1)) & ((turn < from2) | (turn >= to2))


@gluon.jit
def hide(score, own, index, SECOND: gl.constexpr):
    """``score`` [own, others] with -inf outside of the runs ``own``; ``index`` of the others."""
    start, size, start2, size2 = own
    seen = _in_run(index[None, :], start[:, None], size[:, None])
    if SECOND:
        seen = seen | _in_run(index[None, :], start2[:, None], size2[:, None])
    return gl.where(seen, score, float("-inf"))


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring, and the phase of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def new_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """One barrier per stage, each complete after ``ARRIVALS`` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=ARRIVALS)
    return barriers
