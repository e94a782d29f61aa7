"""The kernel of the keys' and values' gradients for Hopper: warp-specialised.

Scores and their gradients are computed transposed, keys by queries, so that they can stay in
registers as the left operands of the products that they enter.
"""

# mypy: ignore-errors
# ruff: noqa: F821, N803, N806, RUF005 - upper case is known for a kernel; Gluon has no `*`

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
    needs_mask,
    new_barriers,
    run_facts,
    visited,
    warps_barrier,
    work_item,
)


@gluon.jit
def _load(
    query,
    key,
    value,
    grad_output,
    base_lse,
    delta,
    own_tiles,
    rings,
    barriers,
    batch,
    kv_head,
    block,
    bounds,
    blocks,
    kv_heads,
    group_packs,
    q_len,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    PARTS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp: queries and their gradients by TMA, numbers per row by its lanes."""
    QUERIES: gl.constexpr = HEADS * TOKENS
    k_tile, v_tile = own_tiles
    q_ring, go_ring, row_ring = rings
    own_full, full, empty = barriers
    begin, end = bounds
    mbarrier.expect(own_full.index(0), 2 * PARTS * ROWS * DIM * 2)
    for part in gl.static_range(PARTS):
        own = [batch, kv_head, (block * PARTS + part) * ROWS, 0]
        tma.async_copy_global_to_shared(key, own, own_full.index(0), k_tile.index(part))
        tma.async_copy_global_to_shared(value, own, own_full.index(0), v_tile.index(part))
    row = gl.arange(0, QUERIES, layout=gl.BlockedLayout([1], [32], [1], [0]))
    stage = 0
    phase = 1
    for pack in range(kv_head * group_packs, (kv_head + 1) * group_packs):
        head = (batch * kv_heads * group_packs + pack) * HEADS + row // TOKENS
        for turn in range(begin, end):
            first = visited(blocks, turn) * TOKENS
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, 2 * QUERIES * DIM * 2)
            place = [batch, pack, 0, first, 0]
            tma.async_copy_global_to_shared(query, place, ready, q_ring.index(stage))
            tma.async_copy_global_to_shared(grad_output, place, ready, go_ring.index(stage))
            token = first + row % TOKENS
            index = head.to(gl.int64) * q_len + token
            in_q = token < q_len
            async_copy.async_copy_global_to_shared(
                row_ring.index(stage * 2), base_lse + index, mask=in_q
            )
            async_copy.async_copy_global_to_shared(
                row_ring.index(stage * 2 + 1), delta + index, mask=in_q
            )
            async_copy.mbarrier_arrive(ready, increment_count=False)
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _compute(
    part: gl.constexpr,
    grad_key,
    grad_value,
    partial_key,
    partial_value,
    own_tiles,
    rings,
    barriers,
    kv_info,
    batch,
    kv_head,
    block,
    slot,
    bounds,
    blocks,
    full_ranges,
    batch_heads,
    kv_heads,
    group_packs,
    kv_len,
    scaling,
    to_log2,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    PARTS: gl.constexpr,
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
    q_ring, go_ring, row_ring = rings
    own_full, full, empty = barriers
    begin, end = bounds
    dtype: gl.constexpr = k_tile.dtype
    index = (block * PARTS + part) * ROWS + gl.arange(0, ROWS, layout=key_layout)
    in_kv = index < kv_len
    acc_key = gl.zeros([ROWS, DIM], gl.float32, acc_layout)
    acc_value = gl.zeros([ROWS, DIM], gl.float32, acc_layout)
    nothing = gl.zeros([ROWS, QUERIES], gl.float32, score_layout)
    k = k_tile.index(part).reshape([ROWS, DIM])
    v = v_tile.index(part).reshape([ROWS, DIM])
    mbarrier.wait(own_full.index(0), 0)
    stage = 0
    phase = 0
    turn = begin
    # One loop over all heads of the group and blocks of queries.
    for _ in range((end - begin) * group_packs):
        mbarrier.wait(full.index(stage), phase)
        q = q_ring.index(stage).reshape([QUERIES, DIM])
        go = go_ring.index(stage).reshape([QUERIES, DIM])
        score = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        d_weight = warpgroup_mma(v, go.permute((1, 0)), nothing, use_acc=False, is_async=True)
        base = row_ring.index(stage * 2).load(query_layout)
        score = warpgroup_mma_wait(1, deps=[score])
        score = score * to_log2 - base[None, :]
        if needs_mask(full_ranges, turn):
            # Loaded here, where few visits come by: no registers are left to hold them.
            own = run_facts(kv_info, index, in_kv, kv_len, SECOND)
            token = gl.arange(0, QUERIES, layout=query_layout) % TOKENS
            score = hide(score, own, visited(blocks, turn) * TOKENS + token, SECOND)
        weight = gl.exp2(score)
        weights = gl.convert_layout(weight.to(dtype), weight_layout)
        acc_value = warpgroup_mma(weights, go, acc_value, is_async=True)
        d_weight = warpgroup_mma_wait(1, deps=[d_weight])
        row_delta = row_ring.index(stage * 2 + 1).load(query_layout)
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
        place = [batch, kv_head, (block * PARTS + part) * ROWS, 0]
        tma.async_copy_shared_to_global(grad_key, place, k_tile.index(part))
        tma.async_copy_shared_to_global(grad_value, place, v_tile.index(part))
        tma.store_wait(0)
    else:
        row = part * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc_layout))
        columns = gl.arange(0, DIM, layout=gl.SliceLayout(0, acc_layout))
        batch_head = batch * kv_heads + kv_head
        kept = (slot.to(gl.int64) * batch_heads + batch_head) * (PARTS * ROWS) + row
        gl.store(partial_key + kept[:, None] * DIM + columns[None, :], acc_key)
        gl.store(partial_value + kept[:, None] * DIM + columns[None, :], acc_value)


@gluon.jit(
    do_not_specialize=[
        "item_batch", "kv_info_batch", "batch_heads", "kv_heads", "group_packs", "q_len", "kv_len",
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
    kv_info,
    item_batch: "i32",
    kv_info_batch: "i64",
    batch_heads: "i32",
    kv_heads: "i32",
    group_packs: "i32",
    q_len: "i32",
    kv_len: "i32",
    scaling: "fp32",
    to_log2: "fp32",
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    PARTS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    SECOND: gl.constexpr,
):
    """What `grad_key_kernel` computes, for PARTS times 64 keys: as many warpgroups.

    The first six are descriptors: of HEADS heads x TOKENS tokens for queries and their gradients,
    of 64 tokens for keys and values and theirs.
    """
    dtype: gl.constexpr = query.dtype
    QUERIES: gl.constexpr = HEADS * TOKENS
    q_shape: gl.constexpr = query.block_type.shape
    kv_shape: gl.constexpr = key.block_type.shape
    batch_head = gl.program_id(0) % batch_heads
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    block, slot, _lead, bounds, blocks, full_ranges = work_item(
        items, batch, gl.program_id(0) // batch_heads, item_batch
    )
    kv_info += batch * kv_info_batch
    q_ring = gl.allocate_shared_memory(dtype, [STAGES] + q_shape, query.layout)
    go_ring = gl.allocate_shared_memory(dtype, [STAGES] + q_shape, grad_output.layout)
    row_ring = gl.allocate_shared_memory(
        gl.float32, [2 * STAGES, QUERIES], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    k_tile = gl.allocate_shared_memory(dtype, [PARTS] + kv_shape, key.layout)
    v_tile = gl.allocate_shared_memory(dtype, [PARTS] + kv_shape, value.layout)
    own_tiles = (k_tile, v_tile)
    rings = (q_ring, go_ring, row_ring)
    own_full = new_barriers(1, 1)
    # The lanes of the loading warp arrive too, when their numbers have come.
    full = new_barriers(STAGES, 1 + 32)
    empty = new_barriers(STAGES, PARTS)
    barriers = (own_full, full, empty)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (
                    _compute,
                    (
                        0, grad_key, grad_value, partial_key, partial_value, own_tiles, rings,
                        barriers, kv_info, batch, kv_head, block, slot, bounds, blocks,
                        full_ranges, batch_heads, kv_heads, group_packs, kv_len, scaling, to_log2,
                        HEADS, TOKENS, PARTS, DIM, STAGES, SECOND,
                    ),
                ),
                (
                    _compute,
                    (
                        1, grad_key, grad_value, partial_key, partial_value, own_tiles, rings,
                        barriers, kv_info, batch, kv_head, block, slot, bounds, blocks,
                        full_ranges, batch_heads, kv_heads, group_packs, kv_len, scaling, to_log2,
                        HEADS, TOKENS, PARTS, DIM, STAGES, SECOND,
                    ),
                ),
                (
                    _load,
                    (
                        query, key, value, grad_output, base_lse, delta, own_tiles, rings,
                        barriers, batch, kv_head, block, bounds, blocks, kv_heads, group_packs,
                        q_len, HEADS, TOKENS, PARTS, DIM, STAGES,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _compute,
                    (
                        0, grad_key, grad_value, partial_key, partial_value, own_tiles, rings,
                        barriers, kv_info, batch, kv_head, block, slot, bounds, blocks,
                        full_ranges, batch_heads, kv_heads, group_packs, kv_len, scaling, to_log2,
                        HEADS, TOKENS, PARTS, DIM, STAGES, SECOND,
                    ),
                ),
                (
                    _load,
                    (
                        query, key, value, grad_output, base_lse, delta, own_tiles, rings,
                        barriers, batch, kv_head, block, bounds, blocks, kv_heads, group_packs,
                        q_len, HEADS, TOKENS, PARTS, DIM, STAGES,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
