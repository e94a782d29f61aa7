"""`verify` holds ``linear`` against its definition, and sees a layer that computes another."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from families import running
from tiny import LENGTH, random_ids

import hf_attn_plugin
from hf_attn_plugin import LinearConfig
from hf_attn_plugin.integrations.attention_calls import InterfaceCall
from hf_attn_plugin.methods import linear
from hf_attn_plugin.ops.linear import reference_linear_attention
from hf_attn_plugin.ops.linear_state import StateSlot
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.verification import DecodingBatch, verify, verify_batches
from hf_attn_plugin.verification.definitions import linear_definition
from hf_attn_plugin.verification.expected import ExpectedPairs

from .test_catches import (
    IDS,
    PACKED,
    PADDED,
    break_layer,
    changed,
    of_pattern,
    only_difference,
)
from .test_verify import model_of

ELU, FAVOR = LinearConfig(), LinearConfig("favor", num_features=16, seed=3, redraw=1)
MAPS = pytest.mark.parametrize("parameters", [ELU, FAVOR], ids=["elu", "favor"])


def linear_model(family: str = "llama", parameters: LinearConfig = ELU) -> Any:
    return hf_attn_plugin.configure(model_of(family, "linear"), parameters)


@MAPS
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "bert"])
def test_every_layer_equals_the_definition(family: str, parameters: LinearConfig) -> None:
    report = verify(linear_model(family, parameters), length=32, gradients=True)
    assert report.ok, str(report)
    assert not report.notes
    assert all(check.budget is not None and check.budget < 1e-4 for check in report.checks)
    outputs = [check for check in report.checks if check.quantity == "output"]
    summed = [check for check in outputs if check.from_softmax is not None]
    # One of Gemma 3's two layers has a window of its own and stays softmax attention.
    assert len({check.name for check in summed}) == (1 if family == "gemma3_text" else 2)
    assert max(check.from_softmax or 0 for check in summed) > 0.1
    assert "from softmax, by design" in str(report)
    if family != "bert":
        assert {check.batch for check in outputs} >= {"packed", "decoding"}


@MAPS
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half: torch.dtype, parameters: LinearConfig) -> None:
    report = verify(linear_model(parameters=parameters).to(half), length=32)
    assert report.ok, str(report)
    assert all((check.budget or 1) < 0.03 for check in report.checks)


def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        report = verify(linear_model(), IDS)
    assert report.ok, str(report)


@MAPS
def test_the_definition_is_that_of_ops(parameters: LinearConfig) -> None:
    module = linear_model(parameters=parameters).model.layers[1].self_attn
    shapes = [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)]
    query, key, value = (torch.randn(shape, dtype=torch.float64) * 3 for shape in shapes)
    allowed = torch.rand(2, 1, 5, 7) < 0.5
    allowed[1, 0, 2] = False
    call = InterfaceCall("linear", max, None, module, query, key, value, None, {"scaling": 0.3})
    found = linear_definition(call, ExpectedPairs(None, allowed, False), torch.float64)
    expected = reference_linear_attention(
        query,
        key,
        value,
        Pattern(q_len=5, kv_len=7, causal=False, dense=allowed),
        feature_map=linear._feature_map(
            linear.AttentionCall(
                "linear", module, query, key, value, None, 0.3, None, None, {}, False  # type: ignore[arg-type]
            )
        ),
        scaling=0.3,
    )  # fmt: skip
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


@MAPS
def test_ignored_padding_is_seen(monkeypatch: pytest.MonkeyPatch, parameters: LinearConfig) -> None:
    break_layer(monkeypatch, of_pattern(key_valid=None), method=linear)
    wrong = only_difference(linear_model(parameters=parameters), PADDED)
    assert wrong.name == "model.layers.1.self_attn"
    assert f"attends to {14 * 6 + 21} pairs too many, first row 1: query 0 → key 0" in wrong.detail
    assert wrong.relative_error > 100 * (wrong.budget or 1)


@MAPS
def test_documents_that_leak_are_seen(
    monkeypatch: pytest.MonkeyPatch, parameters: LinearConfig
) -> None:
    break_layer(monkeypatch, of_pattern(q_documents=None, kv_documents=None), method=linear)
    wrong = only_difference(linear_model(parameters=parameters), PACKED)
    assert wrong.name == "model.layers.1.self_attn"
    assert f"attends to {7 * 13} pairs too many, first row 0: query 7 → key 0" in wrong.detail


def test_looking_ahead_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    break_layer(monkeypatch, of_pattern(causal=False), method=linear)
    wrong = only_difference(linear_model(), {"input_ids": IDS, "use_cache": False})
    assert "first row 0: query 0 → key 1" in wrong.detail


def test_other_features_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = linear._feature_map

    def faulty(call: Any) -> Any:
        features = drawn(call)
        return dataclasses.replace(features, layer=0)

    monkeypatch.setattr(linear, "_feature_map", faulty)
    wrong = only_difference(linear_model(parameters=FAVOR), {"input_ids": IDS})
    assert wrong.name == "model.layers.1.self_attn"
    assert "the right pairs attend, the numbers differ" in wrong.detail


def test_another_scaling_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    break_layer(monkeypatch, changed(scaling=0.36), method=linear)  # 8 ** -0.5 is 0.354
    assert only_difference(linear_model(parameters=FAVOR), {"input_ids": IDS}).layer_idx == 1


def test_softmax_in_place_of_linear_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_has_own_window", lambda call: call.module.layer_idx == 1)
    wrong = only_difference(linear_model(), {"input_ids": IDS, "use_cache": False})
    assert wrong.name == "model.layers.1.self_attn"
    assert "the numbers differ" in wrong.detail


def test_a_wrong_state_is_seen_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = linear_model(), StateSlot.read

    def forgetful(self: StateSlot, start: int) -> Any:
        state = read(self, start)
        return state and dataclasses.replace(state, sums=0.5 * state.sums)

    batch = DecodingBatch({"input_ids": IDS[:, :-1]}, {"input_ids": IDS[:, -1:]})
    assert verify_batches(model, {"step": batch}).ok
    monkeypatch.setattr(StateSlot, "read", forgetful)
    first = verify_batches(model, {"step": batch}).first_difference
    assert first is not None
    assert first.name == "model.layers.0.self_attn"
    assert "a state of earlier keys" in first.detail


def test_a_state_in_the_batch_is_refused() -> None:
    model, ids = linear_model(), random_ids(2, LENGTH)
    with torch.no_grad():
        cache = model(ids[:, :15]).past_key_values
    with pytest.raises(ValueError, match=r"holds a sum in place of its 15 tokens"):
        verify(model, {"input_ids": ids[:, 15:], "past_key_values": cache})


@pytest.mark.parametrize("gain", [1, 40])
@pytest.mark.parametrize("feature_map", ["elu", "favor"])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_in_which_much_cancels_are_rounding(
    feature_map: str, gain: float, seed: int
) -> None:
    """BART's: the numerator's and the denominator's are up to hundreds of times their sum."""
    model = hf_attn_plugin.configure(running.eager_model("bart"), LinearConfig(feature_map))
    model.set_attn_implementation("linear")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter *= gain**0.5
    report = verify(model, length=20, gradients=True, seed=seed)
    assert report.ok, str(report)
    assert max(check.budget or 0 for check in report.checks) < 1e-2


def test_gradients_too_large_by_a_thousandth_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    read = linear.read_call

    def faulty(*args: Any, **kwargs: Any) -> Any:
        call = read(*args, **kwargs)
        key = call.key + 1e-3 * (call.key - call.key.detach())  # larger gradients, the same keys
        return dataclasses.replace(call, key=key) if call.module.layer_idx == 1 else call

    monkeypatch.setattr(linear, "read_call", faulty)
    for parameters in (ELU, FAVOR):
        wrong = only_difference(linear_model(parameters=parameters), IDS, gradients=True)
        assert (wrong.layer_idx, wrong.quantity) == (1, "key gradient")
        assert wrong.relative_error > 10 * (wrong.budget or 1)
