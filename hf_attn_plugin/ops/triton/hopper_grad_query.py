"""The kernel of the queries' gradients for Hopper: warp-specialised as `hopper_forward`."""

# mypy: ignore-errors
# ruff: noqa: F821, N803, RUF005 - upper case is known when a kernel is compiled; Gluon has no `*`

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_attn_plugin.ops.triton.hopper_forward import (
    load_keys_and_values,
    load_own_rows,
    own_tokens,
    store_own_rows,
)
from hf_attn_plugin.ops.triton.hopper_pieces import (
    LOG2E,
    ROWS,
    advance,
    hide,
    needs_mask,
    new_barriers,
    nth_of_program,
    run_facts,
    turns_of_program,
    visited,
    warps_barrier,
    work_item,
)


@gluon.jit
def _load(
    query,
    grad_output,
    output,
    key,
    value,
    tiles,
    rings,
    own_barriers,
    barriers,
    items,
    item_batch,
    num_items,
    batch_packs,
    packs,
    group_packs,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp."""
    q_tile, go_tile, o_tile = tiles
    q_full, q_empty, o_full, o_empty = own_barriers
    stage = 0
    phase = 1
    for turn in range(turns_of_program(num_items * batch_packs)):
        index = nth_of_program(turn)
        batch = index % batch_packs // packs
        pack = index % batch_packs % packs
        block, _slot, _lead, bounds, blocks, _full = work_item(
            items, batch, index // batch_packs, item_batch
        )
        begin, end = bounds
        mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
        mbarrier.expect(q_full.index(0), 4 * ROWS * DIM * 2)
        load_own_rows(query, q_tile, q_full.index(0), batch, pack, block, HEADS, TOKENS)
        load_own_rows(grad_output, go_tile, q_full.index(0), batch, pack, block, HEADS, TOKENS)
        mbarrier.wait(o_empty.index(0), (turn & 1) ^ 1)
        mbarrier.expect(o_full.index(0), 2 * ROWS * DIM * 2)
        load_own_rows(output, o_tile, o_full.index(0), batch, pack, block, HEADS, TOKENS)
        stage, phase = load_keys_and_values(
            key, value, rings, barriers, batch, pack // group_packs,
            begin, end, blocks, stage, phase, KEYS, DIM, STAGES,
        )  # fmt: skip


@gluon.jit
def _compute(
    part: gl.constexpr,
    grad_query,
    lse,
    grad_lse,
    base_lse,
    delta,
    partial,
    tiles,
    rings,
    own_barriers,
    barriers,
    items,
    q_info,
    item_batch,
    q_info_batch,
    num_items,
    batch_packs,
    packs,
    q_len,
    scaling,
    to_log2,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    SECOND: gl.constexpr,
):
    """One warpgroup: 64 rows of every tile."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    d_score_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    key_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    q_tile, go_tile, o_tile = tiles
    dtype: gl.constexpr = q_tile.dtype
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    q_full, q_empty, o_full, o_empty = own_barriers
    nothing = gl.zeros([ROWS, KEYS], gl.float32, score_layout)
    stage = 0
    phase = 0
    for item_turn in range(turns_of_program(num_items * batch_packs)):
        index = nth_of_program(item_turn)
        batch = index % batch_packs // packs
        pack = index % batch_packs % packs
        block, slot, lead, bounds, blocks, full = work_item(
            items, batch, index // batch_packs, item_batch
        )
        begin, end = bounds
        _row, head, token = own_tokens(part, pack, block, HEADS, TOKENS, row_layout)
        in_q = token < q_len
        own = run_facts(q_info + batch * q_info_batch, token, in_q, q_len, SECOND)
        place = (batch * packs * HEADS + head).to(gl.int64) * q_len + token
        row_lse = gl.load(lse + place, mask=in_q, other=float("-inf"))
        empty = row_lse == float("-inf")
        base = gl.where(empty, float("inf"), row_lse * LOG2E)
        mbarrier.wait(q_full.index(0), item_turn & 1)
        mbarrier.wait(o_full.index(0), item_turn & 1)
        out = o_tile.index(part).reshape([ROWS, DIM])
        d_out = go_tile.index(part).reshape([ROWS, DIM])
        product = out.load(out_layout).to(gl.float32) * d_out.load(out_layout).to(gl.float32)
        # d score = weight * (d weight - delta): the log-sum-exp's own gradient enters here too.
        row_delta = gl.convert_layout(gl.sum(product, 1), row_layout)
        if grad_lse is not None:
            row_delta -= gl.load(grad_lse + place, mask=in_q, other=0.0)
        row_delta = gl.where(empty, 0.0, row_delta)
        if lead:
            gl.store(delta + place, row_delta, mask=in_q)
            gl.store(base_lse + place, base, mask=in_q)
        q = q_tile.index(part).reshape([ROWS, DIM])
        acc = gl.zeros([ROWS, DIM], gl.float32, out_layout)
        for turn in range(begin, end):
            mbarrier.wait(k_full.index(stage), phase)
            k = k_ring.index(stage).reshape([KEYS, DIM])
            score = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), phase)
            v = v_ring.index(stage).reshape([KEYS, DIM])
            d_weight = warpgroup_mma(
                d_out, v.permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            score = warpgroup_mma_wait(1, deps=[score])
            score = score * to_log2 - base[:, None]
            if needs_mask(full, turn):
                keys = visited(blocks, turn) * KEYS + gl.arange(0, KEYS, layout=key_layout)
                score = hide(score, own, keys, SECOND)
            weight = gl.exp2(score)
            d_weight = warpgroup_mma_wait(0, deps=[d_weight])
            mbarrier.arrive(v_empty.index(stage), count=1)
            d_score = weight * (d_weight - row_delta[:, None])
            d_score = gl.convert_layout(d_score.to(dtype), d_score_layout)
            acc = warpgroup_mma(d_score, k, acc, is_async=True)
            acc, d_score = warpgroup_mma_wait(0, deps=[acc, d_score])
            mbarrier.arrive(k_empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
        mbarrier.arrive(q_empty.index(0), count=1)
        acc = acc * scaling
        if slot < 0:
            # The output's tile is read no more: it carries the gradients out.
            out.store(acc.to(dtype))
            fence_async_shared()
            warps_barrier()
            source = o_tile.index(part)
            store_own_rows(grad_query, source, part, batch, pack, block, HEADS, TOKENS)
            tma.store_wait(0)
        else:
            first = (slot.to(gl.int64) * batch_packs + batch * packs + pack) * (2 * ROWS)
            kept = first + part * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
            columns = gl.arange(0, DIM, layout=gl.SliceLayout(0, out_layout))
            gl.store(partial + kept[:, None] * DIM + columns[None, :], acc)
        mbarrier.arrive(o_empty.index(0), count=1)


@gluon.jit(
    do_not_specialize=[
        "item_batch", "q_info_batch", "num_items", "batch_packs", "packs", "group_packs", "q_len",
    ]
)  # fmt: skip
def hopper_grad_query_kernel(
    query,
    grad_output,
    output,
    key,
    value,
    grad_query,
    lse,
    grad_lse,
    base_lse,
    delta,
    partial,
    items,
    q_info,
    item_batch: "i32",
    q_info_batch: "i64",
    num_items: "i32",
    batch_packs: "i32",
    packs: "i32",
    group_packs: "i32",
    q_len: "i32",
    scaling: "fp32",
    to_log2: "fp32",
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    SECOND: gl.constexpr,
):
    """What `grad_query_kernel` computes, over items of 128 rows as in `hopper_forward_kernel`."""
    dtype: gl.constexpr = query.dtype
    q_shape: gl.constexpr = query.block_type.shape
    kv_shape: gl.constexpr = key.block_type.shape
    q_tile = gl.allocate_shared_memory(dtype, [2] + q_shape, query.layout)
    go_tile = gl.allocate_shared_memory(dtype, [2] + q_shape, grad_output.layout)
    o_tile = gl.allocate_shared_memory(dtype, [2] + q_shape, output.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES] + kv_shape, key.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + kv_shape, value.layout)
    tiles = (q_tile, go_tile, o_tile)
    rings = (k_ring, v_ring)
    q_full = new_barriers(1, 1)
    q_empty = new_barriers(1, 2)
    o_full = new_barriers(1, 1)
    o_empty = new_barriers(1, 2)
    own_barriers = (q_full, q_empty, o_full, o_empty)
    k_full = new_barriers(STAGES, 1)
    k_empty = new_barriers(STAGES, 2)
    v_full = new_barriers(STAGES, 1)
    v_empty = new_barriers(STAGES, 2)
    barriers = (k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    0, grad_query, lse, grad_lse, base_lse, delta, partial, tiles, rings,
                    own_barriers, barriers, items, q_info, item_batch, q_info_batch, num_items,
                    batch_packs, packs, q_len, scaling, to_log2,
                    HEADS, TOKENS, KEYS, DIM, STAGES, SECOND,
                ),
            ),
            (
                _compute,
                (
                    1, grad_query, lse, grad_lse, base_lse, delta, partial, tiles, rings,
                    own_barriers, barriers, items, q_info, item_batch, q_info_batch, num_items,
                    batch_packs, packs, q_len, scaling, to_log2,
                    HEADS, TOKENS, KEYS, DIM, STAGES, SECOND,
                ),
            ),
            (
                _load,
                (
                    query, grad_output, output, key, value, tiles, rings, own_barriers, barriers,
                    items, item_batch, num_items, batch_packs, packs, group_packs,
                    HEADS, TOKENS, KEYS, DIM, STAGES,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
