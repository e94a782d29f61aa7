"""``hf-attn eval``: lm-eval's evaluator under an attention chosen by name."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_attn_plugin.config import METHOD_CONFIGS, MethodConfig, parse_parameters
from hf_attn_plugin.lm_eval.names import check_implementation
from hf_attn_plugin.lm_eval.run import NeedleGrid

HELP = "evaluate a model with lm-eval under an attention chosen by name"
PASS_THROUGH = True


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
        help="score texts token by token through the KV cache (always so for sparq)",
    )
    parser.add_argument(
        "--heatmap", metavar="FILE", type=Path, help="draw the needle grid of niah, as PNG or SVG"
    )
    methods: dict[str, list[str]] = {}
    types: dict[str, type] = {}
    for name, cls in METHOD_CONFIGS.items():
        for field, kind in _parameters(cls).items():
            methods.setdefault(field, []).append(name)
            types[field] = kind
    group = parser.add_argument_group("parameters of the methods")
    for field, names in methods.items():
        option = "--" + field.replace("_", "-")
        text = f"for {', '.join(names)}"
        if types[field] is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(
                option, type=types[field], metavar=types[field].__name__.upper(), help=text
            )


def run(args: argparse.Namespace) -> int:
    """Hand the line over to lm-eval's ``run``."""
    if any(option.split("=")[0] in ("--model", "-M") for option in args.rest):
        raise ValueError(
            "hf-attn eval takes the model as its first argument; to evaluate another kind of "
            "lm-eval model, use python -m hf_attn_plugin.lm_eval run --model …"
        )
    check_implementation(args.attn)
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


def method_parameters(args: argparse.Namespace) -> MethodConfig | None:
    """The chosen method's parameters, or None when none were given.

    Raises:
        ValueError: An option belongs to another method, or its value is out of range.
    """
    fields = {field for cls in METHOD_CONFIGS.values() for field in _parameters(cls)}
    given = {field: value for field in fields if (value := getattr(args, field)) is not None}
    if not given:
        return None
    cls = METHOD_CONFIGS.get(args.attn)
    valid = list(_parameters(cls)) if cls is not None else []
    wrong = sorted("--" + field.replace("_", "-") for field in set(given) - set(valid))
    if cls is None or wrong:
        options = ", ".join("--" + field.replace("_", "-") for field in valid) or "none"
        raise ValueError(
            f"{', '.join(wrong)}: not a parameter of {args.attn or 'the model as it is'} "
            f"(its parameters: {options}). Choose the method with --attn, one of "
            f"{', '.join(METHOD_CONFIGS)}."
        )
    return parse_parameters(cls, given)


def _parameters(cls: type[MethodConfig]) -> dict[str, type]:
    """Names and types of a method's parameters, without the ``| None`` of those with a default."""
    hints = typing.get_type_hints(cls)
    found: dict[str, type] = {}
    for field in dataclasses.fields(cls):
        kinds = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
        found[field.name] = kinds[0] if kinds else hints[field.name]
    return found
