"""``hf-attn bench``: the speed table, and the pictures over the length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .cases import CASES, SWEPT, Case
from .contenders import Contender, contenders
from .figures import draw_lengths
from .report import Results, Row, machine, markdown_report, text_report
from .table import Bench, failed
from .timing import CudaClock, copy_bytes_per_second, matmul_tflops

RESULTS, PAGE, PICTURE = "speed.json", "speed.md", "speed.png"


def chosen_cases(names: Sequence[str], quick: bool) -> list[Case]:
    """The cases by name, all where none is named; ``quick`` is an eighth of their lengths.

    Raises:
        ValueError: There is no such case.
    """
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(
            f"no case named {', '.join(unknown)}: choose from {', '.join(CASES)}, or one of "
            "compile, model, decode, linear, ring"
        )
    cases = [CASES[name] for name in names or CASES]
    return [case.at(case.length // 8) for case in cases] if quick else cases


def chosen_contenders(peers: Sequence[str] | None) -> list[Contender]:
    """Ours, and the peers by name; all of them where None is given.

    Raises:
        ValueError: There is no such peer.
    """
    found = contenders()
    known = [name for name, contender in found.items() if not contender.ours]
    unknown = [name for name in peers or () if name not in known]
    if unknown:
        raise ValueError(f"no peer named {', '.join(unknown)}: choose from {', '.join(known)}")
    wanted = known if peers is None else peers
    return [c for name, c in found.items() if c.ours or name in wanted]


def listing() -> str:
    """Cases and contenders, a line each."""
    lines = ["cases:"]
    lines += [f"  {case.name:<12} {case.title}, S={case.length}" for case in CASES.values()]
    lines += ["", "contenders (ours are always measured):"]
    for name, contender in contenders().items():
        missing = contender.missing()
        state = "" if missing is None else f"  (missing: {missing})"
        lines.append(f"  {name:<12} {contender.title}{state}")
    return "\n".join(lines)


def run(
    out: Path,
    cases: Sequence[Case],
    entrants: Sequence[Contender],
    *,
    command: str,
    fresh: bool = False,
    figures: bool = True,
    peer_timeout: float = 240.0,
    say: Callable[[str], None],
) -> int:
    """Measure, print and write the tables, draw the pictures.

    Args:
        out: Folder for `RESULTS`, `PAGE` and `PICTURE`.
        cases: What to measure.
        entrants: Who.
        command: The command line, for the page's first line.
        fresh: Measure again what is kept in ``out``.
        figures: Measure `SWEPT` too, and draw it.
        peer_timeout: Seconds that a contender may take to its first results.
        say: Receives progress, a line at a time.

    Returns:
        The exit status: 1 where numerics failed, or ours could not run.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    clock = CudaClock(device)
    roof = matmul_tflops(clock, device, torch.bfloat16)
    copy = copy_bytes_per_second(clock, device)
    torch.cuda.empty_cache()
    limits = {
        "8192³ matmul": f"{roof:.0f} TFLOP/s",
        "device copy": f"{copy / 1e12:.2f} TB/s",
    }
    about = {**machine(), **limits}
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    results = Results(out / RESULTS, Row, fresh)
    bench = Bench(clock, device, roof, results, peer_timeout=peer_timeout, say=say)
    rows = bench.run(cases, entrants)
    peers = [contender.name for contender in entrants if not contender.ours]
    print(text_report(rows, peers), flush=True)
    _write_page(out, markdown_report(rows, peers, command, about))
    swept: list[Row] = []
    if figures:
        swept = bench.run(SWEPT, entrants)
        known = {row.key for row in rows}
        every = [*rows, *(row for row in swept if row.key not in known)]
        about["picture"] = f"[{PICTURE}]({PICTURE})"
        _write_page(out, markdown_report(every, peers, command, about))
        try:
            print(draw(out))
        except ImportError as error:
            print(f"no picture drawn: {error}. `hf-attn bench draw --out {out}` draws it.")
    print(out / PAGE)
    return 1 if failed([*rows, *swept]) else 0


def draw(out: Path) -> Path:
    """Draw `PICTURE` from the results in a folder; needs no GPU.

    Raises:
        ValueError: The lengths of `SWEPT` have not been measured there.
        ImportError: matplotlib is not installed.
    """
    results = Results(out / RESULTS, Row)
    lengths = {(case.name, case.length) for case in SWEPT}
    rows = [row for row in results.rows.values() if (row.case, row.length) in lengths]
    if len({row.length for row in rows}) < 2:
        raise ValueError(f"{out / RESULTS} holds no lengths to draw: run hf-attn bench first.")
    device = next((row.stamp.split(",")[0] for row in rows if row.stamp), "")
    title = f"Attention, forward + backward, 32/8 heads of 128, bfloat16, {device}"
    return draw_lengths(rows, out / PICTURE, title)


def _write_page(out: Path, page: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text(page, encoding="utf-8")
