"""Differences between the supported versions of transformers, each with what lets it go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def update_paged_cache(
    cache: Any, key: Tensor, value: Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Write new keys and values into a paged cache and read back everything that is attended to.

    Args:
        cache: Transformers' ``PagedAttentionCache``.
        key: ``[1, kv_heads, new tokens, head_dim]``.
        value: ``[1, kv_heads, new tokens, value_dim]``.
        layer_idx: The layer.
        kwargs: What the attention function was called with; from 5.19 on the cache resolves its
            entries in place for this layer.

    Returns:
        Keys and values, ``[1, kv_heads, tokens, dim]``.
    """
    if "read_index" in kwargs and "max_length_q" not in kwargs:
        # transformers < 5.19 passes the indices one by one and returns [tokens, kv_heads, dim];
        # goes when 5.19 is the oldest supported version.
        key, value = cache.update(
            key,
            value,
            layer_idx,
            read_index=kwargs["read_index"],
            write_index=kwargs["write_index"],
        )
        lengths = kwargs.get("cu_seq_lens_k")
        if isinstance(lengths, dict):
            sliding = kwargs.get("sliding_window") is not None
            kwargs["cu_seq_lens_k"] = lengths["sliding_attention" if sliding else "full_attention"]
        return key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    return cache.update(key_states=key, value_states=value, layer_idx=layer_idx, kwargs=kwargs)


def paged_names(name: str) -> list[str]:
    """Names under which continuous batching looks an implementation up, besides its own.

    transformers < 5.19 puts ``paged|`` before it; goes when 5.19 is the oldest supported version.
    """
    from importlib.metadata import version

    from packaging.version import Version

    return [f"paged|{name}"] if Version(version("transformers")) < Version("5.19") else []


def chunks_begin_anew() -> bool:
    """Whether transformers' own masks begin chunks anew in every packed document.

    5.17 lets them run on; goes when all supported versions have this function.
    """
    from transformers import masking_utils

    return hasattr(masking_utils, "remap_positions_for_packed_sequence")


def attention_weights_wanted() -> bool:
    """Whether the running forward pass was asked for its attention weights.

    Transformers collects them with hooks, and many models pass ``output_attentions`` no further.
    Goes when transformers tells attention functions what is collected.
    """
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    return bool(collected) and any("attentions" in name for name in collected)


def recurrent_layers(config: Any) -> list[str]:
    """The kinds of a model's layers that carry a state instead of keys and values, if any.

    Read from the kind of cache that transformers keeps for each; goes when configs say it. 5.17
    knows RecurrentGemma's layers by another name and keeps their state outside of caches.
    """
    from transformers import cache_utils

    kinds = dict.fromkeys(
        getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    )
    stateful = cache_utils.LinearAttentionCacheLayerMixin
    caches = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    return [
        kind
        for kind in kinds
        if kind == "recurrent" or issubclass(caches.get(kind, object), stateful)
    ]
