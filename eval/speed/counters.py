"""Bytes that the step reads by count, beside what the memory's own counters show.

    hf-attn bench decode counters

`CacheReads` adds up the tensors that the step in PyTorch gathers; Nsight Compute (``ncu``) counts
what comes out of the GPU's memory while our kernels make the same step. They should agree, or the
bytes that `hf-attn eval` and `hf-attn sweep` report are not those of the kernels. Where query heads
share a KV head, the kernels also write the approximate scores of all keys and read them back: bytes
that are no cache's, and are added here.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .decoding import CleanClock, DecodeCase, contenders
from .report import machine_line, markdown_table, text_table
from .sparq_decoding import (
    VARIANTS,
    Shape,
    make_copy,
    random_inputs,
    torch_step,
    triton_step,
)

PAGE = "counters.md"
SHAPES = (Shape(8, 32768, 32), Shape(8, 32768, 8))
ALLOWED = 0.10
_READ, _WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
_MARKER = "spin_kernel"  # of torch.cuda._sleep, between two steps
_UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
_DENSE = "dense"
_COUNTED, _MACHINE = "counted: ", "machine: "


@dataclasses.dataclass(frozen=True)
class Counted:
    """One step.

    Attributes:
        name: What was run.
        counted: Bytes of the cache that it reads by our count.
        scores: Bytes of approximate scores that it reads back.
        read: Bytes that came out of memory.
        written: Bytes that went into it.
        kernels: Each kernel's name and the bytes that it read.
    """

    name: str
    counted: int
    scores: int
    read: float
    written: float
    kernels: tuple[tuple[str, float], ...]

    @property
    def good(self) -> bool:
        """Whether they agree."""
        return abs(self.share - 1) <= ALLOWED

    @property
    def share(self) -> float:
        """What was read, as a share of what is counted."""
        return self.read / (self.counted + self.scores)


def refuses() -> str | None:
    """Why counters cannot be read here."""
    if shutil.which("ncu") is not None:
        return None
    return (
        "hf-attn bench decode counters needs Nsight Compute: there is no ncu on the PATH. It "
        "comes with the CUDA toolkit; the other parts of hf-attn bench decode do without it."
    )


def run(out: Path, *, command: str, say: Callable[[str], None]) -> int:
    """Run every variant's step under Nsight Compute, compare, print and write `PAGE`.

    Args:
        out: The folder.
        command: The command line, for the page's first line.
        say: Receives progress, a line at a time.

    Returns:
        The exit status: 1 where the bytes differ by more than `ALLOWED`.

    Raises:
        ValueError: There is no ncu, or it read no counters.
    """
    refusal = refuses()
    if refusal is not None:
        raise ValueError(refusal)
    worker = [sys.executable, "-m", "hf_attn_plugin.cli", "bench", "decode", "counters"]
    line = ncu_command([*worker, "--worker", "all"])
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise ValueError("ncu failed: " + " … ".join(said[-6:]))
    rows = write_page(out, done.stdout, command)
    print(text_table(*_table(rows)))
    say(str(out / PAGE))
    return 0 if all(row.good for row in rows) else 1


def write_page(out: Path, output: str, command: str) -> list[Counted]:
    """The page of what ncu and the program under it have printed."""
    steps = [json.loads(text) for text in _after(output, _COUNTED)]
    rows = compare(steps, parse(output))
    header, cells = _table(rows)
    kernels = [
        f"- {row.name}: " + ", ".join(f"`{name}` {size / 1e6:.1f} MB" for name, size in row.kernels)
        for row in rows
    ]
    parts = [f"<!-- Made by: {command} -->", "# Bytes read, counted and by the hardware"]
    parts += [*_after(output, _MACHINE), _MEANING.format(allowed=ALLOWED)]
    parts += [markdown_table(header, cells), "\n".join(kernels)]
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return rows


def ncu_command(program: Sequence[str]) -> list[str]:
    """The line that counts what a program's kernels read, where it asks for it.

    Both counters fit in one pass, so that nothing is run again; caches are as the program leaves
    them, since what one kernel writes for the next may stay there.
    """
    options = ["--profile-from-start", "off", "--metrics", f"{_READ},{_WRITTEN}"]
    options += ["--cache-control", "none", "--clock-control", "none"]
    options += ["--csv", "--page", "raw", "--print-units", "base"]
    return ["ncu", *options, *program]


def parse(output: str) -> list[tuple[str, float, float]]:
    """Kernel, bytes read and bytes written, from ncu's CSV; in the order of the launches.

    Raises:
        ValueError: There are no counters in it.
    """
    lines = output.splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith('"ID"')]
    if not starts:
        raise ValueError("ncu read no counters: " + " … ".join(lines[-6:]))
    table = list(csv.reader(io.StringIO("\n".join(lines[starts[0] :]))))
    header, units = table[0], table[1]
    at = [header.index(name) for name in ("Kernel Name", _READ, _WRITTEN)]
    found = []
    for cells in table[2:]:
        if len(cells) == len(header):
            sizes = [float(cells[i].replace(",", "")) * _UNITS[units[i]] for i in at[1:]]
            found.append((cells[at[0]], sizes[0], sizes[1]))
    return found


def compare(
    steps: Sequence[tuple[str, int, int]], kernels: Sequence[tuple[str, float, float]]
) -> list[Counted]:
    """Set each step's count beside its kernels, which follow a marker."""
    groups: list[list[tuple[str, float, float]]] = []
    for kernel in kernels:
        if _MARKER in kernel[0]:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    rows = []
    for (name, counted, scores), own in zip(steps, groups, strict=True):
        read, written = (sum(sizes) for sizes in zip(*(kernel[1:] for kernel in own), strict=True))
        names = tuple((kernel, size) for kernel, size, _ in own)
        rows.append(Counted(name, counted, scores, read, written, names))
    return rows


