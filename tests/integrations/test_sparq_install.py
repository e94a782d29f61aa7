"""The place of ``sparq``'s cache layer in transformers: `install` and `uninstall`."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import transformers.modeling_utils  # noqa: F401  the package registers when this is imported
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedCache,
    StaticCache,
    StaticSlidingWindowLayer,
)

from hf_attn_plugin.integrations import quantized_cache
from hf_attn_plugin.integrations.sparq_cache import LAYER_TYPES, SparQLayer, install, uninstall
from hf_attn_plugin.integrations.sparq_static_cache import SparQStaticLayer
from hf_attn_plugin.ops.sparq.state import sparq_state


def tiny(config_class, attn_implementation="eager", **kwargs):
    config = config_class(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.5, **kwargs,
    )  # fmt: skip
    config._attn_implementation = attn_implementation
    return config


def gemma3(attn_implementation):
    return tiny(
        Gemma3TextConfig, attn_implementation, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


@pytest.fixture
def clean(registries):
    """Nothing of ours in transformers' caches; `registries` puts the rest back afterwards."""
    uninstall()
    yield
    quantized_cache.install()


def types(cache):
    return [type(layer) for layer in cache.layers]


@pytest.fixture
def installed(clean):
    install()


@pytest.mark.usefixtures("installed")
def test_caches_made_for_sparq_models():
    llama = tiny(LlamaConfig, "sparq")
    assert types(DynamicCache(config=llama)) == [SparQLayer] * 2
    assert types(StaticCache(llama, max_cache_len=8)) == [SparQStaticLayer] * 2
    mixed = gemma3("sparq")
    assert types(DynamicCache(config=mixed)) == [DynamicSlidingWindowLayer, SparQLayer]
    assert types(StaticCache(mixed, max_cache_len=8)) == [
        StaticSlidingWindowLayer,
        SparQStaticLayer,
    ]
    windowed = tiny(MistralConfig, "sparq", sliding_window=4)
    assert types(DynamicCache(config=windowed)) == [DynamicSlidingWindowLayer] * 2
    assert (
        types(DynamicCache(config=tiny(MistralConfig, "sparq", sliding_window=None)))
        == [SparQLayer] * 2
    )


@pytest.mark.usefixtures("installed")
def test_other_models_keep_their_caches():
    assert types(DynamicCache(config=tiny(LlamaConfig))) == [DynamicLayer] * 2
    assert types(DynamicCache(config=gemma3("eager"))) == [DynamicSlidingWindowLayer, DynamicLayer]
    assert mapping_size() == len({*cache_utils.DYNAMIC_LAYER_TYPE_MAPPING})
    assert cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is DynamicLayer


@pytest.mark.usefixtures("installed")
def test_a_quantized_cache_is_refused():
    with pytest.raises(ValueError, match=r"key_copy='int8'"):
        QuantizedCache("quanto", tiny(LlamaConfig, "sparq"))


def mapping_size():
    return len(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING)


@pytest.mark.usefixtures("clean")
def test_install_twice_and_uninstall():
    before, size = cache_utils.get_layer_types_and_kwargs, mapping_size()
    install()
    once = cache_utils.get_layer_types_and_kwargs
    install()
    assert cache_utils.get_layer_types_and_kwargs is once
    assert mapping_size() == size + len(LAYER_TYPES)
    cache = DynamicCache(config=tiny(LlamaConfig, "sparq"))
    uninstall()
    assert cache_utils.get_layer_types_and_kwargs is before
    assert mapping_size() == size
    assert types(DynamicCache(config=tiny(LlamaConfig, "sparq"))) == [DynamicLayer] * 2
    states = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8)
    with torch.no_grad():
        assert sparq_state(cache.update(*states, 0)[0]) is not None
    uninstall()
    install()
    assert types(DynamicCache(config=tiny(LlamaConfig, "sparq"))) == [SparQLayer] * 2


@pytest.mark.usefixtures("installed")
def test_uninstall_under_somebody_elses_wrapper():
    ours = cache_utils.get_layer_types_and_kwargs

    @functools.wraps(ours)
    def theirs(config):
        return ours(config)

    cache_utils.get_layer_types_and_kwargs = theirs
    uninstall()
    assert cache_utils.get_layer_types_and_kwargs is theirs
    assert types(DynamicCache(config=tiny(LlamaConfig, "sparq"))) == [DynamicLayer] * 2
    install()
    assert types(DynamicCache(config=tiny(LlamaConfig, "sparq"))) == [SparQLayer] * 2


@pytest.mark.usefixtures("clean")
class TestWhatWeRelyOnInTransformers:
    """If one of these fails, transformers has changed under `integrations/sparq_cache.py`."""

    def test_the_patched_function_takes_a_config_and_returns_types_first(self):
        function = cache_utils.get_layer_types_and_kwargs
        assert list(inspect.signature(function).parameters) == ["config"]
        layer_types, kwargs = function(gemma3("eager"))
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
        config = tiny(LlamaConfig)
        assert types(make(config=config)) == [Layer] * 2
        assert asked == [config]

    def test_the_layer_has_the_methods_we_override(self):
        theirs = {name for name in dir(DynamicLayer) if not name.startswith("_")}
        known = {
            "batch_repeat_interleave", "batch_select_indices", "crop", "get_mask_sizes",
            "get_max_length", "get_seq_length", "is_compileable", "is_croppable", "is_sliding",
            "lazy_initialization", "offload", "prefetch", "reorder_cache", "reset",
            "supports_early_init", "update", "get_max_cache_shape",
        }  # fmt: skip
        assert theirs <= known, f"new in DynamicLayer: {theirs - known}"

    def test_our_name_is_free(self):
        assert not {*LAYER_TYPES.values()} & {*cache_utils.DYNAMIC_LAYER_TYPE_MAPPING}
