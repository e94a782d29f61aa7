"""What `attention_calls` relies on in transformers, and that it leaves nothing behind."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from tiny import LENGTH, random_ids, tiny_model
from transformers import AttentionInterface

from hf_attn_plugin.integrations.attention_calls import (
    InterfaceCall,
    eager_names,
    intercept_attention,
)


def test_the_function_is_looked_up_with_the_familys_eager_one() -> None:
    signature = inspect.signature(AttentionInterface.get_interface)
    assert list(signature.parameters) == ["self", "attn_implementation", "default"]
    models = Path(transformers.__file__).parent / "models"
    calls = [
        found
        for path in models.glob("*/modeling_*.py")
        for found in re.findall(r"\.get_interface\(([^()]*)\)", path.read_text(encoding="utf-8"))
    ]
    assert len(calls) > 300
    defaults = [call.split(",")[1].strip() for call in calls]
    assert [d for d in defaults if not re.fullmatch(r"\w*eager\w*attention_forward\w*", d)] == []


@pytest.mark.parametrize("attn", ["flash", "sdpa", "eager"])
def test_every_call_of_a_model_is_seen(attn: str) -> None:
    model, other = tiny_model("llama", attn), tiny_model("llama", attn)
    ids = random_ids(2, LENGTH)
    before = model(ids).logits
    seen: list[InterfaceCall] = []

    def look(call: InterfaceCall) -> tuple[torch.Tensor, object]:
        seen.append(call)
        return call.run()

    with intercept_attention(model.modules(), look):
        during = model(ids).logits
        other(ids)
    assert torch.equal(before, during)
    assert [call.module.layer_idx for call in seen] == [0, 1]
    assert {call.implementation for call in seen} == {attn}
    assert all(call.eager.__name__ == "eager_attention_forward" for call in seen if call.eager)
    model(ids)
    assert len(seen) == 2


def test_names_are_put_back_after_an_error() -> None:
    model = tiny_model("llama", "sparq")
    original = AttentionInterface.get_interface
    with (
        pytest.raises(RuntimeError, match="stop"),
        eager_names(model),
        intercept_attention(model.modules(), lambda call: call.run()),
    ):
        assert model.config._attn_implementation == "eager"
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sparq"
    assert AttentionInterface.get_interface is original
