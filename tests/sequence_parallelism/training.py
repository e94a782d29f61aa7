"""Short runs of Trainer in one process or in several, described by a `Run`."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_attn_plugin.sequence_parallelism.trainer import (
    SequenceParallelTrainer,
    SequenceParallelTrainerMixin,
)
from hf_attn_plugin.training import train_from_last_checkpoint
from tests.parallel.processes import run_processes
from tests.tiny import VOCABULARY, tiny_model

STEPS = 20


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of Trainer; the same total batch whatever the number of processes."""

    family: str = "llama"
    attn: str = "flash"
    processes: int = 1
    ring: int | None = None  # None: a plain Trainer
    batch: int = 4  # rows per update and micro-step, over all processes
    length: int = 38  # no multiple of what a layout needs
    rows: str = "packed"
    steps: int = STEPS
    accumulation: int = 2
    lora: bool = False
    checkpointing: bool = False
    average_tokens: bool = True
    fsdp2: bool = False
    device: str = "cpu"
    examples: int = 56
    eval_rows: int = 0
    schedule: str | None = None
    own_loss: str | None = None  # one of LOSSES
    fault: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def with_(self, **changes: Any) -> Run:
        return dataclasses.replace(self, **changes)

    @property
    def alone(self) -> Run:
        """The same in one process, with transformers' Trainer as it is."""
        attn = "flash" if self.attn == "ring" else self.attn
        return self.with_(attn=attn, processes=1, ring=None, fsdp2=False, fault=None)


