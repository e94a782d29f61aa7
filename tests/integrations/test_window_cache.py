"""The bounded cache of ``sliding_window`` and ``longformer`` against the one that keeps all."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from tiny import (
    DECODERS,
    VOCABULARY,
    additive,
    padding_mask,
    pairs,
    random_ids,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hf_attn_plugin
from hf_attn_plugin import LongformerConfig, SlidingWindowConfig
from hf_attn_plugin.integrations import window_cache
from hf_attn_plugin.integrations.window_cache import WindowLayer
from hf_attn_plugin.methods import window_cache as method
from hf_attn_plugin.ops.window_state import kept_keys

PARAMETERS = {
    "window": SlidingWindowConfig(window=5),
    "sinks": SlidingWindowConfig(window=4, num_sink_tokens=3),
    "longformer": LongformerConfig(window=4, num_global_tokens=2),
    "dilated": LongformerConfig(window=3, num_global_tokens=2, dilation=2),
    "one": SlidingWindowConfig(window=1, num_sink_tokens=1),
}
PROMPT, NEW = 14, 20
PADS = [0, 9, 3]


def make(family: str, parameters: Any) -> Any:
    return hf_attn_plugin.configure(tiny_model(family, parameters.name), parameters)


def prompts(pads: list[int] = PADS, length: int = PROMPT) -> dict[str, Tensor]:
    mask = padding_mask(length, pads, "left")
    return {"input_ids": random_ids(len(pads), length) * mask, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], full: bool, **kwargs: Any) -> Any:
    """Greedy by default; ``full`` with a cache that keeps all."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **kwargs}
    settings.setdefault(
        "past_key_values", DynamicCache() if full else DynamicCache(config=model.config)
    )
    return model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)


def equal(bounded: Any, full: Any) -> None:
    assert bounded.sequences.tolist() == full.sequences.tolist()
    torch.testing.assert_close(
        torch.stack(bounded.logits), torch.stack(full.logits), atol=2e-4, rtol=1e-4
    )


def layers(answer: Any) -> list[WindowLayer]:
    found = [la for la in answer.past_key_values.layers if isinstance(la, WindowLayer)]
    assert found
    return found


