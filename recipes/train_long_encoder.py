"""Convert an encoder to longer inputs and train it on masked tokens (arXiv 2004.05150, section 5).

    accelerate launch --config_file recipes/accelerate_1gpu.yaml recipes/train_long_encoder.py \
        --model FacebookAI/roberta-base --max_positions 4096 --window 512 --dataset deepmind/pg19 \
        --max_steps 3000 --gradient_checkpointing --bf16 --out runs/long-roberta

Position embeddings are copied, attention becomes longformer, and the model goes on with masked-LM
training at the new length. Every option of transformers' Trainer is one of the recipe's. The same
line again goes on from the last checkpoint in --out, with the losses of a run that was never
stopped. --out ends up holding the model, and the held-out loss before conversion, after it and
after training, on the same text in rows of the old and of the new length, in
long_encoder_results.json. Load the model with attn_implementation="longformer".
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from hf_attn_plugin.convert import plan_long_encoder, to_long_encoder
from hf_attn_plugin.data import TextArguments, load_texts
from hf_attn_plugin.masked_lm import (
    MaskingCollator,
    encoder_rows,
    load_encoder_rows,
    mask_rows,
    special_ids,
)
from hf_attn_plugin.training import last_checkpoint, train_from_last_checkpoint


@dataclass(kw_only=True)
class Arguments(TextArguments, TrainingArguments):
    """The options of the recipe, beside those for texts and Trainer's."""

    model: str = field(metadata={"help": "Hub id or folder of an encoder"})
    max_positions: int = field(metadata={"help": "tokens it takes afterwards"})
    output_dir: str = field(metadata={"aliases": ["--out"], "help": "checkpoints, final model"})
    window: int = field(default=512, metadata={"help": "keys at distances below it are seen"})
    num_global_tokens: int = field(default=1, metadata={"help": "first tokens that see all"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of tokens to predict"})
    dtype: str = field(default="float32", metadata={"help": "of the weights that are trained"})
    learning_rate: float = 3e-5
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1


def main() -> None:
    """Measure, convert, measure, train, measure, and save."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    first, last = special_ids(tokenizer)
    model = AutoModelForMaskedLM.from_pretrained(args.model, dtype=args.dtype)
    # Refuses before any time is spent.
    plan = plan_long_encoder(type(model), model.config, args.max_positions)
    with args.main_process_first():
        texts = load_texts(
            args.text,
            args.dataset,
            dataset_config=args.dataset_config,
            split=args.split,
            text_column=args.text_column,
        )
        rows = load_encoder_rows(texts, tokenizer, args.max_positions)
    held_out = max(1, round(len(rows) * args.eval_fraction))
    if held_out == len(rows):
        raise ValueError(f"{len(rows)} rows of {args.max_positions} tokens are too few: more text")
    split = rows.train_test_split(test_size=held_out, shuffle=False)
    content = [row["input_ids"][1:-1] for row in split["test"]]
    lengths = {plan.old_positions, args.max_positions}
    measured: dict[int, Any] = {
        length: mask_rows(
            encoder_rows(content, length, first, last), tokenizer, args.mlm_probability
        )
        for length in sorted(lengths)
    }
    trainer = Trainer(
        model,
        args,
        data_collator=MaskingCollator(tokenizer, args.mlm_probability, args.seed),
        train_dataset=split["train"],
    )
    checkpoint = last_checkpoint(args.output_dir)
    results = Path(args.output_dir, "long_encoder_results.json")
    losses = json.loads(results.read_text()) if checkpoint and results.exists() else {}

    def measure(when: str, length: int) -> None:
        name = f"loss_{when}_at_{length}"
        if name not in losses:
            losses[name] = trainer.evaluate(measured[length])["eval_loss"]

    measure("before_conversion", plan.old_positions)
    to_long_encoder(
        model, args.max_positions, args.window, args.num_global_tokens, tokenizer=tokenizer
    )
    for length in measured:
        measure("after_conversion", length)
    trainer.save_metrics("long_encoder", losses, combined=False)

    train_from_last_checkpoint(trainer)
    for length in measured:
        measure("after_training", length)
    trainer.log_metrics("long_encoder", losses)
    trainer.save_metrics("long_encoder", losses, combined=False)
    trainer.save_state()
    trainer.save_model()
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
