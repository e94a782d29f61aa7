"""`verify` on models that refuse a batch, or that attend several times per module."""

from __future__ import annotations

from typing import Any

import pytest
from families import running

import hf_attn_plugin
from hf_attn_plugin import LongformerConfig, SlidingWindowConfig
from hf_attn_plugin.config import METHOD_CONFIGS, MethodConfig
from hf_attn_plugin.verification import example_batches, verify, verify_batches


def odd_model(architecture: str, parameters: MethodConfig) -> Any:
    eager = running.eager_model(architecture)
    model = running.build(type(eager), eager.config, parameters.name)
    model.load_state_dict(eager.state_dict())
    return hf_attn_plugin.configure(model, parameters)


def test_a_batch_that_the_model_refuses_becomes_a_note() -> None:
    model = odd_model("jamba", hf_attn_plugin.FlashConfig())
    report = verify(model, length=16)
    assert report.ok, str(report)
    assert {check.batch for check in report.checks} == {
        "unpadded", "left-padded", "right-padded", "decoding"
    }  # fmt: skip
    (note,) = [note for note in report.notes if note.startswith("packed: refused: ")]
    assert "linear_attention" in note
    batches, _ = example_batches(model, length=16)
    with pytest.raises(ValueError, match="linear_attention"):  # asked for just these
        verify_batches(model, batches)
    with pytest.raises(ValueError, match="linear_attention"):  # nothing is left to report
        verify_batches(model, {"packed": batches["packed"]}, note_refusals=True)


@pytest.mark.parametrize("architecture", ["diffllama", "hrm_text"])
@pytest.mark.parametrize(
    "parameters", [SlidingWindowConfig(3, num_sink_tokens=1), LongformerConfig(3)]
)
def test_modules_that_attend_several_times(architecture: str, parameters: MethodConfig) -> None:
    report = verify(odd_model(architecture, parameters), length=16)
    assert report.ok, str(report)
    assert "decoding" in {check.batch for check in report.checks}


@pytest.mark.parametrize("name", ["flash", "sparq"])
def test_chunks_start_anew_in_every_document(name: str) -> None:
    model = odd_model("llama4_text", METHOD_CONFIGS[name]())
    assert model.config.attention_chunk_size < 8, "a chunk ends inside a document"
    report = verify(model, length=16)
    assert report.ok, str(report)
    assert "packed" in {check.batch for check in report.checks}
