"""``hf-attn convert-gqa``: a checkpoint with fewer key/value heads."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "convert a model to grouped-query attention by merging its key/value heads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="PATH", help="model folder or Hub id")
    parser.add_argument(
        "--kv-heads",
        type=int,
        required=True,
        metavar="N",
        help="key/value heads per layer afterwards, a divisor of the present number and "
        "below it; 1 is multi-query attention",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the converted model")
    parser.add_argument(
        "--method",
        choices=("mean", "first", "random", "aligned"),
        default="mean",
        help="what the heads of a group become: their mean (default), the first of them, a new "
        "random head, or the head that stands for similar ones best after they were turned "
        "towards each other",
    )
    parser.add_argument("--seed", type=int, default=0, help="for --method random (default 0)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the converted model (default: that of every tensor of the checkpoint)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that is already in --out"
    )


def run(args: argparse.Namespace) -> int:
    """Convert, save, and print what became smaller."""
    import torch

    from hf_attn_plugin.convert.gqa_folder import convert_folder

    report = convert_folder(
        _folder(args.model),
        args.out,
        args.kv_heads,
        args.method,
        seed=args.seed,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        overwrite=args.overwrite,
    )
    cache = [elements * report.dtype.itemsize for elements in report.cache_elements]
    print(f"{args.model} -> {args.out}")
    print(f"{'':32}{'before':>16}{'after':>16}")
    for label, before, after in (
        ("key/value heads per layer", report.old_heads, report.new_heads),
        ("parameters", *report.parameters),
        (f"KV cache bytes/token, {str(report.dtype).removeprefix('torch.')}", *cache),
    ):
        print(f"{label:32}{before:>16,}{after:>16,}")
    print(f"KV cache: that of the {report.layers} layers that changed")
    if args.method == "aligned":
        print(
            f"keys turned in {report.turned_keys} of {report.layers} layers, averaged in the rest"
        )
    if report.not_copied:
        print(f"not copied: {', '.join(report.not_copied)}")
    return 0


def _folder(model: str) -> Path:
    """The folder of a model, downloaded where it is a Hub id."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    # Only one of the formats that a repository may hold.
    small = ["*.json", "*.txt", "*.model", "*.jinja", "*.md"]
    try:
        folder = Path(snapshot_download(model, allow_patterns=[*small, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, allow_patterns=[*small, "pytorch_model*.bin"]))
    except HFValidationError as error:
        raise OSError(f"{model} is neither a folder nor a Hub id: {error}") from error
    return folder
