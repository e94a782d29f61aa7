"""One look at many other families: fused projections, latent attention, experts, chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import LENGTH, padding_mask, random_ids, tiny_config, twin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

import hf_attn_plugin
from hf_attn_plugin import SlidingWindowConfig
from hf_attn_plugin.methods import METHODS

_GQA = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_OLD = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0,
        "initializer_range": 0.3}  # fmt: skip
OWN_NAMES: dict[str, dict[str, Any]] = {  # families whose configs share few names with the others
    "gpt2": _OLD,
    "gpt_bigcode": _OLD,
    "opt": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48,
            "num_attention_heads": 4, "word_embed_proj_dim": 32, "init_std": 0.3},
    "distilbert": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
                   "initializer_range": 0.3},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "phi": {},
    "phi3": _GQA,
    "cohere2": {**_GQA, "sliding_window": 6},
    "olmo2": _GQA,
    "mixtral": {**_GQA, "num_local_experts": 2, "sliding_window": 6},
    "qwen2_moe": {**_GQA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "deepseek_v3": {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 6,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "n_routed_experts": 2,
                    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                    "moe_intermediate_size": 16},
    "llama4_text": {**_GQA, "head_dim": 8, "attention_chunk_size": 6, "num_local_experts": 2,
                    "num_experts_per_tok": 2, "intermediate_size_mlp": 48,
                    "layer_types": ["chunked_attention", "full_attention"]},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}  # fmt: skip


def eager_model(family: str) -> Any:
    if family in OWN_NAMES:
        config = CONFIG_MAPPING[family](**OWN_NAMES[family])
    else:
        config = tiny_config(family, **OTHERS[family])
    torch.manual_seed(0)
    model = MODEL_MAPPING[type(config)]._from_config(config, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("family", [*OWN_NAMES, *OTHERS])
def test_exact_methods_equal_eager(
    family: str, registries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AttentionInterface

    eager = eager_model(family)
    ids, valid = random_ids(2, LENGTH), padding_mask(LENGTH, [0, 7], "left")
    with torch.no_grad():
        expected = eager(ids, attention_mask=valid)[0][valid.bool()]
        unmasked = eager(ids)[0][valid.bool()]
        for name in ["sliding_window", "sparq", "flash"]:
            calls = []

            def spy(module: Any, *args: Any, name: str = name, **kwargs: Any) -> Any:
                calls.append(module)  # noqa: B023
                return METHODS[name](module, *args, **kwargs)

            AttentionInterface.register(name, spy)
            ours = twin(eager, name)
            if name == "sliding_window":  # wide enough to leave nothing out
                hf_attn_plugin.configure(ours, SlidingWindowConfig(window=LENGTH))
            found = ours(ids, attention_mask=valid)[0][valid.bool()]
            assert len(calls) == eager.config.num_hidden_layers
            torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-3)
    assert (expected - unmasked).abs().max() > 0.01, "the control: padding matters"


@pytest.mark.parametrize("name", ["flash", "sliding_window", "sparq"])
def test_chunks_of_packed_documents_start_with_each_document(name: str) -> None:
    eager = eager_model("llama4_text")
    ours = hf_attn_plugin.configure(twin(eager, name), SlidingWindowConfig(window=LENGTH))
    ids = random_ids(1, LENGTH)
    positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None]
    with torch.no_grad():
        found = ours(ids, position_ids=positions, use_cache=False)[0]
        alone = [eager(part, use_cache=False)[0] for part in ids.split([9, LENGTH - 9], 1)]
        expected = torch.cat(alone, 1)
        joined = eager(ids, use_cache=False)[0]
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-3)
    assert (joined - expected).abs().max() > 0.01


def test_a_family_that_edits_its_mask_is_refused_clearly() -> None:
    config = tiny_config("doge", num_key_value_heads=2)
    model = MODEL_MAPPING[type(config)]._from_config(config, attn_implementation="flash").eval()
    with pytest.raises((AttributeError, ValueError, TypeError), match=r"sdpa|eager"):
        model(random_ids(1, LENGTH))
