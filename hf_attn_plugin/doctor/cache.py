"""Bytes of KV cache under each method, measured on the caches and methods themselves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.config import METHOD_CONFIGS, MethodConfig, SparQConfig, configure
from hf_attn_plugin.doctor.environment import Target
from hf_attn_plugin.doctor.layers import Layer, sparq_choice
from hf_attn_plugin.methods import METHODS
from hf_attn_plugin.methods.counting import COUNTER_ATTRIBUTE, CacheReadCounter
from hf_attn_plugin.ops.sparq_backend import SparQBackend

# Methods that must have seen the prompt before they decode, which takes time quadratic in it.
_FOLLOWS_PROMPT = frozenset({"h2o", "linear"})
_LONGEST_PROMPT = 8192


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """KV cache of one sequence, all layers together.

    Attributes:
        method: The ``attn_implementation``, with the parameters that matter.
        kept: Bytes held at the given length, room for growth included; None where unknown.
        read: Bytes read by a decoding step at that length; None where unknown.
        note: Why something is unknown.
    """

    method: str
    kept: int | None
    read: int | None
    note: str = ""


def cache_bytes(
    layers: Sequence[Layer], config: Any, length: int, dtype: torch.dtype, target: Target
) -> list[CacheBytes]:
    """A row per method: first dense attention, then this package's, then a static cache.

    A layer of every kind is given a real cache of random keys with a single KV head, and one token
    is decoded over it, under the counters of `hf_attn_plugin.count_reads`. Where ``sparq`` would
    attend to all keys on ``target``, it reads what dense attention does.

    Args:
        layers: Those of the model.
        config: The model's config; its ``attn_params`` are used.
        length: Tokens in the cache.
        dtype: Of keys and values.
        target: Where the model would run.
    """
    cached = [layer for layer in layers if layer.cached_dims is not None]
    if not cached:
        return []
    dense = [_dense(layer, length, dtype) for layer in cached]
    rows = [CacheBytes("dense (flash, sdpa, eager)", sum(dense), sum(dense))]
    for label, name, parameters in _variants(config):
        rows.append(_under(label, name, parameters, cached, config, length, dtype, target))
    note = "under any method, allocated at once for the longest length"
    rows.append(CacheBytes(f"static cache of {length:,}", sum(dense), None, note))
    return rows


def _dense(layer: Layer, length: int, dtype: torch.dtype) -> int:
    tokens = length if layer.window is None else min(length, layer.window)
    return (layer.cached_dims or 0) * dtype.itemsize * tokens


def _variants(config: Any) -> list[tuple[str, str, MethodConfig | None]]:
    """Every method with the model's parameters; ``sparq`` with each copy of the keys."""
    stored = getattr(config, "attn_params", None) or {}
    found: list[tuple[str, str, MethodConfig | None]] = []
    for name, cls in METHOD_CONFIGS.items():
        if name in ("flash", "ring") or name not in METHODS:
            continue
        own = cls(**stored.get(name, {}))
        if isinstance(own, SparQConfig):
            for kind in SparQConfig.KEY_COPIES:
                changed = dataclasses.replace(own, key_copy=kind)
                found.append((f"sparq, key copy {kind}", name, changed))
        else:
            found.append((name, name, own))
    return found


def _under(
    label: str,
    name: str,
    parameters: MethodConfig | None,
    layers: Sequence[Layer],
    config: Any,
    length: int,
    dtype: torch.dtype,
    target: Target,
) -> CacheBytes:
    if name in _FOLLOWS_PROMPT and length > _LONGEST_PROMPT:
        return CacheBytes(label, None, None, f"measured up to {_LONGEST_PROMPT:,} tokens only")
    if name in _FOLLOWS_PROMPT and any(layer.latent for layer in layers):
        return CacheBytes(label, None, None, "needs keys and values, the cache holds latents")
    config = copy.deepcopy(config)
    config._attn_implementation = name
    if isinstance(parameters, SparQConfig):
        # What is measured is one KV head's cache, which `sparq_choice` must not be made for.
        configure(config, dataclasses.replace(parameters, dense_below=0))
    elif parameters is not None:
        configure(config, parameters)
    kept = read = 0
    notes: dict[str, None] = {}
    measured: dict[Any, tuple[int, int]] = {}
    for layer in layers:
        if layer.latent:
            # The latents are read whole to make keys of them, whatever is then done with these.
            size = _dense(layer, length, dtype)
            kept, read = kept + size, read + size
            continue
        key = (layer.kind, _cache_class(config, layer))
        if key not in measured:
            try:
                measured[key] = _measure(layer, name, config, length, dtype)
            except ValueError as error:
                return CacheBytes(label, None, None, f"refused: {str(error).split('. ')[0]}")
        kept += layer.kv_heads * measured[key][0]
        reads_all = _attends_to_all(layer, parameters, dtype, target)
        if reads_all is None:
            read += layer.kv_heads * measured[key][1]
        else:
            read += _dense(layer, length, dtype)
            notes[f"attends to all keys: {reads_all}"] = None
    if any(layer.latent for layer in layers):
        notes["a latent cache is read whole under every method"] = None
    return CacheBytes(label, kept, read, "; ".join(notes))


def _attends_to_all(
    layer: Layer, parameters: MethodConfig | None, dtype: torch.dtype, target: Target
) -> str | None:
    """Why ``sparq`` decodes densely in a layer that it would act in; None if it does not."""
    if not isinstance(parameters, SparQConfig) or layer.window is not None or layer.cross:
        return None
    choice = sparq_choice(layer, parameters, dtype, target)
    return choice.reason if choice.backend is SparQBackend.DENSE else None


def _cache_class(config: Any, layer: Layer) -> str:
    cache, index = _new_cache(config), getattr(layer.module, "layer_idx", 0)
    return type(cache.layers[index]).__name__ if index < len(cache.layers) else "DynamicLayer"


def _new_cache(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _measure(
    layer: Layer, name: str, config: Any, length: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes kept and read by one layer with one KV head."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(1, heads, tokens, dim, generator=generator).to(dtype)

    module = copy.copy(layer.module)  # without weights; its config is all that methods look at
    text = config.get_text_config()
    module.__dict__ = {**module.__dict__, "config": text}
    module._modules = {k: v for k, v in module._modules.items() if k != "config"}
    counter = CacheReadCounter()
    module.__dict__[COUNTER_ATTRIBUTE] = counter
    index = getattr(layer.module, "layer_idx", 0)
    groups = layer.heads // layer.kv_heads
    arguments: dict[str, Any] = {"sliding_window": layer.window}
    if layer.softcap:
        arguments["softcap"] = layer.softcap
    if layer.sinks:
        arguments["s_aux"] = torch.zeros(groups)
    cache = _new_cache(config)
    with torch.no_grad():
        keys, values = cache.update(
            random(1, length - 1, layer.head_dim), random(1, length - 1, layer.value_dim), index
        )
        if name in _FOLLOWS_PROMPT:
            query = random(groups, length - 1, layer.head_dim)
            METHODS[name](module, query, keys, values, None, **arguments)
        keys, values = cache.update(
            random(1, 1, layer.head_dim), random(1, 1, layer.value_dim), index
        )
        METHODS[name](module, random(groups, 1, layer.head_dim), keys, values, None, **arguments)
    return _held(cache.layers[index]), counter.kv_bytes_read


def _held(thing: Any) -> int:
    """Bytes of the tensors inside an object, each piece of memory once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            visit(vars(value))
        elif hasattr(type(value), "__slots__"):
            for name in type(value).__slots__:
                visit(getattr(value, name, None))

    visit(thing)
    return sum(storages.values())
