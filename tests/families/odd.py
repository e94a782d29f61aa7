"""What the rules cannot find for themselves: odd configs, and architectures that are not built."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
            "indexer_budget": 4, "indexer_compress_ratio": 2}  # fmt: skip
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2}

# Config values by architecture; a dict under a part's name goes to that part.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"],
                         "mamba_n_heads": 4, "mamba_d_head": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 5},
    "zamba": {"num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
               "mamba_headdim": 16, "n_mamba_heads": 4, "num_query_groups": 4,
               "hybrid_layer_ids": [1, 3], "num_key_value_heads": 4,
               "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
             "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48}},
    "dots1": {**_ROUTED, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v2": _ROUTED,
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "xmod": {"default_language": "en_XX"},
    "esm": {"vocab_size": 96, "pad_token_id": 1, "mask_token_id": 3},
    "glm5_next_text": {"index_kpool": 2},
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "mistral4": {"qk_nope_head_dim": 4, "head_dim": 8, "qk_head_dim": 8},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGA": 91}},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|visual token 0|>": 91}},
}  # fmt: skip

# Families whose activations grow without bound under the usual weights: smaller ones.
GAINS: dict[str, float] = {"mobilebert": 0.5}

# Architectures of which no tiny model is made, each with the reason.
NOT_BUILT: dict[str, str] = {}
