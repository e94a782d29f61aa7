"""From a pattern to what the kernels read: passes over the tokens, and facts for their masks.

Everything here is data: which kernels are compiled follows from the terms of a pattern alone, so
that a new length or a new layout of documents compiles nothing. (Tiles differ too: between kinds of
patterns, `tiles.Shape`, and on Hopper between runs below 2,048 keys and longer ones, so that the
first call of the other kind compiles once more.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor

from hf_attn_plugin.ops.triton import masks
from hf_attn_plugin.ops.triton.recording import Recording
from hf_attn_plugin.ops.triton.residues import far_runs
from hf_attn_plugin.ops.triton.support import MAX_POSITION
from hf_attn_plugin.ops.triton.work import (
    Runs,
    Split,
    Visits,
    Work,
    visits_of,
    work_from_runs,
    work_from_visits,
)
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.intervals import (
    Intervals,
    key_intervals,
    query_intervals,
)
from hf_attn_plugin.patterns.schedule import build_schedule

# Fewest tokens in a residue class for which strided pairs get a pass of their own.
_MIN_CLASS = 16
# Farther than any two tokens.
_EVERY = 2**31 - 1


@dataclasses.dataclass(eq=False)
class Pass:
    """One set of pairs, apart from those of a plan's other passes, in one order of the tokens.

    Attributes:
        terms: Bits of `masks`.
        q_info: int32 ``[batch or 1, 4, q_len]`` for `masks.token_facts`, in the pass' order.
        kv_info: The same of the keys.
        numbers: lowest, band, reach, dilation, stride, residue, for `masks.in_terms`.
        q_order: int32 ``[q_len]``, the queries in order; None: as they are.
        kv_order: int32 ``[kv_len]``, likewise of the keys.
        runs: What queries see, and what sees keys, where these are runs.
        schedule: Otherwise a pattern, in order, that holds all pairs of this pass; and whether its
            full blocks are those of the pass.
    """

    terms: int
    q_info: Tensor
    kv_info: Tensor
    numbers: dict[str, int]
    q_order: Tensor | None = None
    kv_order: Tensor | None = None
    runs: tuple[Runs, Runs] | None = None
    schedule: tuple[Pattern, bool] | None = None
    _work: dict[tuple[int, int, bool, Split], Work] = dataclasses.field(default_factory=dict)

    def work(self, tokens: int, keys: int, *, of_keys: bool, split: Split) -> Work:
        """The work items of one kernel, made once.

        Args:
            tokens: Queries of a tile.
            keys: Keys of a tile.
            of_keys: For programs that hold keys and go over queries.
            split: When a heavy row is cut.
        """
        asked = (tokens, keys, of_keys, split)
        if asked not in self._work:
            self._work[asked] = self._make_work(*asked)
        return self._work[asked]

    def _make_work(self, tokens: int, keys: int, of_keys: bool, split: Split) -> Work:
        device = self.q_info.device
        if self.runs is not None:
            own, others = (keys, tokens) if of_keys else (tokens, keys)
            return work_from_runs(self.runs[of_keys], own, others, split, device)
        assert self.schedule is not None
        pattern, has_full = self.schedule
        visits = visits_of(build_schedule(pattern, tokens, keys), pattern)
        if not has_full:
            visits = dataclasses.replace(visits, full=np.zeros_like(visits.full))
        if of_keys:
            return work_from_visits(visits.transposed(), split, device)
        return work_from_visits(_with_masked_tail(visits, pattern.kv_len, keys), split, device)


class Plan:
    """One pattern on one device.

    A stride is computed in two passes: what is near, and the far pairs sorted by residue class.
    There they form dense blocks, while in the natural order every block holds some of them.

    Attributes:
        pattern: The pattern on the host, without the caller's own mask (which calls bring along, so
            that a plan keeps none of the caller's memory), with one offset or explicit positions.
        passes: In the order in which kernels go through them.
        recordings: Launches of calls with this pattern, by their layouts; see `launch`.
    """

    def __init__(self, pattern: Pattern, device: torch.device) -> None:
        # The plan is made on the host, where numpy is; values on the device come over once.
        self.recordings: dict[Hashable, Recording] = {}
        host = pattern.replace(dense=None).to("cpu")
        _check_positions(host)
        host = _plain(_one_offset(host))
        self.pattern = host
        if _splits_stride(host):
            self.passes = _strided_passes(host, pattern.dense, device)
        else:
            self.passes = [_natural_pass(host, pattern.dense, device)]


def _check_positions(pattern: Pattern) -> None:
    """Positions that are tensors, by value; `support.refuses_pattern` knows those that are not."""
    offset = pattern.q_offset
    given = [pattern.q_positions, pattern.kv_positions]
    given.append(offset + pattern.q_len if isinstance(offset, Tensor) else None)
    for positions in given:
        if positions is not None and positions.numel() and positions.abs().max() > MAX_POSITION:
            raise ValueError(
                f"triton_attention: positions must stay below {MAX_POSITION}; number every "
                "sequence from 0, or use blocked_attention."
            )


def _splits_stride(pattern: Pattern) -> bool:
    return (
        pattern.stride is not None
        and pattern.q_positions is None
        and min(pattern.q_len, pattern.kv_len) >= _MIN_CLASS * pattern.stride
    )


def _natural_pass(pattern: Pattern, dense: Tensor | None, device: torch.device) -> Pass:
    """All pairs, tokens in their own order."""
    if dense is None:
        queries, keys = query_intervals(pattern, "cpu"), key_intervals(pattern, "cpu")
        if queries is not None and keys is not None:
            return _pass_of_runs(queries, keys, device)
    return _pass_of_terms(pattern, dense, device)


def _strided_passes(pattern: Pattern, dense: Tensor | None, device: torch.device) -> list[Pass]:
    """What is near in the natural order, what is far by residue class."""
    assert pattern.stride is not None
    # A token is at distance 0 from itself, so a window of 1 adds no pair.
    near = pattern.replace(stride=None, window=pattern.window or 1)
    first = _natural_pass(near, dense, device)
    runs = far_runs(near, pattern.stride) if dense is None else None
    if runs is not None:
        far = _pass_of_runs(runs.queries, runs.keys, device)
        orders = (runs.q_order, runs.kv_order)
    else:
        q_positions, kv_positions = pattern.query_positions("cpu"), pattern.key_positions("cpu")
        residues = [positions % pattern.stride for positions in (q_positions, kv_positions)]
        q_order, kv_order = (torch.argsort(r[0], stable=True) for r in residues)
        orders = (q_order, kv_order)
        terms, q_info, kv_info, numbers = _facts(near, dense)
        schedule = Pattern(
            q_len=pattern.q_len,
            kv_len=pattern.kv_len,
            causal=pattern.causal,
            band=pattern.band,
            q_positions=q_positions[:, q_order],
            kv_positions=kv_positions[:, kv_order],
            q_documents=residues[0][:, q_order],
            kv_documents=residues[1][:, kv_order],
        )
        far = Pass(
            terms | masks.FAR.value | masks.MODULO.value,
            q_info[:, :, q_order].contiguous().to(device),
            kv_info[:, :, kv_order].contiguous().to(device),
            numbers | {"stride": pattern.stride, "residue": 0},
            schedule=(schedule, False),
        )
    far.q_order, far.kv_order = (order.to(device, torch.int32) for order in orders)
    return [first, far]


def _pass_of_runs(queries: Intervals, keys: Intervals, device: torch.device) -> Pass:
    second = queries.start2 is not None or keys.start2 is not None
    terms = masks.RUNS.value | (masks.SECOND_RUN.value if second else 0)
    infos = [_run_info(intervals).to(device) for intervals in (queries, keys)]
    numbers = dict.fromkeys(("lowest", "band", "reach", "dilation", "stride", "residue"), 1)
    runs = (_host_runs(queries, keys), _host_runs(keys, queries))
    return Pass(terms, infos[0], infos[1], numbers, runs=runs)


def _run_info(intervals: Intervals) -> Tensor:
    """int32 ``[batch or 1, 4, length]``: the runs, the second empty where there is none."""
    start, length = intervals.start, intervals.length
    given = [start, length, intervals.start2, intervals.length2]
    rows = [torch.zeros_like(start) if row is None else row for row in given]
    return torch.stack(torch.broadcast_tensors(*rows), 1).contiguous()


def _host_runs(own: Intervals, others: Intervals) -> Runs:
    info = _run_info(own).numpy()
    return Runs(info[:, 0], info[:, 1], info[:, 2], info[:, 3], others.start.shape[1])


def _pass_of_terms(pattern: Pattern, dense: Tensor | None, device: torch.device) -> Pass:
    terms, q_info, kv_info, numbers = _facts(pattern, dense)
    return Pass(
        terms,
        q_info.to(device),
        kv_info.to(device),
        numbers,
        schedule=(pattern, dense is None),
    )


def _with_masked_tail(visits: Visits, length: int, block: int) -> Visits:
    """Without full blocks that reach beyond the last key."""
    if length % block == 0:
        return visits
    return dataclasses.replace(visits, full=visits.full & (visits.cols != visits.num_cols - 1))


def _plain(pattern: Pattern) -> Pattern:
    """The same pairs: a stride of 1 keeps all of them, so that no term of a method bites."""
    if pattern.stride != 1:
        return pattern
    return pattern.replace(
        stride=None,
        window=None,
        dilation=1,
        num_sink_tokens=0,
        num_global_tokens=0,
        global_tokens=None,
    )


def _one_offset(pattern: Pattern) -> Pattern:
    """The pattern with one q_offset for all rows; offsets per row become explicit positions."""
    offset = pattern.q_offset
    if not isinstance(offset, Tensor):
        return pattern
    if offset.numel() == 1:
        return pattern.replace(q_offset=int(offset))
    queries = torch.arange(pattern.q_len) + offset.reshape(-1, 1)
    return pattern.replace(
        q_offset=None,
        q_positions=queries.to(torch.int64),
        kv_positions=pattern.key_positions("cpu"),
        kv_ranks=pattern.key_ranks("cpu"),
    )


def _facts(pattern: Pattern, dense: Tensor | None) -> tuple[int, Tensor, Tensor, dict[str, int]]:
    """Terms, facts of queries and keys, and numbers, for masks evaluated term by term."""
    terms = masks.DENSE.value if dense is not None else 0
    if pattern.stride is not None or (pattern.window is not None and pattern.dilation > 1):
        terms |= masks.MODULO.value
    valid = pattern.key_valid
    if valid is None:
        valid = torch.ones(1, pattern.kv_len, dtype=torch.bool)
    kept = torch.zeros_like(valid)
    q_marks: Tensor | None = None
    if pattern.num_sink_tokens:
        kept = kept | pattern.sink_flags("cpu")
    if pattern.has_globals:
        queries, keys = pattern.global_flags("cpu")
        q_marks = queries.int() * masks.KEPT.value
        kept = kept | keys
    kv_marks = valid.int() * masks.VALID.value + kept.int() * masks.KEPT.value
    numbers = {
        "lowest": 0 if pattern.causal else -_EVERY,
        "band": _EVERY if pattern.band is None else pattern.band,
        "reach": (pattern.reach or 0) if pattern.is_sparse else _EVERY,
        "dilation": pattern.dilation,
        "stride": pattern.stride or 1,
        "residue": -1 if pattern.stride is None else 0,
    }
    q_documents, kv_documents = _small_documents(pattern)
    q_info = _info([pattern.query_positions("cpu"), q_documents, q_marks])
    kv_info = _info([pattern.key_positions("cpu"), kv_documents, kv_marks])
    return terms, q_info, kv_info, numbers


def _small_documents(pattern: Pattern) -> tuple[Tensor | None, Tensor | None]:
    """Documents as numbers that fit in 32 bits: their ranks where they do not fit as they are."""
    queries, keys = pattern.q_documents, pattern.kv_documents
    if queries is None or keys is None or not queries.numel() or not keys.numel():
        return queries, keys
    joined = torch.cat([queries.flatten(), keys.flatten()])
    if int(joined.max()) < 2**31 and int(joined.min()) >= -(2**31):
        return queries, keys
    ranks = joined.unique(return_inverse=True)[1]
    return (
        ranks[: queries.numel()].view(queries.shape),
        ranks[queries.numel() :].view(keys.shape),
    )


def _info(rows: list[Tensor | None]) -> Tensor:
    """int32 ``[batch or 1, 4, length]`` of positions, documents, marks; 0 where there are none."""
    given = [row for row in rows if row is not None]
    batch = max(row.shape[0] for row in given)
    info = torch.zeros(batch, 4, given[0].shape[1], dtype=torch.int32)
    for place, row in enumerate(rows):
        if row is not None:
            info[:, place] = row
    return info
