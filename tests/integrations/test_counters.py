"""What `count_reads` says was read, against what must have been read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import LENGTH, WINDOW, padding_mask, random_ids, tiny_model
from transformers import StaticCache

import hf_attn_plugin
from hf_attn_plugin import LongformerConfig, SlidingWindowConfig, SparQConfig, StridedConfig

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


def test_a_models_own_window_bounds_dense_too() -> None:
    reads = decode(tiny_model("mistral", "flash"))
    assert reads.kv_bytes_dense == LAYERS * ENTRY * WINDOW * (NEW - 1)


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
