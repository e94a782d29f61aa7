"""``hf-attn bench decode``: decoding, dense and with SparQ, from kernels to whole models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import counters, decoding, generation
from .decoding import CleanClock
from .quality import SCORES, Errors, Scores, measure_errors
from .report import ERROR, MISSING, OK, WRONG, Results
from .sparq_decoding import (
    DOES_NOT_FIT,
    SHAPES,
    SPARQ,
    VARIANTS,
    Shape,
    SparQBench,
    SparQRow,
    equal_keys,
    neighbouring_keys,
    random_inputs,
    stamp,
)
from .sparq_figures import draw_quality, draw_times
from .sparq_numerics import Setting
from .sparq_report import (
    CROSSOVER,
    DATA,
    FAST,
    PAGE,
    QUALITY_PICTURE,
    RESULTS,
    SETTINGS,
    TABLE,
    TIME_PICTURE,
    Report,
)
from .timing import copy_bytes_per_second

PARTS = {
    "dense": "dense kernels: windows, several queries, static caches (decoding.md)",
    TABLE: "SparQ beside the fastest dense kernel (sparq.md)",
    SETTINGS: "the settings whose scores hf-attn sweep has measured (sparq.md)",
    CROSSOVER: "from which length on SparQ pays (sparq.md)",
    "data": "whether what the cache holds changes the time (sparq.md)",
    "errors": "SparQ's errors on the keys of a model that reads text: --model; no GPU needed",
    "generation": "model.generate() (generation.md)",
    "counters": "bytes counted and bytes read, by Nsight Compute (counters.md)",
    "page": "sparq.md with its pictures, and generation.md, from what is kept; no GPU needed",
}
WITHOUT_GPU = ("errors", "page")

_ON_PAGE = (TABLE, SETTINGS, CROSSOVER, "data")
_SETTINGS_SHAPES = (SHAPES[1], SHAPES[4])
_COPIES = VARIANTS[:4]
_BATCHES, _KV_HEADS = (1, 8, 32), (8, 32)
_BYTES = tuple(2**power for power in range(25, 32))  # of keys and values: 32 MiB to 2 GiB
_BYTES_PER_KEY = Shape(1, 1, 1).dense_bytes
_SHORTEST, _LONGEST = 256, 131072
_DATA = {
    "random": random_inputs,
    "all equal": equal_keys,
    "neighbours that matter": neighbouring_keys,
}
_COPY = "copy"
_BRIEF_SECONDS = 0.06  # of each of the crossover's several hundred


def chosen_parts(names: Sequence[str], model: Path | None) -> list[str]:
    """The parts to run: those named, or all that can be.

    Raises:
        ValueError: There is no such part, or it needs what was not given.
    """
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(
            f"hf-attn bench decode has no part {', '.join(unknown)}: choose from {', '.join(PARTS)}"
        )
    if "errors" in names and model is None:
        raise ValueError(
            "hf-attn bench decode errors needs --model with a folder that eval/lab.py has made."
        )
    if names:
        return list(dict.fromkeys(names))
    return [name for name in PARTS if name != "errors" or model is not None]


def run(
    out: Path,
    *,
    command: str,
    parts: Sequence[str] = (),
    quick: bool = False,
    fresh: bool = False,
    figures: bool = True,
    layers: int | None = None,
    model: Path | None = None,
    scores: Path | None = None,
    say: Callable[[str], None],
) -> int:
    """Measure, print tables, write pages and pictures.

    Args:
        out: The folder.
        command: The command line, for the pages' first lines.
        parts: Some of `PARTS`; none for all.
        quick: The main cases only.
        fresh: Measure again what is kept in ``out``.
        figures: Whether to draw.
        layers: Of the model that generates, instead of its own.
        model: A folder of eval/lab.py, on whose keys errors are measured.
        scores: What ``hf-attn sweep`` wrote for such a model; None is `SCORES`.
        say: Receives progress, a line at a time.

    Returns:
        The exit status: 1 where numbers are wrong or ours could not run.

    Raises:
        ValueError: A part is not there or needs what is not there.
    """
    wanted = chosen_parts(parts, model)
    refusal = counters.refuses() if "counters" in wanted else None
    if refusal is not None and parts:
        raise ValueError(refusal)
    if refusal is not None:
        wanted = [part for part in wanted if part != "counters"]
        say(f"left out: {refusal}")
    on_page = [part for part in wanted if part in _ON_PAGE]
    bad = False
    if on_page or set(wanted) & set(WITHOUT_GPU):
        known = Scores.read(scores or SCORES)
        if "errors" in wanted and model is not None:
            write_errors(out, model, known, say)
        results = Results(out / RESULTS, SparQRow)
        if on_page:
            if fresh:
                results.rows.clear()
            bad |= measure_sparq(results, on_page, known, quick, say)
        report = make_report(results, known, out)
        print(report.text([DATA if part == "data" else part for part in on_page]))
        write_page(report, out, command, figures and not quick)
        say(str(out / PAGE))
    if "dense" in wanted:
        bad |= bool(decoding.run(out, command=command, quick=quick))
    kept = Results(out / generation.RESULTS, generation.GenerationRow)
    if "page" in wanted and "generation" not in wanted and kept.rows:
        generation.write_page(out / generation.PAGE, list(kept.rows.values()), command)
    if "generation" in wanted:
        bad |= bool(
            generation.run(out, command=command, layers=layers, quick=quick, fresh=fresh, say=say)
        )
    if "counters" in wanted:
        bad |= bool(counters.run(out, command=command, say=say))
    return 1 if bad else 0


def work(what: str) -> int:
    """What Nsight Compute watches."""
    return counters.work(what)


def write_errors(out: Path, model: Path, scores: Scores, say: Callable[[str], None]) -> None:
    """Measure what all settings that are timed are off by, on the keys of a model."""
    settings = list(dict.fromkeys((*VARIANTS, *scores.settings)))
    errors = measure_errors(model, model / "held_out.txt", settings)
    errors.write(out)
    say("\n".join(f"{title}: {error:.1%}" for title, error in errors.errors.items()))


def measure_sparq(
    results: Results[SparQRow],
    parts: Sequence[str],
    scores: Scores,
    quick: bool,
    say: Callable[[str], None],
    device: torch.device | None = None,
    clock: Any = None,
) -> bool:
    """Measure the parts that are on one page; whether anything was wrong."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    clock = clock or CleanClock(device)
    _measure_copy(results, clock, device)
    every = SparQBench(clock, device, results, say)
    fast = SparQBench(clock, device, results, say, steps=(FAST,))
    brief = SparQBench(clock, device, results, say, steps=(FAST,), seconds=_BRIEF_SECONDS)
    rows: list[SparQRow] = []
    if TABLE in parts:
        for shape in SHAPES[-2:] if quick else SHAPES:
            rows += every.measure(TABLE, shape, VARIANTS[:2] if quick else VARIANTS)
    if SETTINGS in parts:
        for shape in _SETTINGS_SHAPES[-1:] if quick else _SETTINGS_SHAPES:
            rows += fast.measure(SETTINGS, shape, scores.settings)
    if CROSSOVER in parts:
        for shape in crossover_shapes(quick):
            copies = _COPIES if shape.batch == _BATCHES[1] else _COPIES[:1]
            rows += brief.measure(CROSSOVER, shape, copies)
    if "data" in parts:
        for shape, (name, make) in itertools.product(_SETTINGS_SHAPES, _DATA.items()):
            rows.append(fast.measure_alone(DATA + name, shape, Setting(), make))
    failed = [row for row in rows if row.contender in SPARQ and row.status in (ERROR, MISSING)]
    failed = [row for row in failed if row.detail != DOES_NOT_FIT]
    return bool(failed) or any(row.status == WRONG for row in rows)


