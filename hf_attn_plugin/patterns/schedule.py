"""The schedule: which blocks of pairs a kernel has to visit.

Built from summaries of each block (its lowest and highest position, document, rank), so that its
cost grows with the blocks visited and not with queries x keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from hf_attn_plugin.patterns.pattern import Pattern

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """For every query block, the key blocks to visit (compressed sparse rows).

    Attributes:
        block_q: Queries per block; the last may be shorter.
        block_kv: Keys per block; the last may be shorter.
        rows: int64 ``[query blocks + 1]``; the entries of query block a are
            ``rows[a] : rows[a + 1]``.
        cols: int64 ``[entries]``, the key block of each entry, ascending in a row.
        full: bool ``[entries]``, True where every pair of the block is visible in every batch row,
            so that no mask is needed.
    """

    block_q: int
    block_kv: int
    rows: Ints
    cols: Ints
    full: Bools

    @property
    def num_visited(self) -> int:
        """How many blocks are visited."""
        return len(self.cols)

    def runs(self, q_block: int, max_blocks: int) -> list[tuple[int, int, bool]]:
        """Neighbouring key blocks of one query block, joined.

        Args:
            q_block: The query block.
            max_blocks: The longest run.

        Returns:
            ``(first key block, end, full)`` triples in ascending order.
        """
        joined: list[tuple[int, int, bool]] = []
        for entry in range(int(self.rows[q_block]), int(self.rows[q_block + 1])):
            col, full = int(self.cols[entry]), bool(self.full[entry])
            if joined:
                start, stop, kind = joined[-1]
                if stop == col and kind == full and stop - start < max_blocks:
                    joined[-1] = (start, col + 1, full)
                    continue
            joined.append((col, col + 1, full))
        return joined


@dataclasses.dataclass(frozen=True)
class _Span:
    """Lowest and highest value in each block, over all batch rows."""

    low: Ints
    high: Ints


def build_schedule(pattern: Pattern, block_q: int, block_kv: int) -> Schedule:
    """The blocks that ``pattern`` needs, the same for every batch row (their union).

    Cost: O(tokens + blocks visited) time and memory, except for layouts whose positions are given
    explicitly and do not ascend, where it is O(query blocks x key blocks).
    """
    if isinstance(pattern.q_offset, torch.Tensor):
        pattern = pattern.replace(q_offset=pattern.first_query)
    n_q, n_kv = -(-pattern.q_len // block_q), -(-pattern.kv_len // block_kv)
    if n_q == 0 or n_kv == 0:
        empty = np.zeros(0, np.int64)
        return Schedule(block_q, block_kv, np.zeros(n_q + 1, np.int64), empty, empty.astype(bool))
    blocks = _Blocks(pattern, block_q, block_kv)
    low, high = blocks.base_range()
    q_index, kv_index = blocks.candidates(low, high)
    keep = blocks.possible(q_index, kv_index)
    q_index, kv_index = q_index[keep], kv_index[keep]
    rows = np.zeros(n_q + 1, np.int64)
    np.cumsum(np.bincount(q_index, minlength=n_q), out=rows[1:])
    return Schedule(block_q, block_kv, rows, kv_index, blocks.full(q_index, kv_index))


class _Blocks:
    """The summaries of a pattern's blocks, and the questions asked of them."""

    def __init__(self, pattern: Pattern, block_q: int, block_kv: int) -> None:
        self.pattern = pattern
        self.block_q, self.block_kv = block_q, block_kv
        self.n_q, self.n_kv = -(-pattern.q_len // block_q), -(-pattern.kv_len // block_kv)
        self.q_pos = self._span(_host(pattern.query_positions("cpu")), block_q)
        self.kv_pos = self._span(_host(pattern.key_positions("cpu")), block_kv)
        self.q_doc = self.kv_doc = None
        if pattern.q_documents is not None and pattern.kv_documents is not None:
            self.q_doc = self._span(_host(pattern.q_documents), block_q)
            self.kv_doc = self._span(_host(pattern.kv_documents), block_kv)
        self.any_valid = self.all_valid = np.ones(self.n_kv, bool)
        if pattern.key_valid is not None:
            valid = _host(pattern.key_valid).astype(np.int64)
            span = self._span(valid, block_kv)
            self.any_valid, self.all_valid = span.high > 0, span.low > 0
        self.kv_special_any = self.kv_special_all = np.zeros(self.n_kv, bool)
        self.q_special_any = self.q_special_all = np.zeros(self.n_q, bool)
        self._find_special()

    def _find_special(self) -> None:
        """Blocks with keys that every query sees, and with queries that see every key."""
        pattern = self.pattern
        device = next((t.device for t in pattern.tensors().values() if t.ndim == 2), "cpu")
        if pattern.num_sink_tokens:
            span = self._span(_host(pattern.sink_flags(device)).astype(np.int64), self.block_kv)
            self.kv_special_any, self.kv_special_all = span.high > 0, span.low > 0
        if pattern.has_globals:
            queries, keys = pattern.global_flags(device)
            q_span = self._span(_host(queries).astype(np.int64), self.block_q)
            kv_span = self._span(_host(keys).astype(np.int64), self.block_kv)
            self.q_special_any, self.q_special_all = q_span.high > 0, q_span.low > 0
            self.kv_special_any = self.kv_special_any | (kv_span.high > 0)
            self.kv_special_all = self.kv_special_all | (kv_span.low > 0)

    @staticmethod
    def _span(values: Ints, block: int) -> _Span:
        """Summaries of ``[batch, length]`` values over blocks of ``length``."""
        starts = np.arange(0, values.shape[1], block)
        return _Span(
            np.minimum.reduceat(values, starts, axis=1).min(0),
            np.maximum.reduceat(values, starts, axis=1).max(0),
        )

    def base_range(self) -> tuple[Ints, Ints]:
        """For every query block the range of key blocks that the model's own terms allow."""
        pattern = self.pattern
        low, high = np.zeros(self.n_q, np.int64), np.full(self.n_q, self.n_kv)
        if _ascending(self.kv_pos):
            if pattern.causal:
                high = np.searchsorted(self.kv_pos.low, self.q_pos.high, side="right")
            if pattern.band is not None:
                low, high = self._near(pattern.band, low, high)
        if self.q_doc is not None and self.kv_doc is not None and _ascending(self.kv_doc):
            low = np.maximum(low, np.searchsorted(self.kv_doc.high, self.q_doc.low, "left"))
            high = np.minimum(high, np.searchsorted(self.kv_doc.low, self.q_doc.high, "right"))
        return low, np.maximum(low, high)

    def _near(self, reach: int, low: Ints, high: Ints) -> tuple[Ints, Ints]:
        """Narrow ranges to key blocks less than ``reach`` positions away."""
        near_low = np.searchsorted(self.kv_pos.high, self.q_pos.low - reach, side="right")
        near_high = np.searchsorted(self.kv_pos.low, self.q_pos.high + reach, side="left")
        return np.maximum(low, near_low), np.minimum(high, near_high)

    def candidates(self, low: Ints, high: Ints) -> tuple[Ints, Ints]:
        """The (query block, key block) pairs worth a look, sorted, without repeats."""
        pattern = self.pattern
        if not pattern.is_sparse or pattern.stride is not None or not _ascending(self.kv_pos):
            return _expand(low, high)
        parts: list[tuple[Ints, Ints]] = []
        if pattern.reach is not None:
            near_low, near_high = self._near(pattern.reach, low, high)
            parts.append(_expand(near_low, np.maximum(near_low, near_high)))
        special = np.flatnonzero(self.kv_special_any)
        if len(special):
            first, last = np.searchsorted(special, low), np.searchsorted(special, high)
            rows, slots = _expand(first, last)
            parts.append((rows, special[slots]))
        whole = self.q_special_any
        if whole.any():
            parts.append(_expand(np.where(whole, low, 0), np.where(whole, high, 0)))
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        keys = np.unique(np.concatenate([rows * self.n_kv + cols for rows, cols in parts]))
        return keys // self.n_kv, keys % self.n_kv

    def possible(self, q: Ints, kv: Ints) -> Bools:
        """Whether a block may hold a visible pair at all."""
        pattern = self.pattern
        nearest, farthest = self._distances(q, kv)
        keep = self.any_valid[kv].copy()
        if pattern.causal:
            keep &= farthest >= 0
        if pattern.band is not None:
            keep &= (nearest < pattern.band) & (farthest > -pattern.band)
        if self.q_doc is not None and self.kv_doc is not None:
            keep &= self.kv_doc.low[kv] <= self.q_doc.high[q]
            keep &= self.kv_doc.high[kv] >= self.q_doc.low[q]
        if pattern.is_sparse:
            some = self.kv_special_any[kv] | self.q_special_any[q]
            if pattern.reach is not None:
                some |= (nearest < pattern.reach) & (farthest > -pattern.reach)
            if pattern.stride is not None:
                lowest = np.maximum(nearest, 0) if pattern.causal else nearest
                some |= -(-lowest // pattern.stride) <= farthest // pattern.stride
            keep &= some
        return keep

    def full(self, q: Ints, kv: Ints) -> Bools:
        """Whether every pair of a block is visible, in every batch row."""
        pattern = self.pattern
        nearest, farthest = self._distances(q, kv)
        full = self.all_valid[kv].copy()
        if pattern.dense is not None:
            return np.zeros_like(full)
        if pattern.causal:
            full &= nearest >= 0
        if pattern.band is not None:
            full &= (farthest < pattern.band) & (nearest > -pattern.band)
        if self.q_doc is not None and self.kv_doc is not None:
            for span, index in ((self.q_doc, q), (self.kv_doc, kv)):
                full &= span.low[index] == span.high[index]
            full &= self.q_doc.low[q] == self.kv_doc.low[kv]
        if pattern.is_sparse:
            every = self.kv_special_all[kv] | self.q_special_all[q]
            if pattern.reach is not None and pattern.dilation == 1:
                every |= (farthest < pattern.reach) & (nearest > -pattern.reach)
            if pattern.stride == 1:
                every |= True
            full &= every
        return full

    def _distances(self, q: Ints, kv: Ints) -> tuple[Ints, Ints]:
        """Lowest and highest query - key distance in each block pair."""
        return self.q_pos.low[q] - self.kv_pos.high[kv], self.q_pos.high[q] - self.kv_pos.low[kv]


def _host(values: torch.Tensor) -> Ints:
    return values.detach().cpu().numpy()


def _ascending(span: _Span) -> bool:
    """Whether the blocks' lowest and highest values never descend."""
    return bool((np.diff(span.low) >= 0).all() and (np.diff(span.high) >= 0).all())


def _expand(low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """All (row, col) with ``low[row] <= col < high[row]``, row by row."""
    counts = np.maximum(high - low, 0)
    rows = np.repeat(np.arange(len(low)), counts)
    starts = np.repeat(low - (np.cumsum(counts) - counts), counts)
    return rows, np.arange(len(rows)) + starts
