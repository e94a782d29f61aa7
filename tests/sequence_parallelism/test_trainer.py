"""Trainer over rings of processes: the curves of one process, and an evaluation that is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils.data import IterableDataset

from hf_attn_plugin.sequence_parallelism.mesh import check_ring_size
from hf_attn_plugin.sequence_parallelism.trainer import _without_ring
from hf_attn_plugin.verification import VerifyCallback
from tests.parallel.processes import ChildError, run_processes
from tests.sequence_parallelism.training import STEPS, Run, as_launched, dataset, train
from tests.tiny import tiny_model

# Relative, of losses around 4 in float32; gradient norms are sums over far more.
ROUNDING = 2e-6
NUMBERED_CPUS = Version(transformers.__version__) >= Version("5.23")
Results = dict[str, Any]

TOKENS = (("include_num_input_tokens_seen", "all"),)
BF16 = (("bf16", True),)
TWO = {
    # 53 and 11 rows: the last batches are not full.
    "llama-packed": Run(attn="ring", examples=53, eval_rows=11, settings=TOKENS),
    "mistral-padded": Run(family="mistral", rows="left", average_tokens=False, schedule="ring"),
    "lora-checkpointing": Run(
        attn="longformer", rows="right", lora=True, checkpointing=True, steps=10
    ),
    "bert": Run(family="bert", rows="right", eval_rows=9, accumulation=1, steps=10),
    "own-loss": Run(own_loss="penalty", steps=10),
    "models-loss": Run(own_loss="the model's", rows="left", accumulation=1, eval_rows=9, steps=10),
    "bf16": Run(schedule="gather", settings=BF16, steps=10),
    "targets halved": Run(fault="targets halved", steps=3),
    "labels shifted in parts": Run(fault="labels shifted in parts", steps=3),
}
FOUR = {
    "llama": Run(rows="left", eval_rows=16),
    "mistral": Run(family="mistral", schedule="ring"),
    "fsdp2": Run(fsdp2=True, eval_rows=16, steps=10),
    "fsdp2-lora": Run(fsdp2=True, lora=True, steps=10),
}


def in_processes(runs: dict[str, Run], processes: int) -> dict[str, Results]:
    spread = [run.with_(processes=processes, ring=2) for run in runs.values()]
    return dict(zip(runs, train(*spread), strict=True))


@pytest.fixture(scope="module")
def two() -> dict[str, Results]:
    return in_processes(TWO, 2)


@pytest.fixture(scope="module")
def four() -> dict[str, Results]:
    return in_processes(FOUR, 4)


def differences(run: Results, alone: Results) -> Iterator[float]:
    """Largest relative differences of losses and of gradient norms."""
    for name in ("losses", "norms"):
        assert list(run[name]) == list(alone[name]) == list(range(1, len(run[name]) + 1))
        yield max(abs(run[name][step] / alone[name][step] - 1) for step in run[name])


def assert_same(run: Results, alone: Results, tolerance: float = ROUNDING) -> None:
    losses, norms = differences(run, alone)
    assert losses < tolerance and norms < 10 * tolerance
    first, *_, last = alone["losses"].values()
    assert last < 0.98 * first, "nothing was learned: equal curves would say little"
    if tolerance == ROUNDING:
        for name, weight in alone["weights"].items():
            if not name.endswith("key.bias"):  # in truth without a gradient; Adam enlarges rounding
                torch.testing.assert_close(run["weights"][name], weight, rtol=0, atol=5e-5)
    if "eval_loss" in alone:
        assert run["eval_loss"] == pytest.approx(alone["eval_loss"], rel=ROUNDING)
        for name in ("predictions", "unlabelled"):
            assert run[name].shape == alone[name].shape
            torch.testing.assert_close(run[name], alone[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["llama-packed", "mistral-padded", "lora-checkpointing", "bert", "own-loss", "models-loss"],
)
def test_two_processes_have_the_curve_of_one(name: str, two: dict[str, Results]) -> None:
    (alone,) = train(TWO[name].alone)
    assert_same(two[name], alone)
    assert two[name]["tokens"] == alone["tokens"]
    assert two[name]["flops"] == alone["flops"]


def test_mixed_precision(two: dict[str, Results]) -> None:
    """Each process rounds its own sums; the float32 curve shows that bfloat16 was used."""
    (alone,) = train(TWO["bf16"].alone)
    assert_same(two["bf16"], alone, tolerance=5e-3)
    (wide,) = train(TWO["bf16"].alone.with_(settings=()))
    assert max(differences(alone, wide)) > 1e-4


@pytest.mark.parametrize(
    ("fault", "least"), [("targets halved", 0.9), ("labels shifted in parts", 1e-3)]
)
def test_errors_would_be_seen(fault: str, least: float, two: dict[str, Results]) -> None:
    (alone,) = train(TWO[fault].alone)
    assert min(differences(two[fault], alone)) > least


@pytest.mark.parametrize("name", list(FOUR))
def test_two_rings_of_two_have_the_curve_of_one_process(
    name: str, four: dict[str, Results]
) -> None:
    (alone,) = train(FOUR[name].alone)
    assert_same(four[name], alone)


REFUSALS = {
    "three": "spread over 3 processes, but this job has 2",
    "two configs": "sequence_parallel_size=2, but the ParallelismConfig says cp_size=4",
    "tensor parallel": "beside tensor parallelism",
    "shards": "weights are sharded by FSDP2 alone",
    "smoothing": "label_smoothing_factor: not over sequences",
    "compiled": "torch_compile: attention over sequences",
    "iterable": "evaluation over an iterable data set",
    "verify": "VerifyCallback compares attention over whole rows",
    "sdpa": "sdpa",
    "lengths": "must all be given the same whole batch",
}


class Endless(IterableDataset):
    """Of no length that could be told."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from dataset(Run(length=32), 8, seed=0)


