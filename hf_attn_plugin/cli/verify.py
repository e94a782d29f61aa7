"""``hf-attn verify``: every layer's attention beside eager attention under the same pattern."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hf_attn_plugin.cli.loading import load_config, model_class_of
from hf_attn_plugin.cli.method_options import add_method_options, method_parameters

if TYPE_CHECKING:
    from torch import Tensor

HELP = "compare every layer of a model with eager attention under the same pattern"

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        f"{HELP}: unpadded, padded on either side, packed documents, and a decoding step. "
        "Exit status: 0 when every layer is within its error budget, 1 when one is not."
    )
    parser.add_argument("model", metavar="MODEL", help="name on the Hub or folder")
    parser.add_argument("--attn", metavar="NAME", required=True, help="for example longformer")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text for the batches (random)")
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens per row (default 128); windows should fit"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights")
    parser.add_argument("--gradients", action="store_true", help="also of queries, keys and values")
    parser.add_argument("--seed", type=int, default=0, help="of random tokens (default 0)")
    parser.add_argument("--layers", action="store_true", help="print a line for every layer")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_method_options(parser)


def run(args: argparse.Namespace) -> int:
    """Load, verify, and print the report."""
    from hf_attn_plugin.config import configure
    from hf_attn_plugin.lm_eval.names import check_implementation

    # All that can be refused is refused before the weights are read.
    check_implementation(args.attn)
    parameters = method_parameters(args)
    if args.text is not None and not args.text.is_file():
        raise FileNotFoundError(f"there is no text file {args.text}")
    config = load_config(args.model)
    if parameters is not None:
        configure(config, parameters)
    model_class = model_class_of(config)

    import torch

    from hf_attn_plugin.verification import example_batches, verify_batches

    model = model_class.from_pretrained(
        args.model, config=config, attn_implementation=args.attn, dtype=args.dtype
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()  # type: ignore[arg-type]
    tokens = None if args.text is None else _tokens(args.model, args.text)
    batches, notes = example_batches(model, tokens, length=args.length, seed=args.seed)
    report = verify_batches(
        model, batches, gradients=args.gradients, notes=notes, note_refusals=True
    )
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        if args.layers:
            print(report.table())
        print(report)
    return 0 if report.ok else 1


def _tokens(model: str, file: Path) -> Tensor:
    """The text as token ids, int64 ``[tokens]``."""
    import torch
    from transformers import AutoTokenizer

    text = file.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{file} holds no token: give a text, or leave --text out")
    return torch.tensor(ids)