def work(what: str) -> int:
    """The program that ncu watches: every step once, after a marker; prints what is counted."""
    device = torch.device("cuda", torch.cuda.current_device())
    clock = CleanClock(device)

    def watched(name: str, counted: int, scores: int, call: Callable[[], object]) -> None:
        call()
        call()
        clock.flush()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(_COUNTED + json.dumps([name, counted, scores]), flush=True)

    print(_MACHINE + machine_line(), flush=True)
    for shape in SHAPES:
        inputs = random_inputs(shape, device)
        dense = contenders(DecodeCase(shape.batch, shape.length, shape.kv_heads), device)["triton"]
        if isinstance(dense, str):
            raise ValueError(f"our dense kernel does not run here: {dense}")
        if what in ("all", _DENSE):
            decode = functools.partial(dense, *inputs)
            watched(f"{shape.title}: {_DENSE}", shape.dense_bytes, 0, decode)
        for setting in VARIANTS if what == "all" else ():
            copy = make_copy(setting, inputs[1])
            _, reads = torch_step(setting, inputs, copy)
            name = f"{shape.title}: sparq {setting.title}"
            shared = shape.kv_heads < inputs[0].shape[1]
            scores = 4 * inputs[0].shape[1] * shape.batch * shape.length if shared else 0
            watched(name, reads.total, scores, triton_step(setting, inputs, copy))
    return 0


def _after(text: str, prefix: str) -> list[str]:
    lines = [line for line in text.splitlines() if prefix in line]
    return [line[line.index(prefix) + len(prefix) :] for line in lines]


def _table(rows: Sequence[Counted]) -> tuple[list[str], list[list[str]]]:
    header = [
        "step",
        "counted MB",
        "scores MB",
        "read MB",
        "read / both",
        "written MB",
        "kernels",
    ]
    return header, [
        [
            row.name,
            f"{row.counted / 1e6:.1f}",
            f"{row.scores / 1e6:.1f}",
            f"{row.read / 1e6:.1f}",
            f"{row.share:.3f}" + ("" if row.good else " DIFFERS"),
            f"{row.written / 1e6:.1f}",
            str(len(row.kernels)),
        ]
        for row in rows
    ]


_MEANING = (
    "32 query heads of 128, bfloat16, random inputs; one step of our kernels each, the L2 cache "
    "cleared before. “counted” is what `CacheReads` adds up in the step in PyTorch (for dense "
    "attention all keys and values), “scores” the float32 scores of all keys that are read back "
    "where query heads share KV heads: no cache's bytes, and in no other count. “read” is the sum "
    "of `dram__bytes_read.sum` over the kernels of the step. It may differ from both together by "
    "{allowed:.0%}."
)
