"""Attention over several GPUs: every contender on every case, after its numbers were checked."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_attn_plugin
from hf_attn_plugin.patterns import Pattern

from .cases import Case
from .contenders import kernel_versions, source_hash
from .numerics import Gate, Inputs, Verdict, judge, results_of, sample_rows
from .report import CANNOT, ERROR, OK, WRONG, Results, machine
from .ring_cases import gate_case
from .ring_contenders import DRAWN, SINGLE, RingContender, Sharded
from .ring_report import RingRow, Timelines, row_key
from .ring_team import Team, timed
from .ring_traffic import Timeline, Traffic, timeline_of
from .table import free
from .timing import Clock, Times

Say = Callable[[str], None]


@dataclasses.dataclass
class RingBench:
    """What all measurements of a run share.

    Attributes:
        team: This process among the others.
        clock: Of this process's device.
        results: Rows; written by the rank that leads.
        timelines: What rank 0 did; written by it.
        dtype: Of the inputs.
        rounds: Turns of every contender.
        say: Receives a line per row as it comes.
        written: Called by the rank that leads when the rows of a case have been kept.
    """

    team: Team
    clock: Clock
    results: Results[RingRow]
    timelines: Timelines
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 3
    say: Say = lambda line: None
    written: Callable[[], None] = lambda: None

    def run(self, cases: Sequence[Case], contenders: Sequence[RingContender]) -> list[RingRow]:
        """Every contender on every case; a case that is kept as a whole is not measured again."""
        rows = []
        for case in cases:
            kept = self.team.from_leader(self._kept(case, contenders))
            if kept is None:
                kept = _OnCase(self, case).measure(contenders)
            elif self.team.leads:
                self.say(f"{case.title}, S={case.length}: kept from an earlier run")
            rows += kept
        return rows

    def _kept(self, case: Case, contenders: Sequence[RingContender]) -> list[RingRow] | None:
        """The rows of an earlier run, where all of them still hold: they are compared."""
        if not self.team.leads:
            return None
        found = []
        for contender in contenders:
            key = row_key(case.name, case.length, self.team.size, contender.name)
            row = self.results.rows.get(key)
            if row is None or row.status not in (OK, CANNOT) or row.stamp != stamp(contender):
                return None
            found.append(row)
        return found


@dataclasses.dataclass
class _Ready:
    """A contender whose numbers are right, and its turns so far."""

    contender: RingContender
    sharded: Sharded
    local: Inputs
    verdict: Verdict
    errors: Mapping[str, float]
    turns: list[Times] = dataclasses.field(default_factory=list)
    failure: str | None = None
    unseen: str | None = None
    sent: int | None = None
    timeline: Timeline | None = None


@dataclasses.dataclass
class _Call:
    """Inputs of one length, with what is expected of them on the rank that leads."""

    case: Case
    pattern: Pattern
    inputs: Inputs
    rows: Tensor | None
    grad: Tensor
    gate: Gate | None

    @classmethod
    def make(cls, bench: RingBench, case: Case, sampled: bool) -> _Call:
        device = bench.team.device
        pattern = case.pattern(device)
        inputs = Inputs.random(  # the same on all ranks
            batch=1,
            heads=case.heads,
            kv_heads=case.kv_heads,
            tokens=case.length,
            head_dim=case.head_dim,
            dtype=bench.dtype,
            device=device,
        )
        rows = sample_rows(case.length, device) if sampled else None
        grad = inputs.grad if rows is None else inputs.gradient_at(rows)
        gate = Gate(inputs, pattern, rows) if bench.team.leads else None
        return cls(case, pattern, inputs, rows, grad, gate)


class _OnCase:
    """One case, on one rank; all ranks go through it together."""

    def __init__(self, bench: RingBench, case: Case) -> None:
        self.bench, self.case, self.team = bench, case, bench.team
        self.short: _Call | None = None
        self.call = _Call.make(bench, case, sampled=gate_case(case, self.team.size) != case)

    def measure(self, contenders: Sequence[RingContender]) -> list[RingRow]:
        """A row for each, whatever happens.

        All are checked before any is timed; then they take turns, so that cards that get warmer,
        or a busy host, slow down all alike.
        """
        rows: dict[str, RingRow] = {}
        ready: list[_Ready] = []
        for contender in contenders:
            outcome = self._enter(contender)
            if isinstance(outcome, _Ready):
                ready.append(outcome)
            else:
                rows[contender.name] = outcome
            free(self.team.device)
        self.short = self.call.gate = None
        for _ in range(self.bench.rounds):
            for one in ready:
                self._time(one)
        for one in ready:
            self._look_at(one)
        timed = self._timed_rows(ready)
        rows |= {row.contender: row for row in timed}
        ordered = [rows[contender.name] for contender in contenders]
        if self.team.leads:
            self._keep(ordered, ready)
        ready.clear()
        free(self.team.device)
        return ordered

    def _keep(self, rows: Sequence[RingRow], ready: Sequence[_Ready]) -> None:
        for row in rows:
            self.bench.results.add(row)
            time = f"{row.total_ms:.2f} ms" if row.total_ms is not None else row.detail
            self.bench.say(f"{row.title}, S={row.length}: {row.contender}: {row.status} {time}")
        seen = {one.contender.name: one.timeline for one in ready}
        found = {name: lanes for name, lanes in seen.items() if lanes and name in DRAWN}
        if found:
            self.bench.timelines.add(f"{self.case.title}, S={self.case.length}", found)
        self.bench.written()

    # -- the check ---------------------------------------------------------------------------------

    def _enter(self, contender: RingContender) -> _Ready | RingRow:
        """The contender with its check behind it, or the row that says why not."""
        refused = contender.refuses(self.case, self.team.size)
        if refused is not None:
            return self._row(contender, CANNOT, refused)
        short = self._short_call()
        verdict, errors = Verdict(0.0, ""), {}
        for call in [short] if short is self.call else [short, self.call]:
            done, wrong = self.team.attempt(functools.partial(self._results, contender, call))
            said = None
            if wrong is None:
                sharded, got = done
                said, wrong = self.team.attempt(functools.partial(judged, call.gate, got))
            if wrong is not None:
                knows = contender.masked or self.case.is_plain_causal
                return self._row(contender, ERROR if knows else CANNOT, wrong)
            here, errors = self.team.from_leader(said)
            verdict = max(verdict, here, key=lambda one: one.share)
            if not verdict.good:
                detail = f"{verdict.where}: {verdict.share:.2g} times the error that is allowed"
                return self._row(contender, WRONG, f"{detail}, S={call.case.length}")
        inputs = self.call.inputs if contender.name == SINGLE else sharded.local(self.call.inputs)
        return _Ready(contender, sharded, inputs, verdict, errors)

    def _short_call(self) -> _Call:
        case = gate_case(self.case, self.team.size)
        if case == self.case:
            return self.call
        if self.short is None:
            self.short = _Call.make(self.bench, case, sampled=False)
        return self.short

    def _results(self, contender: RingContender, call: _Call) -> tuple[Sharded, dict[str, Tensor]]:
        """The contender's call, and what it makes of the inputs."""
        try:
            sharded = contender.spread(call.case, call.pattern, self.team)
            return sharded, self._whole_results(contender, sharded, call)
        except Exception as error:
            if contender.ours:
                self.bench.say("".join(traceback.format_exception(error)))
            raise

    def _whole_results(
        self, contender: RingContender, sharded: Sharded, call: _Call
    ) -> dict[str, Tensor]:
        """Output and gradients of the whole sequence; of one GPU on the leading rank only."""
        if contender.name == SINGLE:
            return results_of(sharded.call, call.inputs, call.grad) if self.team.leads else {}
        # Outside of the scope: context_parallel ends with the innermost of its blocks.
        local, grad = sharded.local(call.inputs), sharded.take(call.grad)
        with sharded.scope():
            parts = results_of(sharded.call, local, grad)
        return {name: sharded.join(part) for name, part in parts.items()}

    # -- time --------------------------------------------------------------------------------------

    def _stages(self, one: _Ready) -> list[Callable[[Any], Any]]:
        leaves, grad = one.local.leaves, one.local.grad
        return [
            lambda _: one.sharded.call(*leaves),
            lambda output: torch.autograd.grad(output, leaves, grad),
        ]

    def _time(self, one: _Ready) -> None:
        """One turn of a contender; what breaks now gets no further turn."""
        if one.failure is not None:
            return
        stages, clock, loaded = self._stages(one), self.bench.clock, bool(one.turns)

        def turn() -> Times | None:
            if one.contender.name == SINGLE:
                return timed(None, clock, stages, loaded=loaded) if self.team.leads else None
            with one.sharded.scope():
                return timed(self.team, clock, stages, loaded=loaded)

        times, one.failure = self.team.attempt(turn)
        if times is not None:
            one.turns.append(times)

    def _look_at(self, one: _Ready) -> None:
        """What is sent, and when; once, and not while it is timed."""
        if one.failure is not None or one.contender.name == SINGLE:
            return
        forward, backward = self._stages(one)

        def run() -> None:
            self.team.align()
            backward(forward(None))

        def look() -> tuple[int, Timeline | None]:
            with one.sharded.scope():
                with Traffic(self.team.size) as traffic:
                    backward(forward(None))
                self.team.barrier()
                if self.team.leads:
                    return traffic.sent, timeline_of(run, self.team.device)
                run()
                return traffic.sent, None

        seen, one.unseen = self.team.attempt(look)
        if seen is not None:
            one.sent = int(self.team.largest([seen[0]])[0])
            one.timeline = seen[1]

    # -- rows --------------------------------------------------------------------------------------

    def _timed_rows(self, ready: Sequence[_Ready]) -> list[RingRow]:
        if not self.team.leads:
            return [self._row(one.contender, OK) for one in ready]
        single = next((one for one in ready if one.contender.name == SINGLE and one.turns), None)
        alone = None if single is None else _total(single.turns)
        rows = []
        for one in ready:
            if one.failure is not None:
                rows.append(self._row(one.contender, ERROR, one.failure))
                continue
            total = _total(one.turns)
            forward, backward = (
                statistics.median(times.stages_ms[stage] for times in one.turns) for stage in (0, 1)
            )
            totals = [times.total_ms for times in one.turns]
            numbers: dict[str, Any] = {
                "forward_ms": forward,
                "backward_ms": backward,
                "total_ms": total,
                "spread": (max(totals) - min(totals)) / total,
                "extra_gib": max(times.extra_bytes for times in one.turns) / 2**30,
                "budget": one.verdict.share,
                "error": max(one.errors.values()),
            }
            if one is not single:
                numbers |= {
                    "efficiency": alone and alone / total / self.team.size,
                    "sent_bytes": one.sent,
                    "hidden": one.timeline and one.timeline.hidden,
                    "error_ratio": single and _ratio(one.errors, single.errors),
                }
            told = [one.sharded.about, one.unseen and f"transfers not seen: {one.unseen}"]
            rows.append(self._row(one.contender, OK, "; ".join(filter(None, told)), **numbers))
        return rows

    def _row(
        self, contender: RingContender, status: str, detail: str = "", **numbers: Any
    ) -> RingRow:
        return RingRow(
            case=self.case.name,
            title=self.case.title,
            length=self.case.length,
            ranks=self.team.size,
            contender=contender.name,
            ours=contender.ours,
            status=status,
            detail=detail,
            stamp=stamp(contender),
            **numbers,
        )


