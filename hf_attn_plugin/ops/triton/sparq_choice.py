"""What SparQ's kernels share: visible keys, the largest of many numbers, the query's components."""

# mypy: disallow-untyped-defs=False
# ruff: noqa: N803 - upper case marks what is known when a kernel is compiled

import triton
import triton.language as tl

from hf_attn_plugin.ops.triton.decode_kernels import LOG2E

TINY = tl.constexpr(1.1754943508222875e-38)
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def visible_run(
    first, stop, stride_first, stride_stop, batch, length,
    HAS_FIRST: tl.constexpr, HAS_STOP: tl.constexpr,
):  # fmt: skip
    """The visible keys of a sequence: from, to."""
    end = length
    if HAS_STOP:
        end = tl.minimum(tl.load(stop + batch * stride_stop).to(tl.int32), length)
    begin = end * 0
    if HAS_FIRST:
        begin = tl.maximum(tl.load(first + batch * stride_first).to(tl.int32), 0)
    return tl.minimum(begin, end), end


@triton.jit
def most_recent(recent, stride_recent, batch, begin, end, local_window, HAS_MASK: tl.constexpr):
    """The position from which on keys are always chosen."""
    if HAS_MASK:
        return tl.load(recent + batch * stride_recent).to(tl.int32)
    return tl.maximum(end - local_window, begin)


@triton.jit
def hidden_or_forced(scores, cols, seen, recent, HAS_MASK: tl.constexpr, NOTHING: tl.constexpr):
    """By what keys are ranked: their scores, or NOTHING where they are no candidates.

    The most recent keys are chosen anyway. Where each key has a mask of its own, they need not be
    one run, and are the first candidates; otherwise they are none.
    """
    if HAS_MASK:
        scores = tl.where(cols >= recent, float("inf"), scores)
        return tl.where(seen, scores, NOTHING)
    return tl.where(seen & (cols < recent), scores, NOTHING)


