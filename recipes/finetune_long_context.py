"""Fine-tune a causal language model at a longer context, under an attention chosen by name.

    accelerate launch --config_file recipes/accelerate_1gpu.yaml \
        recipes/finetune_long_context.py --model Qwen/Qwen3-0.6B --dataset deepmind/pg19 \
        --attn longformer --window 512 --context_length 131072 --max_steps 1000 \
        --gradient_checkpointing --out runs/long

Every option of transformers' Trainer is one of the recipe's. The same line again goes on from the
last checkpoint in --out; with --save_steps a multiple of --logging_steps the logged losses are
then those of a run that was never stopped. --out ends up holding the whole model, adapters merged.

Rows too long for one GPU are spread over several, with the same losses as on one:

    accelerate launch --config_file recipes/accelerate/ring_2gpu.yaml \
        recipes/finetune_long_context.py --attn ring …

`ring` is `flash` that insists on it and takes all processes; `--sequence_parallel 2` says how many
processes share a row, under any of the names. All others are given other rows.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_attn_plugin
from hf_attn_plugin import FlashConfig, LongformerConfig, SlidingWindowConfig, StridedConfig
from hf_attn_plugin.convert import extend_context
from hf_attn_plugin.data import TextArguments, collate_packed
from hf_attn_plugin.training import train_from_last_checkpoint
from hf_attn_plugin.verification import VerifyCallback

METHODS = {m.name: m for m in (FlashConfig, LongformerConfig, SlidingWindowConfig, StridedConfig)}
PARAMETERS = ("window", "num_sink_tokens", "num_global_tokens", "dilation", "stride")


@dataclass(kw_only=True)
class Arguments(TextArguments, TrainingArguments):
    """The options of the recipe, beside those for texts and Trainer's."""

    model: str = field(metadata={"help": "Hub id or folder"})
    context_length: int = field(metadata={"help": "tokens per packed row"})
    output_dir: str = field(metadata={"aliases": ["--out"], "help": "checkpoints, final model"})
    attn: str = field(
        default="flash", metadata={"help": f"{', '.join(METHODS)}, ring, sdpa, eager"}
    )
    sequence_parallel: int | None = field(
        default=None,
        metadata={"help": "processes per row; default: all with --attn ring, else 1"},
    )
    window: int | None = None
    num_sink_tokens: int | None = None
    num_global_tokens: int | None = None
    dilation: int | None = None
    stride: int | None = None
    rope_scaling: str = field(default="yarn", metadata={"help": "yarn, linear or none"})
    verify: bool = field(
        default=False, metadata={"help": "compare attention with eager on the first batch"}
    )
    lora: bool = True
    lora_rank: int = 16
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "trained in full beside LoRA, such as embed_tokens norm"}
    )
    dtype: str = field(default="auto", metadata={"help": "of the weights; float32 with --no_lora"})
    learning_rate: float = 2e-4
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1


def configure_attention(config: PreTrainedConfig, args: Arguments) -> None:
    """Keep the parameters of the attention in the model's config."""
    given = {name: getattr(args, name) for name in PARAMETERS if getattr(args, name) is not None}
    method = METHODS.get(args.attn)
    taken = [item.name for item in dataclasses.fields(method)] if method else []
    if not set(given) <= set(taken):
        raise ValueError(f"--attn {args.attn} takes {taken or 'no parameter'}, got {given}")
    if method and given:
        hf_attn_plugin.configure(config, method(**given))


def load_model(args: Arguments, config: PreTrainedConfig) -> Any:
    """Load the model, with new adapters where they are trained."""
    model = AutoModelForCausalLM.from_pretrained(
        args.model, config=config, attn_implementation=args.attn, dtype=args.dtype
    )
    if not args.lora:
        return model
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules="all-linear",
        modules_to_save=args.modules_to_save,
    )
    return get_peft_model(model, lora)


def make_trainer(model: Any, args: Arguments, **kwargs: Any) -> Trainer:
    """Make a Trainer, one that spreads rows over processes where that was asked for."""
    from hf_attn_plugin.sequence_parallelism.trainer import (
        SequenceParallelTrainer,
        parallelism_config,
    )

    config, size = parallelism_config(args), args.sequence_parallel
    configured = config is not None and config.cp_size > 1
    if size == 1 or (size is None and args.attn != "ring" and not configured):
        return Trainer(model, args, **kwargs)
    if args.verify:
        raise ValueError(
            "--verify compares attention over whole rows: run it with --sequence_parallel 1 and "
            f"--attn {'flash' if args.attn == 'ring' else args.attn} first, on short rows"
        )
    return SequenceParallelTrainer(model, args, sequence_parallel_size=size, **kwargs)


def save(trainer: Trainer, args: Arguments, tokenizer: Any) -> None:
    """Save the whole model, adapters merged, from one process."""
    state = None
    if trainer.is_fsdp_enabled:  # every process has a part of each weight
        state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if state is not None:
        model = load_model(args, model.config)
        model.load_state_dict(state)
    if args.lora:
        model = model.merge_and_unload()
    model.config.use_cache = True  # Trainer turns the cache off, and would save that.
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


def main() -> None:
    """Load, extend, pack, train, and save."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    set_seed(args.seed)  # For the adapters, which are there before Trainer sets it.
    config = AutoConfig.from_pretrained(args.model)
    configure_attention(config, args)
    extend_context(config, args.context_length, args.rope_scaling)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with args.main_process_first():
        rows = args.load_rows(tokenizer, args.context_length)

    trainer = make_trainer(
        load_model(args, config),
        args,
        data_collator=collate_packed,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        callbacks=[VerifyCallback()] if args.verify else None,
    )
    train_from_last_checkpoint(trainer)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    save(trainer, args, tokenizer)


if __name__ == "__main__":
    main()
