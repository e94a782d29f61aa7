"""``hf-attn sweep``, from a folder to the report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("matplotlib")

from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_attn_plugin.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are bytes."""
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<pad>", bos_token="<pad>"
    )
    tokenizer.save_pretrained(path)
    tiny_model("llama", vocab_size=len(vocabulary), max_position_embeddings=256).save_pretrained(
        path
    )
    return path


METADATA = json.dumps(
    {
        "niah": {"lengths": [200], "depths": [0.5], "samples": 2},
        "long_bpb": {"context": 60, "scored": 6, "samples": 2},
    }
)
FEW = ["--ranks", "2", "--top-ks", "8", "--coverages", "", "--key-copies", "", "--metadata",
       METADATA, "--device", "cpu"]  # fmt: skip


def test_from_a_folder_to_the_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["sweep", str(folder), "--out", str(tmp_path), *FEW]
    assert main([*line, "--tasks", "long_bpb", "--baselines", "h2o"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"sweep.{s}") for s in ("md", "png")]
    first = json.loads((tmp_path / "results.json").read_text())
    assert {run["label"] for run in first["runs"].values()} == {"dense", "sparq r=2 k=8", "h2o 8"}
    # Another task and another method: only these are measured.
    assert main([*line, "--tasks", "long_bpb,niah", "--baselines", "h2o,lm_infinite"]) == 0
    second = json.loads((tmp_path / "results.json").read_text())
    for key, run in first["runs"].items():
        assert second["runs"][key]["tasks"]["long_bpb"] == run["tasks"]["long_bpb"]
    assert {len(run["tasks"]) for run in second["runs"].values()} == {2}
    report = (tmp_path / "sweep.md").read_text()
    assert report.startswith("<!-- Made by: hf-attn ")
    assert "| lm_infinite 8 |" in report
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "64"], r"every rank of \[64\] is above the model's head_dim 8"),
        (["--baselines", "quest"], "no baseline named quest"),
        (["--key-copies", "int2"], "key_copy must be one of"),
        (["--coverages", "1.5"], "coverage must be a number above 0 and at most 1"),
        (["--metric", "f1"], "--metric takes TASK=NAME, got 'f1'"),
        (["--metadata", "[1]"], "--metadata must be a JSON object"),
        (["--limit", "0"], "--batch-size, --limit and --max-length must be at least 1"),
        (["--max-length", "-5"], "--batch-size, --limit and --max-length must be at least 1"),
        (["--budgets", "2"], "--budgets must be shares above 0 and at most 1"),
        (["--device", "foo"], "the device 'foo' cannot be used .* name cpu"),
        (["--dtype", "foo"], "cannot be loaded as 'foo': name auto, float32"),
        (["--metadata", '{"long_bbp": {"context": 60}}'], "no task reads the metadata 'long_bbp'"),
        (["--metadata", '{"context": 60}'], "no task reads the metadata 'context'.*long_bpb"),
        (["--metadata", '{"long_bpb": {"samples": 1.5}}'], "samples must be an integer, got 1.5"),
    ],
)
def test_wrong_options(
    folder: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["sweep", str(folder), "--out", str(tmp_path), *FEW, "--tasks", "long_bpb"]
    assert main([*line, *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "results.json").exists()


def test_budgets_by_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "model", "--out", str(tmp_path), "--budgets", "1/0"])
    assert "'1/0' divides by zero" in capsys.readouterr().err


def test_there_must_be_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no config.json" in capsys.readouterr().err
