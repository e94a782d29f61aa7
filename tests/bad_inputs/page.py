"""All cases, and the page that shows them."""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path

from . import calls, commands, parameters, sequences, training
from .case import Case

CASES: tuple[Case, ...] = (
    *parameters.CASES,
    *calls.CASES,
    *training.CASES,
    *sequences.CASES,
    *commands.CASES,
)
PAGE = Path(__file__).parents[2] / "eval" / "results" / "bad_inputs.md"


@functools.cache
def answer(case: Case) -> tuple[type[BaseException] | None, str]:
    """What a case gets: the error's type and its message."""
    with tempfile.TemporaryDirectory() as folder:
        return case.message(Path(folder))


def page() -> str:
    """The page, in Markdown."""
    lines = [
        "# Bad inputs, and what is said to them",
        "",
        f"Made by `python -m tests.bad_inputs`; `tests/bad_inputs` runs all {len(CASES)} of them. "
        "Errors are `ValueError` where nothing else is said. Commands end with status 2.",
    ]
    area = ""
    for case in CASES:
        if case.area != area:
            area = case.area
            lines += ["", f"## {area}", "", "| input | message |", "|---|---|"]
        kind, message = answer(case)
        name = "" if kind is None or issubclass(kind, ValueError) else f"`{kind.__name__}`: "
        written = case.written.replace("|", "\\|")
        lines.append(f"| `{written}` | {name}{_cell(message)} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return re.sub(r"([|<*`\\])", r"\\\1", re.sub(r"\s+", " ", text))
