"""`hf-attn doctor`: what it says is what then happens, and no weights are needed for it."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_ids, tiny_config, tiny_model
from transformers import AutoConfig, LlamaForCausalLM

import hf_attn_plugin
from hf_attn_plugin import SlidingWindowConfig, SparQConfig, count_reads
from hf_attn_plugin.cli.main import main
from hf_attn_plugin.doctor import examine, packages
from hf_attn_plugin.doctor.environment import SUPPORTED, target
from hf_attn_plugin.doctor.layers import Layer, build_model, layer_backends, read_layers
from hf_attn_plugin.doctor.report import ModelReport

LENGTH = 96


def save_config(folder: Path, family: str, architecture: str, **overrides: Any) -> str:
    """A folder with a config and nothing else."""
    config = tiny_config(family, **overrides)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    assert not list(folder.glob("*.safetensors"))
    return str(folder)


def examine_json(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, Any]:
    status = main(["doctor", *line, "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == (0 if report["ok"] else 1)
    return report


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in report["model"]["cache"]}


def test_versions_are_those_of_pyproject() -> None:
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in ("train", "eval", "plot", "fa4"):
        lines += project["optional-dependencies"][extra]
    named = {"python": project["requires-python"]}
    for line in lines:
        name, mark, version = line.partition(">=")
        named[name] = mark + version
    assert {name: named[name] for name in SUPPORTED} == SUPPORTED
    assert {package.name for package in packages() if package.ok} >= {"python", "torch"}


def test_a_version_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUPPORTED, "torch", ">=9")
    monkeypatch.setitem(SUPPORTED, "no-such-package", ">=1")
    report = examine()
    assert not report.ok
    assert "NOT SUPPORTED" in str(report)
    assert [package.ok for package in report.packages if package.name == "no-such-package"] == [
        None
    ]


def test_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in text
    assert ("no GPU" in text) is not torch.cuda.is_available()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "parameters",
    [
        SparQConfig(rank=2, top_k=16),
        SparQConfig(rank=2, top_k=16, key_copy="none"),
        SlidingWindowConfig(24, num_sink_tokens=2),
    ],
)
def test_bytes_read_are_those_of_a_real_decoding_step(
    family: str, parameters: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(family, parameters.name)
    hf_attn_plugin.configure(model, parameters)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    report = examine_json(capsys, str(tmp_path), "--length", str(LENGTH), "--dtype", "float32")
    label = parameters.name
    if isinstance(parameters, SparQConfig):
        label = f"sparq, key copy {parameters.key_copy}"
    row = rows_of(report)[label]

    ids = random_ids(1, LENGTH)
    with torch.no_grad(), count_reads(model) as reads:
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        model(ids[:, -1:], past_key_values=cache)
    assert reads.decode_steps == 1
    assert row["read"] == reads.kv_bytes_read
    assert rows_of(report)["dense (flash, sdpa, eager)"]["read"] > row["read"]


def test_bytes_kept_are_those_of_the_formula(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 layers, 2 KV heads of 8, keys and values, 4 bytes; sparq has the keys twice and room."""
    folder = save_config(tmp_path, "llama", "LlamaForCausalLM")
    rows = rows_of(examine_json(capsys, folder, "--length", str(LENGTH)))
    token = 2 * 2 * 8 * 4  # one of keys and values
    assert rows["dense (flash, sdpa, eager)"]["kept"] == 2 * token * LENGTH
    assert rows["sliding_window"]["kept"] == 2 * token * LENGTH
    room = LENGTH - 1 + 64  # the least headroom at prefill
    assert rows["sparq, key copy full"]["kept"] == 3 * token * room
    assert rows["sparq, key copy none"]["kept"] < rows["sparq, key copy int4"]["kept"]
    assert rows["sparq, key copy int4"]["kept"] < rows["sparq, key copy int8"]["kept"]
    half = examine_json(capsys, folder, "--length", str(LENGTH), "--dtype", "bfloat16")
    assert rows_of(half)["dense (flash, sdpa, eager)"]["kept"] == token * LENGTH


def test_linear_has_the_same_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_config(tmp_path, "llama", "LlamaForCausalLM")
    line = [folder, "--length", str(LENGTH), "--attn"]
    flash, linear = (rows_of(examine_json(capsys, *line, name)) for name in ("flash", "linear"))
    assert linear == flash
    assert linear["linear"]["kept"] < linear["dense (flash, sdpa, eager)"]["kept"]


def test_windows_and_their_backends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_config(tmp_path, "gemma2", "Gemma2ForCausalLM")
    report = examine_json(capsys, folder, "--length", str(LENGTH))
    narrow, full = report["model"]["backends"]
    assert (narrow["layers"], full["layers"]) == ("0", "1")
    assert "window 6" in narrow["kind"]
    assert "softcap" in full["prefill_reason"]
    dense = rows_of(report)["dense (flash, sdpa, eager)"]
    assert dense["kept"] == 2 * 2 * 8 * 4 * (LENGTH + 6)
    assert "softcap" in rows_of(report)["linear"]["note"]