def held_bytes(cache: Any) -> int:
    """Memory that the cache keeps alive, whatever the views show."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


FULL_FAMILIES = [family for family in DECODERS if family != "mistral"]


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize("family", FULL_FAMILIES)
def test_padded_batches_equal_the_full_cache(family: str, parameters: Any) -> None:
    model = make(family, parameters)
    bounded, full = (generate(model, prompts(), full) for full in (False, True))
    equal(bounded, full)
    reach = parameters.window + (parameters.window - 1) * (getattr(parameters, "dilation", 1) - 1)
    first = getattr(parameters, "num_sink_tokens", getattr(parameters, "num_global_tokens", 0))
    for layer in layers(bounded):
        assert layer.keys.shape[2] == layer.values.shape[2] == reach - 1 + first
        assert layer.get_seq_length() == PROMPT + NEW - 1


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 5, "num_beams": 2},
    ],
    ids=["beams", "chunks", "chunks and beams"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beams_and_prefill_in_chunks(
    family: str, settings: dict[str, Any], parameters: Any
) -> None:
    model = make(family, parameters)
    equal(*(generate(model, prompts(), full, **settings) for full in (False, True)))


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_turns_of_a_conversation(family: str, parameters: Any) -> None:
    """Padding between the turns too, so that positions and ranks part."""
    model = make(family, parameters)
    answers = []
    for full in (False, True):
        inputs = prompts()
        first = generate(model, inputs, full, max_new_tokens=6, min_new_tokens=6)
        second = {
            "input_ids": torch.cat([first.sequences, random_ids(3, 7, seed=9)], 1),
            "attention_mask": torch.cat(
                [inputs["attention_mask"], torch.ones(3, 6), padding_mask(7, [0, 3, 5], "left")], 1
            ).long(),
        }
        answers.append(generate(model, second, full, past_key_values=first.past_key_values))
    equal(*answers)


def test_memory_is_bounded() -> None:
    parameters = SlidingWindowConfig(window=6, num_sink_tokens=2)
    model = make("llama", parameters)
    cache = DynamicCache(config=model.config)
    sizes = {}
    ids = random_ids(2, 6 * 20)
    with torch.no_grad():
        for position in range(ids.shape[1]):
            model(ids[:, position : position + 1], past_key_values=cache)
            sizes[position + 1] = held_bytes(cache)
    entry = 2 * 2 * 2 * 8 * 4  # keys and values, 2 rows, 2 KV heads, head_dim 8, float32
    assert sizes[6 * 3] == sizes[6 * 20] == 2 * entry * (2 + 6 - 1)
    full = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=full)
    assert held_bytes(full) == 2 * entry * 6 * 20


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_a_long_prompt_is_dropped_at_once(name: str) -> None:
    model = make("llama", PARAMETERS[name])
    with torch.no_grad():
        cache = model(random_ids(2, 100)).past_key_values
        one = held_bytes(cache)
        assert (
            one
            < held_bytes(generate(model, {"input_ids": random_ids(2, 100)}, True).past_key_values)
            / 10
        )
        for token in random_ids(2, 3, seed=4).split(1, 1):
            model(token, past_key_values=cache)
    assert held_bytes(cache) <= one * 2


@pytest.mark.parametrize("name", ["sinks", "longformer"])
def test_the_first_tokens_are_the_rows_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept without regard to padding, others would be attended to."""
    model = make("llama", PARAMETERS[name])
    right = generate(model, prompts(), False)
    places = layers(right)[0]._store.firsts
    count = places.shape[1]
    assert places.tolist() == [[pad + i for i in range(count)] for pad in PADS]
    original = method._first_tokens

    def blind(call: Any, *args: Any) -> Any:
        first = original(call, *args)
        here = torch.arange(count).expand_as(first.columns)
        return type(first)(here, here, True)

    monkeypatch.setattr(method, "_first_tokens", blind)
    wrong = generate(model, prompts(), False)
    assert (torch.stack(wrong.logits) - torch.stack(right.logits)).abs().max() > 0.05


@pytest.mark.parametrize("pads", [[0, 0], [0, 5]])
def test_dense_is_counted_as_if_all_were_kept(pads: list[int]) -> None:
    parameters = SlidingWindowConfig(window=4, num_sink_tokens=2)
    model = make("llama", parameters)
    with hf_attn_plugin.count_reads(model) as reads:
        generate(model, prompts(pads), False)
    entry = 2 * 2 * 2 * 8 * 4
    steps = range(PROMPT + 1, PROMPT + NEW)
    assert reads.kv_bytes_dense == 2 * entry * sum(steps)
    assert reads.kv_bytes_read == 2 * entry * len(steps) * 6


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_assisted_decoding_takes_tokens_back(parameters: Any) -> None:
    model = make("llama", parameters)
    inputs = {"input_ids": random_ids(1, 4).repeat(1, 5)}
    plain = generate(model, inputs, True)
    guessed = generate(model, inputs, False, prompt_lookup_num_tokens=3)
    assert guessed.sequences.tolist() == plain.sequences.tolist()
    assistant = make("llama", parameters)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += torch.randn_like(parameter) * 0.02
    helped = generate(model, inputs, False, assistant_model=assistant)
    assert helped.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_crop(name: str) -> None:
    model = make("llama", PARAMETERS[name])
    ids, other = random_ids(2, 30), random_ids(2, 6, seed=8)

    def go(cache: Any, record: bool) -> Tensor:
        with torch.no_grad():
            model(ids, past_key_values=cache)
            if record:
                cache.activate_past_recording()
            model(other, past_key_values=cache)
            cache.crop(-4)
            assert cache.get_seq_length() == 32
            return model(other, past_key_values=cache).logits

    wanted = go(DynamicCache(), False)
    found = go(DynamicCache(config=model.config), True)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="last 4 tokens cannot be taken back"):
        go(DynamicCache(config=model.config), False)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)  # within the window nothing is dropped
        cache.crop(-3)
        found = model(other, past_key_values=cache).logits
        wanted = model(torch.cat([ids[:, :1], other], 1)).logits[:, 1:]
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="takes the negative number"):
        cache.crop(3)


