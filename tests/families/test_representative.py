"""A dozen architectures of all kinds, compared now and held against the committed table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import transformers
from families import compare, odd, table
from families.catalogue import architectures
from families.compare import sweep
from families.result import (
    BROKEN,
    BYPASSING,
    CHECKS,
    EMPTY,
    EQUAL,
    GOOD,
    NOT_BUILT,
    PART_EQUAL,
    REFUSED,
    WHOLE_REFUSED,
    Result,
)

TABLE = Path(__file__).parents[2] / "eval" / "results" / "families.md"
OUTCOMES = {
    "llama": EQUAL,
    "mistral": EQUAL,  # a window in every layer
    "gemma2": EQUAL,  # softcap
    "gemma3_text": EQUAL,  # windows in some layers
    "gpt_oss": EQUAL,  # sinks
    "llama4_text": EQUAL,  # chunks
    "qwen3_moe": EQUAL,  # experts
    "deepseek_v3": EQUAL,  # latent attention
    "gpt2": EQUAL,
    "gpt_bigcode": EQUAL,  # one KV head; passes no position_ids to its attention
    "bert": EQUAL,
    "modernbert": EQUAL,
    "bart": EQUAL,
    "llava": EQUAL,  # a text model in a multimodal one
    "qwen3_next": EQUAL,  # recurrent layers
    "fast_vlm": PART_EQUAL,
    "got_ocr2": WHOLE_REFUSED,
    "t5": REFUSED,  # position biases
    "doge": REFUSED,  # computes with its mask
    "falcon": BYPASSING,
    "mamba": EMPTY,
}


@pytest.mark.parametrize("architecture", OUTCOMES)
def test_architecture(architecture: str) -> None:
    result = sweep(architecture)
    assert (result.outcome, result.message) == (OUTCOMES[architecture], result.message)
    if TABLE.exists():
        row = table.read(TABLE)[architecture]
        assert row["outcome"] == result.outcome, "make the table again"
        assert row["class"] == result.model_class
        if result.outcome == EQUAL and transformers.__version__ in TABLE.read_text():
            checks = {name: result.checks.get(name, "-").partition(":")[0] for name in CHECKS}
            assert {name: row[name] for name in CHECKS} == checks


def test_a_part_that_is_equal_is_not_the_whole() -> None:
    refused = sweep("got_ocr2")  # its vision tower computes attention by itself
    assert refused.outcome == WHOLE_REFUSED
    assert refused.message.startswith("compared with the name for its text part (Qwen2Model) alone")
    assert "for the whole: GotOcr2ForConditionalGeneration computes attention" in refused.message
    unknown = sweep("fast_vlm")  # its vision tower needs timm
    assert (unknown.outcome, unknown.model_class) == (PART_EQUAL, "Qwen2ForCausalLM")
    counts = table.render([refused, unknown]).split("architectures: ")[1]
    assert counts.startswith("1 text part equal, 1 whole refused, text part equal.")


def test_a_part_without_attention_says_nothing_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(odd.TEXT_TOWERS, "fast_vlm", "mamba")
    monkeypatch.setattr(compare, "_compare", lambda eager, result, dtype: setattr(
        result, "outcome", EMPTY))  # fmt: skip
    assert sweep("fast_vlm").outcome == NOT_BUILT


@pytest.mark.skipif(not TABLE.exists(), reason="the table is made by pytest -m families")
def test_the_table_knows_every_architecture() -> None:
    rows = table.read(TABLE)
    assert {row["outcome"] for row in rows.values()} <= set(GOOD)
    if f"transformers {transformers.__version__}," in TABLE.read_text():
        assert set(rows) == set(architectures())


def test_a_mask_that_is_wrong_in_one_pair_breaks_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_attn_plugin.methods import flash

    def forgetful(method: str, module: object, *args: object, **kwargs: object) -> object:
        call = read_call(method, module, *args, **kwargs)
        if call.pattern.q_len < 3:
            return call
        dense = call.pattern.visible(call.query.device).clone()
        dense[..., 2, 1] = False  # one pair of all
        return dataclasses.replace(call, pattern=call.pattern.replace(dense=dense))

    read_call = flash.read_call
    monkeypatch.setattr(flash, "read_call", forgetful)
    result = sweep("llama")
    assert result.outcome == BROKEN
    assert "differ by" in result.message


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = Result("bert", "BertModel", EQUAL, 1e-15, 2e-15, 0.5, {"left": EQUAL,
                    "packed": "refused: a | b"}, versions="transformers 0, torch 0")  # fmt: skip
    path = tmp_path / "families.md"
    path.write_text(table.render([result]))
    row = table.read(path)["bert"]
    assert (row["outcome"], row["packed"], row["static"]) == (EQUAL, REFUSED, "-")
    assert row["reason or note"] == "a / b"


def test_a_table_with_holes_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have no result"):
        table.write(tmp_path, tmp_path / "families.md")


def test_the_table_calls_no_part_the_whole() -> None:
    rows = table.read(TABLE)
    assert not [name for name in odd.TEXT_TOWERS if rows[name]["outcome"] == EQUAL]
