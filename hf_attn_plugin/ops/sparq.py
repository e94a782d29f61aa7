"""One decoding step that reads only part of the KV cache (SparQ Attention, arXiv 2312.04985)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Half-precision keys and values are converted to float32 this many positions at a time, so that
# the converted block stays in the processor's cache and no full-length copy is ever made.
_BLOCK = 1024


@dataclass(frozen=True)
class CacheReads:
    """Bytes of KV cache that one decoding step read, counted from the tensors it gathered.

    Attributes:
        keys: Rows of keys read for exact attention.
        values: Rows of values read for exact attention.
        components: Key components read to find these rows.
        mean: What the mean value took: the running mean, or the values it was computed from.
        dense: What dense attention would have read, all cached keys and values.
    """

    keys: int
    values: int
    components: int
    mean: int
    dense: int

    @property
    def total(self) -> int:
        """Bytes read in all."""
        return self.keys + self.values + self.components + self.mean


def sparq_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    rank: int,
    top_k: int,
    local_window: int,
    mean_value_reallocation: bool,
    scaling: float | None = None,
    keys_t: Tensor | None = None,
    value_mean: Tensor | None = None,
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

    With ``top_k >= S`` there is nothing to leave out: steps 1 to 3 are skipped, and the result is
    dense attention. With ``rank >= D`` the scores of step 2 are exact.

    Args:
        query: [B, H, 1, D]; query head h reads key/value head h // (H / Hkv).
        keys: [B, Hkv, S, D].
        values: [B, Hkv, S, Dv].
        rank: Query components r, at least 1.
        top_k: Keys k attended to, at least 1.
        local_window: Most recent visible keys that are always chosen, 0 to ``top_k``.
        mean_value_reallocation: Give the mass of the keys left out to the mean value.
        scaling: Factor of the scores; None is 1/√D.
        keys_t: [B, Hkv, D, S], the same keys component-major, so that a component is one
            contiguous row. None computes the same from ``keys``, where the components of one key
            share its cache lines: that reads, and counts, all of ``keys``.
        value_mean: [B, Hkv, Dv], mean of the visible values. None computes it from ``values``
            where it is needed, and counts that.
        visible: bool [B, S] or [1, S], the keys that the query may see; None is all of them.
        softcap: Scores become softcap · tanh(scores / softcap), approximate and exact ones alike.
        sinks: [H], a score per query head that takes part in the denominator of both softmaxes
            and has no value. A head whose sink takes most of its mass thus weighs little in the
            choice of step 3.

    Returns:
        The output [B, H, 1, Dv] in the query's dtype, and the bytes read. Scores and sums are
        float32 (float64 for float64 queries). A query that sees nothing gets 0.

    Raises:
        ValueError: Shapes that do not fit, a parameter out of range, or ``sinks`` together with
            ``mean_value_reallocation``: 1 − α would hand the sink's mass to the mean value.
    """
    _check(query, keys, values, rank, top_k, local_window, keys_t)
    if sinks is not None and mean_value_reallocation:
        raise ValueError(
            "sparq: mean_value_reallocation is not defined with attention sinks, whose mass would "
            "go to the mean value; set mean_value_reallocation=False."
        )
    batch, heads, _, head_dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    scaling = 1 / math.sqrt(head_dim) if scaling is None else scaling
    dense = _nbytes(keys) + _nbytes(values)

    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim).to(accumulate)
    if sinks is not None:
        sinks = sinks.to(accumulate).reshape(1, kv_heads, -1, 1)

    if top_k >= length:
        scores = _mask(_cap(_scores(grouped * scaling, keys), softcap), visible)
        output = _weigh(_softmax(scores, sinks), values)
        reads = CacheReads(_nbytes(keys), _nbytes(values), 0, 0, dense)
        return _ungroup(output, query), reads

    approximate, components = _approximate_scores(grouped, keys, keys_t, rank, scaling)
    approximate = _softmax(_mask(_cap(approximate, softcap), visible), sinks)
    chosen = _choose(approximate.sum(dim=2), top_k, local_window, visible)  # [B, Hkv, k]

    at_batch = torch.arange(batch, device=keys.device)[:, None, None]
    at_head = torch.arange(kv_heads, device=keys.device)[None, :, None]
    chosen_keys = keys[at_batch, at_head, chosen]
    chosen_values = values[at_batch, at_head, chosen]
    scores = _cap(_scores(grouped * scaling, chosen_keys), softcap)
    if visible is not None:
        seen = visible.expand(batch, -1)[at_batch, chosen]
        scores = scores.masked_fill(~seen[:, :, None], -math.inf)
    output = _weigh(_softmax(scores, sinks), chosen_values)

    mean_bytes = 0
    if mean_value_reallocation:
        if value_mean is None:
            mean_bytes = _nbytes(values)
            value_mean = _mean_value(values, visible, accumulate)
        else:
            mean_bytes = _nbytes(value_mean)
        index = chosen[:, :, None].expand(-1, -1, grouped.shape[2], -1)
        alpha = approximate.gather(-1, index).sum(-1, keepdim=True)
        output = alpha * output + (1 - alpha) * value_mean.to(accumulate)[:, :, None]

    reads = CacheReads(
        keys=_nbytes(chosen_keys),
        values=_nbytes(chosen_values),
        components=components,
        mean=mean_bytes,
        dense=dense,
    )
    return _ungroup(output, query), reads


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rank: int,
    top_k: int,
    local_window: int,
    keys_t: Tensor | None,
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
    if keys_t is not None and keys_t.shape != (batch, kv_heads, head_dim, length):
        raise ValueError(
            f"sparq_decode: keys_t {tuple(keys_t.shape)} is not keys {tuple(keys.shape)} "
            "with the last two dimensions exchanged."
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
    query: Tensor, keys: Tensor, keys_t: Tensor | None, rank: int, scaling: float
) -> tuple[Tensor, int]:
    """Scores [B, Hkv, G, S] from the ``rank`` largest query components, and the bytes read."""
    batch, kv_heads, group, head_dim = query.shape
    if rank >= head_dim:
        return _scores(query * scaling, keys), _nbytes(keys)
    tiny = torch.finfo(query.dtype).tiny
    magnitude = query.abs()
    largest = magnitude.sum(dim=2).topk(rank, sorted=False).indices  # [B, Hkv, r]
    index = largest[:, :, None].expand(-1, -1, group, -1)
    part = query.gather(-1, index)
    covered = part.abs().sum(-1, keepdim=True) / magnitude.sum(-1, keepdim=True).clamp_min(tiny)
    # A head of the group may have only zeros at the shared components: its scores are 0, not NaN.
    part = part * (scaling / covered.clamp_min(tiny).sqrt())
    if keys_t is None:
        return _scores(torch.zeros_like(query).scatter(-1, index, part), keys), _nbytes(keys)
    # Whole rows of a matrix: several times faster on a CPU than gather() with an expanded index.
    # The flattening is a view of our cache's buffer; other strides may cost a copy.
    first_row = torch.arange(batch * kv_heads, device=keys.device).view(batch, kv_heads, 1)
    rows = keys_t.flatten(0, 2).index_select(0, (first_row * head_dim + largest).flatten())
    rows = rows.view(batch, kv_heads, rank, -1)
    return part @ rows.to(part.dtype), _nbytes(rows)


