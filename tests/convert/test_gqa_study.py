"""eval/gqa_study.py at the smallest size: it finishes, goes on, and refuses other settings."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("matplotlib")


def load_study() -> Any:
    path = Path(__file__).parents[2] / "eval" / "gqa_study.py"
    spec = importlib.util.spec_from_file_location("gqa_study", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gqa_study"] = module
    spec.loader.exec_module(module)
    return module


def test_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "text.npy", np.random.default_rng(0).integers(0, 32, 800))
    out = tmp_path / "out"
    line = [
        str(tmp_path / "model"), "--text", str(tmp_path / "text.npy"), "--original-steps", "40",
        "--device", "cpu", "--length", "16", "--batch-size", "2", "--held-out-rows", "6",
        "--random-seeds", "2", "--out", str(out),
    ]  # fmt: skip
    assert study.main(line) == 0
    results = json.loads((out / "gqa.json").read_text())
    assert results["settings"]["steps"] == 2
    # Not converted; then 2 and 1 heads: five methods, random twice.
    assert len(results["cells"]) == 1 + 2 * 6
    kept = results["cells"]["not converted/4/0"]
    assert kept["converted"] == pytest.approx(results["before"])
    first, second = (results["cells"][f"random/2/{seed}"]["converted"] for seed in (0, 1))
    assert first != second
    page = (out / "gqa.md").read_text()
    assert page.startswith("<!-- Written by `python eval/gqa_study.py ")
    assert page.count("\n| 2 |") == page.count("\n| 1 |") == 5
    assert (out / "gqa.png").stat().st_size > 1000

    # A cell that is lost is measured again, with the same result; the others are kept.
    lost = results["cells"].pop("aligned+calibration/1/0")
    (out / "gqa.json").write_text(json.dumps(results))
    converted: list[str] = []
    real = study.to_gqa
    monkeypatch.setattr(
        study, "to_gqa", lambda *args, **kw: converted.append(args[2]) or real(*args, **kw)
    )
    assert study.main(line) == 0
    assert converted == ["aligned"]
    again = json.loads((out / "gqa.json").read_text())["cells"]["aligned+calibration/1/0"]
    assert again["uptrained"] == pytest.approx(lost["uptrained"])

    with pytest.raises(ValueError, match="use --fresh"):
        study.main([*line, "--steps", "3"])
    # Refused before anything is measured.
    with pytest.raises(ValueError, match="must be one of 1, 2, 4"):
        study.main([*line, "--heads", "3", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other" / "gqa.json").exists()
    with pytest.raises(ValueError, match="give more text"):
        study.main([*line, "--held-out-rows", "50"])
