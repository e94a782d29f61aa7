"""The cache of ``linear``: a state in place of keys and values, in every kind of generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import running
from tiny import counted_positions, padding_mask, random_ids, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BartConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_attn_plugin import LinearConfig, configure, count_reads, redraw_features
from hf_attn_plugin.integrations import cache_layers
from hf_attn_plugin.integrations.linear_cache import LinearStateLayer
from hf_attn_plugin.ops.linear_state import attached_slot

NEW = 10
CONFIGS = {
    "elu": LinearConfig(),
    "favor": LinearConfig(feature_map="favor", num_features=12),
}
configs = pytest.mark.parametrize("parameters", CONFIGS.values(), ids=CONFIGS)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen3": {},
    "gemma3_text": {},  # one layer with a window, which stays softmax, and one without
}
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


def linear_model(family: str = "llama", parameters: LinearConfig | None = None) -> Any:
    model = tiny_model(family, "linear", **FAMILIES[family])
    configure(model, parameters or LinearConfig())
    return model


def greedy_without_cache(model: Any, ids: Tensor, mask: Tensor, steps: int = NEW) -> Tensor:
    """The whole sequence computed anew for every token."""
    for _ in range(steps):
        logits = model(
            ids, attention_mask=mask, position_ids=counted_positions(mask), use_cache=False
        ).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


def types(cache: Any) -> list[type]:
    return [type(layer) for layer in cache.layers]


@configs
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pads", [[0, 0], [0, 5]], ids=["full", "left-padded"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_generation_equals_no_cache(
    parameters: LinearConfig, family: str, pads: list[int], cache: str | None
) -> None:
    model = linear_model(family, parameters)
    ids, mask = random_ids(2, 12), padding_mask(12, pads, "left")
    with torch.no_grad():
        expected = greedy_without_cache(model, ids, mask)
    out = model.generate(
        ids,
        attention_mask=mask,
        cache_implementation=cache,
        return_dict_in_generate=True,
        **OPTIONS,
    )
    assert torch.equal(out.sequences, expected)
    layer = out.past_key_values.layers[-1]
    assert type(layer) is LinearStateLayer
    assert out.past_key_values.get_seq_length() == 12 + NEW - 1
    assert layer.keys is None and layer.values is None
    if any(pads) and family == "llama":
        unmasked = model.generate(ids, attention_mask=torch.ones_like(mask), **OPTIONS)
        assert not torch.equal(unmasked[1], out.sequences[1]), "the control: padding matters"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from a GPU only")
def test_the_offloaded_cache() -> None:
    model = linear_model().cuda()
    ids = random_ids(2, 12).cuda()
    expected = model.generate(ids, **OPTIONS)
    tried = model.generate(ids, cache_implementation="offloaded", **OPTIONS)
    assert torch.equal(tried, expected)


@configs
def test_the_cache_does_not_grow(parameters: LinearConfig) -> None:
    model = linear_model("llama", parameters)
    sizes = []
    for length in (3, 60):
        cache = model(random_ids(1, length)).past_key_values
        assert cache.get_seq_length() == length
        states = [t for layer in cache.layers for t in layer.recurrent_states.values()]
        assert all(t is not None and t.dtype == torch.float32 for t in states)
        sizes.append(sum(t.numel() for t in states if t is not None))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beams_and_returned_sequences(family: str, options: dict[str, Any]) -> None:
    model = linear_model(family)
    ids, mask = random_ids(2, 9), padding_mask(9, [0, 4], "left")
    options = {**OPTIONS, **options, "do_sample": "num_return_sequences" in options}
    results = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        results.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*results)


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_prefill_in_chunks(chunk: int) -> None:
    model = linear_model("llama", CONFIGS["favor"])
    ids, mask = random_ids(2, 13), padding_mask(13, [0, 6], "left")
    whole = model.generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **OPTIONS), whole
    )


def test_later_turns_go_on_from_the_state() -> None:
    model = linear_model()
    first = model.generate(random_ids(1, 7), return_dict_in_generate=True, **OPTIONS)
    branch = copy.deepcopy(first.past_key_values)
    for seed in (5, 6):  # the second time from the copy, which the first has not changed
        cache = first.past_key_values if seed == 5 else branch
        ids = torch.cat([first.sequences, random_ids(1, 6, seed)], 1)
        second = model.generate(ids, past_key_values=cache, **OPTIONS)
        with torch.no_grad():
            expected = greedy_without_cache(model, ids, torch.ones_like(ids))
        assert torch.equal(second, expected)


def test_rows_are_repeated_selected_and_reordered() -> None:
    model = linear_model("llama", CONFIGS["favor"])
    ids = random_ids(3, 8)
    steps = random_ids(6, 1, seed=9)
    with torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
        cache.batch_select_indices(torch.tensor([0, 3, 4]))
        rows = torch.tensor([2, 1, 0])
        logits = model(steps[:3], past_key_values=cache).logits[:, -1]
        expected = model(torch.cat([ids[rows, :-1], steps[:3]], 1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_reset_forgets() -> None:
    model = linear_model()
    cache = model(random_ids(1, 8)).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = random_ids(1, 5, seed=3)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["prompt lookup", "assistant", "is assistant", "crop"])
def test_what_takes_tokens_back_is_refused(kind: str) -> None:
    model, ids = linear_model(), random_ids(1, 9)
    other = tiny_model("llama", "sdpa", seed=1)
    with pytest.raises(ValueError, match=r"cannot be taken out.*'flash' or 'sparq'"):
        if kind == "prompt lookup":
            model.generate(ids, prompt_lookup_num_tokens=2, **OPTIONS)
        elif kind == "assistant":
            model.generate(ids, assistant_model=other, **OPTIONS)
        elif kind == "is assistant":
            other.generate(ids, assistant_model=model, **OPTIONS)
        else:
            model(ids).past_key_values.crop(-2)
    cache = model(ids).past_key_values
    cache.crop(0)
    assert cache.get_seq_length() == 9 and not cache.is_croppable


def test_the_quantized_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state of fixed size.*Use the default cache.*'flash'"):
        linear_model().generate(random_ids(1, 5), cache_implementation="quantized", **OPTIONS)


def test_keys_put_in_by_hand_are_noticed() -> None:
    model, ids = linear_model(), random_ids(1, 5)
    prefix = torch.randn(1, 2, 3, 8)
    cache = DynamicCache([(prefix, prefix)] * 2, config=model.config)
    with pytest.raises(ValueError, match=r"given 3 tokens, and attention has seen 0"):
        model(ids, past_key_values=cache)


def test_a_forward_pass_that_broke_off_is_noticed() -> None:
    model, ids = linear_model(), random_ids(1, 5)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="4D attention_mask"):
        model(ids, attention_mask=torch.ones(1, 1, 5, 10).bool(), past_key_values=cache)
    with pytest.raises(ValueError, match="start with a new cache"):
        model(ids, past_key_values=cache)


def test_features_drawn_anew_need_a_new_cache() -> None:
    model, ids = linear_model("llama", CONFIGS["favor"]), random_ids(1, 6)
    cache = model(ids).past_key_values
    before = model(ids).logits
    assert redraw_features(model) is model
    assert model.config.attn_params["linear"]["redraw"] == 1
    assert (model(ids).logits - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="Features cannot change while a state lives"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="no random features"):
        redraw_features(linear_model())


def test_caches_without_a_state_are_summed_up_every_time() -> None:
    """One made by hand without the model's config, and one made for another attention."""
    model, ids, mask = linear_model(), random_ids(2, 12), padding_mask(12, [0, 5], "left")
    expected = model.generate(ids, attention_mask=mask, **OPTIONS)
    model.set_attn_implementation("sdpa")
    static = StaticCache(model.config, max_cache_len=40)
    model.set_attn_implementation("linear")
    for cache in (DynamicCache(), static):
        tried = model.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS)
        assert LinearStateLayer not in types(cache)
        assert torch.equal(tried, expected)


