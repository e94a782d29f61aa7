"""`hf-attn verify`: a folder in, a report and an exit status out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_attn_plugin.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    words = {"</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(path)
    return str(path)


def test_every_layer_is_right(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["verify", folder, "--attn", "longformer", "--window", "6", "--gradients", "--layers"]
    assert main([*line, "--length", "40"]) == 0
    text = capsys.readouterr().out
    assert "packed: longformer, outputs of 2 layers: relative error up to" in text
    assert "decoding: model.layers.1.self_attn (longformer) output" in text
    assert text.endswith("every layer computes what eager attention computes under the same "
                         "pattern\n")  # fmt: skip


def test_a_text_of_the_users(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + i * i % 61}" for i in range(50)))
    assert main(["verify", folder, "--attn", "flash", "--text", str(text), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert {check["batch"] for check in report["checks"]} >= {"packed", "decoding"}


def test_a_layer_that_differs(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Transformers' own sdpa mixes packed documents when a cache is made too."""
    assert main(["verify", folder, "--attn", "sdpa", "--length", "16", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    wrong = [check for check in report["checks"] if not check["ok"]]
    assert {check["batch"] for check in wrong} == {"packed"}
    assert main(["verify", folder, "--attn", "sdpa", "--length", "16"]) == 1
    assert "first difference: model.layers.0.self_attn" in capsys.readouterr().out
