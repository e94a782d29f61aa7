"""The place of our cache layers in transformers: which models get them, `install`, `uninstall`."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import transformers.modeling_utils  # noqa: F401  the package registers when this is imported
from tiny import tiny_config
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hf_attn_plugin import SparQConfig, configure
from hf_attn_plugin.integrations.cache_layers import CACHE_LAYERS, install, uninstall
from hf_attn_plugin.integrations.h2o_cache import H2OLayer
from hf_attn_plugin.integrations.linear_cache import LinearStateLayer
from hf_attn_plugin.integrations.sparq_cache import SparQLayer
from hf_attn_plugin.integrations.sparq_static_cache import SparQStaticLayer
from hf_attn_plugin.ops.sparq.state import sparq_state


def config(family, attn="eager", **overrides):
    made = tiny_config(family, **overrides)
    made._attn_implementation = attn
    return made


@pytest.fixture
def clean(registries):
    """Nothing of ours in transformers' caches; `registries` puts everything back afterwards."""
    uninstall()


def types(cache):
    return [type(layer) for layer in cache.layers]


@pytest.fixture
def installed(clean):
    install()


# Of dynamic and of static caches.
OURS = {
    "sparq": (SparQLayer, SparQStaticLayer),
    "h2o": (H2OLayer, StaticLayer),
    "linear": (LinearStateLayer, LinearStateLayer),
}


def test_no_method_is_left_out():
    assert {row.attn_implementation for row in CACHE_LAYERS} == {*OURS}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("attn", OURS)
def test_every_method_gets_its_layers(attn):
    dynamic, static = OURS[attn]
    llama = config("llama", attn)
    assert types(DynamicCache(config=llama)) == [dynamic] * 2
    assert types(StaticCache(llama, max_cache_len=8)) == [static] * 2
    mixed = config("gemma3_text", attn)
    assert types(DynamicCache(config=mixed)) == [DynamicSlidingWindowLayer, dynamic]
    assert types(StaticCache(mixed, max_cache_len=8)) == [StaticSlidingWindowLayer, static]
    windowed = config("mistral", attn)
    assert types(DynamicCache(config=windowed)) == [DynamicSlidingWindowLayer] * 2
    full = config("mistral", attn, sliding_window=None)
    assert types(DynamicCache(config=full)) == [dynamic] * 2


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("key_copy", SparQConfig.KEY_COPIES)
def test_the_layer_copies_keys_as_the_model_wants(key_copy):
    llama = configure(config("llama", "sparq"), SparQConfig(key_copy=key_copy))
    for cache in (DynamicCache(config=llama), StaticCache(llama, max_cache_len=8)):
        assert [layer.key_copy for layer in cache.layers] == [key_copy] * 2


@pytest.mark.usefixtures("installed")
def test_models_that_cannot_use_them_keep_their_own():
    latent = config("llama", "sparq", kv_lora_rank=4)
    assert types(DynamicCache(config=latent)) == [DynamicLayer] * 2
    decoder = config("llama", "linear", add_cross_attention=True)
    assert types(DynamicCache(config=decoder)) == [DynamicLayer] * 2


@pytest.mark.usefixtures("installed")
def test_other_models_keep_their_caches():
    assert types(DynamicCache(config=config("llama"))) == [DynamicLayer] * 2
    assert types(DynamicCache(config=config("gemma3_text", "eager"))) == [
        DynamicSlidingWindowLayer,
        DynamicLayer,
    ]
    assert cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is DynamicLayer


def test_a_quantized_cache_is_refused():
    with pytest.raises(ValueError, match=r"key_copy='int8'"):
        QuantizedCache("quanto", config("llama", "sparq"))
    for attn in sorted({row.attn_implementation for row in CACHE_LAYERS}):
        with pytest.raises(ValueError, match=f"'{attn}' does not work over.*'flash' or 'sdpa'"):
            QuantizedCache("quanto", config("llama", attn))


def mapping_size():
    return len(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING)


@pytest.mark.usefixtures("clean")
def test_install_twice_and_uninstall():
    before, size = cache_utils.get_layer_types_and_kwargs, mapping_size()
    install()
    once = cache_utils.get_layer_types_and_kwargs
    install()
    assert cache_utils.get_layer_types_and_kwargs is once
    assert mapping_size() == size + len(CACHE_LAYERS)
    cache = DynamicCache(config=config("llama", "sparq"))
    uninstall()
    assert cache_utils.get_layer_types_and_kwargs is before
    assert mapping_size() == size
    assert types(DynamicCache(config=config("llama", "sparq"))) == [DynamicLayer] * 2
    states = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8)
    with torch.no_grad():
        assert sparq_state(cache.update(*states, 0)[0]) is not None
    uninstall()
    install()
    assert types(DynamicCache(config=config("llama", "sparq"))) == [SparQLayer] * 2


@pytest.mark.usefixtures("installed")
def test_uninstall_under_somebody_elses_wrapper():
    ours = cache_utils.get_layer_types_and_kwargs

    @functools.wraps(ours)
    def theirs(config):
        return ours(config)

    cache_utils.get_layer_types_and_kwargs = theirs
    uninstall()
    assert cache_utils.get_layer_types_and_kwargs is theirs
    assert types(DynamicCache(config=config("llama", "sparq"))) == [DynamicLayer] * 2
    install()
    assert types(DynamicCache(config=config("llama", "sparq"))) == [SparQLayer] * 2


@pytest.mark.usefixtures("clean")
class TestWhatWeRelyOnInTransformers:
    """If one of these fails, transformers has changed under `integrations/cache_layers.py`."""

    def test_the_patched_function_takes_a_config_and_returns_types_first(self):
        function = cache_utils.get_layer_types_and_kwargs
        assert list(inspect.signature(function).parameters) == ["config"]
        layer_types, kwargs = function(config("gemma3_text", "eager"))
        assert layer_types == ["sliding_attention", "full_attention"]
        assert isinstance(kwargs, list | dict)

    @pytest.mark.parametrize(
        "make", [DynamicCache, functools.partial(StaticCache, max_cache_len=8)]
    )
    def test_caches_look_it_up_in_their_module_and_the_types_in_the_mappings(self, make):
        asked = []
        original = cache_utils.get_layer_types_and_kwargs

        def renamed(config):
            asked.append(config)
            layer_types, kwargs = original(config)
            return ["renamed"] * len(layer_types), kwargs

        class Layer(DynamicLayer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)

        # Assigned and not monkeypatched: `registries` must be the one to undo it.
        cache_utils.get_layer_types_and_kwargs = renamed
        cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["renamed"] = Layer
        cache_utils.STATIC_LAYER_TYPE_MAPPING["renamed"] = Layer
        llama = config("llama")
        assert types(make(config=llama)) == [Layer] * 2
        assert asked == [llama]

    def test_the_layer_has_the_methods_we_override(self):
        theirs = {name for name in dir(DynamicLayer) if not name.startswith("_")}
        known = {
            "batch_repeat_interleave", "batch_select_indices", "crop", "get_mask_sizes",
            "get_max_length", "get_seq_length", "is_compileable", "is_croppable", "is_sliding",
            "lazy_initialization", "offload", "prefetch", "reorder_cache", "reset",
            "supports_early_init", "update", "get_max_cache_shape",
        }  # fmt: skip
        assert theirs <= known, f"new in DynamicLayer: {theirs - known}"

    def test_our_names_are_free(self):
        theirs = {*cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, *cache_utils.STATIC_LAYER_TYPE_MAPPING}
        assert not {row.name for row in CACHE_LAYERS} & theirs
