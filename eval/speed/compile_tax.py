"""``hf-attn bench compile``: what the first call costs in a fresh process with cold caches.

Each pattern gets a process and an empty cache folder of its own. There the first forward and
backward is timed, from the import of the kernels on, and then a first call with a short sequence,
for which there may be tiles of another size. Other lengths and other layouts of documents follow,
and the compiled kernels in the cache folder are counted: there must be no more.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import hf_attn_plugin

from .cases import CASES, Case
from .contenders import contenders
from .numerics import Inputs
from .report import machine, markdown_table, text_table

PAGE, RESULTS = "compile.md", "compile.json"
MOST_SECONDS = 20.0
FIRST = 8192
# Below 2,048 keys tiles of another size are used (`ops.triton.hopper`): compiled once too.
SHORT = 1536
# Odd ones too: Triton compiles anew for a number that is a multiple of 16, unless told not to.
LENGTHS = (1100, 2047, 2048, 6000, 8191, 12288, 16384)
SEEDS = (1, 2, 3)
_OURS = "triton"
_COMPILED = (".cubin", ".hsaco")


@dataclasses.dataclass(frozen=True)
class Tax:
    """What one pattern costs at first.

    Attributes:
        contender: Whose kernels.
        case: The pattern's name.
        first_s: Seconds to the end of the first forward and backward.
        again_s: Seconds of the second.
        kernels: Kernels compiled by the first.
        short_s: Seconds of the first call at `SHORT` tokens.
        short_kernels: Kernels compiled by it.
        lengths_s: Longest of the first calls at other lengths, in seconds.
        lengths_kernels: Kernels compiled by these.
        layouts_s: Longest of the first calls with other documents; None where there are none.
        layouts_kernels: Kernels compiled by these.
        error: Why there are no numbers.
    """

    contender: str
    case: str
    first_s: float | None = None
    again_s: float | None = None
    kernels: int | None = None
    short_s: float | None = None
    short_kernels: int | None = None
    lengths_s: float | None = None
    lengths_kernels: int | None = None
    layouts_s: float | None = None
    layouts_kernels: int | None = None
    error: str = ""

    @property
    def good(self) -> bool:
        """Whether the first calls were quick, and nothing was compiled after them."""
        later = (self.lengths_kernels, self.layouts_kernels)
        if self.first_s is None or self.short_s is None or any(later):
            return False
        return max(self.first_s, self.short_s) < MOST_SECONDS


def run(out: Path, *, command: str, peers: Sequence[str] = (), say: Callable[[str], None]) -> int:
    """Measure every pattern in a process of its own, print a table and write it.

    Args:
        out: Folder for `PAGE` and `RESULTS`.
        command: The command line, for the page's first line.
        peers: Contenders besides ours, such as flex.
        say: Receives progress, a line at a time.

    Returns:
        The exit status: 1 where a pattern of ours took `MOST_SECONDS` or compiled again.
    """
    check_peers(peers)
    found = []
    for name in (_OURS, *peers):
        for case in CASES:
            tax = measure(name, case)
            say(f"{name}, {case}: {tax.error or f'{tax.first_s:.1f} s'}")
            found.append(tax)
    header, rows = table(found)
    print(text_table(header, rows))
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    parts = [
        f"<!-- Made by: {command} -->",
        "# The first call in a fresh process, caches cold",
        f"{about}\n\n{_MEANING}",
        markdown_table(header, rows),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    content = {"about": machine(), "rows": [dataclasses.asdict(tax) for tax in found]}
    (out / RESULTS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(out / PAGE)
    return 0 if all(tax.good for tax in found if tax.contender == _OURS) else 1


def check_peers(names: Sequence[str]) -> None:
    """Raise ValueError where a name is no contender's."""
    known = contenders()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no peer named {', '.join(unknown)}: choose from {', '.join(known)}")


