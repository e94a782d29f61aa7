"""``hf-attn eval``: lm-eval's evaluator under an attention chosen by name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_attn_plugin.cli.loading import check_model_path
from hf_attn_plugin.cli.method_options import add_method_options, method_parameters
from hf_attn_plugin.lm_eval.names import check_implementation
from hf_attn_plugin.lm_eval.niah import GROUP
from hf_attn_plugin.lm_eval.run import NeedleGrid

HELP = "evaluate a model with lm-eval under an attention chosen by name"
PASS_THROUGH = True
_FIGURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the method and every parameter of every method."""
    parser.description = (
        "Every other option is lm-eval's own: --tasks niah,long_bpb --batch_size 8 --limit 10 "
        '--metadata \'{"niah": {"lengths": [1024, 4096]}}\' --output_path results …'
    )
    parser.add_argument("model", metavar="MODEL", help="name on the Hub or folder")
    parser.add_argument(
        "--attn", metavar="NAME", help="attention implementation, for example sparq or sdpa"
    )
    parser.add_argument(
        "--decode-continuation",
        action=argparse.BooleanOptionalAction,
        help="score texts token by token through the KV cache (default: for methods that act in "
        "decoding only, such as sparq, of which one forward pass would measure dense attention)",
    )
    parser.add_argument(
        "--heatmap", metavar="FILE", type=Path, help="draw the needle grid of niah, as PNG or SVG"
    )
    add_method_options(parser)


def run(args: argparse.Namespace) -> int:
    """Hand the line over to lm-eval's ``run``."""
    if any(option.split("=")[0] in ("--model", "-M") for option in args.rest):
        raise ValueError(
            "hf-attn eval takes the model as its first argument; to evaluate another kind of "
            "lm-eval model, use python -m hf_attn_plugin.lm_eval run --model …"
        )
    check_implementation(args.attn)
    check_model_path(args.model)
    if args.heatmap is not None:
        _check_heatmap(args.heatmap, args.rest)
    model_args: dict[str, Any] = {"pretrained": args.model}
    if args.attn is not None:
        model_args["attn_implementation"] = args.attn
    parameters = method_parameters(args)
    if parameters is not None:
        model_args["attn_params"] = {parameters.name: parameters.to_dict()}
    if args.decode_continuation is not None:
        model_args["decode_continuation"] = args.decode_continuation
    arguments = ["run", "--model", "hf-attn", "--model_args", json.dumps(model_args)]
    return run_and_report([*arguments, *args.rest], args.heatmap)


def _check_heatmap(path: Path, rest: Sequence[str]) -> None:
    """Refuse before the evaluation what could not be drawn after it."""
    if path.suffix not in _FIGURES:
        raise ValueError(
            f"--heatmap writes {', '.join(_FIGURES)} files, told by their ending; got {path}."
        )
    words = [word for option in rest for word in option.split("=", 1)]
    after = [index + 1 for index, word in enumerate(words) if word in ("--tasks", "-t")]
    tasks: set[str] = set()
    for start in after:
        for word in words[start:]:
            if word.startswith("-"):
                break
            tasks.update(word.split(","))
    runs = any(task == GROUP or fnmatch("niah", task) for task in tasks)
    if after and not runs:
        named = ", ".join(sorted(tasks)) or "none"
        raise ValueError(
            f"--heatmap draws the task niah, and --tasks names {named}: "
            "add niah to --tasks, or leave --heatmap out."
        )


def run_and_report(arguments: Sequence[str], heatmap: Path | None = None) -> int:
    """Run lm-eval, which prints its table, then print what it does not know.

    Args:
        arguments: lm-eval's own, the command included.
        heatmap: Where to draw the needle grid, or None.
    """
    from hf_attn_plugin.lm_eval.harness import run_harness, summarize

    results = run_harness(arguments)
    if results is None:
        return 0
    summary = summarize(results)
    if summary:
        print(summary)
    if heatmap is not None:
        if not results["samples"].get("niah"):
            raise ValueError("--heatmap draws the task niah, which was not among the tasks.")
        from hf_attn_plugin.hub.figures import needle_heatmaps

        attn = results["config"].get("attn_implementation", "")
        print(needle_heatmaps({attn: NeedleGrid.from_samples(results["samples"]["niah"])}, heatmap))
    return 0