def test_a_cache_can_be_copied_and_pickled() -> None:
    model = make("llama", PARAMETERS["sinks"])
    with torch.no_grad():
        cache = model(random_ids(2, 30)).past_key_values
        buffer = io.BytesIO()
        torch.save(cache, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(cache), torch.load(buffer, weights_only=False)]
        next_ids = random_ids(2, 3, seed=6)
        wanted = model(next_ids, past_key_values=cache).logits
        for other in copies:
            found = model(next_ids, past_key_values=other).logits
            torch.testing.assert_close(found, wanted, atol=0, rtol=0)
        cache.reset()
        again = model(random_ids(2, 30), past_key_values=cache).logits
        torch.testing.assert_close(again, model(random_ids(2, 30)).logits, atol=1e-5, rtol=1e-5)


def test_rows_are_repeated_and_selected() -> None:
    model = make("llama", PARAMETERS["sinks"])
    inputs, token = prompts(), random_ids(2, 1, seed=5)
    rows = torch.tensor([2, 1])

    def go(cache: Any) -> Tensor:
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(rows * 2)
            mask = torch.cat([inputs["attention_mask"][rows], torch.ones(2, 1)], 1).long()
            return model(token, attention_mask=mask, past_key_values=cache).logits

    wanted, found = go(DynamicCache()), go(DynamicCache(config=model.config))
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_gradients_flow_through_the_cache() -> None:
    model = make("llama", PARAMETERS["sinks"])
    gradients = []
    for full in (False, True):
        model.zero_grad()
        cache = DynamicCache() if full else DynamicCache(config=model.config)
        model(random_ids(2, 20), past_key_values=cache)
        model(random_ids(2, 4, seed=3), past_key_values=cache).logits.sin().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)
        assert wanted.any()


