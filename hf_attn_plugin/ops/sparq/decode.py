"""One decoding step that reads only part of the KV cache (SparQ Attention, arXiv 2312.04985)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_attn_plugin.ops.choice import choose_components, choose_keys
from hf_attn_plugin.ops.reads import CacheReads, nbytes
from hf_attn_plugin.ops.scores import cap, dot, hide, softmax, weigh
from hf_attn_plugin.ops.sparq.key_copy import Components
from hf_attn_plugin.ops.sparq.sums import BlockSums, reallocate


def sparq_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    rank: int,
    top_k: int,
    local_window: int,
    mean_value_reallocation: bool,
    coverage: float | None = None,
    rank_coverage: float | None = None,
    mean_block: int | None = None,
    scaling: float | None = None,
    components: Components | None = None,
    sums: BlockSums | None = None,
    visible: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, CacheReads]:
    """Attend with one query per sequence to the ``top_k`` keys that seem to matter most.

    Per key/value head, following algorithm 1 of the paper:

    1. The ``rank`` components where |q| is largest. Query heads that share a key/value head
       share the choice, made on the sum of their |q|.
    2. Approximate scores from these components alone. They are divided by
       τ = √(d · ‖q_i1‖₁ / ‖q‖₁) in place of √d, one τ per query head; with a ``scaling`` other
       than 1/√d they are multiplied by ``scaling`` · √(‖q‖₁ / ‖q_i1‖₁), which is the same thing.
    3. The ``top_k`` keys with the largest approximate softmax, summed over the query heads that
       share them. The last ``local_window`` visible keys are always among the k.
    4. Exact attention y over these keys, and, with ``mean_value_reallocation``,
       α·y + (1 − α)·v̄, where α is the approximate softmax mass of the keys chosen, per query head,
       and v̄ the mean of the visible values.

    ``coverage`` and ``rank_coverage`` make k and r a matter of each sequence and key/value head;
    ``mean_block`` gives v̄ one value per block of positions: see `SparQConfig`.

    With ``top_k >= S`` and no ``coverage`` there is nothing to leave out: steps 1 to 3 are skipped,
    and the result is dense attention. With ``rank >= D`` and no ``rank_coverage`` the scores of
    step 2 are exact.

    Args:
        query: [B, H, 1, D]; query head h reads key/value head h // (H / Hkv).
        keys: [B, Hkv, S, D].
        values: [B, Hkv, S, Dv].
        rank: Query components r, at least 1; the most of them, with ``rank_coverage``.
        top_k: Keys k attended to, at least 1; the most of them, with ``coverage``.
        local_window: Most recent visible keys that are always chosen, 0 to ``top_k``.
        mean_value_reallocation: Give the mass of the keys left out to the mean value.
        coverage: Share of the approximate softmax mass (summed over the query heads that share the
            keys) that the keys chosen must have, above 0 and at most 1.
        rank_coverage: Share of ‖q‖₁ (likewise summed) that the components must have.
        mean_block: Positions that share a mean value.
        scaling: Factor of the scores; None is 1/√D.
        components: The same keys, to be read by component. None reads, and counts, all of ``keys``.
        sums: Sums of the visible values, in blocks of ``mean_block``. None computes them from
            ``values`` where they are needed, and counts that.
        visible: bool [B, S] or [1, S], the keys that the query may see; None is all of them.
        softcap: Scores become softcap · tanh(scores / softcap), approximate and exact ones alike.
        sinks: [H], a score per query head that takes part in the denominator of both softmaxes
            and has no value. A head whose sink takes most of its mass thus weighs little in the
            choice of step 3.

    Returns:
        The output [B, H, 1, Dv] in the query's dtype, and the bytes read. Scores and sums are
        float32 (float64 for float64 queries). A query that sees nothing gets 0. In a graph traced
        by ``torch.compile``, all ``rank`` components and ``top_k`` keys are read (and counted),
        and only then left out.

    Raises:
        ValueError: Shapes that do not fit, a parameter out of range, or ``sinks`` together with
            ``mean_value_reallocation``: 1 − α would hand the sink's mass to the mean value.
    """
    _check(query, keys, values, rank, top_k, local_window)
    refuse_sinks(sinks, mean_value_reallocation)
    batch, heads, _, head_dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    accumulate = torch.promote_types(query.dtype, torch.float32)
    scaling = 1 / math.sqrt(head_dim) if scaling is None else scaling
    dense = nbytes(keys, values)

    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim).to(accumulate)
    if sinks is not None:
        sinks = sinks.to(accumulate).reshape(1, kv_heads, -1, 1)

    if top_k >= length and coverage is None:
        scores = hide(cap(dot(grouped * scaling, keys), softcap), visible)
        output = weigh(softmax(scores, sinks), values)
        return _ungroup(output, query), CacheReads(nbytes(keys), nbytes(values), 0, 0, dense)

    approximate, component_bytes = _approximate_scores(
        grouped, keys, components, rank, rank_coverage, scaling
    )
    approximate = softmax(hide(cap(approximate, softcap), visible), sinks)
    chosen = choose_keys(
        approximate.sum(dim=2), min(top_k, length), local_window, visible, coverage
    )
    chosen_keys, key_bytes = chosen.take(keys)
    chosen_values, value_bytes = chosen.take(values)
    attended = chosen.seen(visible) if chosen.keep is None else chosen.keep
    scores = cap(dot(grouped * scaling, chosen_keys), softcap)
    if attended is not None:
        scores = scores.masked_fill(~attended[:, :, None], -math.inf)
    output = weigh(softmax(scores, sinks), chosen_values)

    mean_bytes = 0
    if mean_value_reallocation:
        if sums is None:
            mean_bytes, sums = nbytes(values), BlockSums.of(values, visible, mean_block)
        else:
            mean_bytes = sums.nbytes
        output = reallocate(output, approximate, chosen, attended, chosen_values, sums)

    return _ungroup(output, query), CacheReads(
        keys=key_bytes,
        values=value_bytes,
        components=component_bytes,
        mean=mean_bytes,
        dense=dense,
    )


def refuse_sinks(sinks: Tensor | None, mean_value_reallocation: bool) -> None:
    """Raise ``ValueError`` for attention sinks together with a mean value."""
    if sinks is not None and mean_value_reallocation:
        raise ValueError(
            "sparq: mean_value_reallocation is not defined with attention sinks, whose mass would "
            "go to the mean value; set mean_value_reallocation=False."
        )


def _check(
    query: Tensor, keys: Tensor, values: Tensor, rank: int, top_k: int, local_window: int
) -> None:
    batch, heads, queries, head_dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    if queries != 1:
        raise ValueError(
            f"sparq_decode takes one query per sequence, got {queries}; "
            "use dense attention for more."
        )
    if keys.shape != (batch, kv_heads, length, head_dim) or heads % kv_heads:
        raise ValueError(
            f"sparq_decode: keys {tuple(keys.shape)} do not fit the query {tuple(query.shape)}."
        )
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"sparq_decode: values {tuple(values.shape)} do not fit keys {tuple(keys.shape)}."
        )
    if rank < 1:
        raise ValueError(f"sparq_decode: rank must be at least 1, got {rank}.")
    if top_k < 1:
        raise ValueError(f"sparq_decode: top_k must be at least 1, got {top_k}.")
    if not 0 <= local_window <= top_k:
        raise ValueError(
            f"sparq_decode: local_window must be 0 to top_k ({top_k}), got {local_window}."
        )


def _approximate_scores(
    query: Tensor,
    keys: Tensor,
    components: Components | None,
    rank: int,
    coverage: float | None,
    scaling: float,
) -> tuple[Tensor, int]:
    """Scores [B, Hkv, G, S] from the largest query components, and the bytes read."""
    head_dim = query.shape[-1]
    if rank >= head_dim and coverage is None:
        return dot(query * scaling, keys), nbytes(keys)
    tiny = torch.finfo(query.dtype).tiny
    magnitude = query.abs()
    chosen = choose_components(magnitude.sum(dim=2), min(rank, head_dim), coverage)
    part = chosen.gather(query)
    covered = part.abs().sum(-1, keepdim=True) / magnitude.sum(-1, keepdim=True).clamp_min(tiny)
    # A head of the group may have only zeros at the shared components: its scores are 0, not NaN.
    part = part * (scaling / covered.clamp_min(tiny).sqrt())
    if components is None:
        index = chosen.index[:, :, None].expand_as(part)
        return dot(torch.zeros_like(query).scatter(-1, index, part), keys), nbytes(keys)
    scores, read = components.scores(part, chosen)
    if scores.shape[-1] != keys.shape[2]:
        raise ValueError(
            f"sparq_decode: components of {scores.shape[-1]} positions do not belong to keys "
            f"{tuple(keys.shape)}."
        )
    return scores, read


def _ungroup(output: Tensor, query: Tensor) -> Tensor:
    """[B, Hkv, G, Dv] to [B, H, 1, Dv] in the query's dtype."""
    return output.reshape(query.shape[0], query.shape[1], 1, -1).to(query.dtype)