def _choose(scores: Tensor, top_k: int, local_window: int, visible: Tensor | None) -> Tensor:
    """Positions [B, Hkv, k] of the largest ``scores`` [B, Hkv, S], the local window among them."""
    if visible is None:
        scores[..., scores.shape[-1] - local_window :] = math.inf
    else:
        from_the_end = visible.flip(-1).cumsum(-1).flip(-1)
        local = visible & (from_the_end <= local_window)
        scores = scores.masked_fill(local[:, None], math.inf)
        # Below the 0 to which the score of a visible key may underflow.
        scores = scores.masked_fill(~visible[:, None], -1.0)
    return scores.topk(top_k, sorted=False).indices


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """Query [..., G, D] times keys [..., S, D], in the query's dtype."""
    if keys.dtype == query.dtype:
        return query @ keys.transpose(-1, -2)
    blocks = [query @ k.to(query.dtype).transpose(-1, -2) for k in keys.split(_BLOCK, dim=-2)]
    return torch.cat(blocks, dim=-1)


def _weigh(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [..., G, S] times values [..., S, Dv], in the weights' dtype."""
    if values.dtype == weights.dtype:
        return weights @ values
    output = weights.new_zeros(*weights.shape[:-1], values.shape[-1])
    for weight, value in zip(
        weights.split(_BLOCK, dim=-1), values.split(_BLOCK, dim=-2), strict=True
    ):
        output = output + weight @ value.to(weight.dtype)
    return output


def _mean_value(values: Tensor, visible: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Mean [B, Hkv, Dv] of the visible ``values`` [B, Hkv, S, Dv]; 0 where none is visible."""
    batch, kv_heads, length, _ = values.shape
    if visible is None:
        visible = torch.ones(1, length, dtype=torch.bool, device=values.device)
    weights = visible.to(dtype) / visible.sum(-1, keepdim=True).clamp_min(1)
    return _weigh(weights[:, None, None].expand(batch, kv_heads, 1, length), values).squeeze(2)


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _mask(scores: Tensor, visible: Tensor | None) -> Tensor:
    return scores if visible is None else scores.masked_fill(~visible[:, None, None], -math.inf)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension; rows that are -inf throughout give 0, not NaN."""
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    largest = largest.clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    # The largest term is 1, so a total below 1 belongs to a row that sees nothing.
    return weights / total.clamp_min(1)


def _ungroup(output: Tensor, query: Tensor) -> Tensor:
    """[B, Hkv, G, Dv] to [B, H, 1, Dv] in the query's dtype."""
    return output.reshape(query.shape[0], query.shape[1], 1, -1).to(query.dtype)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
