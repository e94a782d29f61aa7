"""What ``hf-attn bench ring`` measured: rows, tables, the page and the timeline's picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import CANNOT, ERROR, OK, WRONG, markdown_table, text_table
from .ring_cases import CASES, TO_REACH
from .ring_contenders import SINGLE
from .ring_traffic import Timeline

# Errors of two correct ways of rounding differ by chance in the third digit.
_NO_LARGER = 1.01
_COMPUTING, _MOVING = "#0072B2", "#E69F00"


@dataclasses.dataclass(frozen=True)
class RingRow:
    """One contender on one case.

    Attributes:
        case: The case's name.
        title: What the case is called in tables.
        length: Tokens of the whole sequence.
        ranks: GPUs among which they are spread.
        contender: Its name.
        ours: Whether it is this project's.
        status: ok, FAILED numerics, cannot (it has no such pattern), or error.
        detail: What is wrong, where the status is not ok; else how the sequence is spread.
        stamp: Devices and versions that the numbers hold for.
        forward_ms: Median milliseconds of the forward pass, of the slowest rank.
        backward_ms: Of the backward pass.
        total_ms: Of both together.
        spread: Largest less smallest total of its turns, as a share of the median.
        efficiency: One GPU's time, divided by the time and by the number of GPUs.
        sent_bytes: What the rank that sends most sends, forward and backward.
        extra_gib: Most memory of a rank above its inputs, in GiB.
        hidden: The share of the transfers' time in which rank 0 computed something, too.
        budget: The worst error as a share of what is allowed.
        error: The worst error of a result against float64, as a share of its norm.
        error_ratio: The worst of the results' errors as a multiple of one GPU's.
    """

    case: str
    title: str
    length: int
    ranks: int
    contender: str
    ours: bool
    status: str
    detail: str = ""
    stamp: str = ""
    forward_ms: float | None = None
    backward_ms: float | None = None
    total_ms: float | None = None
    spread: float | None = None
    efficiency: float | None = None
    sent_bytes: int | None = None
    extra_gib: float | None = None
    hidden: float | None = None
    budget: float | None = None
    error: float | None = None
    error_ratio: float | None = None

    @property
    def key(self) -> str:
        """What the row is kept under."""
        return row_key(self.case, self.length, self.ranks, self.contender)


def row_key(case: str, length: int, ranks: int, contender: str) -> str:
    """The key of a row."""
    return f"{case} {length} {ranks} {contender}"


def ring_table(rows: Sequence[RingRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of one case."""
    header = [
        f"{rows[0].title}, S={rows[0].length}, {rows[0].ranks} GPUs",
        "fwd ms",
        "bwd ms",
        "fwd+bwd ms",
        "spread",
        "efficiency",
        "sent MiB",
        "hidden",
        "extra GiB",
        "error/allowed",
        "error",
        "of one GPU's",
        "to reach",
    ]
    cells = []
    for row in rows:
        if row.status != OK:
            cells.append([row.contender, row.status, *["-"] * (len(header) - 2)])
            continue
        sent = None if row.sent_bytes is None else row.sent_bytes / 2**20
        cells.append(
            [
                row.contender,
                _number(row.forward_ms, 2),
                _number(row.backward_ms, 2),
                _number(row.total_ms, 2),
                _percent(row.spread, 1),
                _number(row.efficiency, 3),
                _number(sent, 1),
                _percent(row.hidden, 0),
                _number(row.extra_gib, 2),
                _number(row.budget, 2),
                "-" if row.error is None else f"{row.error:.2e}",
                _number(row.error_ratio, 3),
                _reach(row),
            ]
        )
    return header, cells


def _reach(row: RingRow) -> str:
    """What our schedules are to reach on two GPUs, and what of it they do not."""
    case = CASES.get(row.case)
    known = case is not None and row.length == case.length and row.ranks == 2 and row.ours
    if not known or row.case not in TO_REACH or row.efficiency is None or row.total_ms is None:
        return "-"
    efficiency, most_ms = TO_REACH[row.case]
    short = {
        f"{efficiency:.2f}": row.efficiency < efficiency,
        f"{most_ms or 0:.0f} ms": most_ms is not None and row.total_ms > most_ms,
        "error 1.0": row.error_ratio is not None and row.error_ratio > _NO_LARGER,
    }
    missed = [what for what, so in short.items() if so]
    return f"no: {', '.join(missed)}" if missed else "yes"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def ring_notes(rows: Iterable[RingRow]) -> list[str]:
    """How ours spread each case, and what was not measured and why; what holds often only once."""
    lines: dict[str, None] = {}
    for row in rows:
        where = f"{row.contender} on {row.title}, S={row.length}"
        if row.status == OK and row.detail:
            lines[f"{where}: {row.detail}"] = None
        elif row.status == CANNOT:
            lines[f"{row.contender}: {row.title}: cannot: {row.detail}"] = None
        elif row.status != OK:
            lines[f"{where}: {row.status}: {row.detail}".rstrip(": ")] = None
    return list(lines)


def grouped(rows: Iterable[RingRow]) -> list[list[RingRow]]:
    """Rows of one case, length and number of ranks together, in the order in which they came."""
    groups: dict[tuple[str, int, int], list[RingRow]] = {}
    for row in rows:
        groups.setdefault((row.case, row.length, row.ranks), []).append(row)
    return list(groups.values())


def ring_text(rows: Sequence[RingRow]) -> str:
    """All tables and notes, for a terminal."""
    parts = [text_table(*ring_table(group)) for group in grouped(rows)]
    return "\n\n".join([*parts, "\n".join(ring_notes(rows))])


