"""What one warpgroup of SparQ's kernel for Hopper GPUs does to choose, in Gluon.

As `sparq_choice` defines it, from where its functions differ in nothing but layouts.
"""

# mypy: ignore-errors
# ruff: noqa: N803 - upper case marks what is known when a kernel is compiled

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from hf_attn_plugin.ops.triton.hopper_pieces import LOG2E, warps_barrier

TINY = gl.constexpr(1.1754943508222875e-38)
LOWEST = gl.constexpr(-(2**31))
# Of a warpgroup.
THREADS = gl.constexpr(128)


@gluon.jit
def bounds(first, stop, stride_first, stride_stop, batch, length,
            HAS_FIRST: gl.constexpr, HAS_STOP: gl.constexpr):  # fmt: skip
    """The visible keys of a sequence: from, to."""
    end = length
    if HAS_STOP:
        end = gl.minimum(gl.load(stop + batch * stride_stop).to(gl.int32), length)
    begin = end * 0
    if HAS_FIRST:
        begin = gl.maximum(gl.load(first + batch * stride_first).to(gl.int32), 0)
    return gl.minimum(begin, end), end


@gluon.jit
def blocks_of(
    pair, first, stop, stride_first, stride_stop, pairs, kv_heads, length,
    BLOCK: gl.constexpr, HAS_FIRST: gl.constexpr, HAS_STOP: gl.constexpr,
):  # fmt: skip
    """How many blocks of a KV head are loaded; beyond the last it does not matter."""
    batch = gl.minimum(pair, pairs - 1) // kv_heads
    begin, end = bounds(first, stop, stride_first, stride_stop, batch, length, HAS_FIRST, HAS_STOP)
    return gl.maximum(gl.cdiv(end, BLOCK) - begin // BLOCK, 0)


@gluon.jit
def skip(stage, phase, count, STAGES: gl.constexpr):
    """Where a ring stands after ``count`` more blocks."""
    stage += count
    return stage % STAGES, phase ^ ((stage // STAGES) & 1)


@gluon.jit
def prefetch(at):
    """Bring what is needed later into the L2 cache: the memory's own queue is long."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(gl.int64, bitcast=True)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def plus(a, b):
    """For scans."""
    return a + b


@gluon.jit
def plus_two(a0, a1, b0, b1):
    """For sums of two tensors at a time."""
    return a0 + b0, a1 + b1


@gluon.jit
def plus_three(a0, a1, a2, b0, b1, b2):
    """For sums of three tensors at a time."""
    return a0 + b0, a1 + b1, a2 + b2


@gluon.jit
def ordered(x):
    """Float32 as integers in the same order, and back."""
    bits = x.to(gl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@gluon.jit
def _tanh(x):
    weight = gl.exp2(gl.abs(x) * (-2.0 * LOG2E))
    result = (1.0 - weight) / (1.0 + weight)
    return gl.where(x < 0.0, -result, result)


@gluon.jit
def in_base_2(products, scaling, softcap, SOFTCAP: gl.constexpr):
    """Scores from products of queries and keys."""
    if SOFTCAP:
        return _tanh(products * (scaling / softcap)) * (softcap * LOG2E)
    return products * (scaling * LOG2E)


@gluon.jit
def both_queries(
    query, tile, stride_qd, scaling, share,
    DIM: gl.constexpr, RANK: gl.constexpr, RANK_COVERAGE: gl.constexpr,
):  # fmt: skip
    """Fills ``tile`` [8, DIM]: even rows have the RANK largest components, odd ones all.

    Returns the factor of the approximate scores. Rows repeat so that every thread of a product
    has both kinds of scores.
    """
    ranks: gl.constexpr = gl.BlockedLayout([1, DIM // 4], [8, 4], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, ranks)
    rows: gl.constexpr = gl.BlockedLayout([1, DIM // 16], [2, 16], [4, 1], [1, 0])
    dim = gl.arange(0, DIM, layout=row_layout)
    q = gl.load(query + dim * stride_qd)
    each = gl.abs(q.to(gl.float32))
    # In 16 bits a magnitude and where it stands are one number: of equal ones the first is larger.
    order = (q.to(gl.int16, bitcast=True).to(gl.int32) & 0x7FFF) * 256 + (DIM - 1 - dim)
    others = gl.convert_layout(order, gl.SliceLayout(0, ranks))
    before = others[None, :] > order[:, None]
    place = gl.sum(before.to(gl.int32), 1)
    taken = place < RANK
    if RANK_COVERAGE:
        mass = gl.convert_layout(each, gl.SliceLayout(0, ranks))
        mass = gl.sum(gl.where(before, mass[None, :], 0.0), 1)
        taken = (taken & (mass < share * gl.sum(each, 0))) | (place == 0)
    part, whole = gl.reduce((gl.where(taken, each, 0.0), each), 0, plus_two)
    # A head may have only zeros: its scores are 0, not NaN.
    covered = part / gl.maximum(whole, TINY)
    some = gl.where(taken, q, gl.zeros_like(q))
    some = gl.convert_layout(some, gl.SliceLayout(0, rows))[None, :]
    every = gl.convert_layout(q, gl.SliceLayout(0, rows))[None, :]
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, rows))[:, None]
    tile.store(gl.where(row % 2 == 0, some, every))
    fence_async_shared()
    warps_barrier()
    return scaling / gl.sqrt(gl.maximum(covered, TINY))


@gluon.jit
def threshold(keys, high, wanted, number):
    """Such that fewer than ``wanted`` keys are above, and at least as many not below.

    Of ``number`` keys [threads, own] that take part; all others are `LOWEST`. Fewer than
    ``wanted`` are above ``high``. As `sparq_choice.threshold_of`.
    """
    every = number <= wanted
    low = gl.where(every, high.to(gl.int64), gl.full([], -(2**31), gl.int64))
    high = high.to(gl.int64) + 1
    while high - low > 1:
        width = high - low
        first = low + gl.maximum(width >> 2, 1)
        second = low + (width >> 1)
        third = low + gl.maximum(3 * width >> 2, 1)
        # A thread's three counts are one number, and so are those of all threads.
        own = gl.sum(
            (keys >= first.to(gl.int32)).to(gl.int32)
            + gl.where(keys >= second.to(gl.int32), 1 << 10, 0)
            + gl.where(keys >= third.to(gl.int32), 1 << 20, 0),
            1,
        )
        wide = (own & 1023).to(gl.int64)
        wide += ((own >> 10) & 1023).to(gl.int64) << 20
        wide += (own >> 20).to(gl.int64) << 40
        reached = gl.sum(wide, 0)
        of_first, of_second, of_third = reached & 0xFFFFF, (reached >> 20) & 0xFFFFF, reached >> 40
        low = gl.where(of_first >= wanted, first, low)
        low = gl.where(of_second >= wanted, second, low)
        low = gl.where(of_third >= wanted, third, low)
        high = gl.where(of_third < wanted, third, high)
        high = gl.where(of_second < wanted, second, high)
        high = gl.where(of_first < wanted, first, high)
        found = (of_first == wanted) | (of_second == wanted) | (of_third == wanted)
        high = gl.where(found, low, high)  # the last one that is reached often enough
        low = low - found.to(gl.int64)
    return gl.where(every, LOWEST, low.to(gl.int32))
