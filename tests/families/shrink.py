"""Tiny configs of any architecture: known size attributes, made small wherever they are found."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
ORDINARY = 64  # token ids from here on are special ones (images, audio, ...)
WIDTH, HEADS, HEAD_DIM, LAYERS = 32, 4, 8, 2
WINDOW = 5
CHUNK = 6

# The first pattern that matches the whole name of an integer attribute gives its small value.
_RULES: list[tuple[str, int]] = [
    (r"(type|segment)_vocab_size", 2),
    (r"prompt_types|segment_types|n_langs", 2),
    (r".*vocab_size.*|text_vocab_size", VOCABULARY),
    (r"num_hidden_groups|inner_group_num", 1),
    (r"sliding_window|sliding_window_size|local_attention_window_len|window_length", WINDOW),
    (r"attention_chunk_size", CHUNK),
    (r"local_attention", 8),
    (r"global_attn_every_n_layers|full_attn_every_n.*|sliding_window_pattern", 2),
    (r"index_topk|topk_index|keep_window_size", 4),
    (r"(index|indexer)_n(um)?_?heads", 2),
    (r"(?!.*lin).*num_(kv|key_value)_heads|num_kv_heads|.*key_value_attention_heads", 2),
    (r"linear_num_key_heads", 2),
    (r"num_key_value_groups", 2),
    (r"n_mamba_heads", 2),
    (r".*(attention|num|n|n_|value|query|self|cross|encoder|decoder|memory)_heads", HEADS),
    (r"n_head|num_heads|resampler_heads|num_attention_head", HEADS),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"v_head_dim", 6),
    (r"qk_head_dim", 12),
    (r"global_head_dim", 2 * HEAD_DIM),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r".*head_dim|d_kv|kv_channels|d_head|dim_head|index_head_dim|.*head_size", HEAD_DIM),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r".*_rank", 8),
    (r"(n|moe|num|num_local|n_routed)_(routed_)?experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|moe_top_k|n_activated_experts", 2),
    (r"n_group|topk_group|num_expert_group|n_expert_groups", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_nextn_predict_layers|num_kv_shared_layers|max_window_layers", 0),
    (r"(moe|shared|expert|.*_expert|moe_shared_expert|shared_experts?).*_intermediate_size", 16),
    (r".*intermediate_(size|dim)|.*ffn_dim|.*ffn_hidden_size|d_ff|n_inner|dim_ff|dff", 48),
    (r"mlp_dim|d_inner|.*feedforward_dim|dim_feedforward|.*linear_units|.*mlp_hidden_size", 48),
    (r".*(num_)?(hidden|encoder|decoder|attention)_layers|.*num_layers|n_layers?|depth", LAYERS),
    (r"max_(2d_)?position_embeddings|n_positions|n_ctx|seq_length|max_seq_len.*|model_max_length",
     128),
    (r"max_(source|target|speech|text)_positions|original_max_position_embeddings", 128),
    (r"state_size|mamba_d_state|ssm_state_size|time_step_rank|mamba_dt_rank", 8),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"mamba_n_heads|mamba_num_heads", HEADS),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"mamba_n_groups|n_groups", 1),
    (r"hidden_size_per_layer_input|per_layer_.*dim", 8),
    (r"(conv|linear_conv).*(kernel.*|L_cache)", 3),
    (r"upsample_groups|base_channels|adapter_(in|out)_dim|adapter_input_size", WIDTH),
    (r"codebook_size|.*num_codevectors_per_group", 16),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|projection_dim|emb_dim)", WIDTH),
    (r"(encoder_)?hidden_dim|dim|width|embedding_dim|word_embed_proj_dim|.*hidden_channels", WIDTH),
    (r"(pooler|output|projection|classifier_proj|out)_(output_)?(size|dim)|lru_width", WIDTH),
]  # fmt: skip
_VISION_RULES: list[tuple[str, int]] = [
    (r"(pretrain_)?image_size", 32),
    (r"patch_size", 8),
]
_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]
_COMPILED_VISION = [(re.compile(pattern), value) for pattern, value in _VISION_RULES]
_GENTLE = re.compile(
    r".*vocab_size|.*(num_)?(hidden|encoder|decoder)_layers|num_layers|n_layers?|depth"
)

_STD = re.compile(r"initializer_range|init_std|initializer_factor|init_method_std")
_NOISE = re.compile(
    r".*(drop_?out|drop_path|layerdrop|_pdrop|_drop|jitter|mask_time_prob|mask_feature_prob"
    r"|noise|drop_rate|droprate).*"
)
_TOKEN = re.compile(r".*_(token_id|token_index|token_ids)|.*_tok_id|.*(image|video|audio)_token")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_config(model_type: str, overrides: dict[str, Any], *, kv_heads: int = 2) -> Any:
    """A two-layer config, every known size made small.

    Args:
        model_type: The architecture's key in transformers' auto mappings.
        overrides: Values that the rules would not find; nested dicts for the parts.
        kv_heads: Key/value heads, where the config tells them apart.
    """
    cls = CONFIG_MAPPING[model_type]
    return cls(**_shrunk(cls(), overrides, kv_heads, gentle=False))


def few_layers(model_type: str, overrides: dict[str, Any]) -> Any:
    """The default config with two layers and a small vocabulary, for shapes that must fit."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**_shrunk(cls(), overrides, None, gentle=True))


