"""``hf-attn bench``: speed and memory beside the peers, after a check of the numbers."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HELP = "measure speed and memory beside PyTorch's and FlashAttention's kernels (needs a GPU)"

# What else can be measured, and the module of eval/speed that does it.
OTHERS = {
    "compile": "compile_tax",
    "model": "in_model",
    "decode": "decode",
    "linear": "linear",
    "ring": "ring",
}
# Those of them that measure parts, which are named after them.
_WITH_PARTS = {"decode", "ring"}
# Options that not all of them take, and who does; "table" is the comparison of cases.
_TAKEN_BY = {
    "peers": ("table", "compile", "model", "ring"),
    "quick": ("table", "model", "decode", "linear", "ring"),
    "fresh": ("table", "model", "decode", "ring"),
    "no_figures": ("table", "decode", "ring"),
    "peer_timeout": ("table", "model"),
    "tokens": ("model", "ring"),
    "layers": ("model", "decode", "ring"),
    "model": ("decode",),
    "scores": ("decode",),
    "ranks": ("ring",),
    "rounds": ("ring",),
    "device": ("ring",),
}
_PEER_TIMEOUT = 240.0
_PACKAGE = "hf_attn_plugin.eval_speed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Compare outputs and gradients of every contender with a float64 reference, then time them "
        "in one process. What is measured already is not measured again. Exit status: 1 when "
        "numbers are wrong (their times are not reported). Instead of cases: `compile` (what the "
        "first call costs in a fresh process), `model` (a LoRA step), `decode` (all of its parts, "
        "or those named after it; --list names them), `linear`, `ring` (one sequence over several "
        "GPUs: a process for each is started, torchrun may start them too; cases, `model` for a "
        "training step or `draw` after it); `draw` draws the picture of kept results."
    )
    parser.add_argument(
        "cases", metavar="CASE", nargs="*", help="cases to measure (all; --list names them)"
    )
    parser.add_argument("--list", action="store_true", help="name cases and contenders, and stop")
    parser.add_argument(
        "--peers",
        type=_names,
        metavar="NAME,…",
        help="whom to compare with ('' for nobody; default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench-out"),
        metavar="DIR",
        help="folder for tables, pictures and results (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="short sequences, no pictures")
    parser.add_argument("--fresh", action="store_true", help="measure all of it again")
    parser.add_argument("--no-figures", action="store_true", help="leave out the pictures")
    parser.add_argument(
        "--peer-timeout",
        type=float,
        metavar="SECONDS",
        help="most time to a contender's first results, compilation included "
        f"(default: {_PEER_TIMEOUT:.0f})",
    )
    model = parser.add_argument_group("for hf-attn bench model")
    model.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens of the step (default 65536; of hf-attn bench ring model 262144)",
    )
    model.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="default: those of the real models (hf-attn bench decode generation too)",
    )
    decode = parser.add_argument_group("for hf-attn bench decode")
    decode.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a folder of eval/lab.py, on whose queries and keys SparQ's errors are measured",
    )
    decode.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="results.json of hf-attn sweep on that model (default: "
        "eval/results/sweep/lab/results.json); no speed is shown without its quality",
    )
    ring = parser.add_argument_group("for hf-attn bench ring")
    ring.add_argument(
        "--ranks", type=int, metavar="N", help="processes, each with a GPU (default: all GPUs)"
    )
    ring.add_argument(
        "--rounds", type=int, metavar="N", help="turns of every contender (default: 3)"
    )
    ring.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="cpu tries the command with a few tokens and gloo (default: cuda)",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for."""
    what = args.cases[0] if args.cases else None
    if what in {*OTHERS, "draw"} - _WITH_PARTS and len(args.cases) > 1:
        raise ValueError(f"hf-attn bench {what} takes no cases; got {' '.join(args.cases[1:])}.")
    _check_options(what if what in {*OTHERS, "draw"} else "table", args)
    for name in ("tokens", "layers", "rounds", "peer_timeout"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}.")
    table = speed_module("attention")
    if args.list:
        print(table.listing())
        parts = speed_module(OTHERS["decode"]).PARTS
        print("parts of hf-attn bench decode:")
        print("\n".join(f"  {name:<12}{text}" for name, text in parts.items()))
        print(speed_module(OTHERS["ring"]).listing())
        return 0
    if what == "draw":
        print(table.draw(args.out))
        return 0
    if what in OTHERS:
        return _run_other(what, args)
    cases = table.chosen_cases(args.cases, args.quick)
    entrants = table.chosen_contenders(args.peers)
    _check_gpu()
    return table.run(
        args.out,
        cases,
        entrants,
        command=command_line(sys.argv[1:]),
        fresh=args.fresh,
        figures=not (args.no_figures or args.quick or args.cases),
        peer_timeout=args.peer_timeout or _PEER_TIMEOUT,
        say=_say,
    )


