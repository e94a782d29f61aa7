"""Evaluations of ``sparq`` on a GPU are not of the dense attention that stands in for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from hf_attn_plugin import SparQConfig, configure
from hf_attn_plugin.config import parameters_of
from hf_attn_plugin.lm_eval.always import choose_always


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