def _shrunk(
    config: Any, overrides: dict[str, Any], kv_heads: int | None, *, gentle: bool
) -> dict[str, Any]:
    own = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    small: dict[str, Any] = {}
    tokens = iter(range(VOCABULARY - 1, ORDINARY, -1))
    for name, value in own.items():
        if name == "head_dim" and value is None and not gentle:
            small[name] = HEAD_DIM
        if name in config.sub_configs or isinstance(value, dict):
            continue
        found = _value(name, value, tokens, gentle)
        if found is not None:
            small[name] = found
    if kv_heads is not None:
        latent = own.get("kv_lora_rank") is not None
        for name in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"):
            if name in own:
                small[name] = HEADS if latent else kv_heads
    if "qk_rope_head_dim" in small and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]  # of the rotary part, in latent attention
    if not gentle:
        small.update(_layer_kinds(own, overrides))
        small.update(_rotary(config, own))
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None:
            nested = overrides.get(key, {})
            inner = _shrunk(part, nested if isinstance(nested, dict) else {}, kv_heads,
                            gentle=gentle)  # fmt: skip
            if getattr(part, "model_type", ""):
                inner.setdefault("model_type", part.model_type)
            small[key] = inner
    small.update({k: v for k, v in overrides.items() if k not in config.sub_configs})
    return small


def _value(name: str, value: Any, tokens: Any, gentle: bool) -> Any:
    """The small value of one attribute, or None to leave it alone."""
    if _NOISE.fullmatch(name) and isinstance(value, float):
        return 0.0
    if isinstance(value, bool):
        return None
    if _TOKEN.fullmatch(name):
        if isinstance(value, int) and value >= 0:
            return _SPECIAL.get(name) if name in _SPECIAL else next(tokens)
        if isinstance(value, list) and value and isinstance(value[0], int):
            return [_SPECIAL.get(name.removesuffix("s"), 2)]
        return None
    if _STD.fullmatch(name) and isinstance(value, float) and name != "initializer_factor":
        return 0.5
    if not isinstance(value, int) or value <= 0:
        return None
    if gentle:
        if not _GENTLE.fullmatch(name) or "type" in name:
            return None
        return min(value, VOCABULARY if "vocab" in name else LAYERS)
    for pattern, small in _COMPILED:
        if pattern.fullmatch(name):
            return small if small != LAYERS or value >= LAYERS else value
    for pattern, small in _COMPILED_VISION:
        if pattern.fullmatch(name):
            return min(value, small)
    return None


def _layer_kinds(own: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """One layer of every kind that the default config has."""
    changes: dict[str, Any] = {}
    kinds = own.get("layer_types")
    if isinstance(kinds, list) and kinds and isinstance(kinds[0], str):
        distinct = list(dict.fromkeys(kinds))
        if len(distinct) == 1:
            distinct = distinct * LAYERS
        changes["layer_types"] = distinct
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in own:
                changes[name] = len(distinct)
    count = overrides.get("num_hidden_layers", changes.get("num_hidden_layers", LAYERS))
    full = own.get("num_hidden_layers")
    for name, value in own.items():
        if name == "layer_types" or not isinstance(value, list) or not value:
            continue
        if isinstance(full, int) and len(value) == full and full > count:
            kept = list(dict.fromkeys(map(str, value)))
            if len(kept) == count:  # one of each kind
                by_text = {str(entry): entry for entry in value}
                changes[name] = [by_text[text] for text in kept]
            else:
                changes[name] = value[:count]
    return changes


def _rotary(config: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters that name shares of the head size: sections of positions in images."""
    parameters = own.get("rope_parameters")
    if not isinstance(parameters, dict) or not _has_sections(type(config)):
        return {}
    if any(isinstance(value, dict) for value in parameters.values()):  # one set for each kind
        return {}
    pairs = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0)) // 2
    sections = (
        [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3] if pairs > 2 else [1, pairs - 1, 0]
    )
    return {"rope_parameters": {**parameters, "mrope_section": sections}}


@functools.cache
def _has_sections(config_class: Any) -> bool:
    """Whether the models beside this config cut their rotary positions into sections."""
    folder = Path(inspect.getfile(config_class)).parent
    return any("mrope_section" in path.read_text() for path in folder.glob("modeling_*.py"))
