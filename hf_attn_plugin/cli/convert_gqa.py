"""``hf-attn convert-gqa``: a checkpoint with fewer key/value heads."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HELP = "convert a model to grouped-query attention by pooling its key/value heads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="PATH", help="model folder or Hub id")
    parser.add_argument(
        "--kv-heads",
        type=int,
        required=True,
        metavar="N",
        help="key/value heads per layer afterwards, a divisor of the present number; "
        "1 is multi-query attention",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the converted model")
    parser.add_argument(
        "--method",
        choices=("mean", "first", "random"),
        default="mean",
        help="what the heads of a group become: their mean (default), the first of them, or a new "
        "random head",
    )
    parser.add_argument("--seed", type=int, default=0, help="for --method random (default 0)")
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
    """Convert, save, and print what became smaller."""
    from transformers import AutoConfig

    from hf_attn_plugin.convert import plan_gqa, to_gqa

    # All that can be refused is refused before the weights are read.
    if (Path(args.model) / "adapter_config.json").exists():
        raise ValueError(
            f"{args.model} holds a PEFT adapter: merge it into its model first (merge_and_unload)"
        )
    config = AutoConfig.from_pretrained(args.model)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{args.model} is quantized: convert the model it was made from")
    model_class = _model_class(config)
    plan = plan_gqa(model_class, config, args.kv_heads)
    _prepare_folder(args.model, args.out, args.overwrite)

    model = model_class.from_pretrained(args.model, dtype=args.dtype)
    parameters = model.num_parameters()
    to_gqa(model, args.kv_heads, args.method, seed=args.seed)
    model.save_pretrained(args.out)
    _save_tokenizer(args.model, args.out)

    cache = [elements * model.dtype.itemsize for elements in plan.cache_elements()]
    print(f"{args.model} -> {args.out}")
    print(f"{'':32}{'before':>16}{'after':>16}")
    for label, before, after in (
        ("key/value heads per layer", plan.old_heads, plan.new_heads),
        ("parameters", parameters, model.num_parameters()),
        (f"KV cache bytes/token, {str(model.dtype).removeprefix('torch.')}", *cache),
    ):
        print(f"{label:32}{before:>16,}{after:>16,}")
    return 0


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    raise ValueError(
        f"transformers has no model class for {config.model_type} with architectures "
        f"{config.architectures}: load the model yourself and call hf_attn_plugin.convert.to_gqa"
    )


def _prepare_folder(source: str, out: Path, overwrite: bool) -> None:
    if out.resolve() == Path(source).resolve():
        raise ValueError(f"--out is the model's own folder, {out}: choose another")
    held = [*out.glob("config.json"), *out.glob("*.safetensors")] if out.is_dir() else []
    if held and not overwrite:
        raise ValueError(f"{out} already holds a model ({held[0].name}): use --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the folder {out}: {error}") from error


def _save_tokenizer(source: str, out: Path) -> None:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        print(f"no tokenizer saved, as none could be loaded from {source}: {error}")
        return
    processor.save_pretrained(out)
