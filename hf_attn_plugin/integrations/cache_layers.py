"""Gap: transformers has no door for the layers of the caches that ``generate`` and models make.

It names a kind for every layer of a config, and makes what it finds under that name in two tables.
``install()`` wraps the function that names them, and enters the layers of this package under names
of their own. A model whose attention implementation is in `CACHE_LAYERS` then gets them in every
`DynamicCache` and `StaticCache` that is made with its config; layers with a window or chunks keep
those of transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import StaticLayer

from hf_attn_plugin.config import SparQConfig
from hf_attn_plugin.integrations import linear_cache, sparq_cache
from hf_attn_plugin.integrations.h2o_cache import H2OLayer
from hf_attn_plugin.integrations.linear_cache import LinearStateLayer
from hf_attn_plugin.integrations.sparq_cache import SparQLayer
from hf_attn_plugin.integrations.sparq_static_cache import SparQStaticLayer
from hf_attn_plugin.integrations.wrapping import unwrap, wrap


@dataclass(frozen=True)
class CacheLayers:
    """What the caches of some models have in place of transformers' layers.

    Attributes:
        attn_implementation: Of these models.
        layer_type: The kind of layer that is replaced, in transformers' terms.
        dynamic: Makes a layer of a dynamic cache.
        static: Makes a layer of a static cache.
        variant: What else there is to choose by; a layer is told nothing of the model's config.
        suits: Whether a model with this (text) config takes them.
    """

    attn_implementation: str
    layer_type: str
    dynamic: Callable[..., Any]
    static: Callable[..., Any]
    variant: str = ""
    suits: Callable[[PreTrainedConfig], bool] = lambda config: True

    @property
    def name(self) -> str:
        """Ours for this kind of layer."""
        return ":".join(filter(None, (self.attn_implementation, self.layer_type, self.variant)))


FULL = "full_attention"
CACHE_LAYERS = (
    *(
        CacheLayers(
            "sparq",
            FULL,
            dynamic=functools.partial(SparQLayer, key_copy),
            static=functools.partial(SparQStaticLayer, key_copy),
            variant=key_copy,
            suits=functools.partial(sparq_cache.keeps_copy, key_copy),
        )
        for key_copy in SparQConfig.KEY_COPIES
    ),
    # Static caches keep their own, with which `h2o` refuses to decode.
    CacheLayers("h2o", FULL, dynamic=H2OLayer, static=StaticLayer),
    CacheLayers(
        "linear",
        FULL,
        dynamic=LinearStateLayer,
        static=LinearStateLayer,
        suits=linear_cache.keeps_state,
    ),
)

_FUNCTION = "get_layer_types_and_kwargs"
# In transformers 5.17 the second part is one dictionary for all layers; it is only handed on.
LayerTypes = Callable[[PreTrainedConfig], tuple[list[str], list[dict[Any, Any]]]]


def _with_our_names(original: LayerTypes) -> LayerTypes:
    def layer_types_and_kwargs(
        config: PreTrainedConfig,
    ) -> tuple[list[str], list[dict[Any, Any]]]:
        layer_types, layer_kwargs = original(config)
        ours = {
            row.layer_type: row.name
            for row in CACHE_LAYERS
            if row.attn_implementation == getattr(config, "_attn_implementation", None)
            and row.name in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
            and row.suits(config)
        }
        return [ours.get(kind, kind) for kind in layer_types], layer_kwargs

    return layer_types_and_kwargs


def install() -> None:
    """Make transformers use our layers; idempotent."""
    # Transformers calls what is in the tables; it need not be a class.
    dynamic: dict[str, Any] = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    static: dict[str, Any] = cache_utils.STATIC_LAYER_TYPE_MAPPING
    for row in CACHE_LAYERS:
        dynamic[row.name], static[row.name] = row.dynamic, row.static
    wrap(cache_utils, _FUNCTION, _with_our_names)


def uninstall() -> None:
    """Undo `install`. Caches that exist already keep their layers and go on working.

    Where somebody else has wrapped the same function since, ours stays underneath and does nothing.
    """
    for row in CACHE_LAYERS:
        cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.pop(row.name, None)
        cache_utils.STATIC_LAYER_TYPE_MAPPING.pop(row.name, None)
    unwrap(cache_utils, _FUNCTION)
