"""Heads in groups: the transfers of one group run beside the attention of another.

Heads are independent of each other, so that what is sent can be cut by heads without changing what
is computed. How often is a pure function of a few numbers, so that every rank cuts alike.
"""

from __future__ import annotations

import dataclasses

from hf_attn_plugin.patterns import Pattern

# What a further group costs, on two H200s (causal, 32/8 heads of 128, forward and backward): each
# of its calls of attention ends with multiprocessors that wait for the slowest, for this share of
# the time that a block of queries takes,
_TAIL = 0.3
# and each of its batches of transfers takes so many seconds: launches, copies in smaller pieces.
_BATCH = 100e-6
# In one, two and four groups: keys gathered at 32,768 tokens 33.2, 33.7 and 34.7 ms; heads
# exchanged 27.0, 27.1 and 27.5 (again: 27.1, 28.0, 29.1), at 131,072 408.9, 408.8 and 411.4 (again:
# 405.6, 409.0, 412.4) with 0, 56 and 81 % of the transfers hidden. Over NVLink there is little to
# hide: two groups are where they cost next to nothing, and more are for slower links.
# Queries in a block of a kernel, and multiprocessors that take one block each at a time.
_BLOCK, _MULTIPROCESSORS = 128, 132


@dataclasses.dataclass(frozen=True)
class Load:
    """What a rank does in one call for all of its heads, forward and backward.

    Attributes:
        travel: Seconds of its transfers.
        work: Seconds of its attention.
        calls: Calls of attention, one for each run of its queries.
        batches: Batches of transfers.
        queries: Query vectors: rows times query heads times queries.
    """

    travel: float
    work: float
    calls: int
    batches: int
    queries: int

    def exposed(self, groups: int) -> float:
        """Seconds of transfers that no attention hides: of the first group, and what is left over.

        Args:
            groups: How many groups of heads there are.
        """
        return self.travel / groups + max(0.0, self.travel - self.work) * (1 - 1 / groups)

    def extra(self, groups: int) -> float:
        """Seconds by which so many groups are slower than one, transfers aside.

        Args:
            groups: How many groups of heads there are.
        """
        turns = self.queries / _BLOCK / _MULTIPROCESSORS
        tail = _TAIL * self.work / turns if turns else 0.0
        return (groups - 1) * (self.batches * _BATCH + self.calls * tail)


def count_groups(kv_heads: int, load: Load, wanted: int | None = None) -> int:
    """Into how many groups of equal size KV heads are split: the fewest of the fastest.

    Args:
        kv_heads: KV heads of a rank. One is not split: its gradient would be a sum over groups.
        load: Of the busiest rank, the same numbers on all ranks.
        wanted: Where it is given, the most groups up to it that divide the heads.
    """
    counts = [count for count in range(1, kv_heads + 1) if kv_heads % count == 0]
    if wanted is not None:
        return max(count for count in counts if count <= max(1, wanted))
    return min(counts, key=lambda count: (load.exposed(count) + load.extra(count), count))


def groups_of(heads: int, count: int) -> tuple[range, ...]:
    """Heads in ``count`` runs of equal size."""
    size = heads // count
    return tuple(range(first, first + size) for first in range(0, size * count, size))


def some_heads(pattern: Pattern, heads: range) -> Pattern:
    """The pattern of some of the query heads: the caller's own mask may differ between them."""
    if pattern.dense is None or pattern.dense.shape[1] == 1:
        return pattern
    dense = pattern.dense
    return pattern.derive(
        ("heads", heads), lambda: pattern.replace(dense=dense[:, heads.start : heads.stop])
    )
