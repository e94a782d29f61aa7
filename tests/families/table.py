"""The table of all architectures: written from the results of a sweep, and read back."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import torch
import transformers
from families.catalogue import architectures
from families.result import CHECKS, GOOD, Result

_COLUMNS = ("architecture", "class", "outcome", "outputs", "gradients", *CHECKS, "reason or note")
_HEAD = """\
# `flash` beside eager attention, for every architecture

Made by `pytest -m families --families-table eval/results/families.md`
({versions}, {precision}).
Each architecture in transformers' auto mappings is made tiny with random weights, and compared.

{counts}

- **equal**: outputs and the gradients of all parameters are those of eager attention; the errors
  are relative to the largest value. A mask that is wrong in one key per query is seen in every one.
  Attention that the model computes by itself beside the interface is named in the note.
- **text part equal**: the whole takes the name and is not made tiny; only the part that reads text,
  of the class named, is compared. Nothing is known of the rest.
- **whole refused, text part equal**: the name is refused for the model, since a part of it computes
  attention by itself. `attn_implementation={{'text_config': 'flash'}}` is taken; the model is
  compared under that.
- **refused**: a `ValueError` says why, when the model is made or called.
- **bypassing**: the model computes attention by itself; the name is refused when it is loaded.
- **no attention**: nothing to replace. Language models refuse the name; other backbones take it.
- **not built**: no tiny model of it is made, for the reason given; one that fails without being
  listed fails the sweep.

`left`, `right`: padding (valid positions only). `packed`: documents in one row against each of them
alone in eager. `dynamic`, `static`: greedy generation with that cache, batched and left-padded.
`checkpointing`: gradients under both kinds. `-`: does not apply, or eager cannot do it either.
`equal by cu_seq_lens`: encoders take `position_ids` for positions only, and are told documents by
`cu_seq_lens_q` and `cu_seq_lens_k`. `as eager`: documents mix outside attention, in eager too.
`as sdpa`: the model computes with its rows of padding, in which eager averages over all keys.
"""


def save(result: Result, folder: Path) -> None:
    """Keep the result of one architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(result), indent=1)
    (folder / f"{result.architecture}.json").write_text(text)


def load(architecture: str, folder: Path) -> Result | None:
    """A kept result, made with these versions; None where there is none."""
    path = folder / f"{architecture}.json"
    if not path.exists():
        return None
    result = Result(**json.loads(path.read_text()))
    return result if result.versions == versions() else None


def versions() -> str:
    """What the results belong to."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def write(folder: Path, path: Path) -> None:
    """The table of all architectures.

    Raises:
        ValueError: Some have no result, or a bad one.
    """
    results = [load(architecture, folder) for architecture in architectures()]
    missing = [a for a, r in zip(architectures(), results, strict=True) if r is None]
    bad = [r.architecture for r in results if r is not None and r.outcome not in GOOD]
    if missing or bad:
        raise ValueError(
            f"{path} is not written: {len(missing)} architectures have no result "
            f"({', '.join(missing[:5])}), {len(bad)} are not as they should be "
            f"({', '.join(bad[:5])})."
        )
    found = [result for result in results if result is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(found))


def render(results: list[Result]) -> str:
    """The table in Markdown."""
    tally = collections.Counter(result.outcome for result in results)
    names = [*GOOD, *sorted(tally.keys() - set(GOOD))]
    counts = ", ".join(f"{tally[name]} {name}" for name in names if tally[name])
    precisions = sorted({result.precision for result in results if result.precision})
    lines = [
        _HEAD.format(
            versions=results[0].versions,
            precision=" and ".join(precisions),
            counts=f"{len(results)} architectures: {counts}.",
        ),
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
    ]
    lines += ["| " + " | ".join(_row(result)) + " |" for result in results]
    return "\n".join(lines) + "\n"


def _row(result: Result) -> list[str]:
    checks = [result.checks.get(name, "-") for name in CHECKS]
    reasons = [check.partition(": ")[2] for check in checks if ": " in check]
    note = "; ".join(filter(None, dict.fromkeys([result.message, *reasons, result.note])))
    short = " ".join(note.replace("|", "\\|").split())
    if len(short) > 220:
        short = short[:219] + "…"
    return [
        f"`{result.architecture}`",
        f"`{result.model_class}`" if result.model_class else "-",
        result.outcome,
        _number(result.outputs),
        _number(result.gradients),
        *(check.partition(": ")[0] for check in checks),
        short,
    ]


def _number(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}"


def read(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a table by architecture, each by column."""
    rows = {}
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == len(_COLUMNS):
            row = dict(zip(_COLUMNS, (cell.strip("` ") for cell in cells), strict=True))
            rows[row["architecture"]] = row
    return rows
