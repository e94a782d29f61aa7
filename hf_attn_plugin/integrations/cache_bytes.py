"""Gap: transformers does not tell how much memory a cache takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from hf_attn_plugin.integrations.sparq_cache import SparQLayer
from hf_attn_plugin.integrations.sparq_static_cache import SparQStaticLayer
from hf_attn_plugin.ops.reads import nbytes


def kv_cache_bytes(cache: Cache) -> dict[str, int]:
    """Bytes that a cache holds, measured from its tensors, room for further tokens included.

    Args:
        cache: Any cache of transformers' with keys and values; what its layers hold besides
            (states of linear attention) is not counted. Of an encoder-decoder's, both parts are.

    Returns:
        ``keys``, ``values``, ``key_copy`` (the second copy that ``sparq`` keeps of the keys),
        ``value_sums`` (what it keeps for the mean value) and ``total``, over all layers.

    Raises:
        ValueError: This is no cache.
    """
    if isinstance(cache, EncoderDecoderCache):
        own = kv_cache_bytes(cache.self_attention_cache)
        cross = kv_cache_bytes(cache.cross_attention_cache)
        return {name: size + cross[name] for name, size in own.items()}
    if not isinstance(cache, Cache):
        raise ValueError(
            f"kv_cache_bytes measures a cache of transformers, got {type(cache).__name__}. It is "
            "the `past_key_values` that a model returns with use_cache=True, and "
            "generate(..., return_dict_in_generate=True) too."
        )
    sizes = {"keys": 0, "values": 0, "key_copy": 0, "value_sums": 0}
    for layer in cache.layers:
        if isinstance(layer, SparQLayer | SparQStaticLayer):
            parts = layer.nbytes()
        else:
            parts = {
                name: _size(getattr(layer, name, None))
                + _size(getattr(layer, f"_quantized_{name}", None))
                for name in ("keys", "values")
            }
        for name, size in parts.items():
            sizes[name] += size
    return {**sizes, "total": sum(sizes.values())}


def _size(stored: Any) -> int:
    """Bytes of a tensor, of several, or of None."""
    if isinstance(stored, Tensor):
        return nbytes(stored)
    return sum(map(_size, stored)) if isinstance(stored, tuple | list) else 0
