"""The speed table: every contender on every case, after the numerics gate of the same run."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch

from hf_attn_plugin.patterns import Pattern

from .cases import Case, count_pairs
from .contenders import Contender, bench_hash
from .numerics import Attention, Gate, Inputs, Verdict, sample_rows
from .report import CANNOT, ERROR, MISSING, OK, WRONG, Results, Row, machine, row_key
from .timing import Clock, Times, time_limit, time_stages

Say = Callable[[str], None]
_ROUNDS = 3


@dataclasses.dataclass
class Bench:
    """What all measurements of a run share.

    Attributes:
        clock: Times and counts memory.
        device: Where.
        matmul_tflops: The rate of a large matrix product, or a function that measures it.
        results: Rows, kept.
        dtype: Of the inputs.
        peer_timeout: Seconds that a contender may take to its first results, compilation included.
        say: Receives a line per row as it comes.
    """

    clock: Clock
    device: torch.device
    matmul_tflops: float
    results: Results[Row]
    dtype: torch.dtype = torch.bfloat16
    peer_timeout: float = 240.0
    say: Say = lambda line: None
    # Verdicts on the short version of a pattern, which all of its lengths share.
    _verdicts: dict[tuple[str, str], Verdict] = dataclasses.field(default_factory=dict)

    def run(self, cases: Iterable[Case], contenders: Sequence[Contender]) -> list[Row]:
        """Every contender on every case; rows that are kept from an earlier run are used again."""
        return [row for case in cases for row in _OnCase(self, case).measure(contenders)]

    def kept(self, case: Case, contender: Contender) -> Row | None:
        """The row of an earlier run, where it still holds."""
        if contender.missing() is not None:
            return None
        key = row_key(case.name, case.length, contender.name)
        row = self.results.get(key, self.stamp(contender))
        if row is not None:
            self.say(f"{case.title}, S={case.length}: {contender.name}: kept from an earlier run")
        return row

    def stamp(self, contender: Contender) -> str:
        """What a contender's numbers hold for."""
        about = machine()
        parts = [
            about["device"],
            f"torch {about['torch']}",
            f"triton {about.get('triton', 'none')}",
        ]
        return ", ".join([*parts, f"bench {bench_hash()}", contender.version()])


@dataclasses.dataclass
class _Ready:
    """A contender behind its gate, and its turns so far."""

    contender: Contender
    attention: Attention
    verdict: Verdict
    turns: list[Times] = dataclasses.field(default_factory=list)
    failure: Exception | None = None