@pytest.mark.parametrize(
    ("attn", "prefill", "decoding"),
    [
        ("flash", "SDPA, causal", "SDPA, every pair"),
        ("sliding_window", "dense mask", "over the 9 of 96 cached keys"),
        ("longformer", "dense mask", "over the 10 of 96 cached keys"),
        ("sparq", "SDPA, causal", "sparq's own step"),
        ("sdpa", "transformers' sdpa", "transformers' sdpa"),
    ],
)
def test_backends_by_method(
    attn: str, prefill: str, decoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_config(tmp_path, "llama", "LlamaForCausalLM")
    window = ["--window", "9"] if attn in ("sliding_window", "longformer") else []
    assert main(["doctor", folder, "--attn", attn, "--length", str(LENGTH), *window]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert prefill in next(line for line in lines if "prefill, training:" in line)
    assert decoding in next(line for line in lines if "decoding:" in line)


def large_config(folder: Path) -> str:
    """A config of Llama-3.1-8B's layers."""
    return save_config(
        folder, "llama", "LlamaForCausalLM", hidden_size=4096, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
    )  # fmt: skip


def test_what_a_gpu_elsewhere_decodes_sparq_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def decoding(length: int, *options: str) -> str:
        line = ["--length", str(length), "--dtype", "bfloat16", "--device", "cuda:9.0"]
        (found,) = examine_json(capsys, large_config(tmp_path), *line, "--attn", "sparq", *options)[
            "model"
        ]["backends"]
        return f"{found['decoding']} ({found['decoding_reason']})"

    with_triton = ("--installed", "triton")
    assert "sparq's own step: Triton" in decoding(65536, *with_triton)
    assert "sparq attends to all keys: choosing among them pays from" in decoding(
        1024, *with_triton
    )
    assert "own step: Triton" in decoding(1024, *with_triton, "--dense-below", "0")
    assert "may be slower than a kernel" in decoding(1024, "--installed", "flash-attn-4")


def test_bytes_read_where_sparq_attends_to_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a step reads in the table is what the line above it says that the step does."""
    dense = "dense (flash, sdpa, eager)"

    def sparq(folder: str, *options: str) -> tuple[bool, str]:
        report = examine_json(capsys, folder, "--attn", "sparq", *options)
        row = rows_of(report)["sparq, key copy full"]
        (found,) = report["model"]["backends"]
        reads_all = row["read"] == rows_of(report)[dense]["read"]
        assert reads_all == ("attends to all keys" in found["decoding_reason"])
        assert reads_all == ("attends to all keys" in row["note"])
        return reads_all, row["note"]

    large = [large_config(tmp_path), "--dtype", "bfloat16", "--length"]
    gpu = ("--device", "cuda:9.0", "--installed", "triton")
    assert sparq(*large, "2048", *gpu)[0]
    assert not sparq(*large, "2048")[0]  # a CPU
    assert not sparq(*large, "2048", *gpu, "--dense-below", "0")[0]
    # More than one KV head's bytes, less than the layer's: 8 MiB.
    assert not sparq(*large, "2048", *gpu, "--dense-below", str(2**21))[0]
    tiny = [save_config(tmp_path, "llama", "LlamaForCausalLM"), "--length", str(LENGTH)]
    tiny += ["--top-k", "8"]
    assert not sparq(*tiny)[0]
    reads_all, note = sparq(*tiny, "--dense-below", "100000000")
    assert reads_all
    assert "95.3674 MiB" in note


def test_backends_of_a_gpu_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = large_config(tmp_path)
    line = [folder, "--length", "16384", "--dtype", "bfloat16", "--device", "cuda:9.0"]

    def backend(*options: str) -> dict[str, Any]:
        (found,) = examine_json(capsys, *line, *options)["model"]["backends"]
        return dict(found)

    with_all = backend("--installed", "triton,flash-attn-4")
    assert with_all["prefill"] == "FlashAttention-4"
    assert with_all["prefill_passed_over"] == []
    assert with_all["decoding"].startswith("Triton")
    absent = "FlashAttention-4: not installed (pip install 'hf-attn-plugin[fa4]')"
    with_triton = backend("--installed", "triton")
    assert with_triton["prefill"] != "FlashAttention-4"
    assert absent in with_triton["prefill_passed_over"]
    window = backend("--installed", "triton", "--attn", "sliding_window", "--window", "5000")
    assert window["prefill"].startswith("Triton")
    assert absent in window["prefill_passed_over"]
    assert main(["doctor", *line, "--installed", "triton"]) == 0
    text = capsys.readouterr().out
    assert "16,384 tokens, cuda:9.0 with triton" in text
    assert f"      not {absent}" in text


def test_prefill_and_training_apart(tmp_path: Path) -> None:
    """FlashAttention-4 has no gradient of grouped heads of 192 with values of 128."""
    config = AutoConfig.from_pretrained(large_config(tmp_path))
    model = build_model(LlamaForCausalLM, config, "flash", torch.bfloat16)
    usual = read_layers(model, 16384)[0]
    wide = dataclasses.replace(usual, head_dim=192)
    on = target("cuda:9.0", ["triton", "flash-attn-4"])

    def lines(layer: Layer, dtype: torch.dtype) -> list[str]:
        found = tuple(layer_backends([layer], "flash", dtype, on))
        report = ModelReport("Model", "flash", "bfloat16", 16384, str(on), backends=found)
        return str(report).splitlines()

    assert "    prefill, training: FlashAttention-4 (plain" in "\n".join(lines(usual, torch.half))
    said = lines(wide, torch.bfloat16)
    prefill = next(i for i, line in enumerate(said) if line.startswith("    prefill: Flash"))
    training = next(i for i, line in enumerate(said) if line.startswith("    training: "))
    assert prefill < training
    assert "cuDNN" in said[training]
    assert "no gradient of grouped heads" in said[training + 1]
    double = "\n".join(lines(usual, torch.float64))
    assert "prefill, training: blocks of the schedule in PyTorch" in double
    assert "slower than a kernel by an order of magnitude" in double


def test_the_backend_of_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [large_config(tmp_path), "--attn", "linear", "--dtype", "bfloat16", "--length", "256"]

    def said(*options: str) -> str:
        main(["doctor", *line, *options])
        found = capsys.readouterr().out.splitlines()
        return next(text for text in found if "prefill, training:" in text)

    gpu = ("--device", "cuda:9.0", "--installed")
    assert "linear attention: Triton, chunks in parallel" in said(*gpu, "triton")
    without = said(*gpu, "flash-attn-4")
    assert "PyTorch, chunk after chunk (Triton is not installed" in without
    assert "slower than a kernel" in without
    assert "PyTorch, chunk after chunk (Triton's kernels are for GPUs" in said("--device", "cpu")


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--device", "cuda:0", ["'cuda:0'", "compute capability", "cuda:9.0"]),
        ("--device", "tpu", ["'tpu'", "cpu"]),
        ("--installed", "flash-attn", ["flash-attn", "triton, flash-attn-4"]),
    ],
)
def test_unknown_targets(
    option: str, value: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_config(tmp_path, "llama", "LlamaForCausalLM")
    assert main(["doctor", folder, option, value]) != 0
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error


def test_latent_caches_are_read_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_config(
        tmp_path, "deepseek_v3", "DeepseekV3ForCausalLM", num_key_value_heads=4, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4,
        moe_intermediate_size=16, n_group=1, topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    rows = rows_of(examine_json(capsys, folder, "--length", str(LENGTH)))
    latents = 2 * (16 + 4) * 4 * LENGTH  # layers, latent and rotary key, float32
    assert rows["dense (flash, sdpa, eager)"]["kept"] == latents
    assert rows["sparq, key copy full"]["read"] == latents
    assert rows["h2o"]["read"] is None


def test_encoders_and_encoder_decoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_config(tmp_path / "bert", "bert", "BertForMaskedLM")
    report = examine_json(capsys, folder)
    (backend,) = report["model"]["backends"]
    assert backend["decoding"] is None
    assert report["model"]["cache"] == []
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4}  # fmt: skip
    folder = save_config(tmp_path / "bart", "bart", "BartModel", **shape)
    report = examine_json(capsys, folder, "--length", str(LENGTH))
    assert len(report["model"]["backends"]) == 3
    rows = rows_of(report)
    assert rows["dense (flash, sdpa, eager)"]["kept"] == 2 * 2 * 32 * 4 * LENGTH
    assert "cross-attention" in rows["sliding_window"]["note"]
    refused = examine_json(capsys, folder, "--attn", "sliding_window", "--length", str(LENGTH))
    assert "cross-attention" in refused["model"]["problem"]


@pytest.mark.parametrize(
    ("family", "architecture", "message"),
    [
        ("bloom", "BloomForCausalLM", "computes attention by itself"),
        ("t5", "T5Model", "position_bias"),
    ],
)
def test_families_that_cannot_be_used(
    family: str,
    architecture: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save_config(tmp_path, family, architecture)
    report = examine_json(capsys, folder, "--length", "32")
    assert not report["ok"]
    assert message in report["model"]["problem"]
