"""Quantised and missing copies of the keys in ``sparq``'s cache layers, dynamic and static."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers.modeling_utils  # noqa: F401  the package registers when this is imported
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedCache,
    StaticLayer,
)

from hf_attn_plugin import SparQConfig, configure
from hf_attn_plugin.integrations import quantized_cache
from hf_attn_plugin.integrations.cache_bytes import kv_cache_bytes
from hf_attn_plugin.integrations.sparq_cache import SparQLayer
from hf_attn_plugin.integrations.sparq_static_cache import SparQStaticLayer
from hf_attn_plugin.ops.sparq.key_copy import BITS
from hf_attn_plugin.ops.sparq.state import sparq_state
from tests.ops.sparq_reference import quantized_copy, rows_of

B, HKV, D, DV, GROUP, ROOM = 3, 2, 4, 6, 8, 61
KINDS = ["full", "int8", "int4", "none"]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr("hf_attn_plugin.ops.sparq.key_copy.GROUP", GROUP)
    monkeypatch.setattr(SparQLayer, "MIN_HEADROOM", 3)


def chunk(length, seed=0, batch=B):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, HKV, length, D, generator=generator, dtype=torch.float64)
    return keys, torch.randn(batch, HKV, length, DV, generator=generator, dtype=torch.float64)


def make(kind, static):
    if static:
        return SparQStaticLayer(kind, ROOM), StaticLayer(ROOM)
    return SparQLayer(kind), DynamicLayer()


def step(ours, plain, length, seed):
    states = chunk(length, seed, batch=B if plain.keys is None else plain.keys.shape[0])
    with torch.no_grad():
        expected, found = plain.update(*states), ours.update(*states)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    check(ours, plain)


def check(ours, plain):
    """The copy is what the slow reference makes of the plain layer's keys."""
    state, filled = sparq_state(ours.keys), int(plain.get_seq_length())
    assert state.key_copy == ours.key_copy
    if ours.key_copy == "none":
        assert state.components is None
        return
    expected = plain.keys
    if ours.key_copy in BITS:
        expected = quantized_copy(expected, BITS[ours.key_copy], GROUP, filled)
    everything = torch.arange(D).expand(plain.keys.shape[0], HKV, D)
    rows, _ = rows_of(state.components, everything)
    assert rows.shape[-1] == plain.keys.shape[2]
    torch.testing.assert_close(
        rows[..., :filled], expected.transpose(2, 3)[..., :filled], rtol=1e-12, atol=1e-12
    )


LENGTHS = {
    "one by one": [1] * 20,
    "whole groups": [8, 16, 8],
    "across groups": [7, 2, 13, 1, 1, 6, 10],
    "a long prompt": [50] + [1] * 7,
    "full to the last place": [48, 12, 1],
}


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_copy_follows_the_keys(lengths, kind, static):
    ours, plain = make(kind, static)
    for i, length in enumerate(lengths):
        step(ours, plain, length, seed=i)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_beams_and_reset(kind, static):
    ours, plain = make(kind, static)
    beams = torch.tensor([2, 0, 0])
    ours.reorder_cache(beams)  # before anything is there
    step(ours, plain, 11, seed=0)
    for i, order in enumerate((beams, beams.flip(0))):
        for layer in (ours, plain):
            layer.reorder_cache(order)
        check(ours, plain)
        step(ours, plain, 3, seed=1 + i)
    ours.reset()
    plain = make(kind, static)[1]  # transformers 5.17 resets dynamic layers to zeros, not to empty
    for i, length in enumerate((4, 9, 1)):
        step(ours, plain, length, seed=7 + i)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_the_batch_and_crops(kind):
    ours, plain = make(kind, static=False)
    step(ours, plain, 13, seed=0)
    for i, (name, argument) in enumerate(
        [
            ("batch_repeat_interleave", 2),
            ("crop", -2),
            ("batch_select_indices", torch.tensor([4, 0, 3])),
            ("crop", -9),
            ("crop", 0),
        ]
    ):
        for layer in (ours, plain):
            getattr(layer, name)(argument)
        if name == "crop" and argument:
            assert sparq_state(ours.keys) is None  # until the next update
        step(ours, plain, 1 + 5 * i, seed=1 + i)
        step(ours, plain, 1, seed=20 + i)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_handed_out_never_changes(kind):
    ours, plain = make(kind, static=False)
    kept = []
    everything = torch.arange(D).expand(B, HKV, D)
    for i in range(30):
        if i % 7 == 6:
            for layer in (ours, plain):
                layer.crop(-2)
        step(ours, plain, 1 + i % 3, seed=i)
        components = sparq_state(ours.keys).components
        if components is not None:
            kept.append((components, rows_of(components, everything)[0].clone()))
    for components, rows in kept:
        torch.testing.assert_close(rows_of(components, everything)[0], rows, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_no_new_buffers(kind):
    """Buffers grow by a quarter, so that 300 tokens move them a few times only."""
    layer = SparQLayer(kind)
    addresses = set()
    with torch.no_grad():
        layer.update(*chunk(100))
        for i in range(300):
            layer.update(*chunk(1, seed=i))
            buffers = layer._buffers
            tensors = [buffers.keys, buffers.values]
            if kind == "full":
                tensors.append(buffers.copy.keys_t)
            elif kind != "none":
                tensors += [buffers.copy.codes, buffers.copy.scale]
            addresses.add(tuple(t.data_ptr() for t in tensors))
    assert len(addresses) <= 8


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_offloading_takes_the_copy_along(kind, static):
    """Without a second device: "meta" stands in for the one that computes."""
    ours, plain = make(kind, static)
    ours.offload()
    ours.prefetch()
    step(ours, plain, 19, seed=0)
    ours.offload()
    check(ours, plain)
    ours.prefetch()
    step(ours, plain, 2, seed=1)
    ours.device = torch.device("meta")
    ours.prefetch()
    assert ours.keys.device.type == "meta"
    components = sparq_state(ours.keys).components
    if kind == "full":
        assert components.keys_t.device.type == "meta"
    elif kind != "none":
        parts = (components.codes, components.scale, components.offset, components.tail)
        assert {part.device.type for part in parts} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_cache_and_files(kind):
    ours, plain = make(kind, static=False)
    step(ours, plain, 13, seed=0)
    file = io.BytesIO()
    torch.save(Cache(layers=[ours]), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False).layers[0]
    twin, plain_twin = copy.deepcopy(ours), copy.deepcopy(plain)
    for seed, (layer, reference) in enumerate(((ours, plain), (twin, plain_twin))):
        step(layer, reference, 9, seed=40 + seed)
    step(loaded, filled_again(), 4, seed=50)


def filled_again():
    plain = DynamicLayer()
    plain.update(*chunk(13, seed=0))
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_and_out_of_it(kind):
    ours, plain = make(kind, static=False)
    for i, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode)):
        with mode():
            step(ours, plain, 11, seed=2 * i)
            step(ours, plain, 1, seed=2 * i + 1)


