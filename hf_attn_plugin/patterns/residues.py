"""A strided pattern as two exact parts, of which neither visits blocks in vain.

Every key at a multiple of the stride lies in one column of the mask, so every block of a strided
pattern holds visible pairs, few of them. Sorted by their position modulo the stride, queries and
keys that belong together are neighbours: the far pairs become a run per token. What is near
(window, sink tokens, global tokens) stays in the order of the sequence. The parts are disjoint, so
their outputs merge by log-sum-exp.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hf_attn_plugin.patterns.intervals import (
    Allowed,
    Intervals,
    allowed_keys,
    allowed_queries,
    intervals_between,
    same_rows,
)
from hf_attn_plugin.patterns.pattern import Pattern


@dataclasses.dataclass(frozen=True, eq=False)
class StridedParts:
    """The two parts.

    Attributes:
        near: The pattern without its stride.
        query_order: int64 ``[q_len]``: queries sorted by residue, then position.
        key_order: int64 ``[kv_len]``: keys likewise.
        queries: The sorted keys that every sorted query sees besides ``near``.
        keys: The sorted queries that see every sorted key besides ``near``.
    """

    near: Pattern
    query_order: Tensor
    key_order: Tensor
    queries: Intervals
    keys: Intervals


def split_stride(pattern: Pattern, device: torch.device | str) -> StridedParts | None:
    """The parts of a pattern with a stride; None where they are no runs."""
    if pattern.stride is None:
        return None
    # A token is at distance 0 from itself, so a window of 1 adds no pair.
    near = pattern.replace(stride=None, window=pattern.window or 1)
    keys, queries = allowed_keys(near, device), allowed_queries(near, device)
    if keys is None or queries is None or 0 in (pattern.q_len, pattern.kv_len):
        return None
    own_query = pattern.query_positions(device)[0]
    own_key = pattern.key_positions(device)[0]
    by_query = _far(keys, own_query, own_key, pattern.stride)
    by_key = _far(queries, own_key, own_query, pattern.stride)
    if by_query is None or by_key is None:
        return None
    query_order, key_order = (
        torch.argsort(own % pattern.stride, stable=True) for own in (own_query, own_key)
    )
    return StridedParts(
        near, query_order, key_order, _sorted(by_query, query_order), _sorted(by_key, key_order)
    )


def _far(allowed: Allowed, own: Tensor, others: Tensor, stride: int) -> Intervals | None:
    """Runs of the sorted others: allowed, of the token's residue, not near; unsorted tokens."""
    low, near_low, near_high, high = same_rows(
        allowed.low, allowed.near_low, allowed.near_high, allowed.high
    )
    if allowed.special_low is not None and allowed.special_high is not None:
        low, near_low, near_high, high, first, end = same_rows(
            low, near_low, near_high, high, allowed.special_low, allowed.special_high
        )
        some = end > first
        if bool((some & (first > low) & (first < near_low)).any()):
            return None  # in the middle of the far tokens
        after = some & (first >= near_high) & (near_high > near_low)
        if bool(after.any()):
            return None
        low = torch.where(some & (first <= low), torch.maximum(low, end), low)
    empty = near_high <= near_low
    before = torch.where(empty, high, torch.minimum(near_low, high))
    behind = torch.where(empty, high, torch.maximum(near_high, low))
    residue = own % stride
    # How many of the others, and how many of the residues before this one, come first.
    starts = torch.cumsum(torch.bincount(others % stride, minlength=stride), 0)
    start = torch.nn.functional.pad(starts[:-1], (1, 0))[residue]
    lead = (residue - others[0]) % stride

    def place(index: Tensor) -> Tensor:
        index = index.clamp(0, len(others))
        return start + torch.div(index - lead + stride - 1, stride, rounding_mode="floor").clamp(
            min=0
        )

    left, right = (place(a) for a in (low, before)), (place(a) for a in (behind, high))
    one, two = intervals_between(*left), intervals_between(*right)
    if not bool(two.length.any()):
        return one
    return Intervals(one.start, one.length, two.start, two.length)


def _sorted(intervals: Intervals, order: Tensor) -> Intervals:
    start, length = intervals.start[:, order], intervals.length[:, order]
    if intervals.start2 is None or intervals.length2 is None:
        return Intervals(start, length)
    return Intervals(start, length, intervals.start2[:, order], intervals.length2[:, order])
