"""Evaluations of ``sparq`` on a GPU are not of the dense attention that stands in for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hf_attn_plugin import SparQConfig, configure
from hf_attn_plugin.config import parameters_of
from hf_attn_plugin.lm_eval.always import choose_always
from hf_attn_plugin.lm_eval.run import _attention


@pytest.mark.parametrize(
    ("attn", "device", "given", "left"),
    [
        ("sparq", "cuda", None, 0),
        ("sparq", "cuda", 5, 5),
        ("sparq", "cpu", None, None),
        ("sdpa", "cuda", None, None),
    ],
)
def test_short_caches_are_chosen_from_too(attn, device, given, left):
    config = LlamaConfig(num_hidden_layers=1)
    config._attn_implementation = attn
    configure(config, SparQConfig(rank=7, dense_below=given))
    model = SimpleNamespace(config=config, device=torch.device(device))
    assert choose_always(model) == (left != given)
    assert parameters_of(config, SparQConfig) == SparQConfig(rank=7, dense_below=left)


def test_a_text_part_has_its_parameters_again():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 32, **sizes}
    vision = {"model_type": "clip_vision_model", "image_size": 4, "patch_size": 2, **sizes}
    config = LlavaConfig(text_config=text, vision_config=vision)
    model = LlavaForConditionalGeneration(config)
    own = SparQConfig(rank=3, top_k=17)
    configure(model.config.text_config, own)
    with _attention(model, "sparq", SparQConfig(rank=5)):
        assert parameters_of(model.config.text_config, SparQConfig).rank == 5
    assert parameters_of(model.config.text_config, SparQConfig) == own
    assert model.config.text_config._attn_implementation != "sparq"
