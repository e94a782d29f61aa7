"""Longer contexts: what is written into the config, and that transformers acts on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from hf_attn_plugin.convert import extend_context


def llama(**rope: object) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | rope,
    )


def inverse_frequencies(config: PreTrainedConfig) -> torch.Tensor:
    return LlamaForCausalLM(config).model.rotary_emb.inv_freq


def test_linear_scaling_divides_every_frequency() -> None:
    before = inverse_frequencies(llama())
    after = inverse_frequencies(extend_context(llama(), 512, "linear"))
    torch.testing.assert_close(after, before / 4)


def test_yarn_keeps_the_fast_and_divides_the_slow(tmp_path: Path) -> None:
    config = extend_context(llama(), 512)
    assert config.max_position_embeddings == 512
    assert config.rope_parameters["factor"] == 4
    assert config.rope_parameters["original_max_position_embeddings"] == 128
    before, after = inverse_frequencies(llama()), inverse_frequencies(config)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[-1], before[-1] / 4)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert torch.equal(inverse_frequencies(loaded), after)


def test_twice_extended_is_extended_once_by_the_product() -> None:
    twice = extend_context(extend_context(llama(), 256), 1024)
    assert twice.to_dict() == extend_context(llama(), 1024).to_dict()


def test_only_full_attention_layers_are_scaled() -> None:
    config = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 128})
    extend_context(config, 256)
    rope = config.text_config.rope_parameters
    assert rope["full_attention"]["rope_type"] == "yarn"
    assert rope["sliding_attention"]["rope_type"] == "default"
    assert config.text_config.max_position_embeddings == 256


@pytest.mark.parametrize("scaling", ["yarn", "none"])
def test_a_context_that_fits_changes_nothing(scaling: str) -> None:
    assert extend_context(llama(), 128, scaling).to_dict() == llama().to_dict()  # type: ignore[arg-type]


def test_without_scaling_only_the_limit_rises() -> None:
    config = extend_context(llama(), 512, "none")
    assert config.max_position_embeddings == 512
    assert config.rope_parameters == llama().rope_parameters


def test_refusals() -> None:
    with pytest.raises(ValueError, match="yarn, linear or none, got 'ntk'"):
        extend_context(llama(), 512, "ntk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gpt2 has no rotary positions, its 64"):
        extend_context(GPT2Config(n_positions=64), 512)
    with pytest.raises(ValueError, match=r"scaled already \(linear\)"):
        extend_context(llama(rope_type="linear", factor=2.0), 512)
