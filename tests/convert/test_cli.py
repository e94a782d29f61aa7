"""`hf-attn convert-gqa` from folder to folder, and what it refuses before reading weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_attn_plugin.cli.main import main
from hf_attn_plugin.convert import to_gqa

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.5)).to(torch.bfloat16)
    model.generation_config.max_length = 17
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(32)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def weightless(source: Path, tmp_path: Path) -> Path:
    """A model folder whose weights cannot be read, so that reading them is noticed."""
    folder = tmp_path / "weightless"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    (folder / "model.safetensors").write_text("not weights")
    return folder


def test_converts_a_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["convert-gqa", str(source), "--kv-heads", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = {line[:32].strip(): line[32:].split() for line in printed.splitlines()}
    assert rows["key/value heads per layer"] == ["8", "2"]
    # Keys and values, two layers, 8 or 2 heads of 4 components, 2 bytes.
    assert rows["KV cache bytes/token, bfloat16"] == ["256", "64"]
    assert rows["parameters"] == ["16,544", "13,472"]
    assert "KV cache: that of the 2 layers that changed" in printed

    expected = to_gqa(LlamaForCausalLM.from_pretrained(source), 2)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.max_length == 17
    assert model.config.num_key_value_heads == 2
    ids = AutoTokenizer.from_pretrained(out)("w5", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[5]]
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_dtype_and_method(source: Path, tmp_path: Path) -> None:
    line = ["convert-gqa", str(source), "--kv-heads", "1", "--out", str(tmp_path / "out")]
    assert main([*line, "--method", "first", "--dtype", "float32"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    original = LlamaForCausalLM.from_pretrained(source).model.layers[1].self_attn.k_proj.weight
    assert torch.equal(model.model.layers[1].self_attn.k_proj.weight, original[:4].float())


def test_aligned_says_where_keys_are_averaged(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["convert-gqa", str(source), "--kv-heads", "4", "--out", str(tmp_path / "o")]
    assert main([*line, "--method", "aligned"]) == 0
    assert "keys turned in 2 of 2 layers" in capsys.readouterr().out
    expected = to_gqa(LlamaForCausalLM.from_pretrained(source), 4, "aligned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["convert-gqa", *line]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("heads", ["3", "16", "0"])
def test_heads_are_checked_before_the_weights(
    heads: str, weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused([str(weightless), "--kv-heads", heads, "--out", str(tmp_path / "o")], capsys)
    assert "must be one of 1, 2, 4, 8" in error
    assert not (tmp_path / "o").exists()


def test_output_folder_is_checked_before_the_weights(
    weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(weightless), "--kv-heads", "2", "--out"]
    assert "the model's own folder" in refused([*line, f"{weightless}/../weightless"], capsys)

    (tmp_path / "file").touch()
    assert "cannot write to the folder" in refused([*line, str(tmp_path / "file")], capsys)
    assert "cannot write to the folder" in refused([*line, str(tmp_path / "file/o")], capsys)

    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.json").write_text("{}")
    assert "use --overwrite" in refused([*line, str(tmp_path / "held")], capsys)
    assert (tmp_path / "held" / "config.json").read_text() == "{}"


def test_the_present_number_is_refused(
    weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(weightless), "--kv-heads", "8", "--out", str(tmp_path / "o")]
    assert "has 8 key/value heads per layer already" in refused(line, capsys)
    assert not (tmp_path / "o").exists()


def test_overwrite(source: Path, tmp_path: Path) -> None:
    line = ["convert-gqa", str(source), "--out", str(tmp_path / "o")]
    assert main([*line, "--kv-heads", "4"]) == 0
    assert main([*line, "--kv-heads", "2"]) == 2
    assert main([*line, "--kv-heads", "2", "--overwrite"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o").config.num_key_value_heads == 2


def test_sources_that_cannot_be_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = ["--kv-heads", "2", "--out", str(tmp_path / "o")]
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4)).save_pretrained(tmp_path / "gpt2")
    assert "gpt2 has no `num_key_value_heads`" in refused([str(tmp_path / "gpt2"), *end], capsys)

    config = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path / "quantized")
    assert "is quantized" in refused([str(tmp_path / "quantized"), *end], capsys)

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "holds a PEFT adapter" in refused([str(tmp_path / "adapter"), *end], capsys)

    LlamaConfig(**SIZES, architectures=["OursForCausalLM"]).save_pretrained(tmp_path / "ours")
    assert "OursForCausalLM" in refused([str(tmp_path / "ours"), *end], capsys)
