"""Run every kernel under compute-sanitizer.

    python -m eval.speed.sanitize [memcheck] [racecheck]

memcheck finds accesses outside of allocations, racecheck unordered accesses to shared memory. The
kernels are compiled before, outside of the tool; memory is allocated tensor by tensor, so that an
access beyond a tensor is one beyond its allocation. First each tool is shown a kernel that does
what it looks for, and must find it.

racecheck does not follow mbarriers: of warps that wait for each other by them it reports the same
as of warps that do not, and also the way in which Triton hands the functions of a kernel to its
warps. A control in which everything is in order shows that. Our kernels pass everything between
warps through TMA, which has no thread that could race. So what is left are reports of Triton's
dispatch (`RaceReport.is_dispatch`), which are counted; any other is a failure.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hf_attn_plugin

TOOLS = ("memcheck", "racecheck")
_FOUND = 9  # exit status asked of the tool when it finds something
_LAUNCHES = [sys.executable, "-m", f"{__package__}.launches"]
_ACCESS = re.compile(r"(Read|Write) access at (\w+)\+0x[0-9a-f]+ in ([\w.]+):(\d+)")
_SUMMARY = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed")
_SOURCES = (Path(__file__).parent, Path(hf_attn_plugin.__file__).parent / "ops" / "triton")


@dataclasses.dataclass(frozen=True)
class Access:
    """One side of a reported race.

    Attributes:
        kind: ``Read`` or ``Write``.
        kernel: The kernel's name.
        file: The name of the source file.
        line: The line in it.
    """

    kind: str
    kernel: str
    file: str
    line: int


@dataclasses.dataclass(frozen=True)
class RaceReport:
    """Accesses that racecheck says are not ordered."""

    accesses: tuple[Access, ...]

    def is_dispatch(self) -> bool:
        """Whether Triton's dispatch of functions to warps is all that is reported.

        The compiler writes down for the waiting warps which function is theirs, and reads it there;
        it attributes the reads to the kernel's first line and the writes to that line or to its
        ``warp_specialize``. No kernel touches shared memory itself in these lines.
        """
        for access in self.accesses:
            first, call = dispatch_lines(access.file, access.kernel)
            if access.line != first and (access.kind == "Read" or access.line != call):
                return False
        return {access.kind for access in self.accesses} == {"Read", "Write"}


@functools.cache
def dispatch_lines(file: str, kernel: str) -> tuple[int, int]:
    """The lines of a kernel's ``def`` and of its only ``warp_specialize``; (0, 0): it has none."""
    for path in (folder / file for folder in _SOURCES):
        if not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == kernel:
                calls = [
                    call.lineno
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and call.func.attr == "warp_specialize"
                ]
                return (node.lineno, calls[0]) if len(calls) == 1 else (0, 0)
    return 0, 0


def race_reports(output: str) -> list[RaceReport] | None:
    """What racecheck printed; None where it does not add up to its own summary."""
    found: list[list[Access]] = []
    for line in output.splitlines():
        if "Race reported between" in line:
            found.append([])
        for kind, kernel, file, number in _ACCESS.findall(line):
            if not found:
                return None
            found[-1].append(Access(kind, kernel, file, int(number)))
    summary = _SUMMARY.search(output)
    if summary is None or int(summary[1]) != len(found) or not all(len(a) > 1 for a in found):
        return None
    return [RaceReport(tuple(accesses)) for accesses in found]


def tool_command(tool: str, program: Sequence[str]) -> list[str]:
    """The line that runs a program under a tool."""
    options = ["--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "10000"]
    return ["compute-sanitizer", *options, *program]


def run(tools: Sequence[str]) -> int:
    """Run the launches under each tool; 0 when they are clean and the controls are not.

    Raises:
        SystemExit: There is no such tool, or no compute-sanitizer.
    """
    unknown = [tool for tool in tools if tool not in TOOLS]
    if unknown:
        raise SystemExit(f"no tool named {', '.join(unknown)}: choose from {', '.join(TOOLS)}")
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    print("without a tool:", flush=True)
    if _timed(_LAUNCHES)[0] != 0:
        return 1
    good = [{"memcheck": _memcheck, "racecheck": _racecheck}[tool]() for tool in tools]
    return 0 if all(good) else 1


def _memcheck() -> bool:
    print("memcheck on a kernel that writes outside its tensor:", flush=True)
    status, _ = _timed(tool_command("memcheck", [*_LAUNCHES, "--overrun"]))
    if status != _FOUND:
        print("memcheck did not find it, so it proves nothing here")
        return False
    print("memcheck:", flush=True)
    status, _ = _timed(tool_command("memcheck", _LAUNCHES))
    print(f"memcheck: {'clean' if status == 0 else f'NOT clean (exit status {status})'}")
    return status == 0


def _racecheck() -> bool:
    print("racecheck on a kernel with a race:", flush=True)
    of_dispatch, others = _races([*_LAUNCHES, "--race"])
    if not others:
        print("racecheck did not find it, so it proves nothing here")
        return False
    print("racecheck on the same kernel without the race:", flush=True)
    control, _ = _races([*_LAUNCHES, "--ordered"])
    print("racecheck:", flush=True)
    of_dispatch, others = _races(_LAUNCHES)
    if others is None or others or (of_dispatch and not control):
        print("racecheck: NOT clean")
        return False
    print(f"racecheck: clean but for {of_dispatch} reports of Triton's own dispatch")
    return True


def _races(program: Sequence[str]) -> tuple[int, list[RaceReport] | None]:
    """How many reports are of the dispatch, and the others; None when the run failed otherwise."""
    status, output = _timed(tool_command("racecheck", program))
    reports = race_reports(output)
    if reports is None or status != (_FOUND if reports else 0):
        return 0, None
    others = [report for report in reports if not report.is_dispatch()]
    for report in others[:20]:
        places = sorted({f"{a.kind} {a.kernel} {a.file}:{a.line}" for a in report.accesses})
        print(f"  race: {', '.join(places)}")
    print(f"  {len(reports) - len(others)} reports of Triton's dispatch, {len(others)} others")
    return len(reports) - len(others), others


def _timed(command: Sequence[str]) -> tuple[int, str]:
    start = time.perf_counter()
    done = subprocess.run(
        command,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    shown = lines if done.returncode else [line for line in lines if "SUMMARY" in line]
    print("\n".join(f"  {line}" for line in shown[-40:]))
    seconds = time.perf_counter() - start
    print(f"  exit status {done.returncode}, {len(lines)} lines, {seconds:.0f} s", flush=True)
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:] or TOOLS))