def _refused(rank: int) -> dict[str, str]:
    as_launched(rank, 2)
    return {case: _refusal(rank, case) for case in REFUSALS}


def _refusal(rank: int, case: str) -> str:
    from accelerate import ParallelismConfig
    from transformers import TrainingArguments

    from hf_attn_plugin.sequence_parallelism.trainer import SequenceParallelTrainer

    settings: dict[str, Any] = {
        "smoothing": {"label_smoothing_factor": 0.1},
        "compiled": {"torch_compile": True},
    }.get(case, {})
    size = {"three": 3, "two configs": 2}.get(case)
    if case == "two configs":
        settings["parallelism_config"] = ParallelismConfig(cp_size=4)
    if case == "tensor parallel":
        settings["parallelism_config"] = ParallelismConfig(tp_size=2)
    if case == "shards":
        settings["parallelism_config"] = ParallelismConfig(dp_shard_size=2)
    args = TrainingArguments("unused", use_cpu=True, report_to=[], **settings)
    model = tiny_model("llama", "sdpa" if case == "sdpa" else "flash")
    rows = dataset(Run(length=32 + (case == "lengths") * rank), 8, seed=rank)
    kwargs: dict[str, Any] = {"callbacks": [VerifyCallback()] if case == "verify" else None}
    try:
        trainer = SequenceParallelTrainer(
            model, args, train_dataset=rows, sequence_parallel_size=size, **kwargs
        )
        if case == "iterable":
            trainer.evaluate(Endless())
        trainer.train()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_what_cannot_be_is_refused_on_every_process() -> None:
    for said in run_processes(_refused, 2):
        for case, message in REFUSALS.items():
            assert message in said[case], case


def _configured(rank: int) -> list[int]:
    as_launched(rank, 4)
    from accelerate import ParallelismConfig
    from transformers import TrainingArguments

    from hf_attn_plugin.sequence_parallelism.trainer import SequenceParallelTrainer

    config = ParallelismConfig(cp_size=2)
    args = TrainingArguments(
        "unused",
        use_cpu=True,
        report_to=[],
        parallelism_config=config,
        dataloader_pin_memory=False,
        per_device_train_batch_size=1,
    )
    rows = [{"input_ids": torch.tensor([i]), "labels": torch.tensor([i])} for i in range(8)]
    trainer = SequenceParallelTrainer(tiny_model("llama", "flash"), args, train_dataset=rows)
    assert trainer.get_cp_size() == 2
    assert trainer.get_total_train_batch_size(args) == 2
    return [int(batch["input_ids"]) for batch in trainer.get_train_dataloader()]


def test_the_size_comes_from_accelerates_config_and_rings_share_batches() -> None:
    seen = run_processes(_configured, 4)
    assert seen[0] == seen[1] and seen[2] == seen[3]
    assert sorted(seen[0] + seen[2]) == list(range(8))


def test_fsdp2_with_replicas_shards_over_rings_too() -> None:
    from accelerate.parallelism_config import ParallelismConfig

    told = _without_ring(ParallelismConfig(dp_replicate_size=2, dp_shard_size=3, cp_size=4))
    assert told is not None
    assert (told.dp_replicate_size, told.dp_shard_size, told.cp_size) == (2, 12, 1)
    assert _without_ring(ParallelismConfig(dp_shard_size=3, cp_size=4)) is None


def test_sizes_that_do_not_fit() -> None:
    check_ring_size(2, 4)
    for size, processes, message in [
        (1, 4, "at least 2 processes, asked for 1"),
        (True, 4, "asked for True"),
        (4, 1, "spread over 4 processes, but this job has 1"),
        (4, 6, "6 processes do not make up rings of 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_ring_size(size, processes)


def test_goes_on_with_another_number_of_processes_after_one_was_killed(tmp_path: Any) -> None:
    run = Run(family="mistral", schedule="ring")
    killed = run.with_(processes=4, ring=4, fault="killed at 13 by 2")
    with pytest.raises(ChildError, match="rank 2: ended without a result") as raised:
        train(killed, folder=str(tmp_path))
    text = str(raised.value)
    assert "process 2 (" in text and "is gone: it was killed" in text
    # Older Trainers cannot load an optimizer to a CPU's numbered device, which several have.
    resumed = run.with_(processes=2, ring=2) if NUMBERED_CPUS else run.alone
    (rest,) = train(resumed, folder=str(tmp_path))
    (alone,) = train(run.alone)
    losses, norms = differences(rest, alone)
    assert len(rest["losses"]) == STEPS
    assert losses < ROUNDING and norms < 10 * ROUNDING