def tiny(parameters):
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=HKV, num_hidden_layers=2,
        head_dim=D, vocab_size=11,
    )  # fmt: skip
    config._attn_implementation = "sparq"
    return configure(config, parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_models_get_the_layers_of_their_parameters(kind):
    config = tiny(SparQConfig(key_copy=kind))
    for cache in (DynamicCache(config=config), StaticCache(config, max_cache_len=9)):
        assert {layer.key_copy for layer in cache.layers} == {kind}


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_bytes_of_a_cache_are_those_of_its_tensors(static):
    sizes = {}
    for kind in KINDS:
        config = tiny(SparQConfig(key_copy=kind))
        cache = StaticCache(config, max_cache_len=64) if static else DynamicCache(config=config)
        assert kv_cache_bytes(cache)["total"] == 0
        with torch.no_grad():
            for layer in range(2):
                keys, values = cache.update(*(t.bfloat16() for t in chunk(50)), layer)
                sparq_state(keys).sums.update(values, None, 5)
        sizes[kind] = kv_cache_bytes(cache)
    room = 64 if static else 50 + 50 // 4
    keys = 2 * B * HKV * room * D * 2
    groups = (room + GROUP - 1) // GROUP + 1 if static else room // GROUP
    tails = 2 * B * HKV * D * GROUP * 2
    positions = 2 * 8 if static else 0  # where each layer's tail is
    per_group = 2 * B * HKV * D * groups
    copies = {
        "full": keys,
        "int8": per_group * (GROUP + 4) + tails + positions,
        "int4": per_group * (GROUP // 2 + 4) + tails + positions,
        "none": 0,
    }
    blocks = -(-room // 5) if static else 10
    sums = 2 * B * (HKV * blocks * DV * 4 + blocks * 8)
    for kind, found in sizes.items():
        assert found["keys"] == keys
        assert found["values"] == keys * DV // D
        assert found["key_copy"] == copies[kind]
        assert found["value_sums"] == sums
        assert found["total"] == sum(size for name, size in found.items() if name != "total")


def test_bytes_of_transformers_own_caches():
    cache = Cache(layers=[DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)])
    for layer in range(2):
        cache.update(*chunk(10), layer)
    found = kv_cache_bytes(cache)
    assert found["keys"] == B * HKV * (10 + 3) * D * 8
    assert found["values"] == B * HKV * (10 + 3) * DV * 8
    assert found["key_copy"] == found["value_sums"] == 0


def test_the_refusal_of_quantized_caches_is_undone_and_others_pass(registries):
    def attempt(attn):
        config = tiny(SparQConfig())
        config._attn_implementation = attn
        try:
            QuantizedCache("no such backend", config)
        except ValueError as error:
            return str(error)

    quantized_cache.install()
    quantized_cache.install()
    assert "key_copy='int8'" in attempt("sparq")
    assert "no such backend" in attempt("sdpa")
    quantized_cache.uninstall()
    try:
        assert "key_copy" not in attempt("sparq")
    finally:
        quantized_cache.install()
