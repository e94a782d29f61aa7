"""``hf-attn quickstart``: the whole path on a small model, in minutes, on any machine."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

HELP = "train, extend, convert and evaluate a small model in minutes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Train a small Llama on real text, fine-tune it to 4 times its context with a sparse "
        "attention, convert it to grouped-query attention, evaluate it under several methods and "
        "write a model folder with its card. Interrupted, it goes on when started again."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart-out"),
        help="folder for everything (default: quickstart-out)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="text to learn from, UTF-8 (default: the Python standard library's own sources)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="draws model, documents and needles (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Run all stages that are not finished yet, and print the results."""
    if args.seed < 0:
        raise ValueError(f"--seed must be an integer >= 0, got {args.seed}.")
    command = ["hf-attn", "quickstart", "--out", str(args.out), "--seed", str(args.seed)]
    if args.text:
        command += ["--text", *map(str, args.text)]
    line = shlex.join(command)
    try:
        from transformers.utils import logging

        from hf_attn_plugin.quickstart import run_quickstart

        # The libraries' own bars and notes would break ours.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        run_quickstart(args.out, args.text, args.seed, command=line, progress=True, say=_say)
    except KeyboardInterrupt:
        print(f"\nInterrupted. To go on from here, run it again: {line}", file=sys.stderr)
        return 130
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
