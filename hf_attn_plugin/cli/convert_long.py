"""``hf-attn convert-long``: an encoder that takes more positions, with Longformer attention."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELP = "convert an encoder (BERT, RoBERTa, ...) to longer inputs with Longformer attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="PATH", help="model folder or Hub id")
    parser.add_argument(
        "--max-positions",
        type=int,
        required=True,
        metavar="N",
        help="tokens the model takes afterwards, special ones included",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=512,
        metavar="W",
        help="a token sees keys at distances below W on each side (default 512)",
    )
    parser.add_argument(
        "--global-tokens",
        type=int,
        default=1,
        metavar="G",
        help="first tokens that see all and are seen by all (default 1, [CLS])",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the converted model")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the converted model (default: that of the checkpoint)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that is already in --out"
    )


def run(args: argparse.Namespace) -> int:
    """Convert, save, and print what became longer."""
    from hf_attn_plugin import LongformerConfig
    from hf_attn_plugin.cli.loading import load_config, model_class_of
    from hf_attn_plugin.convert import plan_long_encoder, to_long_encoder

    # All that the config tells is refused before the weights are read.
    LongformerConfig(window=args.window, num_global_tokens=args.global_tokens)
    config = load_config(args.model)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{args.model} is quantized: convert the model it was made from")
    model_class = model_class_of(config)
    plan = plan_long_encoder(model_class, config, args.max_positions)
    _check_folder(args.model, args.out, args.overwrite)

    model = model_class.from_pretrained(args.model, dtype=args.dtype)
    parameters = model.num_parameters()
    tokenizer = _load_tokenizer(args.model)
    to_long_encoder(model, args.max_positions, args.window, args.global_tokens, tokenizer=tokenizer)
    model.save_pretrained(args.out)
    if tokenizer is not None:
        tokenizer.save_pretrained(args.out)

    print(f"{args.model} -> {args.out}")
    print(f"{'':32}{'before':>16}{'after':>16}")
    for label, before, after in (
        ("tokens", plan.old_positions, plan.new_positions),
        ("parameters", parameters, model.num_parameters()),
        ("keys that a token sees, at most", plan.old_positions, _keys(args)),
    ):
        print(f"{label:32}{before:>16,}{after:>16,}")
    print('Load it with attn_implementation="longformer".')
    return 0


def _keys(args: argparse.Namespace) -> int:
    """Keys that a token sees which is not global."""
    return min(args.max_positions, 2 * args.window - 1 + args.global_tokens)


def _check_folder(source: str, out: Path, overwrite: bool) -> None:
    if out.resolve() == Path(source).resolve():
        raise ValueError(f"--out is the model's own folder, {out}: choose another")
    held = [*out.glob("config.json"), *out.glob("*.safetensors")] if out.is_dir() else []
    if held and not overwrite:
        raise ValueError(f"{out} already holds a model ({held[0].name}): use --overwrite")
    out.mkdir(parents=True, exist_ok=True)


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        print(f"no tokenizer saved, as none could be loaded from {source}: {error}")
        return None
