"""Linear attention's forward kernels: each chunk's state, their running sums, the output.

`chunk_states` adds up each chunk by itself, `scan_states` turns these into the state before every
chunk, and `read_states` gives each query its state and the keys of its own chunk. No program waits
for another, and nothing is added atomically. The first two also serve the backward pass, in which
queries take the place of keys and the scan goes backwards.
"""

# mypy: disallow-untyped-defs=False
# ruff: noqa: N803 - upper case marks what is known when a kernel is compiled

from __future__ import annotations

import triton
import triton.language as tl

from hf_attn_plugin.ops.triton.linear_tiles import (
    LENGTHS,
    document_after,
    dot,
    finite,
    load_features,
    load_state,
    load_tile,
    store_tile,
)


@triton.jit(do_not_specialize=LENGTHS)
def chunk_states(
    phi, v, weights, deltas, valid, q_docs, kv_docs,
    sums, column_sums, tops,
    v_b, v_h, v_t, v_d, valid_b, q_docs_b, kv_docs_b,
    kv_heads, q_len, kv_len, lead, first, chunks, count, value_dim,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_DOCS: tl.constexpr, MODE: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr,
    BF: tl.constexpr, NF: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
):  # fmt: skip
    """Each chunk's own sum of ``weight * phi (v, column)^T``, over the largest weight.

    Weights are logarithms: of keys their scales, and their column is 1. Of queries, which make the
    gradient of the states that they read, those of the normalisers to divide by, ``v`` is the
    output's gradient and the column -delta; the heads of a group are added up.
    Grid: tiles, chunks, batch x KV heads.
    """
    pid = tl.program_id(0)
    tile = pid % (NF * NV)
    c = pid // (NF * NV) % count
    bh = (pid // (NF * NV) // count).to(tl.int64)
    b, kv_head = bh // kv_heads, bh % kv_heads
    f, d = tile // NV, tile % NV
    length = q_len if QUERIES else kv_len
    if HAS_DOCS:
        kv_docs += b * kv_docs_b
        if QUERIES:
            before = tl.minimum(tl.maximum(first + c, 0), chunks) - 1
            document = document_after(kv_docs, before, kv_len, CHUNK)
            row_docs = q_docs + b * q_docs_b
        else:
            document = document_after(kv_docs, c, kv_len, CHUNK)
            row_docs = kv_docs

    acc = tl.zeros([BF, BV], tl.float32)
    column_acc = tl.zeros([BF], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    for g in range(GROUPS):
        h = kv_head * GROUPS + g
        row_base = (b * kv_heads * GROUPS + h) * length
        v_head = v + b * v_b + h * v_h
        for t in range(0, CHUNK, T):
            rows = (first + c) * CHUNK + t + tl.arange(0, T) - lead
            inside = (rows >= 0) & (rows < length)
            weight = tl.load(weights + row_base + rows, mask=inside, other=0.0)
            taken = inside
            if QUERIES:
                weight = -weight
                column = -tl.load(deltas + row_base + rows, mask=inside, other=0.0)
            else:
                column = tl.full([T], 1.0, tl.float32)
                if HAS_VALID:
                    taken &= tl.load(valid + b * valid_b + rows, mask=inside, other=0) != 0
            if HAS_DOCS:
                taken &= tl.load(row_docs + rows, mask=inside, other=0) == document
            weight = tl.where(taken, weight, float("-inf"))
            highest = tl.maximum(top, tl.max(weight, 0))
            fade = tl.exp(top - finite(highest))
            tile_phi = load_features(phi, row_base, rows, inside, f, BF, NF).to(tl.float32)
            tile_phi *= tl.exp(weight - finite(highest))[:, None]
            values = load_tile(v_head, rows, inside, v_t, d * BV, v_d, value_dim, BV)
            acc = dot(tl.trans(tile_phi), values, acc * fade, MODE)
            column_acc = column_acc * fade + tl.sum(tile_phi * column[:, None], 0)
            top = highest
    at = bh * count + c
    rows_f = f * BF + tl.arange(0, BF)
    columns_d = d * BV + tl.arange(0, BV)
    sums += at * (NF * BF * NV * BV)
    tl.store(sums + rows_f[:, None] * (NV * BV) + columns_d[None], acc)
    if d == 0:
        tl.store(column_sums + at * (NF * BF) + rows_f, column_acc)
    if tile == 0:
        tl.store(tops + at, top)


@triton.jit(do_not_specialize=LENGTHS)
def scan_states(
    sums, column_sums, tops, start_sums, start_top, kv_docs,
    before, column_before, top_before, end_sums, end_top,
    kv_docs_b, kv_heads, kv_len, first, chunks, count, start, steps, num_features, value_dim,
    STEP: tl.constexpr, HAS_DOCS: tl.constexpr, CHUNK: tl.constexpr,
    FEATURES: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state before every chunk (STEP 1), or what comes after it (STEP -1), and the end.

    ``sums`` are of the chunks from ``first`` on, ``count`` of them; the scan goes through ``steps``
    chunks from ``start`` on. Of these ``0 .. chunks - 1`` have keys, and states are written for
    them (STEP 1: for ``chunks`` too). Grid: blocks of the state, batch x KV heads.
    """
    size: tl.constexpr = FEATURES * VALUES
    bh = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_sum = e < size
    is_column = (e >= size) & (e < size + FEATURES)
    f = tl.where(is_sum, e // VALUES, e - size)
    d = tl.where(is_sum, e % VALUES, value_dim)
    real = (f < num_features) & ((is_sum & (d < value_dim)) | is_column)
    place = bh * num_features * (value_dim + 1) + f * (value_dim + 1) + d
    acc = tl.load(start_sums + place, mask=real, other=0.0)
    top = tl.load(start_top + bh)
    if HAS_DOCS:
        kv_docs += bh // kv_heads * kv_docs_b
    written = chunks + (1 if STEP > 0 else 0)
    for step in range(steps):
        c = start + step * STEP
        write = (c >= 0) & (c < written)
        at = bh * written + c
        value = acc.to(before.dtype.element_ty)
        tl.store(before + at * size + e, value, mask=is_sum & write)
        tl.store(column_before + at * FEATURES + f, acc, mask=is_column & write)
        tl.store(top_before + at, top, mask=write & (tl.program_id(0) == 0))
        if HAS_DOCS:
            here = tl.minimum(tl.maximum(c, 0), chunks - 1)
            ends = document_after(kv_docs, here, kv_len, CHUNK)
            starts = document_after(kv_docs, here - 1, kv_len, CHUNK)
            crossed = (c >= 0) & (c < chunks) & (ends != starts)
            top = tl.where(crossed, float("-inf"), top)
        i = c - first
        present = (i >= 0) & (i < count)
        at = bh * count + i
        own_top = tl.load(tops + at, mask=present, other=float("-inf"))
        own = tl.load(sums + at * size + e, mask=is_sum & present, other=0.0)
        own += tl.load(column_sums + at * FEATURES + f, mask=is_column & present, other=0.0)
        highest = tl.maximum(top, own_top)
        acc = acc * tl.exp(top - finite(highest)) + own * tl.exp(own_top - finite(highest))
        top = highest
    if STEP > 0:
        at = bh * written + chunks
        tl.store(before + at * size + e, acc.to(before.dtype.element_ty), mask=is_sum)
        tl.store(column_before + at * FEATURES + f, acc, mask=is_column)
        tl.store(top_before + at, top, mask=tl.program_id(0) == 0)
    tl.store(end_sums + place, acc, mask=real)
    tl.store(end_top + bh, top, mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=LENGTHS)
def read_states(
    q, k, v, k_scales, valid, q_docs, kv_docs, before, column_before, top_before,
    output, normalisers,
    v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d,
    valid_b, q_docs_b, kv_docs_b,
    kv_heads, q_len, kv_len, lead, first, chunks, count, value_dim,
    GROUPS: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_DOCS: tl.constexpr, MODE: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr,
    BF: tl.constexpr, NF: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
):  # fmt: skip
    """The output, and the logarithm of the sum that it was divided by.

    Grid: tiles of values, tiles of queries (``count`` chunks from ``first`` on), batch x heads.
    """
    pid = tl.program_id(0)
    d = pid % NV
    tile = pid // NV % (count * (CHUNK // T))
    bh = (pid // NV // (count * (CHUNK // T))).to(tl.int64)
    b, h = bh // (kv_heads * GROUPS), bh % (kv_heads * GROUPS)
    kv_head = h // GROUPS
    c = first + tile // (CHUNK // T)
    p0 = c * CHUNK + tile % (CHUNK // T) * T
    positions = p0 + tl.arange(0, T)
    rows = positions - lead
    inside = (rows >= 0) & (rows < q_len)
    state = tl.minimum(tl.maximum(c, 0), chunks)
    at = (b * kv_heads + kv_head) * (chunks + 1) + state
    q_base = bh * q_len
    k_base = (b * kv_heads + kv_head) * kv_len
    v += b * v_b + kv_head * v_h
    before += at * (NF * BF * NV * BV)

    reads = inside
    if HAS_DOCS:
        kv_docs += b * kv_docs_b
        q_document = tl.load(q_docs + b * q_docs_b + rows, mask=inside, other=0)
        reads &= q_document == document_after(kv_docs, state - 1, kv_len, CHUNK)
    # Every sum is relative to the largest scale that its query sees, as in an online softmax.
    top = tl.where(reads, tl.load(top_before + at), float("-inf"))
    acc = tl.zeros([T, BV], tl.float32)
    below = tl.zeros([T], tl.float32)
    phi_q = load_features(q, q_base, rows, inside, 0, BF, NF)
    for f in range(NF):
        if NF > 1:
            phi_q = load_features(q, q_base, rows, inside, f, BF, NF)
        acc = dot(phi_q, load_state(before, f, d, BF, BV, NV), acc, MODE)
        column = tl.load(column_before + at * (NF * BF) + f * BF + tl.arange(0, BF))
        below += tl.sum(phi_q.to(tl.float32) * column[None], 1)
    acc = tl.where((top > float("-inf"))[:, None], acc, 0.0)
    below = tl.where(top > float("-inf"), below, 0.0)

    low = tl.maximum(c, 0) * CHUNK
    high = tl.where(c >= 0, tl.minimum(p0 + T, kv_len), low)
    for j in range(low, high, T):
        keys = j + tl.arange(0, T)
        present = keys < kv_len
        k_scale = tl.load(k_scales + k_base + keys, mask=present, other=0.0)
        weights = tl.zeros([T, T], tl.float32)
        for f in range(NF):
            if NF > 1:
                phi_q = load_features(q, q_base, rows, inside, f, BF, NF)
            phi_k = load_features(k, k_base, keys, present, f, BF, NF)
            weights = dot(phi_q, tl.trans(phi_k), weights, MODE)
        if HAS_VALID:
            present &= tl.load(valid + b * valid_b + keys, mask=present, other=0) != 0
        visible = present[None] & (keys[None] <= positions[:, None])
        if HAS_DOCS:
            k_document = tl.load(kv_docs + keys, mask=keys < kv_len, other=-1)
            visible &= q_document[:, None] == k_document[None]
        seen = tl.where(visible, k_scale[None], float("-inf"))
        highest = tl.maximum(top, tl.max(seen, 1))
        fade = tl.exp(top - finite(highest))
        weights *= tl.exp(seen - finite(highest)[:, None])
        values = load_tile(v, keys, keys < kv_len, v_t, d * BV, v_d, value_dim, BV)
        acc = dot(weights, values, acc * fade[:, None], MODE)
        below = below * fade + tl.sum(weights, 1)
        top = highest
    empty = below == 0
    acc /= tl.where(empty, 1.0, below)[:, None]
    output += b * o_b + h * o_h
    store_tile(output, acc, rows, inside, o_t, d * BV, o_d, value_dim, BV)
    if d == 0:
        normaliser = finite(top) + tl.log(tl.where(empty, 1.0, below))
        normaliser = tl.where(empty, float("inf"), normaliser)
        tl.store(normalisers + bh * q_len + rows, normaliser, mask=inside)