def crossover_shapes(quick: bool = False) -> list[Shape]:
    """Powers of two, for few and many sequences, with and without grouped heads."""
    wanted = _BYTES[2::2] if quick else _BYTES
    return [
        shape
        for kv_heads, batch, size in itertools.product(_KV_HEADS, _BATCHES, wanted)
        for shape in [Shape(batch, size // (batch * kv_heads * _BYTES_PER_KEY), kv_heads)]
        if _SHORTEST <= shape.length <= _LONGEST
    ]


def make_report(results: Results[SparQRow], scores: Scores, out: Path) -> Report:
    """What is kept in a folder."""
    rows = list(results.rows.values())
    copies = [row for row in rows if row.group == _COPY and row.ms and row.nbytes]
    rate = None
    if copies:
        rate = (copies[-1].nbytes or 0) / (copies[-1].ms or 1.0) * 1e3
    rows = [row for row in rows if row.group != _COPY]
    return Report(rows, scores, Errors.read(out), rate)


def write_page(report: Report, out: Path, command: str, figures: bool) -> None:
    """The page of SparQ's step, with its pictures where there is something to draw."""
    stamps = "; ".join(dict.fromkeys(row.stamp for row in report.rows))
    rate = report.copy_rate
    about = stamps if rate is None else f"{stamps}; a copy moves {rate / 1e12:.2f} TB/s"
    if figures:
        title = "A decoding step: SparQ (r=32, k=128) and dense attention"
        if report.group(CROSSOVER):
            draw_times(report.group(CROSSOVER), out / TIME_PICTURE, title)
        if report.group(SETTINGS):
            title = "Speed-up against quality"
            draw_quality(report.group(SETTINGS), report.scores, out / QUALITY_PICTURE, title)
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text(report.markdown(command, about, out), encoding="utf-8")


def _measure_copy(results: Results[SparQRow], clock: Any, device: torch.device) -> None:
    """Keep how fast memory is, as a row."""
    size = 4 * 2**30
    row = SparQRow(_COPY, _COPY, 0, 0, 0, _COPY, "", OK, "", stamp())
    if results.get(row.key, row.stamp) is None:
        rate = copy_bytes_per_second(clock, device, size)
        results.add(dataclasses.replace(row, ms=2 * size / rate * 1e3, nbytes=2 * size))