def _check_options(what: str, args: argparse.Namespace) -> None:
    """Options that would be ignored are refused."""
    for name, takers in _TAKEN_BY.items():
        if getattr(args, name) in (None, False) or what in takers:
            continue
        commands = ["hf-attn bench" if t == "table" else f"hf-attn bench {t}" for t in takers]
        asked = "bench with cases" if what == "table" else f"bench {what}"
        raise ValueError(
            f"--{name.replace('_', '-')} is for {', '.join(commands)}; hf-attn {asked} has no use "
            "for it."
        )


def _run_other(what: str, args: argparse.Namespace) -> int:
    module = speed_module(OTHERS[what])
    if what == "decode":
        return _run_decode(module, args)
    if what == "ring":
        return _run_ring(module, args)
    if args.peers is not None:
        module.check_peers(args.peers)
    _check_gpu()
    command = command_line(sys.argv[1:])
    if what == "compile":
        if args.worker is not None:
            return module.work(args.worker)
        return module.run(args.out, command=command, peers=args.peers or [], say=_say)
    if what == "model":
        return module.run(
            args.out,
            command=command,
            layers=args.layers,
            tokens=args.tokens,
            attentions=args.peers,
            quick=args.quick,
            fresh=args.fresh,
            peer_timeout=args.peer_timeout or _PEER_TIMEOUT,
            say=_say,
        )
    return module.run(args.out, command=command, quick=args.quick)


def _run_decode(module: ModuleType, args: argparse.Namespace) -> int:
    if args.worker is not None:
        return module.work(args.worker)
    parts = args.cases[1:]
    if set(module.chosen_parts(parts, args.model)) - set(module.WITHOUT_GPU):
        _check_gpu()
    return module.run(
        args.out,
        command=command_line(sys.argv[1:]),
        parts=parts,
        quick=args.quick,
        fresh=args.fresh,
        figures=not args.no_figures,
        layers=args.layers,
        model=args.model,
        scores=args.scores,
        say=_say,
    )


def _run_ring(module: ModuleType, args: argparse.Namespace) -> int:
    parts = tuple(args.cases[1:])
    if parts == (module.DRAW,):
        print(module.draw(args.out))
        return 0
    settings = module.Settings(
        out=str(args.out),
        what=parts,
        command=command_line(sys.argv[1:]),
        device=args.device or "cuda",
        peers=None if args.peers is None else tuple(args.peers),
        quick=args.quick,
        fresh=args.fresh,
        figures=not args.no_figures,
        tokens=args.tokens,
        layers=args.layers,
        rounds=args.rounds or 3,
    )
    ranks = module.check(settings, args.ranks)
    return module.start(ring_rank, ranks, dataclasses.asdict(settings))


def ring_rank(
    rank: int | None, ranks: int, meeting: str | None, settings: Mapping[str, Any]
) -> None:
    """One of the processes of ``hf-attn bench ring``; new ones are started with this function.

    Args:
        rank: Its number; None under torchrun.
        ranks: How many there are.
        meeting: The file through which they meet; None under torchrun.
        settings: Fields of the benchmark's settings.

    Raises:
        SystemExit: Numbers were wrong, or something could not run.
    """
    module = speed_module(OTHERS["ring"])
    status = module.work(rank, ranks, meeting, module.Settings(**settings), _say)
    if status:
        raise SystemExit(status)


def speed_module(name: str) -> ModuleType:
    """A module of the benchmarks, which lie beside the package in a checkout, in a wheel inside.

    Raises:
        FileNotFoundError: They are in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "eval" / "speed"
    if _PACKAGE not in sys.modules and not (package / "eval_speed").is_dir():
        if not beside.is_dir():
            raise FileNotFoundError(
                f"the benchmarks are in neither {package / 'eval_speed'} nor {beside}: install "
                "hf_attn_plugin again."
            )
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, beside / "__init__.py", submodule_search_locations=[str(beside)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_PACKAGE] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f"hf-attn bench needs a CUDA GPU, and torch {torch.__version__} finds none here: run "
            "it on a machine that has one, with a CUDA build of torch. (--list works anywhere; "
            "python eval/scaling.py measures on a CPU.)"
        )


def command_line(words: Sequence[str]) -> str:
    """The line to run again, without the folder that a page lies in anyway."""
    kept: list[str] = []
    for index, word in enumerate(words):
        if word.startswith("--out=") or "--out" in (word, words[index - 1] if index else ""):
            continue
        kept.append(word)
    return shlex.join(["hf-attn", *kept])


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
