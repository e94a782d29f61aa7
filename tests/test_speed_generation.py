"""``hf-attn bench decode``: bytes beside the hardware's counters, and generation. No GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_attn_plugin import SparQConfig, configure
from hf_attn_plugin.cli.bench import speed_module
from tests.test_speed import CPU, CountingClock

counters, generation, report = map(speed_module, ("counters", "generation", "report"))


# -- bytes by the hardware -------------------------------------------------------------------------

NCU = """==PROF== Connected to process 7
machine: device X, torch 2
counted: ["dense", 1000, 0]
counted: ["sparq r=32 k=128", 400, 100]
==PROF== Disconnected
"ID","Kernel Name","Block Size","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","Kbyte","byte"
"0","spin_kernel(long)","(1, 1, 1)","0","0"
"1","split_kernel","(128, 1, 1)","0.9","10"
"2","merge_kernel","(128, 1, 1)","0.1","5"
"3","spin_kernel(long)","(1, 1, 1)","0","0"
"4","score_kernel","(128, 1, 1)","0.6","1,000"
"""


def test_counts_beside_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    ran: list[list[str]] = []
    output = NCU

    def done(command: list[str], **options: Any) -> Any:
        ran.append(command)
        return type("Done", (), {"returncode": 0, "stdout": output, "stderr": ""})

    monkeypatch.setattr(counters.subprocess, "run", done)
    assert counters.run(tmp_path, command="x", say=lambda line: None) == 1
    assert ran[0][0] == "ncu"
    assert ran[0][-4:] == ["decode", "counters", "--worker", "all"]
    page = (tmp_path / counters.PAGE).read_text()
    assert "\ndevice X, torch 2\n" in page
    assert "| dense | 0.0 | 0.0 | 0.0 | 1.000 | 0.0 | 2 |" in page
    assert "1.200 DIFFERS" in page
    kernels = counters.parse(NCU)
    assert kernels[-1] == ("score_kernel", 600.0, 1000.0)
    output = NCU.replace('"0.6"', '"0.52"')
    assert counters.run(tmp_path, command="x", say=lambda line: None) == 0
    with pytest.raises(ValueError, match="ncu read no counters: ==ERROR== permission"):
        counters.parse("==ERROR== permission")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="there is no ncu on the PATH"):
        counters.run(tmp_path, command="x", say=lambda line: None)


# -- generation ------------------------------------------------------------------------------------


def tiny_llama(layers: int, tokens: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )


def generation_bench(path: Path) -> tuple[Any, list[str]]:
    said: list[str] = []
    results = report.Results(path, generation.GenerationRow)
    clock = CountingClock(tick=2.0)
    return (
        generation.GenerationBench(2, clock, CPU, results, said.append, True, tiny_llama),
        said,
    )


def test_generation_under_every_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "WARM", 2)
    monkeypatch.setattr(generation, "TIMED", 4)
    bench, _ = generation_bench(tmp_path / "generation.json")
    rows = bench.measure(2, 300)
    status = {row.contender: row.status for row in rows}
    assert status.pop("flash_attention_2, dynamic cache") == "missing"
    assert set(status.values()) == {"ok"}
    assert len(status) == 5
    for row in rows:
        if row.status == "ok":
            assert row.step_ms == 2.0
            assert row.tokens_per_second == 1000.0
            assert (row.prefill_s is None) == ("static" in row.contender)
            assert row.logits_error < 0.05
    header, cells = generation.table(rows)
    assert cells[0][:4] == ["2 x 300, 2 layers", "sdpa, dynamic cache", "1000.0", "2.00"]
    assert cells[1][header.index("vs stock")] == "1.00x"
    assert "flash-attn is not installed" in generation.notes(rows)[0]
    generation.write_page(tmp_path / "generation.md", rows, "hf-attn bench decode")
    assert (
        "| 2 x 300, 2 layers | sparq, dynamic cache |" in (tmp_path / "generation.md").read_text()
    )


def test_generation_that_computes_something_else_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "WARM", 2)
    monkeypatch.setattr(generation, "TIMED", 2)
    bench, _ = generation_bench(tmp_path / "generation.json")
    right = bench._filled_cache

    def other_keys(model: Any, contender: Any, *args: Any, **kwargs: Any) -> Any:
        cache = right(model, contender, *args, **kwargs)
        if contender.attention == "flash":
            for layer in cache.layers:
                layer.values.neg_()
        return cache

    monkeypatch.setattr(bench, "_filled_cache", other_keys)
    contenders = [generation.Contender("sdpa"), generation.Contender("flash")]
    rows = bench.measure(1, 40, contenders)
    assert [row.status for row in rows] == ["ok", "FAILED numerics"]
    assert rows[1].step_ms is None


@pytest.mark.parametrize("top_k", [128, 24])
def test_generation_that_chooses_other_keys_has_no_time(
    top_k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "WARM", 2)
    monkeypatch.setattr(generation, "TIMED", 2)
    bench, _ = generation_bench(tmp_path / "generation.json")
    load, loaded = bench._load, []

    def load_other(attention: str) -> Any:
        model = load(attention)
        loaded.append(attention)
        return configure(model, SparQConfig(rank=4, top_k=128 if len(loaded) == 1 else top_k))

    monkeypatch.setattr(bench, "_load", load_other)
    contenders = [generation.Contender("sparq"), generation.Contender("sparq", static=True)]
    first, second = bench.measure(1, 400, contenders)
    assert first.status == "ok"
    assert second.status == ("ok" if top_k == 128 else "FAILED numerics")


def test_what_cannot_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, _ = generation_bench(tmp_path / "generation.json")
    bench.config, bench.device = generation.llama_8b, torch.device("cuda")
    card = type("Card", (), {"total_memory": 140 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    def room(batch: int, tokens: int, contender: Any) -> str | None:
        row = generation.GenerationRow(32, batch, tokens, contender.name, "ok")
        return bench._room(row, contender)

    sdpa, sparq = generation.Contender("sdpa"), generation.Contender("sparq")
    assert room(1, 131072, sdpa) is room(1, 131072, sparq) is room(8, 32768, sparq) is None
    # 15 GiB of weights, 128 GiB of cache.
    assert room(8, 131072, sdpa) == "does not fit: 147 GiB of 140 GiB"
    assert "does not fit" in (room(8, 131072, sparq) or "")
