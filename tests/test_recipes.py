"""The recipes as users start them: whole runs, and runs that are killed and started again."""

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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import hf_attn_plugin

RECIPES = Path(__file__).parent.parent / "recipes"
STEPS = 24


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer in `model`, and a text with structure in `text.txt`."""
    folder = tmp_path_factory.mktemp("recipes")
    words = {"</s>": 0} | {f"w{i}": i for i in range(1, 64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    records = [" ".join(f"w{1 + i * j % 63}" for i in range(20 + 9 * j)) for j in range(1, 30)]
    (folder / "text").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in records)
    (folder / "text" / "data.jsonl").write_text(lines)
    return folder


def start(
    recipe: str, inputs: Path, out: Path, *options: str, launch: str = "--cpu --num_processes 1"
) -> subprocess.Popen[bytes]:
    launch = f"-m accelerate.commands.launch {launch} --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no"
    line = [sys.executable, *launch.split(), *command(recipe, inputs, out, *options)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(inputs / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(RECIPES.parent), os.environ.get("PYTHONPATH", "")]),
    }
    with (inputs / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            line, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def command(recipe: str, inputs: Path, out: Path, *options: str) -> list[str]:
    return [
        *(str(RECIPES / recipe), "--model", str(inputs / "model")),
        *("--dataset", str(inputs / "text"), "--out", str(out)),
        *("--max_steps", str(STEPS), "--logging_steps", "1", "--save_steps", "4"),
        *("--per_device_train_batch_size", "2", "--learning_rate", "5e-3"),
        *("--use_cpu", "--disable_tqdm", "true", *options),
    ]


def run_to_the_end(recipe: str, inputs: Path, out: Path, *options: str) -> str:
    process = start(recipe, inputs, out, *options)
    assert process.wait(timeout=120) == 0, (inputs / f"{out.name}.log").read_text()[-4000:]
    return (inputs / f"{out.name}.log").read_text()


def kill_after_a_checkpoint(recipe: str, inputs: Path, out: Path, *options: str) -> None:
    process = start(recipe, inputs, out, *options)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-8" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / f"checkpoint-{STEPS}").exists(), "killed too late to test anything"


def logged(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


LONG = ["--context_length=64", "--attn=longformer", "--window=8", "--num_global_tokens=2"]
GQA = ["--context_length=32", "--kv_heads=2", "--attn=sdpa"]


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("finetune_long_context.py", LONG), ("uptrain_gqa.py", GQA)],
    ids=["finetune", "uptrain"],
)
def test_killed_and_resumed_equals_uninterrupted(
    recipe: str, options: list[str], inputs: Path
) -> None:
    whole, resumed = inputs / f"whole-{recipe}", inputs / f"resumed-{recipe}"
    run_to_the_end(recipe, inputs, whole, *options)
    kill_after_a_checkpoint(recipe, inputs, resumed, *options)
    first = resumed / "checkpoint-4" / "trainer_state.json"
    written = first.stat().st_mtime_ns
    run_to_the_end(recipe, inputs, resumed, *options)
    assert first.stat().st_mtime_ns == written, "started anew instead of resuming"

    expected, losses = logged(whole), logged(resumed)
    assert list(expected) == list(losses) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(expected, abs=1e-6)
    # The run learned, and went over its rows more than once.
    assert sum(list(losses.values())[-4:]) < 0.95 * sum(list(losses.values())[:4])
    check = check_finetuned if recipe.startswith("finetune") else check_uptrained
    check(whole, inputs)
    weights = [AutoModelForCausalLM.from_pretrained(out).state_dict() for out in (whole, resumed)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-5)
    # The same line once more finds the run ended, and changes nothing.
    run_to_the_end(recipe, inputs, resumed, *options)
    assert logged(resumed) == losses
    again = AutoModelForCausalLM.from_pretrained(resumed).state_dict()
    for name, tensor in weights[1].items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)


def check_finetuned(out: Path, inputs: Path) -> None:
    assert "longformer" in hf_attn_plugin.implementations()
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="longformer")
    assert not (out / "adapter_config.json").exists()
    assert model.config.attn_params["longformer"] == {
        "window": 8,
        "num_global_tokens": 2,
        "dilation": 1,
    }
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.max_position_embeddings == 64
    assert model.config.use_cache
    before = LlamaForCausalLM.from_pretrained(inputs / "model").model.layers[0].mlp.up_proj.weight
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert AutoTokenizer.from_pretrained(out)("w5 w6")["input_ids"] == [5, 6]


def check_uptrained(out: Path, inputs: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_key_value_heads == 2
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)
    assert model.config.use_cache
    losses = json.loads((out / "uptrain_results.json").read_text())
    assert set(losses) == {
        "loss_before_conversion",
        "loss_after_conversion",
        "loss_after_uptraining",
    }
    assert losses["loss_after_uptraining"] < losses["loss_after_conversion"]
    assert losses["loss_before_conversion"] != losses["loss_after_conversion"]


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("finetune_long_context.py", [*LONG, "--stride=4"], "--attn longformer takes"),
        ("finetune_long_context.py", [*LONG, "--rope_scaling=ntk"], "yarn, linear or none"),
        ("uptrain_gqa.py", GQA, "give --max_steps, or --original_steps"),
        ("uptrain_gqa.py", [*GQA, "--max_steps=1", "--kv_heads=3"], "must be one of 1, 2, 4"),
        (
            "uptrain_gqa.py",
            [*GQA, "--max_steps=1", "--method=median"],
            "method must be one of mean",
        ),
    ],
)
def test_wrong_options_are_refused(
    recipe: str,
    options: list[str],
    message: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", inputs / "cache")
    monkeypatch.setattr("transformers.Trainer.evaluate", None)  # refused before any time is spent
    line = [recipe, f"--model={inputs / 'model'}", f"--dataset={inputs / 'text'}", *options]
    monkeypatch.setattr(sys, "argv", [*line, f"--out={tmp_path}"])
    with pytest.raises(ValueError, match=message):
        runpy.run_path(str(RECIPES / recipe), run_name="__main__")
