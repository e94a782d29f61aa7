"""Convert a model to grouped-query attention and uptrain it (arXiv 2305.13245).

    accelerate launch --config_file recipes/accelerate_1gpu.yaml recipes/uptrain_gqa.py \
        --model openlm-research/open_llama_3b_v2 --kv_heads 8 --dataset allenai/c4 \
        --dataset_config en --split 'train[:1%]' --original_steps 250000 --out runs/gqa

Key/value heads are merged, by their mean or as --method says, then the model trains on for a part
of its pre-training steps, 5 % as in the paper; --max_steps says the number directly. Every option
of transformers' Trainer is one of the recipe's. The same line again goes on from the last
checkpoint in --out; with --save_steps a multiple of --logging_steps the logged losses are then
those of a run that was never stopped. --out ends up holding the model, and the loss before
conversion, after it and after uptraining in uptrain_results.json.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import hf_attn_plugin  # noqa: F401  (registers the names that --attn takes)
from hf_attn_plugin.convert import to_gqa
from hf_attn_plugin.convert.gqa_layers import Conversion
from hf_attn_plugin.data import TextArguments, collate_packed
from hf_attn_plugin.training import last_checkpoint, train_from_last_checkpoint


@dataclass(kw_only=True)
class Arguments(TextArguments, TrainingArguments):
    """The options of the recipe, beside those for texts and Trainer's."""

    model: str = field(metadata={"help": "Hub id or folder"})
    kv_heads: int = field(metadata={"help": "key/value heads afterwards; 1 is multi-query"})
    output_dir: str = field(metadata={"aliases": ["--out"], "help": "checkpoints, final model"})
    method: str = field(default="mean", metadata={"help": "mean, first, random or aligned"})
    original_steps: int | None = field(default=None, metadata={"help": "of the pre-training"})
    uptrain_fraction: float = field(default=0.05, metadata={"help": "of --original_steps"})
    context_length: int = field(default=2048, metadata={"help": "tokens per packed row"})
    attn: str = field(default="flash", metadata={"help": "attention implementation"})
    dtype: str = field(default="float32", metadata={"help": "of the weights that are trained"})
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        """Work out the number of steps."""
        if self.max_steps <= 0:
            if self.original_steps is None:
                raise ValueError("give --max_steps, or --original_steps to take a part of")
            self.max_steps = math.ceil(self.uptrain_fraction * self.original_steps)
        super().__post_init__()


def main() -> None:
    """Measure, convert, measure, train, measure, and save."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with args.main_process_first():
        rows = args.load_rows(tokenizer, args.context_length)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, attn_implementation=args.attn, dtype=args.dtype
    )
    # Refuses before any time is spent.
    Conversion(type(model), model.config, args.kv_heads, args.method, args.seed)
    trainer = Trainer(
        model,
        args,
        data_collator=collate_packed,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
    )
    checkpoint = last_checkpoint(args.output_dir)
    results = Path(args.output_dir, "uptrain_results.json")
    losses = json.loads(results.read_text()) if checkpoint and results.exists() else {}
    if not losses:
        losses["loss_before_conversion"] = trainer.evaluate()["eval_loss"]
    to_gqa(model, args.kv_heads, args.method, seed=args.seed)
    if len(losses) == 1:
        losses["loss_after_conversion"] = trainer.evaluate()["eval_loss"]
        trainer.save_metrics("uptrain", losses, combined=False)

    train_from_last_checkpoint(trainer)
    losses["loss_after_uptraining"] = trainer.evaluate()["eval_loss"]
    trainer.log_metrics("uptrain", losses)
    trainer.save_metrics("uptrain", losses, combined=False)
    trainer.save_state()

    model.config.use_cache = True  # Trainer turns the cache off, and would save that.
    trainer.save_model()
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
