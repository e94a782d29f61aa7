"""SparQ's whole step with one copy of the keys on Hopper, where every KV head has one query head.

All keys are read, once: tensor cores multiply them by the query without the components left out,
which gives the approximate scores, and by the query, which gives the exact ones of whatever keys
are chosen then; only values are gathered. One program runs on each multiprocessor: one warp loads
keys by TMA, of one KV head after another, and never waits for a choice. Two warpgroups take turns:
one multiplies the keys of a KV head as they arrive, while the other chooses among those of the KV
head before, attends to them, and prepares the query after next.
"""

# mypy: ignore-errors
# ruff: noqa: F821, N803, N806, RUF005 - upper case is known when a kernel is compiled; Gluon has no `*`

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_attn_plugin.ops.triton.hopper_descriptors import DTYPES
from hf_attn_plugin.ops.triton.hopper_pieces import LOG2E, advance, new_barriers, warps_barrier
from hf_attn_plugin.ops.triton.sparq_hopper_choice import (
    LOWEST,
    THREADS,
    TINY,
    blocks_of,
    both_queries,
    bounds,
    in_base_2,
    ordered,
    plus,
    plus_three,
    prefetch,
    skip,
    threshold,
)


@gluon.jit
def _load(
    key, ring, barriers, first, stop, stride_first, stride_stop, pairs, kv_heads, length,
    BLOCK: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
    HAS_FIRST: gl.constexpr, HAS_STOP: gl.constexpr,
):  # fmt: skip
    """The loading warp: the blocks of all of the program's KV heads, one after another.

    Bounds are loaded in the turn that needs them: those that a loop carries from one turn to the
    next, Triton 3.6 takes to be the first ones in all turns.
    """
    full, empty = barriers
    stage = 0
    phase = 1
    for pair in range(gl.program_id(0), pairs, gl.num_programs(0)):
        batch = pair // kv_heads
        head = pair % kv_heads
        begin, end = bounds(
            first, stop, stride_first, stride_stop, batch, length, HAS_FIRST, HAS_STOP
        )
        for block in range(begin // BLOCK, gl.cdiv(end, BLOCK)):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), BLOCK * DIM * 2)
            tma.async_copy_global_to_shared(
                key, [batch, head, block * BLOCK, 0], full.index(stage), ring.index(stage)
            )
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _attend(
    part: gl.constexpr, ring, barriers, turns, memory, tensors, strides, numbers,
    DIM: gl.constexpr, VALUE_DIM: gl.constexpr, TOP_K: gl.constexpr, SLOTS: gl.constexpr,
    ROOM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, V_UNIT: gl.constexpr,
    RANK: gl.constexpr, RANK_COVERAGE: gl.constexpr, MEAN: gl.constexpr,
    HAS_COUNT: gl.constexpr, SOFTCAP: gl.constexpr, HAS_FIRST: gl.constexpr,
    HAS_STOP: gl.constexpr, HAS_MASK: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups that compute: scores, choice, and attention of every other KV head.

    The ring's barriers tell only neighbouring rounds apart, so each waits for its turn, from which
    on the next blocks are its own.
    """
    tile, approximate, exact = memory
    query, value, value_sum, value_count, first, stop, visible, recent, sinks, lists, output = (
        tensors
    )
    (
        stride_qb, stride_qh, stride_qd, stride_vb, stride_vh, stride_vn,
        stride_sb, stride_sh, stride_count,
        stride_first, stride_stop, stride_visible, stride_recent,
    ) = strides  # fmt: skip
    pairs, kv_heads, length, local_window, scaling, softcap, component_share = numbers
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    # A thread's positions are neighbours, so that most of a scan is its own.
    PER: gl.constexpr = ROOM // THREADS
    places: gl.constexpr = gl.BlockedLayout([1, PER], [32, 1], [4, 1], [1, 0])
    of_thread: gl.constexpr = gl.SliceLayout(1, places)
    threads: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # Values: 16 bytes a load, the values of DEEP x WIDE keys on their way at a time.
    LANES: gl.constexpr = VALUE_DIM // 8
    WIDE: gl.constexpr = THREADS // LANES
    DEEP: gl.constexpr = SLOTS // WIDE if SLOTS < 16 * WIDE else 16
    gathered: gl.constexpr = gl.BlockedLayout(
        [DEEP, 1, 8], [1, 32 // LANES, LANES], [1, 4, 1], [2, 1, 0]
    )
    of_slot: gl.constexpr = gl.SliceLayout(2, gathered)
    listed: gl.constexpr = gl.BlockedLayout([1, 1], [32 // WIDE, WIDE], [4, 1], [1, 0])
    sums: gl.constexpr = gl.SliceLayout(0, gathered)
    of_dim: gl.constexpr = gl.SliceLayout(0, sums)
    full, empty = barriers
    nothing = gl.zeros([BLOCK, 8], gl.float32, products)
    stage = 0
    phase = 0
    turn = 1 - part
    programs = gl.num_programs(0)
    if part == 1:
        blocks = blocks_of(
            gl.program_id(0), first, stop, stride_first, stride_stop, pairs, kv_heads, length,
            BLOCK, HAS_FIRST, HAS_STOP,
        )  # fmt: skip
        stage, phase = skip(stage, phase, blocks, STAGES)
    for pair in range(gl.program_id(0) + part * programs, pairs, 2 * programs):
        batch = (pair // kv_heads).to(gl.int64)
        head = (pair % kv_heads).to(gl.int64)
        begin, end = bounds(
            first, stop, stride_first, stride_stop, batch, length, HAS_FIRST, HAS_STOP
        )
        if HAS_MASK:
            forced_from = gl.load(recent + batch * stride_recent).to(gl.int32)
        else:
            forced_from = gl.maximum(end - local_window, begin)
        blocks = blocks_of(
            pair + programs, first, stop, stride_first, stride_stop, pairs, kv_heads, length,
            BLOCK, HAS_FIRST, HAS_STOP,
        )  # fmt: skip
        factor = both_queries(
            query + batch * stride_qb + head * stride_qh, tile, stride_qd, scaling,
            component_share, DIM, RANK, RANK_COVERAGE,
        )  # fmt: skip
        following = gl.minimum(pair + 2 * programs, pairs - 1)
        q_at = query + (following // kv_heads) * stride_qb + (following % kv_heads) * stride_qh
        prefetch(q_at + gl.arange(0, DIM, layout=threads) * stride_qd)
        if MEAN:
            sum_at = value_sum + batch * stride_sb + head * stride_sh
            prefetch(sum_at + gl.arange(0, VALUE_DIM, layout=threads))
        mbarrier.wait(turns.index(part), turn)
        turn ^= 1
        for block in range(begin // BLOCK, gl.cdiv(end, BLOCK)):
            mbarrier.wait(full.index(stage), phase)
            k = ring.index(stage).reshape([BLOCK, DIM])
            acc = warpgroup_mma(k, tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(stage), count=1)
            one, other = gl.split(gl.reshape(acc, [BLOCK, 4, 2]))
            one = gl.max(one, 1)
            other = gl.max(other, 1)
            approximate.index(block).store(one)
            exact.index(block).store(other)
            stage, phase = advance(stage, phase, STAGES)
        warps_barrier()
        mbarrier.arrive(turns.index(1 - part), count=1)
        stage, phase = skip(stage, phase, blocks, STAGES)

        cols = gl.arange(0, THREADS, layout=of_thread)[:, None] * PER
        cols = cols + gl.arange(0, PER, layout=gl.SliceLayout(0, places))[None, :]
        seen = (cols >= begin) & (cols < end)
        if HAS_MASK:
            shown = gl.load(visible + batch * stride_visible + cols, mask=seen, other=0)
            seen = seen & (shown != 0)
        scores = approximate._reinterpret(gl.float32, [THREADS, PER], plain).load(places)
        scores = gl.where(seen, in_base_2(scores, factor, softcap, SOFTCAP), float("-inf"))
        keys = gl.where(seen, ordered(scores), LOWEST)
        highest = gl.max(gl.max(keys, 1), 0)
        number = gl.sum(gl.sum(seen.to(gl.int32), 1), 0)
        keys = gl.where(seen & (cols >= forced_from), 0x7FFFFFFF, keys)
        level = threshold(keys, highest, TOP_K, number)
        above = keys > level
        equal = (keys == level) & (keys != LOWEST)
        # Both counts in one scan: there are no more than 2**15 keys.
        counts = gl.where(above, 1 << 16, 0) + equal.to(gl.int32)
        running = gl.associative_scan(counts, 1, plus)
        own = gl.sum(counts, 1)
        before = gl.associative_scan(gl.convert_layout(own, threads), 0, plus)
        before = gl.convert_layout(before, of_thread) - own
        room = TOP_K - (gl.sum(own, 0) >> 16)
        running = running + before[:, None]
        equals = running & 0xFFFF
        taken = above | (equal & (equals <= room))
        place = (running >> 16) + gl.minimum(equals, room) - 1
        count = gl.minimum(number, TOP_K)

        e = exact._reinterpret(gl.float32, [THREADS, PER], plain).load(places)
        e = gl.where(taken, in_base_2(e, scaling, softcap, SOFTCAP), float("-inf"))
        top = gl.max(gl.max(e, 1), 0)
        if HAS_SINKS:
            sink = gl.load(sinks + head).to(gl.float32) * LOG2E
            top = gl.maximum(top, sink)
        top = gl.where(top == float("-inf"), 0.0, top)
        weights = gl.exp2(e - top)
        weights_at = lists + pair.to(gl.int64) * (2 * SLOTS)
        chosen = (weights_at + SLOTS).to(gl.pointer_type(gl.int32), bitcast=True)
        gl.store(weights_at + place, weights, mask=taken)
        gl.store(chosen + place, cols, mask=taken)
        if MEAN:
            base = gl.where(number > 0, ordered(highest).to(gl.float32, bitcast=True), 0.0)
            masses = gl.exp2(scores - base)
            total, covered, mass = gl.reduce(
                (
                    gl.sum(weights, 1),
                    gl.sum(gl.where(taken, masses, 0.0), 1),
                    gl.sum(masses, 1),
                ),
                0,
                plus_three,
            )
            alpha = covered / gl.maximum(mass, TINY)
        else:
            total = gl.sum(gl.sum(weights, 1), 0)
        if HAS_SINKS:
            total += gl.exp2(sink - top)
        warps_barrier()

        dim = gl.arange(0, VALUE_DIM, layout=of_dim)
        if MEAN:
            values_seen = end - begin
            if HAS_COUNT:
                values_seen = gl.load(value_count + batch * stride_count).to(gl.int32)
            mean = gl.load(sum_at + dim)
        value_at = value + (batch * stride_vb + head * stride_vh) * V_UNIT
        acc = gl.zeros([WIDE, VALUE_DIM], gl.float32, sums)
        for start in range(0, count, DEEP * WIDE):
            deep = gl.arange(0, DEEP, layout=gl.SliceLayout(1, listed))[:, None]
            wide = gl.arange(0, WIDE, layout=gl.SliceLayout(0, listed))[None, :]
            slot = start + deep * WIDE + wide
            used = slot < count
            spot = gl.load(chosen + slot, mask=used, other=-1)
            weight = gl.load(weights_at + slot, mask=used, other=0.0)
            # Through shared memory: were they loaded by all that need them, values would wait long.
            spot = gl.expand_dims(gl.convert_layout(spot, of_slot), 2)
            weight = gl.expand_dims(gl.convert_layout(weight, of_slot), 2)
            v_at = value_at + spot.to(gl.int64) * (stride_vn * V_UNIT)
            v_at = v_at + gl.expand_dims(gl.expand_dims(dim, 0), 0)
            v = gl.load(v_at, mask=spot >= 0, other=0.0)
            acc += gl.sum(v.to(gl.float32) * weight, 0)
        out = gl.sum(acc, 0) / gl.where(total == 0.0, 1.0, total)
        if MEAN:
            mean = mean / gl.maximum(values_seen, 1).to(gl.float32)
            out = out * alpha + (1.0 - alpha) * mean
        gl.store(output + pair.to(gl.int64) * VALUE_DIM + dim, out.to(output.dtype.element_ty))


@gluon.jit
def _own_memory(
    dtype: gl.constexpr, DIM: gl.constexpr, ROOM: gl.constexpr, BLOCK: gl.constexpr
):  # fmt: skip
    """A warpgroup's queries, and both kinds of scores."""
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, DIM], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return (
        gl.allocate_shared_memory(dtype, [8, DIM], tile_layout),
        gl.allocate_shared_memory(gl.float32, [ROOM // BLOCK, BLOCK], flat),
        gl.allocate_shared_memory(gl.float32, [ROOM // BLOCK, BLOCK], flat),
    )


HOPPER_UNALIGNED = ["query", "value_sum", "value_count", "first", "stop", "visible", "recent"]


@gluon.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qd", "stride_vb", "stride_vh", "stride_vn",
        "stride_sb", "stride_sh", "stride_count",
        "stride_first", "stride_stop", "stride_visible", "stride_recent",
        "pairs", "kv_heads", "length", "local_window",
    ],
    do_not_specialize_on_alignment=[*HOPPER_UNALIGNED, "sinks"],
)  # fmt: skip
def hopper_whole_kernel(
    query, key_tiles, value, value_sum, value_count, first, stop, visible, recent, sinks,
    scratch, output,
    stride_qb: "i64", stride_qh: "i64", stride_qd: "i64",
    stride_vb: "i64", stride_vh: "i64", stride_vn: "i64",
    stride_sb: "i64", stride_sh: "i64", stride_count: "i64",
    stride_first: "i64", stride_stop: "i64", stride_visible: "i64", stride_recent: "i64",
    pairs: "i32", kv_heads: "i32", length: "i32", local_window: "i32",
    scaling: "fp32", softcap: "fp32", component_share: "fp32",
    DIM: gl.constexpr, VALUE_DIM: gl.constexpr, TOP_K: gl.constexpr, SLOTS: gl.constexpr,
    ROOM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, V_UNIT: gl.constexpr,
    RANK: gl.constexpr, RANK_COVERAGE: gl.constexpr, MEAN: gl.constexpr,
    HAS_COUNT: gl.constexpr, SOFTCAP: gl.constexpr, HAS_FIRST: gl.constexpr,
    HAS_STOP: gl.constexpr, HAS_MASK: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """The whole step of ``pairs`` KV heads with one query head each, and at most ROOM keys.

    ``key_tiles`` is a descriptor of BLOCK keys of one KV head. ``scratch`` receives the weights of
    SLOTS chosen keys of each KV head, and their positions.
    """
    dtype: gl.constexpr = key_tiles.dtype
    ring = gl.allocate_shared_memory(dtype, [STAGES] + key_tiles.block_type.shape, key_tiles.layout)
    barriers = (new_barriers(STAGES, 1), new_barriers(STAGES, 1))
    tensors = (
        query, value, value_sum, value_count, first, stop, visible, recent, sinks, scratch, output,
    )  # fmt: skip
    strides = (
        stride_qb, stride_qh, stride_qd, stride_vb, stride_vh, stride_vn,
        stride_sb, stride_sh, stride_count,
        stride_first, stride_stop, stride_visible, stride_recent,
    )  # fmt: skip
    numbers = (pairs, kv_heads, length, local_window, scaling, softcap, component_share)
    turns = new_barriers(2, 1)
    one = _own_memory(dtype, DIM, ROOM, BLOCK)
    other = _own_memory(dtype, DIM, ROOM, BLOCK)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    0, ring, barriers, turns, one, tensors, strides, numbers,
                    DIM, VALUE_DIM, TOP_K, SLOTS, ROOM, BLOCK, STAGES, V_UNIT, RANK,
                    RANK_COVERAGE, MEAN, HAS_COUNT, SOFTCAP, HAS_FIRST, HAS_STOP, HAS_MASK,
                    HAS_SINKS,
                ),
            ),
            (
                _attend,
                (
                    1, ring, barriers, turns, other, tensors, strides, numbers,
                    DIM, VALUE_DIM, TOP_K, SLOTS, ROOM, BLOCK, STAGES, V_UNIT, RANK,
                    RANK_COVERAGE, MEAN, HAS_COUNT, SOFTCAP, HAS_FIRST, HAS_STOP, HAS_MASK,
                    HAS_SINKS,
                ),
            ),
            (
                _load,
                (
                    key_tiles, ring, barriers, first, stop, stride_first, stride_stop,
                    pairs, kv_heads, length, BLOCK, DIM, STAGES, HAS_FIRST, HAS_STOP,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


_DIMS = (64, 128)
# From how many keys on it pays, and how many the shared memory has room for.
_LEAST, _MOST = 512, 4096
# Keys of a block, of 16384 bytes, and how many blocks are on their way. More take longer to come,
# and with them what is chosen: on an H200, 64 x 4096 keys of 32 heads take 520 us, with 6 blocks
# 522, with 3 530.
BLOCK_BYTES = 16384
STAGES = 4


def serves(told: dict[str, Any], settings: Any) -> bool:
    """Whether the kernel computes a call on a Hopper GPU.

    It does with one copy of the keys, in 16 bits, where each KV head has one query head, and TMA
    can address the keys.

    Args:
        told: The call's tensors, by name: `sparq_launch.Layout`.
        settings: Its `sparq_launch.Settings`.
    """
    query, keys, values = (told[name] for name in ("query", "keys", "values"))
    unit = 16 // query.dtype.itemsize
    return (
        settings.bits == 0
        and settings.coverage is None
        and "keys_t" not in told
        and query.dtype in DTYPES
        and query.shape[1] == keys.shape[1]
        and _LEAST <= keys.shape[2] <= _MOST
        and keys.shape[3] in _DIMS
        and values.shape[3] in _DIMS
        and keys.aligned
        and all(
            step > 0 and step % unit == 0
            for count, step in zip(keys.shape[:3], keys.stride[:3], strict=True)
            if count > 1
        )
    )