def test_parameters_and_features_come_back_from_a_folder(tmp_path: Path) -> None:
    model = linear_model("llama", LinearConfig("favor", num_features=9, seed=3, redraw=2))
    model.save_pretrained(tmp_path)
    names = {"model.layers", "model.embed_tokens", "model.norm", "lm_head"}
    assert all(name.startswith(tuple(names)) for name in model.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="linear").eval()
    ids = random_ids(2, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    configure(again, LinearConfig("favor", num_features=9, seed=4, redraw=2))
    assert not torch.equal(again(ids).logits, model(ids).logits)


@configs
def test_decoding_reads_the_state_alone(parameters: LinearConfig) -> None:
    model = linear_model("llama", parameters)
    shares = []
    for length in (20, 80):
        with count_reads(model) as reads:
            model.generate(random_ids(1, length), **OPTIONS)
        features = 12 if parameters.num_features else 8
        state = 4 * 2 * (features * 9 + 1)  # bytes, KV heads, sums and scale
        new = 4 * 2 * (8 + 8)
        steps = NEW - 1
        assert reads.decode_steps == steps and reads.calls == {"linear": 2 * NEW}
        assert reads.kv_bytes_read == 2 * steps * (state + new)
        assert reads.kv_bytes_dense == 2 * sum(new * (length + 1 + i) for i in range(steps))
        shares.append(reads.ratio)
    assert shares[1] < shares[0] / 2


# -- the place in transformers -----------------------------------------------------------------


def test_caches_made_for_linear_models() -> None:
    for make in (
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config, max_cache_len=30),
    ):
        assert types(make(linear_model().config)) == [LinearStateLayer] * 2
        mixed = types(make(linear_model("gemma3_text").config))
        assert mixed[0] is not LinearStateLayer and mixed[1] is LinearStateLayer
        assert LinearStateLayer not in types(make(tiny_model("llama", "flash").config))
    windows = types(DynamicCache(config=tiny_model("mistral", "linear").config))
    assert windows == [DynamicSlidingWindowLayer] * 2


