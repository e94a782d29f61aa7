"""Granite's hybrid models use position_ids for RoPE alone; documents are kept apart even so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import running
from tiny import random_ids
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.opt.modeling_opt import OPTDecoder

from hf_attn_plugin.integrations import flash_name, forward_positions
from hf_attn_plugin.methods import METHODS

DOCUMENTS = [5, 3, 4]


def model_of(name: str, kinds: list[str]) -> Any:
    config = running.eager_model("granitemoehybrid").config
    config.layer_types = kinds
    config.position_embedding_type = "rope"
    torch.manual_seed(0)
    model = running.build(granite.GraniteMoeHybridForCausalLM, config, name)
    running._randomize(model, 1.5)
    return model


def packed_and_alone(model: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(2, sum(DOCUMENTS))
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    with torch.no_grad():
        alone = [model(input_ids=part).logits for part in ids.split(DOCUMENTS, 1)]
        packed = model(input_ids=ids, position_ids=positions, **kwargs).logits
    return packed, torch.cat(alone, 1)


@pytest.mark.parametrize("name", ["flash", "sliding_window", "linear"])
@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}, {"attention_mask": True}])
def test_documents_are_kept_apart(name: str, kwargs: dict[str, Any], registries: None) -> None:
    model = model_of(name, ["full_attention"] * 2)
    mask = torch.ones(2, sum(DOCUMENTS), dtype=torch.long)
    if "attention_mask" in kwargs:
        kwargs = {"attention_mask": mask}
    packed, alone = packed_and_alone(model, **kwargs)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert not vars(mask)
    flash_name.uninstall()  # the control
    leaking, _ = packed_and_alone(model, **kwargs)
    flash_name.install(frozenset(METHODS))
    assert (leaking - alone).abs().max() > 0.01


def test_the_name_may_be_given_later() -> None:
    model = model_of("sdpa", ["full_attention"] * 2)
    model.set_attn_implementation("flash")
    torch.testing.assert_close(*packed_and_alone(model), rtol=1e-4, atol=1e-4)


def test_recurrent_layers_refuse_packed_documents() -> None:
    model = model_of("flash", ["linear_attention", "full_attention"])
    with pytest.raises(ValueError, match="state runs on from one document into"):
        packed_and_alone(model)


def test_which_models_keep_positions_to_themselves() -> None:
    assert forward_positions.keeps_positions(granite.GraniteMoeHybridModel)
    for cls in (granite.GraniteMoeHybridForCausalLM, LlamaModel, OPTDecoder):
        assert not forward_positions.keeps_positions(cls)