def judged(gate: Gate | None, got: Mapping[str, Tensor]) -> tuple[Verdict, dict[str, float]] | None:
    """What is to be said of the results of a whole sequence.

    Args:
        gate: With the truth, of all queries or a sample; None on ranks that have nothing to say.
        got: Output and gradients as `results_of` names them, of all queries.

    Returns:
        The verdict, and the error of each as a share of its norm; None without a gate.
    """
    if gate is None:
        return None
    checked = dict(got)
    if gate.rows is not None:
        others = torch.ones(got["output"].shape[2], dtype=torch.bool, device=gate.rows.device)
        others[gate.rows] = False
        # No gradient comes in there, so none may come out; nor may the rest of the output break.
        finite = bool(got["output"].isfinite().all())
        if not finite or bool((got["query gradient"][:, :, others] != 0).any()):
            where = "query gradient of queries without a gradient" if finite else "output"
            return Verdict(float("inf"), where), {}
        for name in ("output", "query gradient"):
            checked[name] = got[name][:, :, gate.rows]
    errors = {
        name: float((checked[name].double() - want).norm() / want.norm())
        for name, want in gate.want.items()
    }
    return judge(checked, gate.want, gate.plain), errors


def stamp(contender: RingContender) -> str:
    """What a contender's numbers hold for."""
    about = machine()
    parts = [about["device"], f"torch {about['torch']}"]
    if torch.cuda.is_available():
        parts.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    own = f"triton {about.get('triton', 'none')}, {digests()}, {kernel_versions()}"
    return ", ".join([*parts, own if contender.ours else f"bench {_digest(_BESIDE, 'ring*.py')}"])


def digests() -> str:
    """Of this benchmark, and of the files that our speed depends on."""
    parallel = _digest(_PARALLEL, "*.py")
    return f"bench {_digest(_BESIDE, 'ring*.py')}, sources {source_hash()}, parallel {parallel}"


_BESIDE = Path(__file__).parent
_PARALLEL = Path(inspect.getfile(hf_attn_plugin)).parent / "parallel"


@functools.cache
def _digest(folder: Path, names: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob(names)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _total(turns: Sequence[Times]) -> float:
    return statistics.median(times.total_ms for times in turns)


def _ratio(errors: Mapping[str, float], single: Mapping[str, float]) -> float | None:
    """The worst error as a multiple of one GPU's in the same result."""
    ratios = (errors[name] / single[name] for name in errors if single[name])
    return max(ratios, default=None)
