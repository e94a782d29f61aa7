"""``hf-attn doctor``: versions, devices, and what a model would do on this machine."""

from __future__ import annotations

import argparse
import json

from hf_attn_plugin.cli.loading import load_config, model_class_of
from hf_attn_plugin.cli.method_options import add_method_options, method_parameters

HELP = "versions, devices, and the backends and cache sizes of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        f"{HELP}. Only the model's config is read, no weights. Exit status: 0 when all versions "
        "are supported and the model can be used, 1 otherwise."
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="name on the Hub or folder")
    parser.add_argument("--attn", metavar="NAME", help="whose backends (default flash)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens (default 4096)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model")
    parser.add_argument(
        "--device",
        metavar="D",
        help="choose backends for cpu or, by compute capability, a GPU here or not: cuda:9.0",
    )
    parser.add_argument(
        "--installed",
        metavar="P,…",
        help="choose among the kernels of these packages (triton, flash-attn-4), installed or not",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_method_options(parser)


def run(args: argparse.Namespace) -> int:
    """Examine and print."""
    import torch

    from hf_attn_plugin.config import configure
    from hf_attn_plugin.doctor import examine
    from hf_attn_plugin.lm_eval.names import check_implementation

    parameters = method_parameters(args)
    if args.model is None:
        about = ("attn", "length", "dtype", "device", "installed")
        given = [name for name in about if getattr(args, name) is not None]
        if given:
            options = ", ".join(f"--{name}" for name in given)
            raise ValueError(f"{options}: these are about a model; name one: hf-attn doctor MODEL")
        report = examine()
    else:
        check_implementation(args.attn)
        config = load_config(args.model)
        if parameters is not None:
            configure(config, parameters)
        report = examine(
            model_class_of(config),
            config,
            attn=args.attn or "flash",
            length=args.length,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            device=args.device,
            installed=None if args.installed is None else args.installed.split(","),
        )
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.ok else 1