def measure(contender: str, case: str) -> Tax:
    """Start the process for one pattern and read what it found."""
    with tempfile.TemporaryDirectory(prefix="hf-attn-bench-") as folder:
        caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
        paths = {name: str(Path(folder) / part) for name, part in caches.items()}
        # Found from a checkout too, whatever the working directory.
        found = [str(Path(hf_attn_plugin.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        paths["PYTHONPATH"] = os.pathsep.join(part for part in found if part)
        task = json.dumps({"contender": contender, "case": case, "folder": folder})
        done = subprocess.run(
            [sys.executable, "-m", "hf_attn_plugin.cli", "bench", "compile", "--worker", task],
            env={**os.environ, **paths},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Tax(contender, case, error=lines[-1][:200])
    return Tax(**json.loads(done.stdout.strip().splitlines()[-1]))


def work(task: str) -> int:
    """What the fresh process does; prints the `Tax` as JSON."""
    given = json.loads(task)
    measured = tax_of(
        given["contender"],
        CASES[given["case"]].at(FIRST),
        Path(given["folder"]),
        torch.device("cuda"),
    )
    print(json.dumps(dataclasses.asdict(measured)))
    return 0


def tax_of(name: str, case: Case, folder: Path, device: torch.device) -> Tax:
    """Time the first calls of a contender, and count the kernels that ``folder`` holds after."""
    contender = contenders()[name]
    refused = contender.refuses(case)
    if refused is not None:
        return Tax(name, case.name, error=refused)
    torch.ones(1, device=device).sum().item()  # the device itself is started before the clock

    def seconds(case: Case) -> float:
        inputs = Inputs.random(
            batch=1,
            heads=case.heads,
            kv_heads=case.kv_heads,
            tokens=case.length,
            head_dim=case.head_dim,
            dtype=torch.bfloat16,
            device=device,
        )
        pattern = case.pattern(device)
        _wait(device)
        start = time.perf_counter()
        output = contender.prepare(case, pattern, device)(*inputs.leaves)
        torch.autograd.grad(output, inputs.leaves, inputs.grad)
        _wait(device)
        return time.perf_counter() - start

    first = seconds(case)
    kernels = count_compiled(folder)
    again = seconds(case)
    short = seconds(case.at(SHORT))
    after_short = count_compiled(folder)
    lengths = max(seconds(case.at(length)) for length in LENGTHS)
    after_lengths = count_compiled(folder)
    layouts = None
    if case.packed:
        layouts = max(seconds(dataclasses.replace(case, seed=seed)) for seed in SEEDS)
    return Tax(
        contender=name,
        case=case.name,
        first_s=first,
        again_s=again,
        kernels=kernels,
        short_s=short,
        short_kernels=after_short - kernels,
        lengths_s=lengths,
        lengths_kernels=after_lengths - after_short,
        layouts_s=layouts,
        layouts_kernels=None if layouts is None else count_compiled(folder) - after_lengths,
    )


def count_compiled(folder: Path) -> int:
    """Compiled kernels under a cache folder."""
    return sum(1 for path in folder.rglob("*") if path.suffix in _COMPILED)


def table(found: Sequence[Tax]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = [
        "pattern",
        "kernels of",
        "first fwd+bwd s",
        "compiled",
        "again s",
        "short s",
        "compiled",
        "new lengths s",
        "compiled",
        "new documents s",
        "compiled",
    ]
    rows = []
    for tax in found:
        if tax.error:
            rows.append([tax.case, tax.contender, tax.error, *["-"] * (len(header) - 3)])
            continue
        numbers = (
            tax.first_s,
            tax.kernels,
            tax.again_s,
            tax.short_s,
            tax.short_kernels,
            tax.lengths_s,
            tax.lengths_kernels,
            tax.layouts_s,
            tax.layouts_kernels,
        )
        rows.append([tax.case, tax.contender, *map(_cell, numbers)])
    return header, rows


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_MEANING = (
    f"Every pattern in a new process with empty cache folders: seconds from importing the kernels "
    f"to the end of the first forward and backward at {FIRST} tokens (required of ours: under "
    f"{MOST_SECONDS:.0f}), of the same call again, of the first at {SHORT} tokens (below 2048 keys "
    f"there are tiles of another size, compiled once too), of the slowest first call at the "
    f"lengths {', '.join(map(str, LENGTHS))}, and with {len(SEEDS)} other layouts of documents. "
    "“Compiled” counts the kernels that appeared in the cache folder."
)
