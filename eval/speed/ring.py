"""``hf-attn bench ring``: one sequence over several GPUs, beside PyTorch's ``context_parallel``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .report import Results, machine, text_table
from .ring_attention import RingBench
from .ring_cases import CASES, chosen_cases
from .ring_contenders import chosen_contenders, ring_contenders
from .ring_report import RingRow, Timelines, bad, draw_timelines, ring_page, ring_text
from .ring_team import Team, check_ranks, clock_of, joined, start
from .timing import matmul_tflops

RESULTS, STEPS, TIMELINES = "ring.json", "ring_model.json", "ring_timeline.json"
PAGE, PICTURE = "ring.md", "ring_timeline.png"
MODEL, DRAW = "model", "draw"

__all__ = ["DRAW", "Settings", "check", "draw", "listing", "start", "work"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was asked for, in plain values that a new process can be given.

    Attributes:
        out: Folder for results, page and picture.
        what: Names of cases, none for all, and `MODEL` for the steps of models; alone or after
            cases.
        command: The command line, for the page.
        device: ``cuda`` or ``cpu``.
        peers: Whom to compare with; None for all.
        quick: An eighth of the lengths.
        fresh: Measure again what is kept.
        figures: Whether to draw the timeline.
        rounds: Turns of every contender.
        tokens: Of a model's step.
        layers: Of the models.
    """

    out: str
    what: tuple[str, ...] = ()
    command: str = ""
    device: str = "cuda"
    peers: tuple[str, ...] | None = None
    quick: bool = False
    fresh: bool = False
    figures: bool = True
    rounds: int = 3
    tokens: int | None = None
    layers: int | None = None


def check(settings: Settings, ranks: int | None) -> int:
    """How many processes to start.

    Raises:
        ValueError: What was asked for cannot be measured, or not here.
    """
    chosen_contenders(_peers(settings))
    chosen_cases([name for name in settings.what if name != MODEL], 2)
    return check_ranks(ranks, settings.device)


def work(rank: int | None, ranks: int, meeting: str | None, settings: Settings, say: Any) -> int:
    """One of the processes.

    Args:
        rank: Its number; None where torchrun knows it.
        ranks: How many there are.
        meeting: The file through which they meet; None where torchrun says.
        settings: What was asked for.
        say: Receives progress, a line at a time.

    Returns:
        The exit status, of rank 0 for all: 1 where numerics failed, or ours could not run.
    """
    with joined(rank, ranks, meeting, settings.device) as team:
        quiet: Callable[[str], None] = lambda line: None  # noqa: E731 - one speaks
        say = say if team.leads else quiet
        cases = tuple(name for name in settings.what if name != MODEL)
        failed = False
        if cases or not settings.what:
            failed = _attention(team, dataclasses.replace(settings, what=cases), say)
        if MODEL in settings.what:
            failed = _steps(team, settings, say) or failed
        return int(failed and team.leads)


def _attention(team: Team, settings: Settings, say: Callable[[str], None]) -> bool:
    tiny = team.device.type == "cpu"
    cases = chosen_cases(settings.what, team.size, quick=settings.quick, tiny=tiny)
    out, clock = Path(settings.out), clock_of(team.device)
    bench = RingBench(
        team,
        clock,
        Results(out / RESULTS, RingRow, settings.fresh),
        Timelines(out / TIMELINES),
        rounds=1 if tiny else settings.rounds,
        say=say,
    )
    about: dict[str, Any] = {"ranks": team.size, **machine()}
    if not tiny:
        about["8192³ matmul"] = f"{matmul_tflops(clock, team.device, torch.bfloat16):.0f} TFLOP/s"
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    peers = [] if tiny and settings.peers is None else _peers(settings)  # they need a GPU
    # A run that is stopped leaves a page, too.
    bench.written = lambda: say(str(_write_page(out, settings.command, about)))
    rows = bench.run(cases, chosen_contenders(peers))
    if not team.leads:
        return False
    print(ring_text(rows), flush=True)
    if settings.figures:
        try:
            print(draw(out))
        except (ImportError, ValueError) as error:
            print(f"no picture drawn: {error}. `hf-attn bench ring draw --out {out}` draws it.")
    print(_write_page(out, settings.command, about))
    return bad(rows)


def _steps(team: Team, settings: Settings, say: Callable[[str], None]) -> bool:
    from .ring_model import StepRow, run_models, step_notes, step_table  # models take seconds

    out = Path(settings.out)
    about = {"ranks": team.size, **machine()}
    results = Results(out / STEPS, StepRow, settings.fresh)
    rows, failed = run_models(
        team,
        clock_of(team.device),
        results,
        tokens=settings.tokens,
        layers=settings.layers,
        quick=settings.quick,
        say=say,
        written=lambda: say(str(_write_page(out, settings.command, about))),
    )
    if team.leads:
        print("\n".join([text_table(*step_table(rows)), *step_notes(rows)]))
        print(_write_page(out, settings.command, about), flush=True)
    return failed


def draw(out: Path) -> Path:
    """Draw the timelines that are kept in a folder.

    Raises:
        ValueError: None are.
        ImportError: matplotlib is not installed.
    """
    return draw_timelines(Timelines(out / TIMELINES).kept, out / PICTURE)


def listing() -> str:
    """Cases and contenders, a line each."""
    lines = ["cases of hf-attn bench ring:"]
    lines += [f"  {case.name:<20} {case.title}, S={case.length}" for case in CASES.values()]
    lines.append("contenders of hf-attn bench ring (ours are always measured):")
    lines += [f"  {one.name:<20} {one.title}" for one in ring_contenders().values()]
    return "\n".join(lines)


def _write_page(out: Path, command: str, about: dict[str, Any]) -> Path:
    """The page of everything that is kept in the folder, of this run and of earlier ones."""
    rows = list(Results(out / RESULTS, RingRow).rows.values())
    if (out / PICTURE).exists():
        about = {**about, "picture": PICTURE}
    tables, notes = [], []
    if (out / STEPS).exists():
        from .ring_model import StepRow, step_notes, step_table

        steps = list(Results(out / STEPS, StepRow).rows.values())
        tables, notes = [step_table(steps)], step_notes(steps)
    page = ring_page(rows, tables, notes, command, about)
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text(page, encoding="utf-8")
    return out / PAGE


def _peers(settings: Settings) -> list[str] | None:
    return None if settings.peers is None else list(settings.peers)
