"""`verify` finds every layer equal to eager attention, and leaves the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import FAMILIES, LENGTH, pack_positions, padding_mask, random_ids, tiny_model
from transformers import (
    AttentionInterface,
    BartConfig,
    BartModel,
    BloomConfig,
    BloomModel,
    DynamicCache,
)

import hf_attn_plugin
from hf_attn_plugin import LongformerConfig, SlidingWindowConfig, SparQConfig, StridedConfig
from hf_attn_plugin.config import METHOD_CONFIGS
from hf_attn_plugin.verification import (
    AttentionMismatchError,
    DecodingBatch,
    verify,
    verify_batches,
)

PARAMETERS = [
    SlidingWindowConfig(5, num_sink_tokens=2),
    LongformerConfig(3, num_global_tokens=2, dilation=2),
    StridedConfig(3, stride=4),
    SparQConfig(rank=4, top_k=8),
]
EXACT = ["flash", "sliding_window", "longformer", "strided"]


def model_of(family: str, name: str, **overrides: Any) -> Any:
    model = tiny_model(family, name, **overrides)
    for parameters in PARAMETERS:
        hf_attn_plugin.configure(model, parameters)
    return model


@pytest.mark.parametrize("name", [*EXACT, "sparq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_equals_eager(family: str, name: str) -> None:
    report = verify(model_of(family, name), length=32, gradients=True)
    assert report.ok, str(report)
    assert {check.method for check in report.checks} == {name}
    batches = {check.batch for check in report.checks}
    decoder = {"packed", "decoding"} if family not in ("bert", "modernbert") else set()
    assert batches == {"unpadded", "left-padded", "right-padded"} | decoder
    assert {check.quantity for check in report.checks} == {
        "output", "query gradient", "key gradient", "value gradient"
    }  # fmt: skip
    assert len({check.name for check in report.checks}) == 2
    assert not report.notes, "a pattern was not put to the test, or a layer was not called"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["flash", "longformer"])
def test_half_precision_is_within_its_own_budget(name: str, dtype: torch.dtype) -> None:
    report = verify(model_of("gemma2", name).to(dtype), length=32, gradients=True)
    assert report.ok, str(report)
    assert all(1e-4 < c.budget < 0.1 for c in report.checks if c.budget is not None)


def test_autocast_and_training_mode_are_verified_as_they_are() -> None:
    model = model_of("llama", "flash").train()
    with torch.autocast("cpu", torch.bfloat16):
        report = verify(model, random_ids(2, LENGTH))
    assert report.ok, str(report)
    assert model.training


def test_decoding_with_sparq_is_reported_as_an_approximation() -> None:
    report = verify(model_of("llama", "sparq"), length=48)
    decoding = [check for check in report.checks if check.batch == "decoding"]
    assert all(check.budget is None and check.ok for check in decoding)
    assert max(check.relative_error for check in decoding) > 1e-3
    assert all(check.budget for check in report.checks if check.batch != "decoding")
    assert "approximates by design" in str(report)
    model = model_of("llama", "sparq")
    hf_attn_plugin.configure(model, SparQConfig(top_k=64))
    all_keys = [c for c in verify(model, length=48).checks if c.batch == "decoding"]
    assert max(check.relative_error for check in all_keys) < 1e-5


def batches() -> dict[str, dict[str, Any]]:
    ids = random_ids(2, LENGTH)
    four_d = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().tril(3)[None, None]
    lengths = torch.tensor([0, 7, LENGTH], dtype=torch.int32)
    globals_ = torch.zeros(2, LENGTH, dtype=torch.long)
    globals_[:, 9] = 1
    packed = pack_positions([[7, 13], [LENGTH]])
    return {
        "4D mask": {"input_ids": ids, "attention_mask": four_d},
        "4D mask over positions that start again": {
            "input_ids": ids, "attention_mask": four_d, "position_ids": packed
        },
        "cumulative lengths": {
            "input_ids": ids[:1], "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths,
            "max_length_q": 13, "max_length_k": 13,
        },
        "packed beside a mask": {
            "input_ids": ids, "position_ids": packed, "attention_mask": torch.ones_like(ids)
        },
        "packed and padded": {
            "input_ids": ids, "position_ids": packed,
            "attention_mask": padding_mask(LENGTH, [0, 4], "right"),
        },
        "positions that jump ahead": {
            "input_ids": ids, "position_ids": packed + (packed > 4) * 9, "use_cache": False
        },
        "labels": {"input_ids": ids, "labels": ids, "position_ids": packed, "use_cache": False},
        "marked tokens": {"input_ids": ids, "global_attention_mask": globals_},
        "embeddings": {"inputs_embeds": torch.randn(2, LENGTH, 32)},
    }  # fmt: skip


@pytest.mark.parametrize("kind", batches())
def test_batches_of_the_users_own(kind: str) -> None:
    model = model_of("llama", "longformer" if kind == "marked tokens" else "flash")
    report = verify(model, batches()[kind], gradients=True)
    assert report.ok, str(report)


@pytest.mark.parametrize("name", ["flash", "sliding_window", "longformer"])
def test_packed_encoders_told_by_lengths(name: str) -> None:
    batch = batches()["cumulative lengths"]
    assert verify(model_of("bert", name), batch).ok
    leaking = verify(tiny_model("bert", "sdpa"), batch).first_difference
    assert leaking is not None and "pairs too many" in leaking.detail


def test_a_cache_with_gradients_is_refused() -> None:
    model, ids = model_of("llama", "flash"), random_ids(1, LENGTH)
    cache = model(ids[:, :15]).past_key_values
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        verify(model, {"input_ids": ids[:, 15:], "past_key_values": cache})


def test_several_tokens_over_a_cache_which_stays_as_it_is() -> None:
    model = model_of("gemma3_text", "sliding_window")
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        cache = model(ids[:, :15], past_key_values=DynamicCache()).past_key_values
    before = copy.deepcopy(cache)
    report = verify(model, {"input_ids": ids[:, 15:], "past_key_values": cache})
    assert report.ok, str(report)
    assert cache.get_seq_length() == 15
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys)


@pytest.mark.parametrize("name", ["sliding_window", "longformer"])
@pytest.mark.parametrize("new", [1, 4])
def test_caches_that_drop_keys_are_held_against_all_keys(name: str, new: int) -> None:
    model, ids = model_of("llama", name), random_ids(2, LENGTH)
    batch = DecodingBatch({"input_ids": ids[:, :-new]}, {"input_ids": ids[:, -new:]})
    report = verify_batches(model, {"step": batch})
    assert report.ok, str(report)
    with torch.no_grad():
        cache = model(ids[:, :-new]).past_key_values
    assert max(layer.keys.shape[2] for layer in cache.layers) < LENGTH - new
    with pytest.raises(ValueError, match=r"cache in the batch.*DynamicCache\(\)"):
        verify(model, {"input_ids": ids[:, -new:], "past_key_values": cache})


def test_encoder_decoders_and_peft() -> None:
    from peft import LoraConfig, get_peft_model

    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.5,
        max_position_embeddings=64,
    )  # fmt: skip
    report = verify(BartModel._from_config(config, attn_implementation="flash").eval(), length=32)
    assert report.ok, str(report)
    assert len({check.name for check in report.checks}) == 3, "self, cross, encoder"
    wrapped = get_peft_model(
        model_of("llama", "longformer"), LoraConfig(target_modules="all-linear")
    )
    report = verify(wrapped, length=32)
    assert report.ok, str(report)
    assert {check.batch for check in report.checks} >= {"packed", "decoding"}


def test_nothing_is_left_behind() -> None:
    model = model_of("llama", "sliding_window", attention_dropout=0.0).train()
    get_interface, state = AttentionInterface.get_interface, torch.get_rng_state()
    logits = model(random_ids(1, LENGTH)).logits
    verify(model, length=32, gradients=True)
    assert AttentionInterface.get_interface is get_interface
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sliding_window"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(random_ids(1, LENGTH)).logits, logits)
    with pytest.raises(ValueError, match="output_attentions"):
        verify(model, {"input_ids": random_ids(1, LENGTH), "output_attentions": True})
    assert AttentionInterface.get_interface is get_interface
    assert model.config._attn_implementation == "sliding_window"


def test_what_was_not_put_to_the_test_is_said() -> None:
    report = verify(tiny_model("llama", "sliding_window"), length=32)
    assert report.ok
    assert "sliding_window left out no pair" in str(report)


def test_families_outside_the_interface_are_refused() -> None:
    config = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)
    with pytest.raises(ValueError, match=r"BloomModel made no attention call.*Llama"):
        verify(BloomModel(config), random_ids(1, 8))


@pytest.mark.parametrize("name", sorted({*METHOD_CONFIGS} - {"ring"}))
def test_each_method_of_the_package_can_be_verified(name: str) -> None:
    """Also those that are added later: exact within the budget, or said to be approximate."""
    report = verify(model_of("llama", name), length=32)
    assert report.ok, str(report)


def test_transformers_own_sdpa_is_caught_mixing_packed_documents() -> None:
    """The gap that README's section on packing is about: a cache is made, the packing is lost."""
    batch = {"input_ids": random_ids(1, LENGTH), "position_ids": pack_positions([[7, 13]])}
    model = tiny_model("llama", "sdpa")
    assert verify(model, {**batch, "use_cache": False}).ok
    report = verify(model, batch)
    first = report.first_difference
    assert first is not None
    assert first.name == "model.layers.0.self_attn"
    assert f"attends to {7 * 13} pairs too many, first row 0: query 7 → key 0" in first.detail
    with pytest.raises(AttentionMismatchError, match=r"in 2 of 2 layers; first in batch: model"):
        report.raise_if_different()
