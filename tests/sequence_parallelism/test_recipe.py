"""The fine-tuning recipe over a ring of processes, as users start it; also when one dies."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import test_recipes
from tests.parallel.processes import run_processes
from tests.sequence_parallelism.training import as_launched
from tests.test_recipes import RECIPES, STEPS, check_finetuned, command, logged, start

inputs = test_recipes.inputs
RECIPE = "finetune_long_context.py"
# What the README says to add for a CPU: --mixed_precision no (`start` does), and --use_cpu.
LAUNCH = f"--config_file {RECIPES / 'accelerate' / 'ring_2gpu.yaml'}"
TRAINING = ["--context_length=64", "--gradient_accumulation_steps=2"]


def alone(inputs: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """The recipe in this process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", inputs / "cache")
    monkeypatch.setattr(sys, "argv", command(RECIPE, inputs, out, *options))
    runpy.run_path(str(RECIPES / RECIPE), run_name="__main__")


def wait(process: subprocess.Popen[bytes], log: Path, expected: int) -> str:
    try:
        status = process.wait(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text()
    assert status == expected, text[-6000:]
    return text


def processes(checkpoint: Path) -> int:
    """How many processes a checkpoint is from: each leaves its random state."""
    return len(list(checkpoint.glob("rng_state_*.pth")))


def _recipe(rank: int, line: list[str]) -> None:
    as_launched(rank, 2)
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")


def test_a_ring_learns_evaluates_and_saves_as_one_process(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ring = inputs / "whole", inputs / "ring"
    options = [*TRAINING, "--attn=longformer", "--window=8", "--num_global_tokens=2"]
    alone(inputs, whole, monkeypatch, *options)
    options.append("--sequence_parallel=2")
    run_processes(_recipe, 2, command(RECIPE, inputs, ring, *options), limit_s=150.0)
    assert processes(ring / "checkpoint-24") == 2 and processes(whole / "checkpoint-24") == 0
    assert list(logged(ring)) == list(range(1, STEPS + 1))
    assert logged(ring) == pytest.approx(logged(whole), rel=1e-5)
    losses = [json.loads((out / "eval_results.json").read_text()) for out in (whole, ring)]
    assert losses[1]["eval_loss"] == pytest.approx(losses[0]["eval_loss"], rel=1e-5)
    check_finetuned(ring, inputs)
    weights = [AutoModelForCausalLM.from_pretrained(out).state_dict() for out in (whole, ring)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-4)


def child(launcher: int, rank: int) -> int:
    """The process id of a rank that a launcher has started."""
    listed = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in listed:
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes as Linux does")
def test_accelerates_job_ends_with_a_dead_rank_and_goes_on_with_another_number(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = inputs / "whole-ring", inputs / "resumed-ring"
    process = start(RECIPE, inputs, resumed, *TRAINING, "--attn=ring", launch=LAUNCH)
    deadline = time.monotonic() + 150
    while not (resumed / "checkpoint-8" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, (
            inputs / "resumed-ring.log"
        ).read_text()[-6000:]
        time.sleep(0.01)
    victim = child(process.pid, 1)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    log = wait(process, inputs / "resumed-ring.log", 1)
    assert time.monotonic() - killed < 60
    assert f"pid {victim}) is gone" in log and "rank      : 1 (local_rank: 1)" in log
    assert not (resumed / f"checkpoint-{STEPS}").exists(), "killed too late to test anything"
    assert processes(resumed / "checkpoint-8") == 2

    first = (resumed / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns
    alone(inputs, resumed, monkeypatch, *TRAINING, "--attn=flash")
    assert (resumed / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns == first
    alone(inputs, whole, monkeypatch, *TRAINING, "--attn=flash")
    assert list(logged(resumed)) == list(range(1, STEPS + 1))
    assert logged(resumed) == pytest.approx(logged(whole), rel=1e-5)


def test_a_ring_in_a_job_of_one_process_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TRAINING, "--attn=ring"]
    with pytest.raises(ValueError, match="starts one process only; on a CPU use"):
        alone(inputs, tmp_path, monkeypatch, *options)
    with pytest.raises(ValueError, match="spread over 2 processes, but this job has 1"):
        alone(inputs, tmp_path, monkeypatch, *options, "--sequence_parallel=2")
    with pytest.raises(ValueError, match="--verify compares attention over whole rows"):
        alone(inputs, tmp_path, monkeypatch, *options, "--verify")