@triton.jit
def ordered(x):
    """Float32 as integers in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def threshold_of(keys, low, high, count, number):
    """Such that at most ``count`` of ``number`` keys are above, and at least as many not below.

    Keys that do not take part are `LOWEST`. All others lie in ``low`` <= key <= ``high``, or
    enough of them do. Counts the keys above three numbers that divide the range, until that leaves
    one, or any number has ``count`` keys above.
    """
    every = number <= count
    low = low.to(tl.int64) - every.to(tl.int64)
    high = tl.where(every, low + 1, high.to(tl.int64) + 1)
    while high - low > 1:
        width = high - low
        first = low + tl.maximum(width >> 2, 1)
        second = low + (width >> 1)
        third = low + tl.maximum(3 * width >> 2, 1)
        # All three counts in one sum.
        reached = tl.sum(
            (keys >= first.to(tl.int32)).to(tl.int64)
            + ((keys >= second.to(tl.int32)).to(tl.int64) << 20)
            + ((keys >= third.to(tl.int32)).to(tl.int64) << 40),
            0,
        )
        of_first, of_second, of_third = reached & 0xFFFFF, (reached >> 20) & 0xFFFFF, reached >> 40
        low = tl.where(of_first >= count, first, low)
        low = tl.where(of_second >= count, second, low)
        low = tl.where(of_third >= count, third, low)
        high = tl.where(of_third < count, third, high)
        high = tl.where(of_second < count, second, high)
        high = tl.where(of_first < count, first, high)
        found = (of_first == count) | (of_second == count) | (of_third == count)
        high = tl.where(found, low, high)  # the last one that is reached often enough
        low = low - found.to(tl.int64)
    return low.to(tl.int32)


@triton.jit
def places_of(keys, threshold, count):
    """Which keys are the ``count`` largest, of equal ones the first; and their places in order."""
    above = keys > threshold
    level = (keys == threshold) & (keys != LOWEST)
    # Both counts in one scan: there are no more than 2**15 keys.
    running = tl.cumsum((above.to(tl.int32) << 16) + level.to(tl.int32), 0)
    wanted = count - tl.sum(above.to(tl.int32), 0)
    levels = running & 0xFFFF
    return above | (level & (levels <= wanted)), (running >> 16) + tl.minimum(levels, wanted) - 1


@triton.jit
def choose_components(
    query, stride_qh, stride_qd, scaling, share, RANK: tl.constexpr, RANK_COVERAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The components where the group's |q| are largest.

    Returns them [BLOCK_R], how many of these are used, the query [ROWS, BLOCK_D] with zeros
    elsewhere, and the factor of each head's scores [ROWS].
    """
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, ROWS)
    real = dims < HEAD_DIM
    q = tl.load(
        query + rows[:, None] * stride_qh + dims[None, :] * stride_qd,
        mask=(rows < GROUPS)[:, None] & real[None, :], other=0.0,
    )  # fmt: skip
    each = tl.abs(q.to(tl.float32))
    magnitude = tl.sum(each, 0)
    used = tl.full([], RANK, tl.int32)
    if RANK_COVERAGE:
        # How many come before each, and how much: larger ones, equal ones of lower index.
        magnitude = tl.where(real, magnitude, -1.0)
        before = (magnitude[None, :] > magnitude[:, None]) | (
            (magnitude[None, :] == magnitude[:, None]) & (dims[None, :] < dims[:, None])
        )
        place = tl.sum(before.to(tl.int32), 1)
        mass = tl.sum(tl.where(before, magnitude[None, :], 0.0), 1)
        target = share * tl.sum(tl.where(real, magnitude, 0.0), 0)
        taken = (mass < target) & (place < RANK) & real | (place == 0)
        used = tl.sum(taken.to(tl.int32), 0)
    else:
        keys = tl.where(real, ordered(magnitude), LOWEST)
        level = threshold_of(keys, tl.full([], 0, tl.int32), tl.max(keys, 0), RANK, HEAD_DIM)
        taken, place = places_of(keys, level, RANK)
    slots = tl.arange(0, BLOCK_R)
    hit = taken[None, :] & (place[None, :] == slots[:, None])
    components = tl.sum(tl.where(hit, dims[None, :], 0), 1)
    part = tl.sum(tl.where(taken[None, :], each, 0.0), 1)
    covered = part / tl.maximum(tl.sum(each, 1), TINY)
    # A head may have only zeros at the shared components: its scores are 0, not NaN.
    factor = scaling / tl.sqrt(tl.maximum(covered, TINY))
    return components, used, tl.where(taken[None, :], q, 0.0), factor


@triton.jit
def log_sum_exp(top, total, sinks, head, HAS_SINKS: tl.constexpr, GROUPS: tl.constexpr,
                ROWS: tl.constexpr):  # fmt: skip
    """Each head's log-sum-exp [ROWS] in base 2 from its maximum and sum; 0 if it sees nothing."""
    if HAS_SINKS:
        rows = tl.arange(0, ROWS)
        sink = tl.load(sinks + head * GROUPS + rows, mask=rows < GROUPS, other=0.0)
        sink = sink.to(tl.float32) * LOG2E
        base = tl.maximum(top, sink)
        total = total * tl.exp2(top - base) + tl.exp2(sink - base)
    else:
        base = tl.where(top == float("-inf"), 0.0, top)
    return tl.where(total > 0.0, base + tl.log2(tl.maximum(total, TINY)), 0.0)


@triton.jit
def merge_parts(stats, pair, splits, GROUPS: tl.constexpr, ROWS: tl.constexpr,
                SPLITS: tl.constexpr):  # fmt: skip
    """Maximum and sum of each head's softmax, [ROWS], from those of all parts of the keys."""
    rows = tl.arange(0, ROWS)
    parts = tl.arange(0, SPLITS)
    ok = (rows < GROUPS)[:, None] & (parts < splits)[None, :]
    place = ((pair.to(tl.int64) * GROUPS + rows) * 2 * splits)[:, None] + parts[None, :]
    tops = tl.load(stats + place, mask=ok, other=float("-inf"))
    sums = tl.load(stats + place + splits, mask=ok, other=0.0)
    top = tl.max(tops, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(sums * tl.exp2(tops - base[:, None]), 1)
