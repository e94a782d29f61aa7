"""`verify` reads packed documents as the methods do, and says so where nothing tells them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import running
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import LENGTH, from_config, pack_positions, padding_mask, random_ids
from torch import Tensor
from transformers import Gemma3TextConfig

import hf_attn_plugin
from hf_attn_plugin import SlidingWindowConfig
from hf_attn_plugin.methods import flash, sliding_window
from hf_attn_plugin.verification import verify
from hf_attn_plugin.verification.batches import shorten_batch
from hf_attn_plugin.verification.expected import read_tokens

from .test_catches import break_layer, of_pattern, only_difference
from .test_verify import model_of

ROW = [[5, 3, 12]]
IDS = random_ids(1, LENGTH)
POSITIONS = pack_positions(ROW)
LEAKING = of_pattern(q_documents=None, kv_documents=None)
LEAK = f"attends to {5 * 15 + 3 * 12} pairs too many, first row 0: query 5 → key 0"


def documents(positions: Tensor, mask: Tensor | None = None) -> list[list[int]]:
    ids = torch.zeros(positions.shape[-2:], dtype=torch.long)
    tokens = read_tokens({"input_ids": ids, "position_ids": positions, "attention_mask": mask}, 0)
    assert tokens is not None
    return tokens.document.tolist()


def test_positions_along_several_axes() -> None:
    # Two images of four patches each at the same moment go back on all axes, but not to 0.
    time = torch.tensor([[0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 4, 0, 1]])
    height = torch.tensor([[0, 1, 2, 2, 3, 3, 2, 2, 3, 3, 4, 0, 1]])
    width = torch.tensor([[0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 0, 1]])
    three = torch.stack([time, height, width])
    assert documents(three) == [[0] * 11 + [1, 1]]
    text = pack_positions([[4, 9]])
    assert documents(torch.cat([text[None], three])) == [[0] * 4 + [1] * 9]
    assert documents(torch.zeros(3, 2, 4)) == [[0, 1, 2, 3]] * 2, "one token each"
    padded = pack_positions([[4, 3]])[None].expand(3, -1, -1)
    assert documents(padded, torch.tensor([[0, 0, 0, 0, 1, 1, 1]])) == [[0] * 7]


@pytest.mark.parametrize("axes", [0, 3, 4])
@pytest.mark.parametrize("kept", [True, False])
def test_packed_rows_of_a_model_with_images(
    monkeypatch: pytest.MonkeyPatch, axes: int, kept: bool
) -> None:
    model = running.eager_model("qwen2_vl")
    model.set_attn_implementation("flash")
    positions = POSITIONS.expand(axes, -1, -1) if axes else POSITIONS
    batch = {"input_ids": IDS, "position_ids": positions}
    if kept:
        report = verify(model, batch)
        assert report.ok, str(report)
    else:
        break_layer(monkeypatch, LEAKING)
        assert LEAK in only_difference(model, batch).detail


@pytest.mark.parametrize("axes", [3, 4])
def test_long_rows_of_a_model_with_images_are_cut(axes: int) -> None:
    batch = {"input_ids": IDS, "position_ids": POSITIONS.expand(axes, -1, -1)}
    short = shorten_batch(batch, 7)
    assert torch.equal(short["position_ids"], batch["position_ids"][..., :7])
    model = running.eager_model("qwen2_vl")
    model.set_attn_implementation("flash")
    assert verify(model, short).ok


def both_ways(name: str) -> Any:
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"], use_bidirectional_attention=True,
        initializer_range=0.5, max_position_embeddings=64,
    )  # fmt: skip
    return hf_attn_plugin.configure(from_config(config, name), SlidingWindowConfig(5))


@pytest.mark.parametrize("name", ["flash", "sliding_window"])
def test_gemma_that_looks_both_ways(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = both_ways(name)
    padded = torch.tensor([[1] * 18 + [0] * 2])
    for more in ({}, {"attention_mask": padded}, {"use_cache": False}):
        report = verify(model, {"input_ids": IDS, "position_ids": POSITIONS, **more})
        assert report.ok, str(report)
    leaking = of_pattern(q_documents=None, kv_documents=None, dense=None)
    break_layer(monkeypatch, leaking, method=flash if name == "flash" else sliding_window)
    detail = only_difference(model, {"input_ids": IDS, "position_ids": POSITIONS}).detail
    assert "pairs too many" in detail


@pytest.mark.parametrize("name", ["flash", "sliding_window", "longformer"])
def test_encoders_take_positions_for_positions(name: str) -> None:
    """So there is one document in a row, with first tokens of its own."""
    report = verify(model_of("bert", name), {"input_ids": IDS, "position_ids": POSITIONS})
    assert report.ok, str(report)


def prompt_tuned(kind: Any, name: str) -> Any:
    return get_peft_model(
        model_of("llama", name), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )


@pytest.mark.parametrize("name", ["flash", "sliding_window", "longformer", "linear"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_counted(kind: Any, name: str) -> None:
    model = prompt_tuned(kind, name)
    for mask in (None, padding_mask(LENGTH, [0, 6], "left")):
        report = verify(model, {"input_ids": random_ids(2, LENGTH), "attention_mask": mask})
        assert report.ok, str(report)
        assert not report.notes
        assert ": equal" in str(report)


def test_a_fault_behind_virtual_tokens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompt_tuned(PromptTuningConfig, "sliding_window")
    break_layer(monkeypatch, of_pattern(causal=False), method=sliding_window)
    assert not verify(model, {"input_ids": IDS}).ok


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_documents_that_a_wrapper_drops_are_not_called_equal() -> None:
    batch = {"input_ids": IDS, "position_ids": POSITIONS}
    report = verify(prompt_tuned(PromptTuningConfig, "flash"), batch)
    assert {check.not_judged for check in report.checks} == {"packed documents"}
    (note,) = report.notes
    assert "PeftModelForCausalLM does not hand their positions on" in note
    text = str(report)
    assert "not judged: packed documents" in text
    assert ": equal" not in text
    assert text.endswith("as far as it was judged")
    assert all("not judged" in line for line in report.table().splitlines())
    assert "not judged" not in str(verify(model_of("llama", "flash"), batch))


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_every_batch_made_here_runs_through_virtual_tokens() -> None:
    report = verify(prompt_tuned(PromptTuningConfig, "sliding_window"), length=32)
    assert report.ok, str(report)
    assert {check.batch for check in report.checks if check.not_judged} == {"packed"}
    assert len({check.batch for check in report.checks}) == 5
