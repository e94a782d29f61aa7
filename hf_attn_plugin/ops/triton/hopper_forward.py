"""The forward kernel for Hopper: warp-specialised, with asynchronous matrix products.

Two warpgroups of 64 rows each share the tiles of keys and values. Each computes the next block's
scores while its softmax of this block runs, as FlashAttention-3 does (arXiv 2407.08608). The grid
is persistent: the loads of a program's next item start while it finishes this one.
"""

# mypy: ignore-errors
# ruff: noqa: F821, N803, RUF005, SIM102 - upper case is known when a kernel is compiled; Gluon has no `*`

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
def load_own_rows(
    source,
    target,
    barrier,
    batch,
    pack,
    block,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """Start loading the two warpgroups' rows of a tile of HEADS heads x TOKENS tokens."""
    for part in gl.static_range(2):
        if HEADS == 1:
            place = [batch, pack, 0, block * TOKENS + part * ROWS, 0]
        else:
            place = [batch, pack * 2 + part, 0, block * TOKENS, 0]
        tma.async_copy_global_to_shared(source, place, barrier, target.index(part))


@gluon.jit
def store_own_rows(
    target,
    source,
    part: gl.constexpr,
    batch,
    pack,
    block,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """Start storing one warpgroup's rows of a tile."""
    if HEADS == 1:
        place = [batch, pack, 0, block * TOKENS + part * ROWS, 0]
    else:
        place = [batch, pack * 2 + part, 0, block * TOKENS, 0]
    tma.async_copy_shared_to_global(target, place, source)


@gluon.jit
def own_tokens(
    part: gl.constexpr,
    pack,
    block,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    layout: gl.constexpr,
):
    """Rows of the tile, their heads and tokens, for one warpgroup."""
    row = part * ROWS + gl.arange(0, ROWS, layout=layout)
    return row, pack * HEADS + row // TOKENS, block * TOKENS + row % TOKENS


@gluon.jit
def load_keys_and_values(
    key,
    value,
    rings,
    barriers,
    batch,
    kv_head,
    begin,
    end,
    blocks,
    stage,
    phase,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Keep the rings of keys and values filled; returns where they stand."""
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    for turn in range(begin, end):
        first = visited(blocks, turn) * KEYS
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), KEYS * DIM * 2)
        tma.async_copy_global_to_shared(
            key, [batch, kv_head, first, 0], k_full.index(stage), k_ring.index(stage)
        )
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), KEYS * DIM * 2)
        tma.async_copy_global_to_shared(
            value, [batch, kv_head, first, 0], v_full.index(stage), v_ring.index(stage)
        )
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _load(
    query,
    key,
    value,
    q_tile,
    rings,
    q_barriers,
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
    q_full, q_empty = q_barriers
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
        mbarrier.expect(q_full.index(0), 2 * ROWS * DIM * 2)
        load_own_rows(query, q_tile, q_full.index(0), batch, pack, block, HEADS, TOKENS)
        stage, phase = load_keys_and_values(
            key, value, rings, barriers, batch, pack // group_packs,
            begin, gl.maximum(end, begin + 1), blocks, stage, phase, KEYS, DIM, STAGES,
        )  # fmt: skip


@gluon.jit
def _softmax(score, top, total, to_log2):
    """Weights, and the running maximum (in units of log 2) and sum after them; the old's factor."""
    new_top = gl.maximum(top, gl.max(score, 1) * to_log2)
    # Rows that have seen nothing yet are at -inf; 0 keeps -inf - -inf out.
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    weight = gl.exp2(score * to_log2 - base[:, None])
    shrink = gl.exp2(top - base)
    return weight, new_top, total * shrink + gl.sum(weight, 1), shrink


@gluon.jit
def _compute(
    part: gl.constexpr,
    output,
    lse,
    sinks,
    partial_output,
    partial_state,
    q_tile,
    o_tile,
    rings,
    q_barriers,
    barriers,
    items,
    q_info,
    item_batch,
    q_info_batch,
    num_items,
    batch_packs,
    packs,
    q_len,
    to_log2,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    SECOND: gl.constexpr,
    SINKS: gl.constexpr,
):
    """One warpgroup: 64 rows of every tile."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    key_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    dtype: gl.constexpr = q_tile.dtype
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    q_full, q_empty = q_barriers
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
        row, head, token = own_tokens(part, pack, block, HEADS, TOKENS, row_layout)
        in_q = token < q_len
        own = run_facts(q_info + batch * q_info_batch, token, in_q, q_len, SECOND)
        top = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        total = gl.zeros([ROWS], gl.float32, row_layout)
        if SINKS:
            if lead:
                top = gl.load(sinks + head).to(gl.float32) * LOG2E
                total = gl.where(top == float("-inf"), 0.0, 1.0)
        acc = gl.zeros([ROWS, DIM], gl.float32, out_layout)
        mbarrier.wait(q_full.index(0), item_turn & 1)
        q = q_tile.index(part).reshape([ROWS, DIM]).load(q_layout)
        # An item without visits computes one block, of which its rows see nothing.
        mbarrier.wait(k_full.index(stage), phase)
        k = k_ring.index(stage).reshape([KEYS, DIM]).permute((1, 0))
        score = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])
        # Only now all warps are known to have the queries in registers: a barrier does not wait
        # for loads that are on their way, and TMA writes rows beyond the end at once.
        mbarrier.arrive(q_empty.index(0), count=1)
        mbarrier.arrive(k_empty.index(stage), count=1)
        if needs_mask(full, begin):
            keys = visited(blocks, begin) * KEYS + gl.arange(0, KEYS, layout=key_layout)
            score = hide(score, own, keys, SECOND)
        weight, top, total, shrink = _softmax(score, top, total, to_log2)
        weights = gl.convert_layout(weight.to(dtype), weight_layout)
        for turn in range(begin + 1, end):
            v_stage = stage
            v_phase = phase
            stage, phase = advance(stage, phase, STAGES)
            mbarrier.wait(k_full.index(stage), phase)
            k = k_ring.index(stage).reshape([KEYS, DIM]).permute((1, 0))
            score = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            v = v_ring.index(v_stage).reshape([KEYS, DIM])
            acc = warpgroup_mma(weights, v, acc, is_async=True)
            score = warpgroup_mma_wait(1, deps=[score])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if needs_mask(full, turn):
                keys = visited(blocks, turn) * KEYS + gl.arange(0, KEYS, layout=key_layout)
                score = hide(score, own, keys, SECOND)
            weight, top, total, shrink = _softmax(score, top, total, to_log2)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            acc = acc * gl.convert_layout(shrink, out_row_layout)[:, None]
            weights = gl.convert_layout(weight.to(dtype), weight_layout)
        mbarrier.wait(v_full.index(stage), phase)
        v = v_ring.index(stage).reshape([KEYS, DIM])
        acc = warpgroup_mma(weights, v, acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
        if slot < 0:
            empty = total == 0.0
            safe = gl.where(empty, 1.0, total)
            place = (batch * packs * HEADS + head).to(gl.int64) * q_len + token
            result = gl.where(empty, float("-inf"), (top + gl.log2(safe)) / LOG2E)
            gl.store(lse + place, result, mask=in_q)
            out = acc * gl.convert_layout(1.0 / safe, out_row_layout)[:, None]
            # The store of the item before may still read the tile.
            tma.store_wait(0)
            warps_barrier()
            o_tile.index(part).reshape([ROWS, DIM]).store(out.to(dtype))
            fence_async_shared()
            warps_barrier()
            store_own_rows(output, o_tile.index(part), part, batch, pack, block, HEADS, TOKENS)
        else:
            first = (slot.to(gl.int64) * batch_packs + batch * packs + pack) * (2 * ROWS)
            gl.store(partial_state + 2 * (first + row), top)
            gl.store(partial_state + 2 * (first + row) + 1, total)
            kept = first + part * ROWS + gl.arange(0, ROWS, layout=out_row_layout)
            columns = gl.arange(0, DIM, layout=gl.SliceLayout(0, out_layout))
            gl.store(partial_output + kept[:, None] * DIM + columns[None, :], acc)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "item_batch", "q_info_batch", "num_items", "batch_packs", "packs", "group_packs", "q_len",
    ]
)  # fmt: skip
def hopper_forward_kernel(
    query,
    key,
    value,
    output,
    lse,
    sinks,
    partial_output,
    partial_state,
    items,
    q_info,
    item_batch: "i32",
    q_info_batch: "i64",
    num_items: "i32",
    batch_packs: "i32",
    packs: "i32",
    group_packs: "i32",
    q_len: "i32",
    to_log2: "fp32",
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    SECOND: gl.constexpr,
    SINKS: gl.constexpr,
):
    """Items of 128 rows (HEADS heads of one KV group x TOKENS tokens), as `forward_kernel`.

    ``query``, ``key``, ``value`` and ``output`` are descriptors: of 64 rows (heads x tokens) for
    queries and output, of KEYS tokens for keys and values.
    """
    dtype: gl.constexpr = query.dtype
    q_shape: gl.constexpr = query.block_type.shape
    kv_shape: gl.constexpr = key.block_type.shape
    q_tile = gl.allocate_shared_memory(dtype, [2] + q_shape, query.layout)
    o_tile = gl.allocate_shared_memory(dtype, [2] + q_shape, output.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES] + kv_shape, key.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + kv_shape, value.layout)
    rings = (k_ring, v_ring)
    q_barriers = (new_barriers(1, 1), new_barriers(1, 2))
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
                    0, output, lse, sinks, partial_output, partial_state, q_tile, o_tile, rings,
                    q_barriers, barriers, items, q_info, item_batch, q_info_batch, num_items,
                    batch_packs, packs, q_len, to_log2,
                    HEADS, TOKENS, KEYS, DIM, STAGES, SECOND, SINKS,
                ),
            ),
            (
                _compute,
                (
                    1, output, lse, sinks, partial_output, partial_state, q_tile, o_tile, rings,
                    q_barriers, barriers, items, q_info, item_batch, q_info_batch, num_items,
                    batch_packs, packs, q_len, to_log2,
                    HEADS, TOKENS, KEYS, DIM, STAGES, SECOND, SINKS,
                ),
            ),
            (
                _load,
                (
                    query, key, value, q_tile, rings, q_barriers, barriers, items, item_batch,
                    num_items, batch_packs, packs, group_packs,
                    HEADS, TOKENS, KEYS, DIM, STAGES,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
