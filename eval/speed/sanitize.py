"""Run every kernel under compute-sanitizer.

    python -m eval.speed.sanitize [memcheck] [racecheck]

memcheck finds accesses outside of allocations, racecheck unordered accesses to shared memory. The
kernels are compiled before, outside of the tool; memory is allocated tensor by tensor, so that an
access beyond a tensor is one beyond its allocation. First memcheck is shown a kernel that does
write outside, which it must find.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

TOOLS = ("memcheck", "racecheck")
_FOUND = 9  # exit status asked of the tool when it finds something
_LAUNCHES = [sys.executable, "-m", f"{__package__}.launches"]


def tool_command(tool: str, program: Sequence[str]) -> list[str]:
    """The line that runs a program under a tool."""
    options = ["--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "20"]
    return ["compute-sanitizer", *options, *program]


def run(tools: Sequence[str]) -> int:
    """Run the launches under each tool; 0 when they are clean and the control is not.

    Raises:
        SystemExit: There is no such tool, or no compute-sanitizer.
    """
    unknown = [tool for tool in tools if tool not in TOOLS]
    if unknown:
        raise SystemExit(f"no tool named {', '.join(unknown)}: choose from {', '.join(TOOLS)}")
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    print("without a tool:", flush=True)
    if _timed(_LAUNCHES) != 0:
        return 1
    bad = False
    if "memcheck" in tools:
        print("memcheck on a kernel that writes outside its tensor:", flush=True)
        if _timed(tool_command("memcheck", [*_LAUNCHES, "--overrun"])) != _FOUND:
            print("memcheck did not find it, so it proves nothing here")
            bad = True
    for tool in tools:
        print(f"{tool}:", flush=True)
        status = _timed(tool_command(tool, _LAUNCHES))
        print(f"{tool}: {'clean' if status == 0 else f'NOT clean (exit status {status})'}")
        bad = bad or status != 0
    return 1 if bad else 0


def _timed(command: Sequence[str]) -> int:
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
    return done.returncode


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:] or TOOLS))
