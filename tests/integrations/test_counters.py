"""What `count_reads` says was read, against what must have been read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import LENGTH, WINDOW, padding_mask, random_ids, tiny_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)

import hf_attn_plugin
from hf_attn_plugin import (
    ExactTopKConfig,
    FlashConfig,
    LMInfiniteConfig,
    LongformerConfig,
    SlidingWindowConfig,
    SparQConfig,
    StridedConfig,
    kv_cache_bytes,
)

PROMPT, NEW, LAYERS = 12, 6, 2
ENTRY = 2 * 2 * 8 * 4  # bytes of one token: keys and values, 2 KV heads, head_dim 8, float32


def decode(model: Any, batch: int = 1, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with hf_attn_plugin.count_reads(model) as reads:
        model.generate(random_ids(batch, PROMPT), **settings, **kwargs)
    return reads


def steps() -> range:
    """Keys in the cache at each decoding step."""
    return range(PROMPT + 1, PROMPT + NEW)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_decoding_reads_the_whole_cache(name: str, batch: int) -> None:
    reads = decode(tiny_model("llama", name), batch)
    assert reads.calls == {name: NEW * LAYERS}
    assert reads.decode_steps == NEW - 1
    assert reads.decode_calls == (NEW - 1) * LAYERS
    assert reads.kv_bytes_dense == reads.kv_bytes_read == batch * LAYERS * ENTRY * sum(steps())
    assert reads.ratio == 1.0


def in_window(length: int, parameters: Any) -> int:
    query = length - 1
    if isinstance(parameters, SlidingWindowConfig):
        sinks, window = parameters.num_sink_tokens, parameters.window
        return sum(query - k < window or k < sinks for k in range(length))
    if isinstance(parameters, LongformerConfig):
        return sum(
            (
                (query - k) % parameters.dilation == 0
                and query - k < parameters.window * parameters.dilation
            )
            or k < parameters.num_global_tokens
            for k in range(length)
        )
    return sum(
        query - k < parameters.window or (query - k) % parameters.stride == 0 for k in range(length)
    )


@pytest.mark.parametrize(
    "parameters",
    [
        SlidingWindowConfig(window=4),
        SlidingWindowConfig(window=3, num_sink_tokens=2),
        LongformerConfig(window=3, num_global_tokens=1, dilation=2),
        StridedConfig(window=2, stride=5),
    ],
    ids=str,
)
def test_sparse_decoding_reads_the_keys_seen(parameters: Any) -> None:
    model = hf_attn_plugin.configure(tiny_model("llama", parameters.name), parameters)
    reads = decode(model)
    seen = sum(in_window(length, parameters) for length in steps())
    assert reads.kv_bytes_read == LAYERS * ENTRY * seen
    assert reads.kv_bytes_dense == LAYERS * ENTRY * sum(steps())
    assert reads.ratio == pytest.approx(seen / sum(steps()))


def test_sparq_reads_less_than_dense() -> None:
    model = hf_attn_plugin.configure(
        tiny_model("llama", "sparq"), SparQConfig(rank=2, top_k=4, local_window=1)
    )
    reads = decode(model)
    # Every step: 2 of 8 components of all keys per KV head, then 4 keys and values.
    wanted = sum(2 * 2 * 4 * length + ENTRY * 4 for length in steps())
    assert reads.kv_bytes_read == LAYERS * wanted
    assert reads.kv_bytes_dense == LAYERS * ENTRY * sum(steps())


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash"])
def test_a_models_own_window_bounds_dense_too(name: str) -> None:
    reads = decode(tiny_model("mistral", name))
    assert reads.kv_bytes_read == reads.kv_bytes_dense == LAYERS * ENTRY * WINDOW * (NEW - 1)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash"])
def test_a_prompt_of_one_token_is_no_decoding_step(name: str) -> None:
    model = tiny_model("llama", name)
    with hf_attn_plugin.count_reads(model) as reads:
        model.generate(random_ids(1, 1), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert reads.calls == {name: 3 * LAYERS}
    assert (reads.decode_steps, reads.decode_calls) == (2, 2 * LAYERS)
    assert reads.kv_bytes_dense == LAYERS * ENTRY * (2 + 3)


def tiny_bart(name: str) -> Any:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
        decoder_ffn_dim=32, max_position_embeddings=64, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration._from_config(config, attn_implementation=name).eval()


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash"])
def test_encoder_decoders_read_both_caches(name: str) -> None:
    reads = decode(tiny_bart(name))
    entry = 2 * 4 * 8 * 4
    # The first token is a decoding step for cross-attention alone, which reads the whole prompt.
    own, cross = sum(range(2, NEW + 1)), PROMPT * NEW
    assert reads.calls == {name: (1 + 2 * NEW) * LAYERS}
    assert reads.decode_calls == (NEW - 1 + NEW) * LAYERS
    assert reads.kv_bytes_read == reads.kv_bytes_dense == LAYERS * entry * (own + cross)


def test_an_encoder_decoders_cache_is_measured() -> None:
    assert kv_cache_bytes(EncoderDecoderCache(DynamicCache(), DynamicCache()))["total"] == 0
    output = tiny_bart("flash").generate(
        random_ids(1, PROMPT), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    sizes = kv_cache_bytes(output.past_key_values)
    half = LAYERS * 4 * 8 * 4 * (PROMPT + NEW)
    assert sizes == {
        "keys": half, "values": half, "key_copy": 0, "value_sums": 0, "total": 2 * half,
    }  # fmt: skip


def test_what_is_no_cache_is_not_measured() -> None:
    with pytest.raises(ValueError, match=r"got NoneType.*return_dict_in_generate=True"):
        kv_cache_bytes(None)


LATENT, ROPE = 16, 8


def deepseek(name: str) -> Any:
    return tiny_model(
        "deepseek_v3", name, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=LATENT,
        qk_nope_head_dim=8, qk_rope_head_dim=ROPE, v_head_dim=8, first_k_dense_replace=LAYERS,
    )  # fmt: skip


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        FlashConfig(),
        SparQConfig(rank=2, top_k=4, local_window=1),
        ExactTopKConfig(top_k=4),
        LMInfiniteConfig(window=3, num_sink_tokens=1),
        SlidingWindowConfig(window=3),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:sparq. DeepseekV3Attention decodes from a cache")
def test_of_latents_every_method_reads_all(parameters: Any) -> None:
    """Keys and values are made from all of them before a method can choose."""
    model = deepseek("sdpa" if parameters is None else parameters.name)
    if parameters is not None:
        hf_attn_plugin.configure(model, parameters)
    reads = decode(model)
    assert sum(reads.calls.values()) == NEW * LAYERS
    assert reads.decode_calls == (NEW - 1) * LAYERS
    assert reads.kv_bytes_dense == LAYERS * (LATENT + ROPE) * 4 * sum(steps())
    assert reads.kv_bytes_read == reads.kv_bytes_dense


@pytest.mark.parametrize("name", ["sdpa", "flash"])
def test_recurrent_layers_are_no_attention_calls(name: str) -> None:
    model = tiny_model(
        "jamba", name, num_key_value_heads=2, num_experts=1, attn_layer_offset=1,
        attn_layer_period=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    reads = decode(model)
    assert reads.calls == {name: NEW}
    assert reads.decode_calls == NEW - 1


def test_training_reads_no_cache() -> None:
    model = tiny_model("llama", "flash")
    with hf_attn_plugin.count_reads(model) as reads:
        model(random_ids(2, LENGTH), attention_mask=padding_mask(LENGTH, [0, 3], "left"))
    assert reads.calls == {"flash": LAYERS}
    assert (reads.decode_steps, reads.kv_bytes_read, reads.kv_bytes_dense) == (0, 0, 0)
    assert reads.ratio is None


def test_models_do_not_share_a_counter() -> None:
    one, other = tiny_model("llama", "flash"), tiny_model("llama", "sparq")
    with (
        hf_attn_plugin.count_reads(one) as first,
        hf_attn_plugin.count_reads(other) as second,
    ):
        one(random_ids(1, 4))
        other(random_ids(1, 4))
        one(random_ids(1, 4))
    assert first.calls == {"flash": 2 * LAYERS}
    assert second.calls == {"sparq": LAYERS}


def test_nothing_is_left_behind_after_an_error() -> None:
    model = tiny_model("llama", "flash")
    model(random_ids(1, 4))  # upstream installs hooks of its own at the first call
    before = [set(vars(m)) for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError, match="ours"), hf_attn_plugin.count_reads(model):
        model(random_ids(1, 4))
        raise RuntimeError("ours")
    assert [set(vars(m)) for m in model.modules()] == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_the_counter_stays_readable_and_still() -> None:
    model = tiny_model("llama", "flash")
    with hf_attn_plugin.count_reads(model) as reads:
        model(random_ids(1, 4))
    model(random_ids(1, 4))
    assert reads.calls == {"flash": LAYERS}


def test_static_caches_count_what_they_hold() -> None:
    model = tiny_model("llama", "flash")
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = random_ids(1, 5)
    with torch.no_grad(), hf_attn_plugin.count_reads(model) as reads:
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert reads.decode_steps == 1
    assert reads.kv_bytes_dense == LAYERS * ENTRY * 32


def test_counting_twice_at_once_is_refused() -> None:
    model = tiny_model("llama", "flash")
    with (
        hf_attn_plugin.count_reads(model) as reads,
        pytest.raises(ValueError, match="counted already"),
        hf_attn_plugin.count_reads(model),
    ):
        pass
    with hf_attn_plugin.count_reads(model) as again:
        model(random_ids(1, LENGTH))
    assert (reads.calls["flash"], again.calls["flash"]) == (0, 2)


def test_layers_that_keep_both_kinds_are_named() -> None:
    """Attention and a recurrent state side by side: no layer of ours takes their place."""

    def falcon(name: str) -> Any:
        return tiny_model(
            "falcon_h1", name, num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4,
            mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=4,
        )  # fmt: skip

    with pytest.warns(UserWarning, match="keys and a recurrent state together"):
        reads = decode(falcon("sparq"))
    assert reads.calls == {"sparq": NEW * LAYERS}
    assert decode(falcon("sdpa")).calls == {"sdpa": NEW * LAYERS}
    with pytest.raises(ValueError, match=r"keys and a recurrent state together.*'sparq'"):
        decode(falcon("h2o"))
