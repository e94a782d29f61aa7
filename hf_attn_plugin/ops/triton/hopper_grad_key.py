"""The kernel of the keys' and values' gradients for Hopper: warp-specialised and persistent.

Scores and their gradients are computed transposed, keys by queries, so that they can stay in
registers as the left operands of the products that they enter. Two warpgroups with 64 keys each
share one stream of queries. What only one of them sees the other skips, which keeps them apart:
one starts and ends its blocks while the other multiplies.
"""

# mypy: ignore-errors
# ruff: noqa: F821, N803, N806, RUF005 - upper case is known when a kernel is compiled; Gluon has no `*`

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_attn_plugin.ops.triton.hopper_pieces import (
    ROWS,
    advance,
    hide,
    new_barriers,
    nth_of_program,
    run_facts,
    turns_of_program,
    visited,
    warps_barrier,
)

# Columns of an item and of a block's runs; see `hopper_work.PairWork`.
_ITEM_COLUMNS = gl.constexpr(10)
_PART_COLUMNS = gl.constexpr(8)


@gluon.jit
def _nth_item(items, turn, item_batch, batch_heads, kv_heads):
    """The row of the program's item of one round, its batch row and its KV head."""
    index = nth_of_program(turn)
    batch = index % batch_heads // kv_heads
    row = items + (batch.to(gl.int64) * item_batch + index // batch_heads) * _ITEM_COLUMNS
    return row, batch, index % batch_heads % kv_heads


@gluon.jit
def _visits(row):
    """Begin and end of an item's visits, and their blocks for `visited`."""
    blocks = (gl.load(row + 6), gl.load(row + 7), gl.load(row + 8))
    return gl.load(row + 4), gl.load(row + 5), blocks


@gluon.jit
def _load_own(
    key,
    value,
    own_tiles,
    own_barriers,
    items,
    item_batch,
    num_items,
    batch_heads,
    kv_heads,
    DIM: gl.constexpr,
):
    """The warp that loads keys and values: of each warpgroup when it is done with those before."""
    k_tile, v_tile = own_tiles
    own_full, own_empty = own_barriers
    for turn in range(turns_of_program(num_items * batch_heads)):
        row, batch, kv_head = _nth_item(items, turn, item_batch, batch_heads, kv_heads)
        for part in gl.static_range(2):
            place = [batch, kv_head, gl.load(row + part) * ROWS, 0]
            ready = own_full.index(part)
            mbarrier.wait(own_empty.index(part), (turn & 1) ^ 1)
            mbarrier.expect(ready, 2 * ROWS * DIM * 2)
            tma.async_copy_global_to_shared(key, place, ready, k_tile.index(part))
            tma.async_copy_global_to_shared(value, place, ready, v_tile.index(part))


@gluon.jit
def _load(
    query,
    grad_output,
    base_lse,
    delta,
    rings,
    barriers,
    items,
    item_batch,
    num_items,
    batch_heads,
    kv_heads,
    group_packs,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The warp that loads queries, their gradients and their numbers."""
    QUERIES: gl.constexpr = HEADS * TOKENS
    q_ring, go_ring, base_ring, delta_ring = rings
    full, empty = barriers
    stage = 0
    phase = 1
    for turn in range(turns_of_program(num_items * batch_heads)):
        row, batch, kv_head = _nth_item(items, turn, item_batch, batch_heads, kv_heads)
        begin, end, blocks = _visits(row)
        for pack in range(kv_head * group_packs, (kv_head + 1) * group_packs):
            for visit in range(begin, end):
                first = visited(blocks, visit) * TOKENS
                place = [batch, pack, 0, first, 0]
                numbers = [batch, pack, 0, first]
                ready = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(ready, 2 * QUERIES * (DIM * 2 + 4))
                tma.async_copy_global_to_shared(query, place, ready, q_ring.index(stage))
                tma.async_copy_global_to_shared(base_lse, numbers, ready, base_ring.index(stage))
                tma.async_copy_global_to_shared(grad_output, place, ready, go_ring.index(stage))
                tma.async_copy_global_to_shared(delta, numbers, ready, delta_ring.index(stage))
                stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _numbers(ring, stage, QUERIES: gl.constexpr, layout: gl.constexpr):
    """A stage's numbers, one per query; heads x tokens lie one after the other."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return ring.index(stage)._reinterpret(gl.float32, [QUERIES], plain).load(layout)


@gluon.jit
def _within(block, bounds):
    """Whether a block lies in one of two ranges."""
    from1, to1, from2, to2 = bounds
    return ((block >= from1) & (block < to1)) | ((block >= from2) & (block < to2))


@gluon.jit
def _hide_unseen(
    score,
    facts,
    part: gl.constexpr,
    block,
    TOKENS: gl.constexpr,
    SECOND: gl.constexpr,
    key_layout: gl.constexpr,
    query_layout: gl.constexpr,
):
    """``score`` [keys, queries] with -inf where a key is not seen; facts lie in shared memory."""
    start = facts.index(part * 4).load(key_layout)
    size = facts.index(part * 4 + 1).load(key_layout)
    start2, size2 = start, size
    if SECOND:
        start2 = facts.index(part * 4 + 2).load(key_layout)
        size2 = facts.index(part * 4 + 3).load(key_layout)
    token = gl.arange(0, score.shape[1], layout=query_layout) % TOKENS
    return hide(score, (start, size, start2, size2), block * TOKENS + token, SECOND)


@gluon.jit
def _compute(
    part: gl.constexpr,
    grad_key,
    grad_value,
    partial_key,
    partial_value,
    own_tiles,
    own_barriers,
    facts,
    rings,
    barriers,
    items,
    parts,
    kv_info,
    item_batch,
    part_batch,
    kv_info_batch,
    num_items,
    batch_heads,
    kv_heads,
    group_packs,
    kv_len,
    scaling,
    to_log2,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    SECOND: gl.constexpr,
):
    """One warpgroup: 64 keys."""
    QUERIES: gl.constexpr = HEADS * TOKENS
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    key_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    query_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    k_tile, v_tile = own_tiles
    own_full, own_empty = own_barriers
    q_ring, go_ring, base_ring, delta_ring = rings
    full, empty = barriers
    dtype: gl.constexpr = k_tile.dtype
    nothing = gl.zeros([ROWS, QUERIES], gl.float32, score_layout)
    k = k_tile.index(part).reshape([ROWS, DIM])
    v = v_tile.index(part).reshape([ROWS, DIM])
    stage = 0
    phase = 0
    for item_turn in range(turns_of_program(num_items * batch_heads)):
        row, batch, kv_head = _nth_item(items, item_turn, item_batch, batch_heads, kv_heads)
        block = gl.load(row + part)
        slot = gl.load(row + 2 + part)
        in_turns = gl.load(row + 9) != 0
        begin, end, blocks = _visits(row)
        line = parts + (batch.to(gl.int64) * part_batch + block) * _PART_COLUMNS
        seen = (gl.load(line), gl.load(line + 1), gl.load(line + 4), gl.load(line + 5))
        whole = (gl.load(line + 2), gl.load(line + 3), gl.load(line + 6), gl.load(line + 7))
        index = block * ROWS + gl.arange(0, ROWS, layout=key_layout)
        info = kv_info + batch * kv_info_batch
        start, size, start2, size2 = run_facts(info, index, index < kv_len, kv_len, SECOND)
        # Few visits need these: no registers are left to hold them.
        facts.index(part * 4).store(start)
        facts.index(part * 4 + 1).store(size)
        if SECOND:
            facts.index(part * 4 + 2).store(start2)
            facts.index(part * 4 + 3).store(size2)
        # What comes after its own last visit does not hold up a warpgroup's results.
        last = gl.maximum(
            gl.where(seen[0] < seen[1], seen[1], 0), gl.where(seen[2] < seen[3], seen[3], 0)
        )
        own_end = end
        while (own_end > begin) & (visited(blocks, own_end - 1) >= last):
            own_end -= 1
        total = (end - begin) * group_packs
        own_total = total - (end - own_end)
        acc_key = gl.zeros([ROWS, DIM], gl.float32, acc_layout)
        acc_value = gl.zeros([ROWS, DIM], gl.float32, acc_layout)
        mbarrier.wait(own_full.index(part), item_turn & 1)
        turn = begin
        # One loop over all heads of the group and blocks of queries.
        for _ in range(own_total):
            visit = visited(blocks, turn)
            mbarrier.wait(full.index(stage), phase)
            if _within(visit, seen) & ((turn & 1 == part) | (not in_turns)):
                q = q_ring.index(stage).reshape([QUERIES, DIM])
                go = go_ring.index(stage).reshape([QUERIES, DIM])
                score = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
                d_weight = warpgroup_mma(
                    v, go.permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                base = _numbers(base_ring, stage, QUERIES, query_layout)
                score = warpgroup_mma_wait(1, deps=[score])
                score = score * to_log2 - base[None, :]
                if not _within(visit, whole):
                    score = _hide_unseen(
                        score, facts, part, visit, TOKENS, SECOND, key_layout, query_layout
                    )
                weight = gl.exp2(score)
                weights = gl.convert_layout(weight.to(dtype), weight_layout)
                acc_value = warpgroup_mma(weights, go, acc_value, is_async=True)
                d_weight = warpgroup_mma_wait(1, deps=[d_weight])
                row_delta = _numbers(delta_ring, stage, QUERIES, query_layout)
                d_score = weight * (d_weight - row_delta[None, :])
                d_score = gl.convert_layout(d_score.to(dtype), weight_layout)
                acc_key = warpgroup_mma(d_score, q, acc_key, is_async=True)
                acc_key, acc_value, weights, d_score = warpgroup_mma_wait(
                    0, deps=[acc_key, acc_value, weights, d_score]
                )
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
            turn += 1
            if turn == end:
                turn = begin
        acc_key = acc_key * scaling
        if slot < 0:
            # The tiles of keys and values are read no more: they carry the gradients out.
            k.store(acc_key.to(dtype))
            v.store(acc_value.to(dtype))
            fence_async_shared()
            warps_barrier()
            place = [batch, kv_head, block * ROWS, 0]
            tma.async_copy_shared_to_global(grad_key, place, k_tile.index(part))
            tma.async_copy_shared_to_global(grad_value, place, v_tile.index(part))
            tma.store_wait(0)
        else:
            kept = (slot.to(gl.int64) * batch_heads + batch * kv_heads + kv_head) * ROWS
            kept += gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc_layout))
            columns = gl.arange(0, DIM, layout=gl.SliceLayout(0, acc_layout))
            gl.store(partial_key + kept[:, None] * DIM + columns[None, :], acc_key)
            gl.store(partial_value + kept[:, None] * DIM + columns[None, :], acc_value)
        mbarrier.arrive(own_empty.index(part), count=1)
        for _ in range(own_total, total):
            mbarrier.wait(full.index(stage), phase)
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit(
    do_not_specialize=[
        "item_batch", "part_batch", "kv_info_batch", "num_items", "batch_heads", "kv_heads",
        "group_packs", "kv_len",
    ]
)  # fmt: skip
def hopper_grad_key_kernel(
    query,
    key,
    value,
    grad_output,
    grad_key,
    grad_value,
    base_lse,
    delta,
    partial_key,
    partial_value,
    items,
    parts,
    kv_info,
    item_batch: "i32",
    part_batch: "i32",
    kv_info_batch: "i64",
    num_items: "i32",
    batch_heads: "i32",
    kv_heads: "i32",
    group_packs: "i32",
    kv_len: "i32",
    scaling: "fp32",
    to_log2: "fp32",
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    SECOND: gl.constexpr,
):
    """What `grad_key_kernel` computes, for items of two blocks of 64 keys (`hopper_work`).

    The first eight are descriptors: of HEADS heads x TOKENS tokens for queries, their gradients and
    their numbers, of 64 tokens for keys and values and theirs.
    """
    dtype: gl.constexpr = query.dtype
    q_shape: gl.constexpr = query.block_type.shape
    kv_shape: gl.constexpr = key.block_type.shape
    n_shape: gl.constexpr = base_lse.block_type.shape
    q_ring = gl.allocate_shared_memory(dtype, [STAGES] + q_shape, query.layout)
    go_ring = gl.allocate_shared_memory(dtype, [STAGES] + q_shape, grad_output.layout)
    base_ring = gl.allocate_shared_memory(gl.float32, [STAGES] + n_shape, base_lse.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES] + n_shape, delta.layout)
    k_tile = gl.allocate_shared_memory(dtype, [2] + kv_shape, key.layout)
    v_tile = gl.allocate_shared_memory(dtype, [2] + kv_shape, value.layout)
    facts = gl.allocate_shared_memory(gl.int32, [8, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    rings = (q_ring, go_ring, base_ring, delta_ring)
    own_tiles = (k_tile, v_tile)
    own_barriers = (new_barriers(2, 1), new_barriers(2, 1))
    barriers = (new_barriers(STAGES, 1), new_barriers(STAGES, 2))
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    0, grad_key, grad_value, partial_key, partial_value, own_tiles, own_barriers,
                    facts, rings, barriers, items, parts, kv_info, item_batch, part_batch,
                    kv_info_batch, num_items, batch_heads, kv_heads, group_packs, kv_len, scaling,
                    to_log2, HEADS, TOKENS, DIM, STAGES, SECOND,
                ),
            ),
            (
                _compute,
                (
                    1, grad_key, grad_value, partial_key, partial_value, own_tiles, own_barriers,
                    facts, rings, barriers, items, parts, kv_info, item_batch, part_batch,
                    kv_info_batch, num_items, batch_heads, kv_heads, group_packs, kv_len, scaling,
                    to_log2, HEADS, TOKENS, DIM, STAGES, SECOND,
                ),
            ),
            (
                _load,
                (
                    query, grad_output, base_lse, delta, rings, barriers, items, item_batch,
                    num_items, batch_heads, kv_heads, group_packs, HEADS, TOKENS, DIM, STAGES,
                ),
            ),
            (
                _load_own,
                (
                    key, value, own_tiles, own_barriers, items, item_batch, num_items,
                    batch_heads, kv_heads, DIM,
                ),
            ),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
