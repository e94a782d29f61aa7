"""Distillation into linear attention, its recipe, and the page of errors."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import pack_positions, random_ids, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_attn_plugin import LinearConfig, configure
from hf_attn_plugin.convert.linearize import (
    AttentionDistillation,
    attention_modules,
    attention_output_errors,
    record_attention,
)

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "linearize.py"
DISTILL, FINETUNE = 12, 12

BATCH = {
    "input_ids": random_ids(3, 24),
    "position_ids": pack_positions([[24], [10, 14], [5, 6, 13]]),
}


# -- the layers --------------------------------------------------------------------------------


def test_modules_are_found_once_for_each_layer() -> None:
    names = list(attention_modules(tiny_model("llama")))
    assert names == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert len(attention_modules(tiny_model("bert"))) == 2
    with pytest.raises(ValueError, match="no attention modules"):
        attention_modules(torch.nn.Linear(2, 2))


def test_recording_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama", "eager")
    calls = record_attention(model, {**BATCH, "labels": BATCH["input_ids"]})
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_hooks for module in attention_modules(model).values())
    assert [call.output.shape for call in calls] == [(3, 24, 32)] * 2
    assert not any(call.output.requires_grad for call in calls)


def test_softmax_has_no_error_against_itself_and_windows_stay_softmax() -> None:
    model = tiny_model("gemma3_text", "eager")
    assert max(attention_output_errors(model, [BATCH], attn="flash")) < 1e-5
    window, full = attention_output_errors(model, [BATCH])
    assert window == 0 and full > 0.1
    with pytest.raises(ValueError, match="at least one batch"):
        attention_output_errors(model, [])


def test_errors_are_those_of_the_outputs() -> None:
    """The same by hand for the first layer, whose inputs are the embeddings."""
    model = tiny_model("llama", "flash")
    outputs = []
    for name in ("flash", "linear"):
        model.set_attn_implementation(name)
        kept: list[torch.Tensor] = []
        hook = model.model.layers[0].self_attn.register_forward_hook(
            lambda module, args, result, kept=kept: kept.append(result[0])
        )
        model(**BATCH, use_cache=False)
        hook.remove()
        outputs.append(kept[0])
    with torch.no_grad():
        expected = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    assert attention_output_errors(model, [BATCH])[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "parameters", [LinearConfig(), LinearConfig("favor", num_features=32)], ids=["elu", "favor"]
)
def test_distillation_brings_the_outputs_closer(family: str, parameters: LinearConfig) -> None:
    model = tiny_model(family, "sdpa")
    configure(model, parameters)
    before = attention_output_errors(model, [BATCH])
    original = {name: p.clone() for name, p in model.state_dict().items()}
    student = AttentionDistillation(model)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert len(trained) == (8 if family == "qwen3" else 4)
    assert all("q_" in name or "k_" in name for name in trained)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        loss = student(**BATCH, labels=BATCH["input_ids"])["loss"]
        loss.backward()
        optimizer.step()
    after = attention_output_errors(model, [BATCH], students=student.students)
    assert all(a < 0.8 * b for a, b in zip(after, before, strict=True))
    mean_square = sum(error**2 for error in after) / 2
    assert mean_square == pytest.approx(student(**BATCH)["loss"].item(), rel=1e-3)
    assert model.config._attn_implementation == "sdpa"
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, original[name]), "the teacher has changed"
    student.write_back()
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, original[n])}
    assert {name.split(".")[-2] for name in changed} <= {"q_proj", "k_proj", "q_norm", "k_norm"}
    assert len(changed) == len(trained)


def test_fused_projections_are_refused() -> None:
    with pytest.raises(ValueError, match=r"none of its own, only .*qkv_proj"):
        AttentionDistillation(tiny_model("phi3", num_key_value_heads=4))


# -- the recipe --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer in `model`, and a text with structure in `text`."""
    folder = tmp_path_factory.mktemp("linearize")
    words = {"</s>": 0} | {f"w{i}": i for i in range(1, 64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    records = [" ".join(f"w{1 + i * j % 63}" for i in range(20 + 9 * j)) for j in range(1, 30)]
    (folder / "text").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in records)
    (folder / "text" / "data.jsonl").write_text(lines)
    return folder


def options(inputs: Path, out: Path) -> list[str]:
    return [
        *("--model", str(inputs / "model"), "--dataset", str(inputs / "text"), "--out", str(out)),
        *("--distill_steps", str(DISTILL), "--max_steps", str(FINETUNE), "--save_steps", "4"),
        *("--distill_learning_rate", "1e-2", "--learning_rate", "5e-3", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "2", "--context_length", "32", "--use_cpu"),
        *("--disable_tqdm", "true", "--report_to", "none"),
    ]


def start(inputs: Path, out: Path) -> subprocess.Popen[bytes]:
    launch = "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(inputs / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    line = [sys.executable, *launch.split(), str(RECIPE), *options(inputs, out)]
    with (inputs / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            line, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def run_here(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", line)
    runpy.run_path(line[0], run_name="__main__")


def logged(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_the_recipe_and_the_recipe_interrupted(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", inputs / "cache")
    whole, resumed = inputs / "whole", inputs / "resumed"
    process = start(inputs, resumed)
    deadline = time.monotonic() + 240
    while not (resumed / "finetuning" / "checkpoint-4" / "trainer_state.json").exists():
        log = inputs / "resumed.log"
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (resumed / "model.safetensors").exists(), "killed too late to test anything"
    for out in (resumed, whole):
        run_here([str(RECIPE), *options(inputs, out)], monkeypatch)
    for stage, steps in (("distillation", DISTILL), ("finetuning", FINETUNE)):
        losses = logged(whole / stage)
        assert len(losses) == steps
        assert logged(resumed / stage) == pytest.approx(losses, abs=1e-6)

    results, again = (
        json.loads((out / "linearize_results.json").read_text()) for out in (whole, resumed)
    )
    del results["command"], again["command"]
    for name, value in results.items():
        assert again[name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-5))
    assert all(
        a < b for a, b in zip(results["errors_after"], results["errors_before"], strict=True)
    )
    assert results["loss_finetuned"] < results["loss_distilled"]
    assert results["loss_linear"] != results["loss_softmax"]
    assert (whole / "linearize.png").read_bytes().startswith(b"\x89PNG")

    model = AutoModelForCausalLM.from_pretrained(whole, attn_implementation="linear")
    assert model.config.attn_params["linear"]["feature_map"] == "elu" and model.config.use_cache
    assert not (whole / "adapter_config.json").exists()
    before = LlamaForCausalLM.from_pretrained(inputs / "model")
    for part in ("self_attn.q_proj", "mlp.up_proj"):
        ours, theirs = (m.get_parameter(f"model.layers.0.{part}.weight") for m in (model, before))
        assert not torch.equal(ours, theirs)
    checkpoint = whole / "distillation" / f"checkpoint-{DISTILL}" / "model.safetensors"
    assert checkpoint.stat().st_size < 0.5 * (inputs / "model" / "model.safetensors").stat().st_size

    page = write_page(inputs, whole)
    assert "## Linearised, elu" in page and "accelerate launch" in page
    assert f"| linear, after fine-tuning | {results['loss_finetuned']:.3f} |" in page


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--max_steps=3", "--distill_steps=0"], "both above 0; got 3 and 0"),
        (["--distill_steps=3"], "both above 0; got -1 and 3"),
        (["--max_steps=3", "--feature_map=relu"], "must be one of 'elu', 'favor'"),
        (["--max_steps=3", "--num_features=9"], "belong to feature_map='favor'"),
    ],
)
def test_wrong_options_are_refused(
    wrong: list[str],
    message: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = ["linearize.py", f"--model={inputs / 'model'}", f"--dataset={inputs / 'text'}"]
    monkeypatch.setattr(sys, "argv", [*line, f"--out={tmp_path}", "--use_cpu", *wrong])
    with pytest.raises(ValueError, match=message):
        runpy.run_path(str(RECIPE), run_name="__main__")


# -- the page of errors ------------------------------------------------------------------------


def write_page(inputs: Path, model: Path, **options: Any) -> str:
    """The page that eval/linear_error.py writes."""
    text, out = inputs / "held_out.txt", inputs / "linear.md"
    text.write_text(" ".join(f"w{1 + i * i % 63}" for i in range(300)))
    line = ["linear_error.py", f"--model={model}", f"--text={text}", f"--out={out}"]
    line += ["--length=48", "--rows=4", "--seeds=2", "--features", "4", "512"]
    results = model / "linearize_results.json"
    line += [f"--linearized={results}"] if results.exists() else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", line)
        runpy.run_path(str(ROOT / "eval" / "linear_error.py"), run_name="__main__")
    return out.read_text()


def test_the_error_of_favor_falls_with_the_number_of_features(inputs: Path) -> None:
    page = write_page(inputs, inputs / "model")
    rows = dict(line.strip("| ").split(" | ")[:2] for line in page.splitlines() if "favor" in line)
    few, many = (float(rows[f"favor, {n} features"].split()[0]) for n in (4, 512))
    assert many < 0.6 * few
    assert "| elu | " in page and "linear_error.py --model=" in page


def test_a_text_that_is_too_short(inputs: Path) -> None:
    with pytest.raises(ValueError, match="need more"), pytest.MonkeyPatch.context() as patch:
        (inputs / "short.txt").write_text("w1 w2")
        options = [f"--model={inputs / 'model'}", f"--text={inputs / 'short.txt'}"]
        patch.setattr(sys, "argv", ["linear_error.py", *options])
        runpy.run_path(str(ROOT / "eval" / "linear_error.py"), run_name="__main__")
