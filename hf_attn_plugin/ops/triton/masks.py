"""Which pairs of a tile attend: the one place where a kernel evaluates a pattern.

A tile's first axis holds the program's own tokens, its second those that it goes over. Most
patterns let a token see one or two runs of neighbouring others (`patterns.intervals`), and need two
comparisons per run. The rest is evaluated as `Pattern.visible` does, with numbers that switch off
the terms that a pattern does not have: one compiled kernel serves all of them.
"""

# mypy: ignore-errors
# ruff: noqa: N803, SIM108 - Triton's types, constants of the compiler in upper case

import triton
import triton.language as tl

# What a kernel evaluates: bits of its TERMS.
RUNS = tl.constexpr(1 << 0)  # one run, and nothing but runs
SECOND_RUN = tl.constexpr(1 << 1)  # two
MODULO = tl.constexpr(1 << 2)  # a dilation or a stride
FAR = tl.constexpr(1 << 3)  # the pairs at a multiple of the stride that no other term keeps
DENSE = tl.constexpr(1 << 4)  # the caller's own mask

# Bits of a token's marks.
VALID = tl.constexpr(1)
KEPT = tl.constexpr(2)


@triton.jit
def token_facts(info, index, inside, length, TERMS: tl.constexpr):
    """What a mask reads of tokens, from int32 ``info`` [4, length] of one batch row.

    Returns:
        Start, length, start and length of the runs; or position, document, marks, nothing.
    """
    a = tl.load(info + index, mask=inside, other=0)
    b = tl.load(info + length + index, mask=inside, other=0)
    c, d = a, b
    if ((RUNS & TERMS) == 0) | ((SECOND_RUN & TERMS) != 0):
        c = tl.load(info + 2 * length + index, mask=inside, other=0)
    if SECOND_RUN & TERMS:
        d = tl.load(info + 3 * length + index, mask=inside, other=0)
    return a, b, c, d


@triton.jit
def in_run(index, start, length):
    """Whether ``start <= index < start + length``: a negative distance is a huge unsigned one."""
    distance = (index - start).to(tl.uint32, bitcast=True)
    return distance < length.to(tl.uint32, bitcast=True)


@triton.jit
def in_terms(
    distance,
    same_document,
    q_marks,
    kv_marks,
    lowest,
    band,
    reach,
    dilation,
    stride,
    residue,
    TERMS: tl.constexpr,
):
    """`Pattern.visible` for pairs.

    Args:
        distance: Position of the query minus that of the key.
        same_document: Whether both are in one document.
        q_marks: KEPT where a query sees every key.
        kv_marks: VALID where a key is not padding, KEPT where every query sees it.
        lowest: Smallest distance: 0 if causal.
        band: Distances stay below it.
        reach: Distances in the window stay below it; huge without a method.
        dilation: Distances in the window are multiples of it.
        stride: Distances at a multiple of it are kept, if
        residue: is 0, and none if it is -1.
        TERMS: Bits.
    """
    apart = tl.abs(distance)
    kept = ((q_marks | kv_marks) & KEPT) != 0
    if MODULO & TERMS:
        kept = kept | ((apart < reach) & (apart % dilation == 0))
        multiple = apart % stride == residue
        if FAR & TERMS:
            kept = multiple & (kept == 0)
        else:
            kept = kept | multiple
    else:
        kept = kept | (apart < reach)
    seen = (distance >= lowest) & (apart < band) & same_document
    return seen & kept & ((kv_marks & VALID) != 0)


@triton.jit
def hide(
    score,
    own,
    own_inside,
    own_dense,
    other_info,
    other_index,
    other_inside,
    other_length,
    other_dense,
    dense,
    numbers,
    OWN_QUERIES: tl.constexpr,
    TERMS: tl.constexpr,
):
    """``score`` [own, others] with -inf where a pair does not attend.

    Args:
        score: Scores of a tile.
        own: What `token_facts` says of the own tokens.
        own_inside: Which own tokens there are.
        own_dense: Offsets of the own tokens into the caller's own mask.
        other_info: `token_facts`' source for the others.
        other_index: Indices of the others.
        other_inside: Which others there are.
        other_length: How many there are in all.
        other_dense: Their offsets into the caller's own mask.
        dense: The caller's own mask, or None.
        numbers: lowest, band, reach, dilation, stride, residue; see `in_terms`.
        OWN_QUERIES: Whether the own tokens are queries, the others keys.
        TERMS: Bits.
    """
    a, b, c, d = own
    if RUNS & TERMS:
        seen = in_run(other_index[None, :], a[:, None], b[:, None])
        if SECOND_RUN & TERMS:
            seen = seen | in_run(other_index[None, :], c[:, None], d[:, None])
    else:
        lowest, band, reach, dilation, stride, residue = numbers
        e, f, g, _h = token_facts(other_info, other_index, other_inside, other_length, TERMS)
        distance = a[:, None] - e[None, :]
        own_marks, other_marks = c[:, None], g[None, :]
        if OWN_QUERIES:
            q_marks, kv_marks = own_marks, other_marks
        else:
            distance = -distance
            q_marks, kv_marks = other_marks, own_marks
        seen = in_terms(
            distance, b[:, None] == f[None, :], q_marks, kv_marks,
            lowest, band, reach, dilation, stride, residue, TERMS,
        )  # fmt: skip
        seen = seen & other_inside[None, :]
        if DENSE & TERMS:
            inside = own_inside[:, None] & other_inside[None, :]
            place = own_dense[:, None] + other_dense[None, :]
            seen = seen & (tl.load(dense + place, mask=inside, other=0) != 0)
    return tl.where(seen, score, float("-inf"))
