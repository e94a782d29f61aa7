"""The names: which ``attn_implementation`` is which function, and its registration."""

from __future__ import annotations

from hf_attn_plugin.compat import paged_names
from hf_attn_plugin.integrations import attn_params, flash_name
from hf_attn_plugin.integrations.deferred import when_imported

DESCRIPTIONS: dict[str, str] = {
    "flash": "exact attention, by the fastest kernel that honours the call",
    "ring": "flash over a sequence that several GPUs share, inside sequence_parallel",
    "sliding_window": "the last `window` tokens, and sink tokens if wanted",
    "longformer": "a window, and global tokens that see and are seen by all",
    "strided": "a window, and every key at a multiple of the stride",
    "sparq": "dense prefill; decoding reads only the part of the KV cache that matters",
    "exact_topk": "dense prefill; decoding over the `top_k` keys with the largest exact scores",
    "h2o": "dense prefill; decoding over the keys that have drawn the most attention so far",
    "lm_infinite": "dense prefill; decoding over sink tokens and the last `window` tokens",
    "linear": "features in place of softmax: O(N) training, decoding from a state of fixed size",
}


def implementations() -> dict[str, str]:
    """The registered names with a line each."""
    return dict(DESCRIPTIONS)


def register() -> None:
    """Register every name with transformers, as soon as its modules are imported; idempotent."""
    when_imported("transformers.configuration_utils", attn_params.install)
    when_imported("transformers.modeling_utils", _register_now)


def _register_now() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    from hf_attn_plugin.integrations import (
        cache_layers,
        packed_positions,
        quantized_cache,
        window_cache,
    )
    from hf_attn_plugin.integrations.masks import pattern_mask
    from hf_attn_plugin.methods import METHODS

    attn_params.install()
    flash_name.install(frozenset(METHODS))
    packed_positions.install(frozenset(METHODS))
    cache_layers.install()
    quantized_cache.install()
    window_cache.install()
    for name, function in METHODS.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, pattern_mask)
    for name in paged_names("flash"):
        AttentionInterface.register(name, METHODS["flash"])
