"""Gap: transformers does not tell how much of the KV cache a decoding step reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from hf_attn_plugin.methods import METHODS
from hf_attn_plugin.methods.counting import COUNTER_ATTRIBUTE, CacheReadCounter
from hf_attn_plugin.ops.reads import nbytes


@contextlib.contextmanager
def count_reads(model: nn.Module) -> Iterator[CacheReadCounter]:
    """Count attention calls, and the bytes of KV cache that decoding reads.

    This package's methods report what they gather. Transformers' own implementations read every
    cached key and value of a layer, so for them the tensors in the cache are measured.

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
        handles.append(module.register_forward_hook(_StockHook(counter), with_kwargs=True))
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
    marks = hasattr(module, "layer_idx") or hasattr(module, "is_causal")
    return marks and hasattr(module, "config")


class _StockHook:
    """Measures what transformers' own attention reads: all that the layer's cache holds."""

    def __init__(self, counter: CacheReadCounter) -> None:
        self.counter = counter

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        config: Any = module.config
        name: str = config._attn_implementation.removeprefix("paged|")
        if name in METHODS:
            return
        cache = kwargs.get("past_key_values")
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if cache is None or not isinstance(hidden, torch.Tensor) or hidden.shape[1] != 1:
            self.counter.add(id(module), name, None, None)
            return
        layer = cache.layers[cast(int, module.layer_idx)]
        size = nbytes(layer.keys, layer.values)
        self.counter.add(id(module), name, size, size)