def test_a_callers_own_mask_covers_all_tokens() -> None:
    model = make("llama", PARAMETERS["window"])
    ids = random_ids(1, 24)
    hole = pairs(1, 24, lambda q, k: k <= q and k != 20)
    answers = []
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            mask = additive(hole)[:, :, 20:]
            answers.append(model(ids[:, 20:], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*answers, atol=2e-4, rtol=1e-4)


def test_tokens_named_global_are_kept() -> None:
    model = make("llama", PARAMETERS["longformer"])
    ids = random_ids(1, 24)
    named = torch.zeros(1, 24).index_fill(1, torch.tensor([7]), 1)
    answers = []
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache, global_attention_mask=named[:, :20])
            step = model(ids[:, 20:], past_key_values=cache, global_attention_mask=named)
            answers.append(step.logits)
    torch.testing.assert_close(*answers, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        cache = model(ids[:, :20]).past_key_values
        with pytest.raises(ValueError, match=r"global_attention_mask"):
            model(ids[:, 20:], past_key_values=cache, global_attention_mask=named)


def test_a_wider_window_or_another_attention_is_refused() -> None:
    model = make("llama", SlidingWindowConfig(window=5, num_sink_tokens=1))
    token = random_ids(1, 1)
    with torch.no_grad():
        cache = model(random_ids(1, 20)).past_key_values
        hf_attn_plugin.configure(model, SlidingWindowConfig(window=6, num_sink_tokens=1))
        with pytest.raises(ValueError, match="filled under a window of 5 keys and 1 first"):
            model(token, past_key_values=copy.deepcopy(cache))
        hf_attn_plugin.configure(model, SlidingWindowConfig(window=4, num_sink_tokens=2))
        with pytest.raises(ValueError, match="now 4 and 2 are wanted"):
            model(token, past_key_values=copy.deepcopy(cache))
        for name in ("sdpa", "flash", "sparq"):
            model.set_attn_implementation(name)
            with pytest.raises(ValueError, match=f"{name!r} cannot go on with a cache"):
                model(token, past_key_values=cache)
        short = DynamicCache(config=model.config)
        model(token, past_key_values=short)


def test_narrower_windows_go_on() -> None:
    ids = random_ids(2, 40)
    wide = SlidingWindowConfig(window=8, num_sink_tokens=3)
    narrow = SlidingWindowConfig(window=5, num_sink_tokens=1)
    answers = []
    for full in (False, True):
        model = make("llama", wide)
        cache = DynamicCache() if full else DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            hf_attn_plugin.configure(model, narrow)
            steps = [model(part, past_key_values=cache).logits for part in ids[:, 20:].split(4, 1)]
        answers.append(torch.cat(steps, 1))
    torch.testing.assert_close(*answers, atol=2e-4, rtol=1e-4)


def test_packed_prefill_keeps_all() -> None:
    """So that it can be cropped to its first document, which then goes on."""
    model = make("llama", PARAMETERS["sinks"])
    positions = torch.tensor([[*range(6), *range(14)]])
    answers = []
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        with torch.no_grad():
            model(random_ids(1, 20), position_ids=positions, past_key_values=cache)
            cache.crop(-14)
            answers.append(model(random_ids(1, 1, seed=2), past_key_values=cache).logits)
    torch.testing.assert_close(*answers, atol=2e-4, rtol=1e-4)


def test_latent_attention_keeps_all() -> None:
    """Multi-head latent attention makes its keys after the cache, which then knows nothing."""
    config = tiny_config(
        "deepseek_v3",
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        moe_intermediate_size=16,
        num_key_value_heads=4,
    )
    from tiny import from_config

    torch.manual_seed(0)
    model = from_config(config, "sliding_window")
    hf_attn_plugin.configure(model, PARAMETERS["sinks"])
    bounded, full = (generate(model, prompts(), full) for full in (False, True))
    equal(bounded, full)


def test_only_full_layers_of_dynamic_caches_change() -> None:
    llama = tiny_model("llama", "sliding_window").config
    mixed = tiny_model("gemma3_text", "longformer").config

    def types(cache: Any) -> list[type]:
        return [type(layer) for layer in cache.layers]

    assert types(DynamicCache(config=llama)) == [WindowLayer] * 2
    assert types(DynamicCache(config=mixed)) == [DynamicSlidingWindowLayer, WindowLayer]
    assert types(DynamicCache(config=tiny_model("llama", "strided").config)) == [DynamicLayer] * 2
    assert types(DynamicCache(config=tiny_model("llama", "sdpa").config)) == [DynamicLayer] * 2
    assert DynamicCache().layers == []
    assert not any(
        isinstance(la, WindowLayer) for la in StaticCache(config=llama, max_cache_len=8).layers
    )
    # What quantized caches ask for.
    assert set(cache_utils.get_layer_types_and_kwargs(llama)[0]) == {"full_attention"}


def test_install_is_undone(registries: None) -> None:
    config = tiny_model("llama", "sliding_window").config
    window_cache.install()
    wrapped = DynamicCache.__init__
    try:
        window_cache.uninstall()
        assert type(DynamicCache(config=config).layers[0]) is DynamicLayer
        window_cache.uninstall()
    finally:
        window_cache.install()
    assert type(DynamicCache(config=config).layers[0]) is WindowLayer
    assert DynamicCache.__init__ is not wrapped  # made anew, around the same original
    window_cache.install()
    assert type(DynamicCache(config=config).layers[0]) is WindowLayer


def test_what_is_relied_on_upstream() -> None:
    """Fails when transformers changes it."""
    parameters = list(inspect.signature(DynamicCache.__init__).parameters)
    assert parameters[:3] == ["self", "ddp_cache_data", "config"]
    layer = DynamicLayer()
    assert (layer.keys, layer.is_initialized, layer.is_sliding) == (None, False, False)
    model = tiny_model("llama", "sliding_window")
    hf_attn_plugin.configure(model, PARAMETERS["sinks"])
    seen = []

    def spy(module: Any, query: Any, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(kept_keys(key))
        return original(module, query, key, *args, **kwargs)

    from transformers import AttentionInterface

    original = AttentionInterface._global_mapping["sliding_window"]
    AttentionInterface.register("sliding_window", spy)
    try:
        with torch.no_grad():
            model(torch.full((1, 12), VOCABULARY - 1))
    finally:
        AttentionInterface.register("sliding_window", original)
    assert [kept.seen for kept in seen] == [12, 12], "the keys do not reach the attention"
