"""Linear attention's backward kernels: gradients of queries, keys and values.

With ``g = (output's gradient, -delta) / normaliser``, delta being output times its gradient, query
i and key j have the weight ``phi_i phi_j`` and that weight the gradient ``g_i (v_j, 1)``. So the
gradients are what the forward pass is: sums over the keys before, or the queries after, of which
those beyond the chunk are in a state. Each program owns what it writes.
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
    load_features,
    load_state,
    load_tile,
    store_tile,
    through_features,
)


@triton.jit(do_not_specialize=LENGTHS)
def output_deltas(
    output, grad, deltas,
    o_b, o_h, o_t, o_d, g_b, g_h, g_t, g_d,
    heads, q_len, count, value_dim, T: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Each query's output times its gradient. Grid: tiles of queries, batch x heads."""
    bh = (tl.program_id(0) // count).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = tl.program_id(0) % count * T + tl.arange(0, T)
    inside = rows < q_len
    product = load_tile(
        output + b * o_b + h * o_h, rows, inside, o_t, 0, o_d, value_dim, BV
    ).to(tl.float32)  # fmt: skip
    product *= load_tile(grad + b * g_b + h * g_h, rows, inside, g_t, 0, g_d, value_dim, BV)
    tl.store(deltas + bh * q_len + rows, tl.sum(product, 1), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def query_gradients(
    q, k, v, grad, q_scales, k_scales, normalisers, deltas, valid, q_docs, kv_docs,
    before, column_before, top_before, q_grad,
    v_b, v_h, v_t, v_d, g_b, g_h, g_t, g_d,
    dq_b, dq_h, dq_t, dq_f, valid_b, q_docs_b, kv_docs_b,
    kv_heads, q_len, kv_len, lead, first, chunks, count, width, value_dim,
    ELU: tl.constexpr, GROUPS: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_DOCS: tl.constexpr, MODE: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr,
    BF: tl.constexpr, NF: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries. Grid: tiles of features, tiles of queries, batch x heads."""
    pid = tl.program_id(0)
    f = pid % NF
    tile = pid // NF % (count * (CHUNK // T))
    bh = (pid // NF // (count * (CHUNK // T))).to(tl.int64)
    b, h = bh // (kv_heads * GROUPS), bh % (kv_heads * GROUPS)
    kv_head = h // GROUPS
    c = first + tile // (CHUNK // T)
    p0 = c * CHUNK + tile % (CHUNK // T) * T
    positions = p0 + tl.arange(0, T)
    rows = positions - lead
    inside = (rows >= 0) & (rows < q_len)
    state = tl.minimum(tl.maximum(c, 0), chunks)
    at = (b * kv_heads + kv_head) * (chunks + 1) + state
    k_base = (b * kv_heads + kv_head) * kv_len
    v += b * v_b + kv_head * v_h
    grad += b * g_b + h * g_h
    before += at * (NF * BF * NV * BV)
    normaliser = tl.load(normalisers + bh * q_len + rows, mask=inside, other=float("inf"))
    delta = tl.load(deltas + bh * q_len + rows, mask=inside, other=0.0)
    reads = inside
    if HAS_DOCS:
        kv_docs += b * kv_docs_b
        q_document = tl.load(q_docs + b * q_docs_b + rows, mask=inside, other=0)
        reads &= q_document == document_after(kv_docs, state - 1, kv_len, CHUNK)

    column = tl.load(column_before + at * (NF * BF) + f * BF + tl.arange(0, BF))
    acc = -delta[:, None] * column[None]
    g_tile = load_tile(grad, rows, inside, g_t, 0, g_d, value_dim, BV)
    for d in range(NV):
        if NV > 1:
            g_tile = load_tile(grad, rows, inside, g_t, d * BV, g_d, value_dim, BV)
        acc = dot(g_tile, tl.trans(load_state(before, f, d, BF, BV, NV)), acc, MODE)
    factor = tl.where(reads, tl.load(top_before + at), float("-inf")) - normaliser
    acc *= tl.exp(factor)[:, None]

    low = tl.maximum(c, 0) * CHUNK
    high = tl.where(c >= 0, tl.minimum(p0 + T, kv_len), low)
    for j in range(low, high, T):
        keys = j + tl.arange(0, T)
        present = keys < kv_len
        k_scale = tl.load(k_scales + k_base + keys, mask=present, other=0.0)
        pairs = tl.zeros([T, T], tl.float32)
        for d in range(NV):
            if NV > 1:
                g_tile = load_tile(grad, rows, inside, g_t, d * BV, g_d, value_dim, BV)
            values = load_tile(v, keys, present, v_t, d * BV, v_d, value_dim, BV)
            pairs = dot(g_tile, tl.trans(values), pairs, MODE)
        visible = present[None] & (keys[None] <= positions[:, None])
        if HAS_VALID:
            visible &= (tl.load(valid + b * valid_b + keys, mask=present, other=0) != 0)[None]
        if HAS_DOCS:
            k_document = tl.load(kv_docs + keys, mask=present, other=-1)
            visible &= q_document[:, None] == k_document[None]
        exponent = tl.where(visible, k_scale[None] - normaliser[:, None], float("-inf"))
        pairs = (pairs - delta[:, None]) * tl.exp(exponent)
        phi_k = load_features(k, k_base, keys, present, f, BF, NF)
        acc = dot(pairs, phi_k, acc, MODE)
    scale = tl.load(q_scales + bh * q_len + rows, mask=inside, other=0.0)
    phi_q = load_features(q, bh * q_len, rows, inside, f, BF, NF)
    acc = through_features(acc, phi_q, scale, ELU)
    q_grad += b * dq_b + h * dq_h
    store_tile(q_grad, acc, rows, inside, dq_t, f * BF, dq_f, width, BF)


@triton.jit(do_not_specialize=LENGTHS)
def key_gradients(
    q, k, v, grad, k_scales, normalisers, deltas, valid, q_docs, kv_docs,
    after, column_after, top_after, k_grad,
    v_b, v_h, v_t, v_d, g_b, g_h, g_t, g_d,
    dk_b, dk_h, dk_t, dk_f, valid_b, q_docs_b, kv_docs_b,
    kv_heads, q_len, kv_len, lead, first, chunks, count, width, value_dim,
    ELU: tl.constexpr, GROUPS: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_DOCS: tl.constexpr, MODE: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr,
    BF: tl.constexpr, NF: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
):  # fmt: skip
    """Gradient of the keys. Grid: tiles of features, tiles of keys, batch x KV heads."""
    pid = tl.program_id(0)
    f = pid % NF
    tile = pid // NF % (chunks * (CHUNK // T))
    bh = (pid // NF // (chunks * (CHUNK // T))).to(tl.int64)
    b, kv_head = bh // kv_heads, bh % kv_heads
    keys = tile * T + tl.arange(0, T)
    c = tile // (CHUNK // T)
    present = keys < kv_len
    at = bh * chunks + c
    v += b * v_b + kv_head * v_h
    after += at * (NF * BF * NV * BV)
    scale = tl.load(k_scales + bh * kv_len + keys, mask=present, other=0.0)
    taken = present
    if HAS_VALID:
        taken &= tl.load(valid + b * valid_b + keys, mask=present, other=0) != 0
    absorbed = taken
    if HAS_DOCS:
        kv_docs += b * kv_docs_b
        k_document = tl.load(kv_docs + keys, mask=present, other=-1)
        absorbed &= k_document == document_after(kv_docs, c, kv_len, CHUNK)

    column = tl.load(column_after + at * (NF * BF) + f * BF + tl.arange(0, BF))
    acc = tl.zeros([T, BF], tl.float32) + column[None]
    values = load_tile(v, keys, present, v_t, 0, v_d, value_dim, BV)
    for d in range(NV):
        if NV > 1:
            values = load_tile(v, keys, present, v_t, d * BV, v_d, value_dim, BV)
        acc = dot(values, tl.trans(load_state(after, f, d, BF, BV, NV)), acc, MODE)
    factor = tl.where(absorbed, scale + tl.load(top_after + at), float("-inf"))
    acc *= tl.exp(factor)[:, None]

    low = tl.maximum(tile * T, lead)
    high = tl.minimum((c + 1) * CHUNK, lead + q_len)
    for g in range(GROUPS):
        h = kv_head * GROUPS + g
        row_base = (b * kv_heads * GROUPS + h) * q_len
        for p in range(low, high, T):
            positions = p + tl.arange(0, T)
            rows = positions - lead
            inside = positions < high
            normaliser = tl.load(normalisers + row_base + rows, mask=inside, other=float("inf"))
            delta = tl.load(deltas + row_base + rows, mask=inside, other=0.0)
            pairs = tl.zeros([T, T], tl.float32)
            g_head = grad + b * g_b + h * g_h
            for d in range(NV):
                if NV > 1:
                    values = load_tile(v, keys, present, v_t, d * BV, v_d, value_dim, BV)
                g_tile = load_tile(g_head, rows, inside, g_t, d * BV, g_d, value_dim, BV)
                pairs = dot(values, tl.trans(g_tile), pairs, MODE)
            visible = taken[:, None] & inside[None] & (keys[:, None] <= positions[None])
            if HAS_DOCS:
                q_document = tl.load(q_docs + b * q_docs_b + rows, mask=inside, other=-2)
                visible &= k_document[:, None] == q_document[None]
            exponent = tl.where(visible, scale[:, None] - normaliser[None], float("-inf"))
            pairs = (pairs - delta[None]) * tl.exp(exponent)
            phi_q = load_features(q, row_base, rows, inside, f, BF, NF)
            acc = dot(pairs, phi_q, acc, MODE)
    phi_k = load_features(k, bh * kv_len, keys, present, f, BF, NF)
    acc = through_features(acc, phi_k, scale, ELU)
    k_grad += b * dk_b + kv_head * dk_h
    store_tile(k_grad, acc, keys, present, dk_t, f * BF, dk_f, width, BF)


@triton.jit(do_not_specialize=LENGTHS)
def value_gradients(
    q, k, grad, k_scales, normalisers, valid, q_docs, kv_docs,
    after, top_after, v_grad,
    g_b, g_h, g_t, g_d,
    dv_b, dv_h, dv_t, dv_d, valid_b, q_docs_b, kv_docs_b,
    kv_heads, q_len, kv_len, lead, first, chunks, count, value_dim,
    GROUPS: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_DOCS: tl.constexpr, MODE: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr,
    BF: tl.constexpr, NF: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
):  # fmt: skip
    """Gradient of the values. Grid: tiles of values, tiles of keys, batch x KV heads."""
    pid = tl.program_id(0)
    d = pid % NV
    tile = pid // NV % (chunks * (CHUNK // T))
    bh = (pid // NV // (chunks * (CHUNK // T))).to(tl.int64)
    b, kv_head = bh // kv_heads, bh % kv_heads
    keys = tile * T + tl.arange(0, T)
    c = tile // (CHUNK // T)
    present = keys < kv_len
    at = bh * chunks + c
    after += at * (NF * BF * NV * BV)
    scale = tl.load(k_scales + bh * kv_len + keys, mask=present, other=0.0)
    taken = present
    if HAS_VALID:
        taken &= tl.load(valid + b * valid_b + keys, mask=present, other=0) != 0
    absorbed = taken
    if HAS_DOCS:
        kv_docs += b * kv_docs_b
        k_document = tl.load(kv_docs + keys, mask=present, other=-1)
        absorbed &= k_document == document_after(kv_docs, c, kv_len, CHUNK)

    acc = tl.zeros([T, BV], tl.float32)
    phi_k = load_features(k, bh * kv_len, keys, present, 0, BF, NF)
    for f in range(NF):
        if NF > 1:
            phi_k = load_features(k, bh * kv_len, keys, present, f, BF, NF)
        acc = dot(phi_k, load_state(after, f, d, BF, BV, NV), acc, MODE)
    factor = tl.where(absorbed, scale + tl.load(top_after + at), float("-inf"))
    acc *= tl.exp(factor)[:, None]

    low = tl.maximum(tile * T, lead)
    high = tl.minimum((c + 1) * CHUNK, lead + q_len)
    for g in range(GROUPS):
        h = kv_head * GROUPS + g
        row_base = (b * kv_heads * GROUPS + h) * q_len
        for p in range(low, high, T):
            positions = p + tl.arange(0, T)
            rows = positions - lead
            inside = positions < high
            normaliser = tl.load(normalisers + row_base + rows, mask=inside, other=float("inf"))
            pairs = tl.zeros([T, T], tl.float32)
            for f in range(NF):
                if NF > 1:
                    phi_k = load_features(k, bh * kv_len, keys, present, f, BF, NF)
                phi_q = load_features(q, row_base, rows, inside, f, BF, NF)
                pairs = dot(phi_k, tl.trans(phi_q), pairs, MODE)
            visible = taken[:, None] & inside[None] & (keys[:, None] <= positions[None])
            if HAS_DOCS:
                q_document = tl.load(q_docs + b * q_docs_b + rows, mask=inside, other=-2)
                visible &= k_document[:, None] == q_document[None]
            exponent = tl.where(visible, scale[:, None] - normaliser[None], float("-inf"))
            g_head = grad + b * g_b + h * g_h
            g_tile = load_tile(g_head, rows, inside, g_t, d * BV, g_d, value_dim, BV)
            acc = dot(pairs * tl.exp(exponent), g_tile, acc, MODE)
    v_grad += b * dv_b + kv_head * dv_h
    store_tile(v_grad, acc, keys, present, dv_t, d * BV, dv_d, value_dim, BV)
