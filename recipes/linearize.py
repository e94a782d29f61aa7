"""Turn a softmax model into one with linear attention: distil its layers, then fine-tune.

    accelerate launch --config_file recipes/accelerate_1gpu.yaml recipes/linearize.py \
        --model Qwen/Qwen3-0.6B --dataset deepmind/pg19 --feature_map favor --num_features 256 \
        --context_length 4096 --distill_steps 1000 --max_steps 2000 --out runs/linear

Stage 1 trains the query and key projections, all layers at once, to give the attention outputs of
the softmax model; stage 2 trains the whole model, by LoRA or with --no_lora in full, on the text.
Every option of transformers' Trainer is one of the recipe's, for both stages. The same line again
goes on from the last checkpoint in --out. --out ends up holding the model, what was measured in
linearize_results.json, and the picture of it in linearize.png where matplotlib is installed.
"""

import copy
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_attn_plugin import LinearConfig, configure
from hf_attn_plugin.convert.linearize import AttentionDistillation, attention_output_errors
from hf_attn_plugin.data import TextArguments, collate_packed
from hf_attn_plugin.training import train_from_last_checkpoint

logger = logging.get_logger(__name__)
RESULTS = "linearize_results.json"


@dataclass(kw_only=True)
class Arguments(TextArguments, TrainingArguments):
    """The options of the recipe, beside those for texts and Trainer's."""

    model: str = field(metadata={"help": "Hub id or folder"})
    output_dir: str = field(metadata={"aliases": ["--out"], "help": "checkpoints, final model"})
    context_length: int = field(default=2048, metadata={"help": "tokens per packed row"})
    feature_map: str = field(default="elu", metadata={"help": "elu or favor"})
    num_features: int | None = field(default=None, metadata={"help": "of favor"})
    distill_steps: int = field(default=1000, metadata={"help": "of stage 1"})
    distill_learning_rate: float = field(default=1e-3, metadata={"help": "of stage 1"})
    error_rows: int = field(default=16, metadata={"help": "held-out rows for the layers' errors"})
    lora: bool = True
    lora_rank: int = 16
    dtype: str = field(default="float32", metadata={"help": "of the weights that are trained"})
    learning_rate: float = 2e-4
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1

    def stage(self, folder: str, **changes: Any) -> TrainingArguments:
        """The arguments of one stage, with a folder of its own inside --out."""
        args = copy.copy(self)
        args.output_dir = str(Path(self.output_dir, folder))
        for name, value in changes.items():
            setattr(args, name, value)
        return args


class Results:
    """What was measured so far; kept in a file, so that a run that goes on measures it once."""

    def __init__(self, args: Arguments) -> None:
        self.path = Path(args.output_dir, RESULTS)
        self.writes = args.process_index == 0
        self.values: dict[str, Any] = {}
        if self.path.exists():
            self.values = json.loads(self.path.read_text("utf-8"))

    def add(self, **values: Any) -> None:
        """Keep more values, and say them."""
        self.values |= values
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=2), encoding="utf-8")
        partial.replace(self.path)  # whole or not at all
        for name, value in values.items():
            logger.warning(f"{name}: {value}")


def held_out_loss(model: PreTrainedModel, args: Arguments, rows: Any, attn: str) -> float:
    """The language-model loss on the held-out rows."""
    model.set_attn_implementation(attn)
    trainer = Trainer(model, args, data_collator=collate_packed, eval_dataset=rows)
    return float(trainer.evaluate()["eval_loss"])


def train(model: Any, args: TrainingArguments, rows: Any) -> Trainer:
    """Train from the last checkpoint on, if there is one."""
    trainer = Trainer(
        model,
        args,
        data_collator=collate_packed,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
    )
    train_from_last_checkpoint(trainer)
    trainer.save_state()
    return trainer


def plot(values: dict[str, Any], path: Path) -> None:
    """Losses, and errors of the layers."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture without matplotlib: pip install 'hf_attn_plugin[plot]'")
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    stages = ("softmax", "linear", "distilled", "finetuned")
    bars = left.bar(stages, [values[f"loss_{stage}"] for stage in stages], color="#0072B2")
    left.bar_label(bars, fmt="%.2f")
    left.set_ylabel("loss on held-out text")
    for name, color in (("before", "#D55E00"), ("after", "#009E73")):
        errors = values[f"errors_{name}"]
        right.plot(range(len(errors)), errors, "o-", color=color, label=f"{name} distillation")
    right.set_ylim(bottom=0)
    right.set_xlabel("layer")
    right.set_ylabel("relative error of the attention output")
    right.legend()
    figure.suptitle(f"softmax to linear, {values['features']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, distil, measure, fine-tune, measure, and save."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if args.max_steps <= 0 or args.distill_steps <= 0:
        raise ValueError(
            "give --max_steps for stage 2 and --distill_steps for stage 1, both above 0; "
            f"got {args.max_steps} and {args.distill_steps}"
        )
    parameters = LinearConfig(args.feature_map, args.num_features)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with args.main_process_first():
        rows = args.load_rows(tokenizer, args.context_length)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, attn_implementation="flash", dtype=args.dtype
    )
    configure(model, parameters)
    student = AttentionDistillation(model)  # Refuses before any time is spent.
    model.to(args.device)
    some = rows["test"].select(range(min(args.error_rows, len(rows["test"]))))
    loader = DataLoader(some, args.per_device_eval_batch_size, collate_fn=collate_packed)
    batches = [{key: value.to(args.device) for key, value in batch.items()} for batch in loader]

    results = Results(args)
    results.add(command=shlex.join(["accelerate", "launch", *sys.argv]))
    if "errors_before" not in results.values:
        results.add(
            features=parameters.feature_map
            + (f" with {args.num_features} features" if args.num_features else ""),
            loss_softmax=held_out_loss(model, args, rows["test"], "flash"),
            loss_linear=held_out_loss(model, args, rows["test"], "linear"),
            errors_before=attention_output_errors(model, batches),
        )
    stage = args.stage(
        "distillation",
        max_steps=args.distill_steps,
        learning_rate=args.distill_learning_rate,
        gradient_checkpointing=False,  # of no use: only attention is computed with gradients
    )
    train(student, stage, rows)
    if "errors_after" not in results.values:
        results.add(errors_after=attention_output_errors(model, batches, students=student.students))
    student.write_back()
    model.requires_grad_(True)
    if "loss_distilled" not in results.values:
        results.add(loss_distilled=held_out_loss(model, args, rows["test"], "linear"))

    model.set_attn_implementation("linear")
    set_seed(args.seed)  # The same adapters whether stage 1 ran in this process or not.
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules="all-linear",
    )
    trainer = train(
        get_peft_model(model, lora) if args.lora else model, args.stage("finetuning"), rows
    )
    results.add(loss_finetuned=float(trainer.evaluate()["eval_loss"]))
    model = trainer.accelerator.unwrap_model(trainer.model)
    if args.lora:
        model = model.merge_and_unload()
    model.config.use_cache = True  # Trainer turns the cache off, and would save that.
    if trainer.is_world_process_zero():
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        plot(results.values, Path(args.output_dir, "linearize.png"))


if __name__ == "__main__":
    main()
