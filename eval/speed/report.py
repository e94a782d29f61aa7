"""What was measured, kept in a file and written as tables."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import transformers

CHOICE = "flash"
"""The contender that chooses among the others."""

OK, WRONG, CANNOT, MISSING, ERROR = "ok", "FAILED numerics", "cannot", "missing", "error"


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender on one case.

    Attributes:
        case: The case's name.
        title: What the case is called in tables.
        length: Tokens.
        contender: Its name.
        ours: Whether it is this project's.
        status: ok, FAILED numerics, cannot (it has no such pattern), missing (not installed), or
            error.
        detail: What is wrong, where the status is not ok.
        stamp: Device and versions that the numbers hold for.
        forward_ms: Median milliseconds of the forward pass.
        backward_ms: Of the backward pass.
        total_ms: Of both together.
        spread: Largest less smallest total of its turns, as a share of the median.
        extra_gib: Peak memory above the inputs, in GiB.
        tflops: Operations on visible pairs in forward and backward, per second, in 10^12.
        matmul_tflops: The rate of a large matrix product in the same process.
        error: The worst error as a share of what is allowed.
    """

    case: str
    title: str
    length: int
    contender: str
    ours: bool
    status: str
    detail: str = ""
    stamp: str = ""
    forward_ms: float | None = None
    backward_ms: float | None = None
    total_ms: float | None = None
    spread: float | None = None
    extra_gib: float | None = None
    tflops: float | None = None
    matmul_tflops: float | None = None
    error: float | None = None

    @property
    def key(self) -> str:
        """What the row is kept under."""
        return row_key(self.case, self.length, self.contender)


def row_key(case: str, length: int, contender: str) -> str:
    """The key of a row: a contender on a case of a length."""
    return f"{case} {length} {contender}"


class Kept(Protocol):
    """What `Results` needs of a row."""

    @property
    def key(self) -> str:
        """What it is kept under."""
        ...

    @property
    def status(self) -> str:
        """Whether it was measured."""
        ...

    @property
    def stamp(self) -> str:
        """What its numbers hold for."""
        ...


K = TypeVar("K", bound=Kept)


class Results(Generic[K]):
    """Rows in a JSON file, written after each, so that a stopped run goes on where it was.

    Args:
        path: The file; made when the first row comes.
        kind: The rows' dataclass.
        fresh: Forget what is in it.
    """

    def __init__(self, path: Path, kind: type[K], fresh: bool = False) -> None:
        self.path = path
        self.rows: dict[str, K] = {}
        if path.exists() and not fresh:
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))["rows"]
                self.rows = {row.key: row for row in (kind(**fields) for fields in kept)}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} does not hold rows of this version ({error}): measure anew with "
                    "--fresh, or choose another folder with --out"
                ) from error

    def get(self, key: str, stamp: str) -> K | None:
        """A row to use again: measured, on the same device and versions."""
        row = self.rows.get(key)
        return row if row is not None and row.status == OK and row.stamp == stamp else None

    def add(self, row: K) -> None:
        """Keep a row, in memory and in the file."""
        self.rows[row.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[Any] = list(self.rows.values())
        content = {"rows": [dataclasses.asdict(row) for row in rows]}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def machine() -> dict[str, str]:
    """The device and the versions that numbers hold for."""
    import hf_attn_plugin

    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_attn_plugin": hf_attn_plugin.__version__,
        "Python": platform.python_version(),
    }
    try:
        import triton
    except ImportError:
        return found
    return {**found, "triton": triton.__version__}


