"""Patterns in which every token sees at most two runs of neighbouring tokens.

Causality, windows, packed documents, padding at the ends, offsets, and the first tokens of a
sequence all leave a query with one run of keys, or with two. A kernel then needs two numbers per
run in place of the whole predicate, and one compiled kernel serves all these patterns.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hf_attn_plugin.patterns.pattern import Pattern


@dataclasses.dataclass(frozen=True, eq=False)
class Intervals:
    """What every token sees: ``[start, start + length)``, and the same with ``2`` where given.

    Attributes:
        start: int32 ``[batch or 1, tokens]``, index of the first token seen.
        length: int32 ``[batch or 1, tokens]``, 0 where nothing is seen.
        start2: The second run's; None when no token has one. The runs may overlap.
        length2: The second run's.
    """

    start: Tensor
    length: Tensor
    start2: Tensor | None = None
    length2: Tensor | None = None

    def visible(self, others: int) -> Tensor:
        """The mask that the runs stand for: bool ``[batch or 1, tokens, others]``."""
        index = torch.arange(others, device=self.start.device)
        seen = _inside(index, self.start, self.length)
        if self.start2 is not None and self.length2 is not None:
            seen = seen | _inside(index, self.start2, self.length2)
        return seen


def query_intervals(pattern: Pattern, device: torch.device | str) -> Intervals | None:
    """The keys that every query sees; None when the pattern has no such form.

    Looks at values where documents or padding are given, and so waits for the device then.
    """
    if not _has_runs(pattern):
        return None
    own = pattern.query_positions(device) - pattern.kv_offset
    low, high = torch.zeros_like(own), torch.full_like(own, pattern.kv_len)
    if pattern.causal:
        high = torch.minimum(high, own + 1)
    bounds = _within_documents(pattern.kv_documents, pattern.q_documents, low, high)
    if bounds is None:
        return None
    low, high = bounds
    if pattern.key_valid is not None:
        first, end = _run(pattern.key_valid)
        if first is None or end is None:
            return None
        low, high = torch.maximum(low, first), torch.minimum(high, end)
    keys_special, queries_special = _special(pattern, device)
    return _seen(pattern, own, low, high, keys_special, queries_special)


def key_intervals(pattern: Pattern, device: torch.device | str) -> Intervals | None:
    """The queries that see every key; None when the pattern has no such form."""
    if not _has_runs(pattern):
        return None
    offset = pattern.query_positions(device)[:, :1] if pattern.q_len else 0
    own = pattern.key_positions(device) - offset
    low, high = torch.zeros_like(own), torch.full_like(own, pattern.q_len)
    if pattern.causal:
        low = torch.maximum(low, own)
    bounds = _within_documents(pattern.q_documents, pattern.kv_documents, low, high)
    if bounds is None:
        return None
    low, high = bounds
    if pattern.key_valid is not None:
        high = torch.where(pattern.key_valid, high, low)
    keys_special, queries_special = _special(pattern, device)
    return _seen(pattern, own, low, high, queries_special, keys_special)


def _seen(
    pattern: Pattern,
    own: Tensor,
    low: Tensor,
    high: Tensor,
    seen_by_all: Tensor | None,
    seeing_all: Tensor | None,
) -> Intervals | None:
    """The method's terms, within what the model lets a token see."""
    low, high = _near(pattern.band, own, low, high)
    if not pattern.is_sparse:
        return _between(low, high)
    near_low, near_high = low, low
    if pattern.reach is not None:
        near_low, near_high = _near(pattern.reach, own, low, high)
    if seeing_all is not None:
        near_low = torch.where(seeing_all, low, near_low)
        near_high = torch.where(seeing_all, high, near_high)
    near = _between(near_low, near_high)
    if seen_by_all is None:
        return near
    runs = _runs_of(seen_by_all, low, high)
    if runs is None:
        return None
    special = _between(*runs)
    return Intervals(*_same_rows(near.start, near.length, special.start, special.length))


def _within_documents(
    others: Tensor | None, own: Tensor | None, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor] | None:
    """``[low, high)`` cut to the token's own document; None when documents are no runs."""
    if others is None or own is None:
        return low, high
    if not bool((others.diff(dim=1) >= 0).all()):
        return None
    others, own = (tensor.contiguous() for tensor in _same_rows(others, own))
    return (
        torch.maximum(low, torch.searchsorted(others, own)),
        torch.minimum(high, torch.searchsorted(others, own, right=True)),
    )


def _special(pattern: Pattern, device: torch.device | str) -> tuple[Tensor | None, Tensor | None]:
    """Keys that all queries see and queries that see all keys, as flags."""
    keys = queries = None
    if pattern.num_sink_tokens:
        keys = pattern.sink_flags(device)
    if pattern.has_globals:
        queries, flags = pattern.global_flags(device)
        keys = flags if keys is None else keys | flags
    return keys, queries


def _has_runs(pattern: Pattern) -> bool:
    """Whether the terms alone do not rule runs out."""
    if pattern.dense is not None or pattern.stride is not None or pattern.q_positions is not None:
        return False
    return pattern.window is None or pattern.dilation == 1


def _near(reach: int | None, distance: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """``[low, high)`` cut to less than ``reach`` from each token."""
    if reach is None:
        return low, high
    return torch.maximum(low, distance - reach + 1), torch.minimum(high, distance + reach)


def _run(valid: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """First valid index and the end of the valid run, ``[batch, 1]``; None where there are gaps."""
    index = torch.arange(valid.shape[1], device=valid.device)
    first = torch.where(valid, index, valid.shape[1]).amin(1, keepdim=True)
    end = torch.where(valid, index + 1, 0).amax(1, keepdim=True)
    whole = (end - first).clamp(min=0) == valid.sum(1, keepdim=True)
    return (first, end) if bool(whole.all()) else (None, None)


def _runs_of(flags: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    """The flagged tokens within each ``[low, high)``, as one run each; None if one is not."""
    length = flags.shape[1]
    count = torch.nn.functional.pad(flags.long().cumsum(1), (1, 0))
    index = torch.arange(length, device=flags.device)
    # The first flagged token at or after each index.
    later = torch.where(flags, index, length).flip(1).cummin(1).values.flip(1)
    later = torch.nn.functional.pad(later, (0, 1), value=length)
    low, high, count, later = _same_rows(low.clamp(0, length), high.clamp(0, length), count, later)
    number = count.gather(1, torch.maximum(low, high)) - count.gather(1, low)
    first = later.gather(1, low)
    end = torch.where(number > 0, first + number, first)
    unbroken = count.gather(1, end.clamp(max=length)) - count.gather(1, first) == number
    return (first, end) if bool(unbroken.all()) else None


def _between(low: Tensor, high: Tensor) -> Intervals:
    return Intervals(low.int().contiguous(), (high - low).clamp(min=0).int().contiguous())


def _inside(index: Tensor, start: Tensor, length: Tensor) -> Tensor:
    offset = index - start[..., None]
    return (offset >= 0) & (offset < length[..., None])


def _same_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``[batch or 1, n]`` tensors, expanded to the same batch."""
    rows = max(tensor.shape[0] for tensor in tensors)
    return tuple(tensor.expand(rows, -1) for tensor in tensors)