def test_models_that_come_back_to_cached_keys_keep_them() -> None:
    config = BartConfig(d_model=32, encoder_layers=1, decoder_layers=1)
    config._attn_implementation = "linear"
    assert types(DynamicCache(config=config)) == [DynamicLayer]


def test_the_slot_leads_back_to_nothing() -> None:
    cache = DynamicCache(config=linear_model().config)
    key = torch.zeros(1, 2, 3, 8)
    returned, _ = cache.update(key, key, 0)
    found = attached_slot(returned)
    assert found is not None and found == (cache.layers[0].slot, 0)
    assert set(vars(found[0])) == {"tensors", "feature_map", "tokens"}
    assert found[0].tensors is cache.layers[0].recurrent_states
    assert attached_slot(key * 1) is None


def test_a_cache_made_before_uninstalling_goes_on(registries: None) -> None:
    model = linear_model()
    old = model(random_ids(1, 4)).past_key_values
    cache_layers.uninstall()
    assert types(DynamicCache(config=model.config)) == [DynamicLayer] * 2
    assert types(old) == [LinearStateLayer] * 2
    model(random_ids(1, 2), past_key_values=old)
    assert old.get_seq_length() == 6


def test_layers_that_attend_twice_with_one_set_of_keys_are_refused() -> None:
    eager = running.eager_model("diffllama")
    model = running.build(type(eager), eager.config, "linear")
    ids = random_ids(1, 8)
    with pytest.raises(ValueError, match=r"attends more than once.*use_cache=False"):
        model(ids)
    model(ids, use_cache=False)