def machine_line() -> str:
    """`machine` in one line."""
    return ", ".join(f"{name} {version}" for name, version in machine().items())


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns in line: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(header))]

    def join(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join(
        [join(header), "-" * len(join(["-" * w for w in widths])), *map(join, lines[1:])]
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_table(rows: Sequence[Row], peers: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of one case.

    Args:
        rows: One per contender.
        peers: Whose times the others are divided into: 2.0x is twice as fast as that peer.
    """
    times = {row.contender: row.total_ms for row in rows if row.status == OK}
    compared = [peer for peer in peers if peer in times]
    header = [
        rows[0].title + f", S={rows[0].length}",
        "fwd ms",
        "bwd ms",
        "fwd+bwd ms",
        "spread",
        "TFLOP/s",
        "of matmul",
        "extra GiB",
        "error/allowed",
        *[f"vs {peer}" for peer in compared],
    ]
    cells = []
    for row in rows:
        if row.status != OK or row.total_ms is None:
            state = row.status if row.status != ERROR else "error"
            cells.append([row.contender, state, *["-"] * (len(header) - 2)])
            continue
        share = "-"
        if row.tflops is not None and row.matmul_tflops:
            share = f"{row.tflops / row.matmul_tflops:.0%}"
        ratios = [f"{(times[peer] or 0) / row.total_ms:.2f}x" for peer in compared]
        numbers = [
            _number(row.forward_ms),
            _number(row.backward_ms),
            _number(row.total_ms),
            "-" if row.spread is None else f"{row.spread:.1%}",
            _number(row.tflops, 0),
            share,
            _number(row.extra_gib),
            _number(row.error),
        ]
        cells.append([row.contender, *numbers, *ratios])
    return header, cells


def notes(rows: Iterable[Row]) -> list[str]:
    """A line for everything that was not measured, and why; what holds for many cases once."""
    lines: dict[str, None] = {}
    for row in rows:
        if row.status in (MISSING, CANNOT):
            lines[f"{row.contender}: {row.status}: {row.detail}"] = None
        elif row.status != OK:
            text = f"{row.contender} on {row.title}, S={row.length}: {row.status}: {row.detail}"
            lines[text.rstrip(": ")] = None
    return list(lines)


def choice_line(rows: Sequence[Row]) -> str | None:
    """How much longer the choice takes than the fastest of the others on the case."""
    times = {row.contender: row.total_ms for row in rows if row.status == OK and row.total_ms}
    others = {name: time for name, time in times.items() if name != CHOICE}
    if CHOICE not in times or not others:
        return None
    best = min(others, key=lambda name: others[name])
    return f"{CHOICE} takes {times[CHOICE] / others[best]:.3f} of the time of {best}, the fastest."


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one case and length together, in the order in which they came."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.length), []).append(row)
    return list(groups.values())


def text_report(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """All tables and notes, for a terminal."""
    parts = _tables(rows, peers, text_table, "\n")
    said = notes(rows)
    return "\n\n".join([*parts, "\n".join(said)] if said else parts)


def _tables(
    rows: Sequence[Row], peers: Sequence[str], draw: Callable[..., str], gap: str
) -> list[str]:
    """A table per case, each with the line about the choice."""
    groups = [(draw(*speed_table(group, peers)), choice_line(group)) for group in by_case(rows)]
    return [table if line is None else f"{table}{gap}{line}" for table, line in groups]


def markdown_report(
    rows: Sequence[Row], peers: Sequence[str], command: str, about: Mapping[str, Any]
) -> str:
    """The page: command, machine, tables, notes."""
    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    parts = [f"<!-- Made by: {command} -->", "# Speed of attention", facts, _MEANING]
    parts += _tables(rows, peers, markdown_table, "\n\n")
    said = notes(rows)
    if said:
        parts.append("\n".join(f"- {line}" for line in said))
    return "\n\n".join(parts) + "\n"


_MEANING = (
    "Batch 1, bfloat16, causal, random inputs, medians of CUDA events with the L2 cache cleared. "
    "Operations are 4 · heads · head_dim · visible pairs forward and 2.5 times that backward; "
    "“of matmul” is their rate as a share of a matrix product's of 8192³ in the same process. "
    "“error/allowed”: the worst error against float64, as a share of twice plain PyTorch's plus a "
    "rounding floor; times with more than 1 are not reported. “vs” is the peer's time divided by "
    "the row's: above 1 is faster than the peer. Contenders take turns, three each; “spread” is "
    "what these differ by."
)


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if value < 1000 else f"{value:,.0f}"
