"""The training loop of all stages: transformers' Trainer with our loss, lengths and bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from hf_attn_plugin.data import IGNORE_INDEX
from hf_attn_plugin.quickstart.documents import ANSWER

_SMOOTHING = 0.9


class Curriculum(TrainerCallback, ExportableState):
    """Row lengths that double when the answers come right, and what is shown meanwhile.

    Args:
        first: Length of the first rows, tokens.
        last: Length that they grow to.
        threshold: Share of right answers, smoothed over steps, at which they double.
    """

    def __init__(self, first: int, last: int, threshold: float = 1.0) -> None:
        self.first, self.last, self.threshold = first, last, threshold
        self.changes: list[list[int]] = [[0, first]]
        self.accuracy = 0.0
        self.loss = math.nan

    def length_at(self, step: int) -> int:
        """Length of the rows at a step (counted from 0)."""
        return next(length for start, length in reversed(self.changes) if start <= step)

    def observe(self, loss: float, accuracy: float) -> None:
        """Take note of a step's loss (nats per token) and share of right answers."""

        def smooth(previous: float, value: float) -> float:
            if math.isnan(value):
                return previous
            if math.isnan(previous):
                return value
            return _SMOOTHING * previous + (1 - _SMOOTHING) * value

        self.loss = smooth(self.loss, loss)
        self.accuracy = smooth(self.accuracy, accuracy)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {"first": self.first, "last": self.last, "threshold": self.threshold},
            "attributes": {
                "changes": [list(change) for change in self.changes],
                "accuracy": self.accuracy,
                # JSON has no NaN.
                "loss": None if math.isnan(self.loss) else self.loss,
            },
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take up what the checkpoint kept, if the training is resumed."""
        if state.global_step == 0:
            return
        stored: Any = state.stateful_callbacks
        kept = stored[type(self).__name__]["attributes"]
        self.changes = [list(change) for change in kept["changes"]]
        self.accuracy = kept["accuracy"]
        self.loss = math.nan if kept["loss"] is None else kept["loss"]

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Double the length when the answers are right."""
        length = self.changes[-1][1]
        if self.accuracy > self.threshold and length < self.last:
            # The next batch has been made already.
            self.changes.append([state.global_step + 1, min(2 * length, self.last)])
            self.accuracy = 0.0


class _Bar(TrainerCallback):
    """A progress bar over the steps."""

    def __init__(self, description: str, curriculum: Curriculum, disable: bool | None) -> None:
        self.description, self.curriculum, self.disable = description, curriculum, disable
        self.bar: tqdm | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.description,
            unit="step",
            disable=self.disable,
        )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        assert self.bar is not None
        if state.global_step % 5 == 0:
            self.bar.set_postfix(
                length=self.curriculum.length_at(state.global_step),
                loss=f"{self.curriculum.loss:.2f}",
                answers=f"{100 * self.curriculum.accuracy:.0f}%",
                refresh=False,
            )
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _StageTrainer(Trainer):
    """Trainer whose loss is that of the text plus that of the answers, over batches in order."""

    def __init__(self, curriculum: Curriculum, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.curriculum = curriculum

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        batches: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(batches)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        losses, right, outputs = token_losses(model, inputs)
        labelled = inputs["labels"][:, 1:] != IGNORE_INDEX
        answers = labelled & (inputs["kinds"][:, 1:] == ANSWER)
        # The answers count as much as all the text, however few they are.
        loss = losses[labelled & ~answers].mean()
        accuracy = math.nan
        if answers.any():
            loss = loss + losses[answers].mean()
            accuracy = float(right[answers].float().mean())
        self.curriculum.observe(float(losses[labelled].detach().mean()), accuracy)
        return (loss, outputs) if return_outputs else loss


def token_losses(
    model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Loss of every prediction, and whether it was right.

    Returns:
        Losses in nats and hits, ``[rows, length - 1]`` each (0 where there is no label), and the
        model's outputs.
    """
    positions = {name: batch[name] for name in ("position_ids",) if name in batch}
    outputs = model(input_ids=batch["input_ids"], use_cache=False, **positions)
    logits, labels = outputs.logits[:, :-1].float(), batch["labels"][:, 1:]
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view_as(labels), logits.argmax(-1) == labels, outputs


@torch.no_grad()
def measure(
    model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, float]:
    """Mean loss per token, and the share of right answers.

    Args:
        model: Left as it was found.
        batches: As `documents.make_batch` makes them.

    Returns:
        ``{"loss": nats, "answers": 0 to 1}``.
    """
    training = model.training
    model.eval()
    losses, answers = [], []
    for batch in batches:
        loss, right, _ = token_losses(model, batch)
        labelled = batch["labels"][:, 1:] != IGNORE_INDEX
        losses.append(loss[labelled])
        answers.append(right[labelled & (batch["kinds"][:, 1:] == ANSWER)])
    model.train(training)
    return {
        "loss": float(torch.cat(losses).mean()),
        "answers": float(torch.cat(answers).float().mean()),
    }


def train(
    model: Any,
    batches: Dataset[dict[str, torch.Tensor]],
    curriculum: Curriculum,
    *,
    description: str,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    decay_share: float,
    save_steps: int,
    checkpoints: Path,
    resume_from: str | None,
    seed: int,
    progress: bool | None,
) -> None:
    """Train a model in place.

    Args:
        model: A transformers or PEFT model.
        batches: One item per step.
        curriculum: Observes the training, and holds the rows' lengths.
        description: Shown with the progress bar.
        steps: Optimizer steps.
        learning_rate: Its peak; it is reached after a short warmup and falls to near 0 at the end.
        weight_decay: AdamW's.
        decay_share: Share of the steps over which the learning rate falls.
        save_steps: Steps between checkpoints.
        checkpoints: Folder for them.
        resume_from: A checkpoint to go on from.
        seed: For Trainer.
        progress: True and False switch the bar on and off, None shows it on terminals only.
    """
    warmup = min(30, max(1, steps // 10))
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        warmup_steps=warmup,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": min(max(1, round(decay_share * steps)), steps - warmup),
            "min_lr_ratio": 0.01,
            "decay_type": "linear",
        },
        save_steps=save_steps,
        save_total_limit=1,
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=seed,
    )
    bar = _Bar(description, curriculum, None if progress is None else not progress)
    trainer = _StageTrainer(
        curriculum,
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=_only_item,
        callbacks=[curriculum, bar],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    finally:
        bar.close()


def _only_item(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The batches come ready made."""
    return items[0]
