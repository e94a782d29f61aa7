"""The far pairs of a strided pattern as runs of tokens.

Every key at a multiple of the stride lies in one column of the mask, so every block of a strided
pattern holds visible pairs, few of them. Sorted by their position modulo the stride, queries and
keys that belong together are neighbours, and the far pairs become a run or two per token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.intervals import Intervals, key_intervals, query_intervals


@dataclasses.dataclass(frozen=True, eq=False)
class FarRuns:
    """What a stride adds to the rest of a pattern, tokens sorted by residue and then position.

    Attributes:
        q_order: int64 ``[q_len]``, the queries in order.
        kv_order: int64 ``[kv_len]``, the keys in order.
        queries: The sorted keys that every sorted query sees.
        keys: The sorted queries that see every sorted key.
    """

    q_order: Tensor
    kv_order: Tensor
    queries: Intervals
    keys: Intervals


def far_runs(near: Pattern, stride: int) -> FarRuns | None:
    """The pairs at a multiple of ``stride`` that the model allows and ``near`` does not keep.

    Args:
        near: The pattern without its stride, on the CPU, positions by offset.
        stride: The stride.

    Returns:
        None where a token would need more than two runs.
    """
    every = near.replace(
        window=None, dilation=1, num_sink_tokens=0, num_global_tokens=0, global_tokens=None
    )
    q_positions, kv_positions = (p("cpu")[0] for p in (near.query_positions, near.key_positions))
    sides = []
    for intervals, own, others in (
        (query_intervals, q_positions, kv_positions),
        (key_intervals, kv_positions, q_positions),
    ):
        allowed, kept = intervals(every, "cpu"), intervals(near, "cpu")
        if allowed is None or kept is None or allowed.start2 is not None:
            return None
        left = _two_runs(_gaps(allowed, kept))
        if left is None:
            return None
        order = torch.argsort(own % stride, stable=True)
        sides.append((order, _sorted(left, order, own, others, stride)))
    (q_order, queries), (kv_order, keys) = sides
    return FarRuns(q_order, kv_order, queries, keys)


def _gaps(allowed: Intervals, kept: Intervals) -> list[tuple[Tensor, Tensor]]:
    """What is allowed before, between and after the runs that are kept: (start, end) each."""
    low, high = allowed.start, allowed.start + allowed.length
    bounds = [(kept.start, kept.start + kept.length)]
    if kept.start2 is not None and kept.length2 is not None:
        bounds.append((kept.start2, kept.start2 + kept.length2))
    # Empty runs cut nothing: they go where nothing is allowed, so that the others come first.
    starts = torch.stack(torch.broadcast_tensors(*[torch.where(b > a, a, high) for a, b in bounds]))
    ends = torch.stack(torch.broadcast_tensors(*[torch.where(b > a, b, high) for a, b in bounds]))
    first = starts.argsort(dim=0, stable=True)
    starts, ends = starts.gather(0, first), ends.gather(0, first)
    gaps, reached = [], low
    for start, end in zip(starts, ends, strict=True):
        gaps.append((reached, torch.minimum(start, high)))
        reached = torch.maximum(reached, end)
    return [*gaps, (reached, high)]


def _two_runs(gaps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Starts and ends ``[2, batch or 1, tokens]`` of the runs that are not empty."""
    starts = torch.stack(torch.broadcast_tensors(*[start for start, _ in gaps]))
    ends = torch.stack(torch.broadcast_tensors(*[end for _, end in gaps]))
    some = ends > starts
    if bool((some.sum(0) > 2).any()):
        return None
    first = (~some).int().argsort(dim=0, stable=True)
    starts, ends = starts.gather(0, first)[:2], ends.gather(0, first)[:2]
    return starts, torch.maximum(starts, ends)


def _sorted(
    runs: tuple[Tensor, Tensor], order: Tensor, own: Tensor, others: Tensor, stride: int
) -> Intervals:
    """Runs over the others as they are, to runs over the sorted others of the same residue."""
    residue = own % stride
    counts = torch.bincount(others % stride, minlength=stride)
    class_start = (counts.cumsum(0) - counts)[residue]
    # Index of the first of the others in each token's class, counted from the first of all.
    first = (residue - others[0]) % stride
    starts, ends = (
        class_start + torch.div(bound - first + stride - 1, stride, rounding_mode="floor").clamp(0)
        for bound in runs
    )
    start, length = (x[..., order].int() for x in (starts, ends - starts))
    if not bool(length[1].any()):
        return Intervals(start[0].contiguous(), length[0].contiguous())
    return Intervals(*(x.contiguous() for x in (start[0], length[0], start[1], length[1])))