def dataset(run: Run, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Rows with structure to learn, of documents or of padding, and with few or many targets."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        start = torch.randint(3, VOCABULARY, (), generator=draw)
        ids = 3 + (start + (number % 5 + 1) * torch.arange(run.length)) % (VOCABULARY - 3)
        row = {"input_ids": ids, "labels": ids.clone()}
        row["labels"][: int(torch.randint(0, run.length - 4, (), generator=draw))] = -100
        if run.rows == "packed":
            cut = int(torch.randint(4, run.length - 4, (), generator=draw))
            row["position_ids"] = torch.cat([torch.arange(cut), torch.arange(run.length - cut)])
            row["labels"][cut] = -100
        else:
            pads = number % 7
            valid = torch.ones(run.length, dtype=torch.long)
            side = slice(None, pads) if run.rows == "left" else slice(run.length - pads, None)
            valid[side] = 0
            row["attention_mask"] = valid
            row["labels"] = torch.where(valid == 1, row["labels"], -100)
        if run.family == "bert":  # masked tokens: a few targets, in some rows all in one half
            hidden = torch.rand(run.length, generator=draw) < 0.2
            hidden[2] = True
            row["labels"] = torch.where(hidden, ids, -100)
            row["input_ids"] = torch.where(hidden, 3, ids)
        rows.append(row)
    return rows


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def train(*runs: Run, folder: str | None = None) -> list[dict[str, Any]]:
    """What runs on one number of processes leave: losses and norms by step, weights, evaluation.

    Args:
        runs: Follow each other in the same processes, since starting them takes longest.
        folder: Where checkpoints go, and come from where there are some.
    """
    (count,) = {run.processes for run in runs}
    if count == 1:
        return [_train(0, run, folder) for run in runs]
    by_rank = run_processes(_train_all, count, runs, folder, limit_s=150.0)
    for first, *others in zip(*by_rank, strict=True):
        assert {result["processes"] for result in (first, *others)} == {count}
        for other in others:
            for name, weight in first["weights"].items():
                assert torch.equal(other["weights"][name], weight), f"ranks differ in {name}"
    return by_rank[0]


def _train_all(rank: int, runs: tuple[Run, ...], folder: str | None) -> list[dict[str, Any]]:
    as_launched(rank, runs[0].processes)
    return [_train(rank, run, folder) for run in runs]


def as_launched(rank: int, processes: int) -> None:
    """The environment that a launcher gives its processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    names["LOCAL_WORLD_SIZE"] = processes
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"})


def fsdp2_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch` sets for FSDP2; accelerate itself takes GPUs only for it."""
    from accelerate.state import DistributedType, PartialState

    settings = {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": "true"}
    settings |= {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    settings |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = ("gloo", DistributedType.MULTI_GPU)
    monkeypatch.setattr(PartialState, "_prepare_backend", lambda self, *args, **kwargs: found)


def _train(rank: int, run: Run, folder: str | None) -> dict[str, Any]:
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as monkeypatch:
        AcceleratorState._reset_state(reset_partial_state=True)
        if run.fsdp2 and run.device == "cpu":
            fsdp2_on_a_cpu(monkeypatch)
        if run.fsdp2 and run.ring is not None:  # as accelerate's launcher hands the size on
            monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
            monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", str(run.ring))
        try:
            return _result(rank, run, folder)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def _result(rank: int, run: Run, folder: str | None) -> dict[str, Any]:
    replicas = run.processes // (run.ring or 1)
    assert run.batch % replicas == 0
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=folder or scratch,
            use_cpu=run.device == "cpu" and not run.fsdp2,
            dataloader_pin_memory=False,
            max_steps=run.steps,
            per_device_train_batch_size=run.batch // replicas,
            per_device_eval_batch_size=run.batch // replicas,
            gradient_accumulation_steps=run.accumulation,
            max_grad_norm=0.5,
            learning_rate=3e-3,
            logging_steps=1,
            gradient_checkpointing=run.checkpointing,
            average_tokens_across_devices=run.average_tokens,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no" if folder is None else "steps",
            save_steps=4,
            **dict(run.settings),
        )
        model = tiny_model(run.family, run.attn)
        if run.lora:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        kwargs: dict[str, Any] = {
            "data_collator": collate,
            "train_dataset": dataset(run, run.examples, seed=1),
            "eval_dataset": dataset(run, run.eval_rows, seed=2) if run.eval_rows else None,
        }
        trainer: Any
        if run.ring is None:
            trainer = LOSSES.get(run.own_loss, Trainer)(model, args, **kwargs)
        else:
            kwargs["sequence_parallel_size"] = None if run.fsdp2 else run.ring
            kwargs["sequence_parallel_options"] = {"schedule": run.schedule}
            kind: Any = SequenceParallelTrainer
            if run.own_loss is not None:
                kind = type("Mixed", (SequenceParallelTrainerMixin, LOSSES[run.own_loss]), {})
            trainer = kind(model, args, **kwargs)
            _inject(run.fault, trainer)
        train_from_last_checkpoint(trainer)
        result = {
            "processes": trainer.accelerator.num_processes,
            "losses": _logged(trainer, "loss"),
            "norms": _logged(trainer, "grad_norm"),
            "weights": {name: _whole(weight) for name, weight in model.named_parameters()},
            "tokens": trainer.state.num_input_tokens_seen,
            "flops": trainer.state.total_flos,
        }
        if run.eval_rows:
            result["eval_loss"] = trainer.evaluate()["eval_loss"]
            found = trainer.predict(trainer.eval_dataset)
            result["predictions"] = torch.as_tensor(found.predictions)
            rows = [{k: v for k, v in r.items() if k != "labels"} for r in trainer.eval_dataset]
            result["unlabelled"] = torch.as_tensor(trainer.predict(rows).predictions)
        return result


class OwnLoss(Trainer):
    """A Trainer whose loss is not the model's: cross-entropy and a penalty on large logits."""

    loss_is_scaled_for_ga = False
    shard: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # how transformers 5.17 is told the same

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        targets = inputs.get("shift_labels")
        if targets is None:
            targets = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        outputs = model(**{k: v for k, v in inputs.items() if "labels" not in k})
        valid = targets != -100
        each = (
            nn.functional.cross_entropy(outputs.logits.transpose(1, 2), targets, reduction="none")
            + 0.01 * outputs.logits.logsumexp(-1).square()
        )
        loss = each[valid].mean() if self.shard is None else self.shard.mean(each, valid)
        return (loss, outputs) if return_outputs else loss


class ModelsLoss(Trainer):
    """A Trainer whose loss is the model's, of a call that passes no number of items."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


LOSSES: dict[str | None, type[Trainer]] = {"penalty": OwnLoss, "the model's": ModelsLoss}


def _whole(weight: Tensor) -> Tensor:
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole.detach().cpu().clone()


def _logged(trainer: Any, name: str) -> dict[int, float]:
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


def _inject(fault: str | None, trainer: Any) -> None:
    """Errors that a comparison of curves has to notice."""
    if fault == "targets halved":  # as where transformers and the mixin both divide, or none does
        counted = trainer._get_num_items_in_batch

        def halved(*args: Any) -> Any:
            trainer._targets = counted(*args) / 2
            return trainer._targets

        trainer._get_num_items_in_batch = halved
    elif fault == "labels shifted in parts":
        prepared = trainer._prepare_context_parallel_inputs

        def prepare(model: Any, inputs: Any) -> Any:
            context, batch = prepared(model, inputs)
            labels = batch["shift_labels"].clone()
            labels[:, -1] = -100  # the last token of a part has lost its target
            return context, {**batch, "shift_labels": labels}

        trainer._prepare_context_parallel_inputs = prepare
    elif fault is not None:  # "killed at STEP by RANK"
        trainer.add_callback(Killer(*(int(word) for word in fault.split() if word.isdecimal())))


class Killer(TrainerCallback):
    """Ends one process as the operating system does when memory runs out."""

    def __init__(self, step: int, rank: int) -> None:
        self.step = step
        self.rank = rank

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
