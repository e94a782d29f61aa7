"""Gap: transformers does not tell how much of the KV cache a decoding step reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicSlidingWindowLayer, EncoderDecoderCache

from hf_attn_plugin.compat import recurrent_layers
from hf_attn_plugin.methods import METHODS
from hf_attn_plugin.methods.counting import COUNTER_ATTRIBUTE, CacheReadCounter
from hf_attn_plugin.ops.reads import nbytes


@contextlib.contextmanager
def count_reads(model: nn.Module) -> Iterator[CacheReadCounter]:
    """Count attention calls, and the bytes of KV cache that decoding reads.

    This package's methods report what they gather. Transformers' own implementations read every
    cached key and value of a layer, so for them the tensors in the cache are measured. So they are
    for every method where the cache holds latents (multi-head latent attention): transformers
    makes all keys and values from them before any method chooses.

    Args:
        model: A transformers model; wrappers such as PEFT's may be around it.

    Yields:
        The counter, which stays readable after the block.
    """
    counter = CacheReadCounter()
    modules = [m for m in model.modules() if _attends(m)]
    modules = [
        m for m in modules if not any(_attends(part) for part in m.modules() if part is not m)
    ]
    handles = []
    if any(hasattr(module, COUNTER_ATTRIBUTE) for module in modules):
        raise ValueError("count_reads: this model's reads are being counted already.")
    for module in modules:
        setattr(module, COUNTER_ATTRIBUTE, counter)
        handles.append(module.register_forward_hook(_CacheHook(counter), with_kwargs=True))
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            if hasattr(module, COUNTER_ATTRIBUTE):
                delattr(module, COUNTER_ATTRIBUTE)


def _attends(module: nn.Module) -> bool:
    """Whether this looks like the module that calls the attention function (or one around it)."""
    config: Any = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None) or ()
    layer: Any = getattr(module, "layer_idx", None)
    kind = layer_types[layer] if isinstance(layer, int) and layer < len(layer_types) else None
    # Recurrent layers know their number too, and some stand beside attention in its layer.
    if kind in recurrent_layers(config) and not hasattr(module, "is_causal"):
        return False
    return config is not None and (hasattr(module, "layer_idx") or hasattr(module, "is_causal"))


class _CacheHook:
    """Measures what the layer's cache holds, where that is what attention reads."""

    def __init__(self, counter: CacheReadCounter) -> None:
        self.counter = counter

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        config: Any = module.config
        name: str = config._attn_implementation.removeprefix("paged|")
        layer = _cache_layer(module, kwargs)
        if name in METHODS:
            if layer is not None and _holds_latents(layer, config):
                held = nbytes(layer.keys, layer.values)
                self.counter.correct(held, held)
            return
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        size: int | None = None
        if layer is not None and isinstance(hidden, torch.Tensor) and hidden.shape[1] == 1:
            size = _bytes_attended(layer)
        self.counter.add(id(module), name, size, size)


def _cache_layer(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The layer of the cache that this call attended to, None without one."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, EncoderDecoderCache):
        crosses = any(
            kwargs.get(name) is not None for name in ("key_value_states", "encoder_hidden_states")
        )
        cache = cache.cross_attention_cache if crosses else cache.self_attention_cache
    number = getattr(module, "layer_idx", None)
    if cache is None or not isinstance(number, int) or number >= len(cache.layers):
        return None
    layer = cache.layers[number]
    return None if getattr(layer, "keys", None) is None else layer


def _bytes_attended(layer: Any) -> int | None:
    """Bytes of the keys and values of a step with one query; None where that is the only token."""
    held = tokens = layer.keys.shape[2]
    if isinstance(layer, DynamicSlidingWindowLayer):
        # What the next step will not see is dropped before this one has attended to it.
        tokens = min(layer.get_seq_length(), layer.sliding_window)
    return None if tokens < 2 else nbytes(layer.keys, layer.values) // held * tokens


def _holds_latents(layer: Any, config: Any) -> bool:
    """Whether a layer keeps what multi-head latent attention makes its keys and values from."""
    rank = getattr(config, "kv_lora_rank", None)
    widths = layer.keys.shape[-1], layer.values.shape[-1]
    return rank in widths and layer.keys.shape[1] == 1