def ring_page(
    rows: Sequence[RingRow],
    model: Sequence[tuple[list[str], list[list[str]]]],
    model_notes: Sequence[str],
    command: str,
    about: Mapping[str, Any],
) -> str:
    """The page: command, machine, tables, notes, the models' steps.

    Args:
        rows: Of attention.
        model: Tables of whole models, header and cells.
        model_notes: Lines below them.
        command: The command line.
        about: Machine and versions; ``picture`` is the timeline's, where there is one.
    """
    facts = ", ".join(f"{key} {value}" for key, value in about.items() if key != "picture")
    parts = [f"<!-- Made by: {command} -->", "# One sequence over several GPUs", facts]
    if rows:
        parts += [_MEANING, *(markdown_table(*ring_table(group)) for group in grouped(rows))]
        said = ring_notes(rows)
        if said:
            parts.append("\n".join(f"- {line}" for line in said))
    if "picture" in about:
        parts += ["## Timeline", _PICTURE, f"![timeline]({about['picture']})"]
    if model:
        parts += ["## A training step", *(markdown_table(*table) for table in model)]
        parts.append("\n".join(f"- {line}" for line in model_notes))
    return "\n\n".join(part for part in parts if part) + "\n"


_MEANING = (
    "Forward and backward of one attention call, batch 1, bfloat16, random inputs: medians of "
    "CUDA events, of the slowest rank, caches cleared, the ranks' GPUs made to wait for each "
    "other before every run; “spread” is what its turns differ by. “efficiency” is the time of "
    f"`{SINGLE}` (our fastest way, on rank 0 while the others wait) divided by the time and by the"
    " number of GPUs. “sent” counts the bytes that a rank hands to the others, forward and "
    "backward; “hidden” is the share of the time of NCCL's kernels on rank 0 in which it "
    "computed, too. “error/allowed”: the worst error against float64 in outputs and gradients, "
    "all queries of a short sequence that is spread alike and a sample of the queries of this "
    "one, as a share of twice plain PyTorch's plus a rounding floor; times with more than 1 are "
    "not reported. “error” is the worst norm of an error as a share of the result's, on this "
    "sequence; beside it the errors as a multiple of one GPU's, the worst of output and three "
    "gradients. “to reach”: the efficiency, the time and the error that two H200s are to reach."
)
_PICTURE = (
    "Rank 0, one forward and backward, from PyTorch's profiler. NCCL's kernels include the time in "
    "which they wait for the other ranks. In brackets the share of their time in which something "
    "was computed, too."
)


# -- timelines -------------------------------------------------------------------------------------


class Timelines:
    """Timelines in a JSON file, by case and contender.

    Args:
        path: The file; made when the first comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: dict[str, dict[str, Timeline]] = {}
        if path.exists():
            for case, lanes in json.loads(path.read_text(encoding="utf-8")).items():
                self.kept[case] = {name: _timeline(fields) for name, fields in lanes.items()}

    def add(self, case: str, found: Mapping[str, Timeline]) -> None:
        """Keep what the contenders did on a case, instead of what was kept of it."""
        self.kept[case] = dict(found)
        content = {
            name: {contender: dataclasses.asdict(lanes) for contender, lanes in case.items()}
            for name, case in self.kept.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, default=float)
        self.path.write_text(text + "\n", encoding="utf-8")


def _timeline(fields: Mapping[str, Any]) -> Timeline:
    lanes = ([(start, end) for start, end in fields[name]] for name in ("computing", "moving"))
    return Timeline(*map(tuple, lanes))


def draw_timelines(kept: Mapping[str, Mapping[str, Timeline]], path: Path) -> Path:
    """Draw two lanes, computation and transfers, for every contender (row) and case (column).

    Args:
        kept: By the case's title, by contender.
        path: The file to write; its suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hf-attn-plugin[plot]'") from error
    names = list(dict.fromkeys(name for lanes in kept.values() for name in lanes))
    if not names:
        raise ValueError("there are no timelines to draw: run hf-attn bench ring first.")
    figure = Figure(figsize=(3.8 * len(kept) + 0.8, 1.25 * len(names) + 0.8), layout="constrained")
    axes = figure.subplots(len(names), len(kept), squeeze=False, sharex="col")
    for column, (title, lanes) in zip(axes.T, kept.items(), strict=True):
        column[0].set_title(f"{title}\n", fontsize=10, loc="left")
        lowest = max(index for index, name in enumerate(names) if name in lanes)
        column[lowest].set_xlabel("ms")
        column[lowest].tick_params(labelbottom=True)
        for axis, name in zip(column, names, strict=True):
            timeline = lanes.get(name)
            if timeline is None:
                axis.set_axis_off()
                continue
            for place, spans, color in (
                (1, timeline.computing, _COMPUTING),
                (0, timeline.moving, _MOVING),
            ):
                bars = [(start / 1e3, (end - start) / 1e3) for start, end in spans]
                axis.broken_barh(bars, (place - 0.4, 0.8), facecolors=color)
            axis.set_yticks([1, 0], ["computation", "transfers"], fontsize=8)
            axis.set_ylim(-0.6, 1.6)
            hidden = "nothing sent" if timeline.hidden is None else f"{timeline.hidden:.0%} hidden"
            axis.set_title(f"{name} ({hidden})", fontsize=8, loc="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def bad(rows: Iterable[RingRow]) -> bool:
    """Whether numbers were wrong, or something of ours could not run."""
    return any(row.status == WRONG or (row.ours and row.status == ERROR) for row in rows)