class _OnCase:
    """One case: inputs and references are made when the first contender needs them."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self.bench, self.case = bench, case
        self.inputs: Inputs | None = None
        self.short: Gate | None = None
        self.sampled: Gate | None = None
        self.pairs = 0

    def measure(self, contenders: Sequence[Contender]) -> list[Row]:
        """A row for each, whatever happens.

        All pass the gate before any is timed; then they take turns, so that a card that gets
        warmer, or a busy host, slows down all alike.
        """
        rows: dict[str, Row] = {}
        ready: list[_Ready] = []
        for contender in contenders:
            kept = self.bench.kept(self.case, contender)
            outcome = kept or self._enter(contender)
            if isinstance(outcome, _Ready):
                ready.append(outcome)
            else:
                rows[contender.name] = outcome
            free(self.bench.device)
        self.short = self.sampled = None
        for _ in range(_ROUNDS):
            for one in ready:
                self._time(one)
        for one in ready:
            rows[one.contender.name] = self._timed_row(one)
        for row in rows.values():
            self.bench.results.add(row)
            time = f"{row.total_ms:.2f} ms" if row.total_ms is not None else row.detail
            self.bench.say(f"{row.title}, S={row.length}: {row.contender}: {row.status} {time}")
        self.inputs = None
        ready.clear()
        free(self.bench.device)
        return [rows[contender.name] for contender in contenders]

    def _enter(self, contender: Contender) -> _Ready | Row:
        """The contender with its gate behind it, or the row that says why not."""
        missing = contender.missing()
        if missing is not None:
            return self._row(contender, MISSING, missing)
        refused = contender.refuses(self.case)
        if refused is not None:
            return self._row(contender, CANNOT, refused)
        try:
            self._prepare()
            what = f"{contender.name} on {self.case.title}"
            with time_limit(self.bench.peer_timeout, what), warnings.catch_warnings():
                if not contender.ours:
                    warnings.simplefilter("ignore")
                attention, verdict = self._pass_gate(contender)
        except Exception as error:  # whatever a peer does must not stop the others
            return self._failure(contender, error)
        if verdict.good:
            return _Ready(contender, attention, verdict)
        detail = f"{verdict.where}: {verdict.share:.2g} times the error that is allowed"
        return self._row(contender, WRONG, detail)

    def _failure(self, contender: Contender, error: Exception) -> Row:
        if contender.ours:
            self.bench.say("".join(traceback.format_exception(error)))
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        # Compilers put the place first and the reason last.
        text = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
        return self._row(contender, ERROR, f"{type(error).__name__}: {text[:300]}")

    def _prepare(self) -> None:
        """Inputs and the reference at full length."""
        if self.inputs is not None:
            return
        pattern = self._pattern()
        self.pairs = count_pairs(pattern, self.bench.device)
        self.inputs = self._random(self.case)
        rows = sample_rows(self.case.length, self.bench.device)
        self.sampled = Gate(self.inputs, pattern, rows)

    def _pass_gate(self, contender: Contender) -> tuple[Attention, Verdict]:
        """The contender's call, judged on the short version and on a sample of the long one."""
        key = (self.case.name, contender.name)
        if key not in self.bench._verdicts:
            short = self.case.for_gate()
            pattern = short.pattern(self.bench.device)
            if self.short is None:
                self.short = Gate(self._random(short), pattern)
            attention = contender.prepare(short, pattern, self.bench.device)
            self.bench._verdicts[key] = self.short.judge(attention)
        verdict = self.bench._verdicts[key]
        attention = contender.prepare(self.case, self._pattern(), self.bench.device)
        if verdict.good:
            assert self.sampled is not None
            verdict = max(verdict, self.sampled.judge(attention), key=lambda v: v.share)
        return attention, verdict

    def _time(self, one: _Ready) -> None:
        """One turn of a contender; what breaks now gets no further turn."""
        inputs, attention = self.inputs, one.attention
        assert inputs is not None
        leaves, grad = inputs.leaves, inputs.grad
        if one.failure is not None:
            return
        try:
            times = time_stages(
                self.bench.clock,
                [
                    lambda _: attention(*leaves),
                    lambda output: torch.autograd.grad(output, leaves, grad),
                ],
                loaded=bool(one.turns),
            )
            one.turns.append(times)
        except Exception as error:  # as above
            one.failure = error

    def _timed_row(self, one: _Ready) -> Row:
        if one.failure is not None:
            return self._failure(one.contender, one.failure)
        totals = [times.total_ms for times in one.turns]
        total = statistics.median(totals)
        forward, backward = (
            statistics.median(times.stages_ms[stage] for times in one.turns) for stage in (0, 1)
        )
        return self._row(
            one.contender,
            OK,
            forward_ms=forward,
            backward_ms=backward,
            total_ms=total,
            spread=(max(totals) - min(totals)) / total,
            extra_gib=max(times.extra_bytes for times in one.turns) / 2**30,
            tflops=3.5 * self.case.forward_flops(self.pairs) / total / 1e9,
            matmul_tflops=self.bench.matmul_tflops,
            error=one.verdict.share,
        )

    def _pattern(self) -> Pattern:
        return self.case.pattern(self.bench.device)

    def _random(self, case: Case) -> Inputs:
        return Inputs.random(
            batch=1,
            heads=case.heads,
            kv_heads=case.kv_heads,
            tokens=case.length,
            head_dim=case.head_dim,
            dtype=self.bench.dtype,
            device=self.bench.device,
        )

    def _row(self, contender: Contender, status: str, detail: str = "", **numbers: float) -> Row:
        return Row(
            case=self.case.name,
            title=self.case.title,
            length=self.case.length,
            contender=contender.name,
            ours=contender.ours,
            status=status,
            detail=detail,
            stamp=self.bench.stamp(contender) if status == OK else "",
            **numbers,
        )


def failed(rows: Iterable[Row]) -> bool:
    """Whether numerics failed, or something of ours could not run."""
    return any(row.status == WRONG or (row.ours and row.status == ERROR) for row in rows)


def free(device: torch.device) -> None:
    """Give back memory that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
