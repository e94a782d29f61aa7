"""What a conversion to fewer key/value heads changes, worked out from a config alone.

What has to change is not listed family by family. The model class is built twice without weights,
with the old and with the new number of heads in its config, and the two are compared: parameters
whose shape differs hold key/value heads, plain attributes that differ are to be set. A difference
that cannot be explained is a refusal, before a weight is touched.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

SUPPORTED = (
    "supported are decoders with a number of key/value heads in their config, whose keys and "
    "values come from linear layers, separate (Llama, Mistral, Qwen, Gemma, gpt-oss, OLMo 2, "
    "Cohere and many more) or fused as queries, keys, values in this order (Phi-3, DBRX)"
)

_KEY = {"k_proj", "key", "key_proj", "k", "wk"}
_VALUE = {"v_proj", "value", "value_proj", "v", "wv"}
_FUSED = {"qkv_proj", "Wqkv", "wqkv", "qkv", "query_key_value"}
_KEY_NORM = re.compile(r"k(ey)?_?(layer)?norm$")
_HEAD_FIELD = re.compile(
    r"(swa_)?num_(global_)?(key_value|kv)_heads(_per_layer)?$|kv_n_heads$|n_kv_heads$"
)
# Sub-configs that describe the same layers as the config around them (DBRX).
_NESTED_CONFIGS = ("attn_config",)


@dataclass(frozen=True)
class HeadRows:
    """A run of rows of a parameter that holds key/value heads, one after the other.

    Attributes:
        start: First row.
        heads: Heads before.
        new_heads: Heads after, a divisor of `heads`.
        head_dim: Rows per head.
    """

    start: int
    heads: int
    new_heads: int
    head_dim: int

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + self.heads * self.head_dim


@dataclass(frozen=True)
class LayerPlan:
    """One attention layer that changes.

    Attributes:
        name: The attention module's name.
        heads: Its key/value heads before.
        new_heads: Its key/value heads after.
        key_dim: Components per key head.
        value_dim: Components per value head; 0 where keys serve as values.
        keys: The parameter of the keys' weight and its rows.
        values: The parameter of the values' weight and its rows, or None.
    """

    name: str
    heads: int
    new_heads: int
    key_dim: int
    value_dim: int
    keys: tuple[str, HeadRows]
    values: tuple[str, HeadRows] | None


@dataclass(frozen=True)
class GqaPlan:
    """What a conversion changes in a model; made from the config alone, without weights.

    Attributes:
        old_heads: Key/value heads that the config names before (the most of any layer, where it
            names several numbers).
        new_heads: The number asked for; layers that have no more than that stay as they are.
        shapes: For every parameter that is pooled, its name and its shapes before and after.
        rows: For the same parameters, the rows that hold key/value heads.
        layers: The attention layers that change.
        attributes: `(module name, attribute, new value)` for every plain attribute to set.
    """

    old_heads: int
    new_heads: int
    shapes: dict[str, tuple[torch.Size, torch.Size]]
    rows: dict[str, tuple[HeadRows, ...]]
    layers: tuple[LayerPlan, ...]
    attributes: tuple[tuple[str, str, Any], ...]

    def cache_elements(self) -> tuple[int, int]:
        """Elements that the KV cache holds per token in the layers that change: before, after."""
        widths = [
            (layer, layer.key_dim + (layer.value_dim or layer.key_dim)) for layer in self.layers
        ]
        return (
            sum(layer.heads * width for layer, width in widths),
            sum(layer.new_heads * width for layer, width in widths),
        )


def plan_gqa(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, num_key_value_heads: int
) -> GqaPlan:
    """Work out a conversion from the config, without weights.

    Args:
        model_class: The class that `config` is for, for example `LlamaForCausalLM`.
        config: Its config; it is not changed.
        num_key_value_heads: New number of key/value heads per layer. In a model whose layers have
            different numbers, those with more than this are reduced to it.

    Returns:
        The plan; with the present number of heads it changes nothing.

    Raises:
        ValueError: If the number is not valid or the family is not supported.
    """
    counts = head_counts(config)
    old_heads = max(counts)
    _check_number(counts, num_key_value_heads)
    if num_key_value_heads == old_heads:
        return GqaPlan(old_heads, old_heads, {}, {}, (), ())
    new_config = copy.deepcopy(config)
    set_heads(new_config, num_key_value_heads)
    old = build_without_weights(model_class, copy.deepcopy(config))
    new = _build_reduced(model_class, new_config, num_key_value_heads)
    shapes, rows, layers = _explain(config, old, new)
    return GqaPlan(
        old_heads, num_key_value_heads, shapes, rows, layers, tuple(_changed_attributes(old, new))
    )


def head_counts(config: PreTrainedConfig) -> list[int]:
    """Every number of key/value heads that a config names for its (text) decoder's layers.

    Raises:
        ValueError: If it names none, or is not a decoder's.
    """
    family = config.model_type
    if config.is_encoder_decoder:
        raise ValueError(f"{family} is an encoder-decoder, which cannot be converted: {SUPPORTED}")
    text = config.get_text_config()
    counts: list[int] = []
    for holder, field in _head_fields(text):
        value = vars(holder)[field]
        counts += value if isinstance(value, list) else [value]
    counts += [o[f] for o in _layer_overrides(text).values() for f in o if _HEAD_FIELD.match(f)]
    if not counts:
        raise ValueError(
            f"{family} has no `num_key_value_heads` in its config, its code cannot share key/value "
            f"heads that way: {SUPPORTED}"
        )
    return counts


def set_heads(config: PreTrainedConfig, heads: int) -> None:
    """Write a smaller number of key/value heads into a config, wherever it names a larger one."""
    text = config.get_text_config()
    for holder, field in _head_fields(text):
        value = vars(holder)[field]
        reduced = [min(v, heads) for v in value] if isinstance(value, list) else min(value, heads)
        setattr(holder, field, reduced)
    overrides = _layer_overrides(text)
    for fields in overrides.values():
        for field in filter(_HEAD_FIELD.match, fields):
            fields[field] = min(fields[field], heads)
    if overrides:
        text.per_layer_config = overrides


def build_without_weights(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> PreTrainedModel:
    """A model of this class and config whose parameters have shapes but no data."""
    with torch.device("meta"), no_init_weights():
        return model_class(config)


def _head_fields(text: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str]]:
    holders = [text, *(vars(text)[name] for name in _NESTED_CONFIGS if name in vars(text))]
    for holder in holders:
        for field, value in list(vars(holder).items()):
            counts = value if isinstance(value, list) else [value]
            if _HEAD_FIELD.match(field) and counts and all(type(c) is int for c in counts):
                yield holder, field


def _layer_overrides(text: PreTrainedConfig) -> dict[int | str, dict[str, Any]]:
    """A copy of what single layers set differently, in configs that say so layer by layer."""
    spec = vars(text).get("_heterogeneity_spec")
    return {} if spec is None else copy.deepcopy(spec.per_layer_overrides)


def _check_number(counts: list[int], heads: int) -> None:
    most = max(counts)
    valid = [n for n in range(1, most + 1) if all(c <= n or c % n == 0 for c in counts)]
    if isinstance(heads, bool) or not isinstance(heads, int) or heads not in valid:
        named = ", ".join(map(str, sorted(set(counts))))
        raise ValueError(
            f"{named} key/value heads cannot become {heads!r}: "
            f"the new number must be one of {', '.join(map(str, valid))}"
        )


def _build_reduced(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, heads: int
) -> PreTrainedModel:
    if config.model_type == "diffllama" and heads % 2:
        raise ValueError(
            f"diffllama cannot have {heads} key/value heads: its differential attention splits "
            f"them into two halves, so their number must be even"
        )
    try:
        return build_without_weights(model_class, config)
    except Exception as error:
        raise ValueError(
            f"{config.model_type} cannot be built with {heads} key/value heads: {error}"
        ) from error


def _explain(
    config: PreTrainedConfig, old: PreTrainedModel, new: PreTrainedModel
) -> tuple[
    dict[str, tuple[torch.Size, torch.Size]],
    dict[str, tuple[HeadRows, ...]],
    tuple[LayerPlan, ...],
]:
    family = config.model_type
    new_shapes = _tensor_shapes(new)
    shapes = {
        name: (shape, new_shapes.get(name, torch.Size()))
        for name, shape in _tensor_shapes(old).items()
        if shape != new_shapes.get(name)
    }
    if not shapes:
        raise ValueError(
            f"no weight of {family} depends on `num_key_value_heads`, so there is nothing to pool: "
            f"{SUPPORTED}"
        )
    added = sorted(_within_layer(name) for name in new_shapes.keys() - _tensor_shapes(old).keys())
    if added:
        raise ValueError(f"{family} cannot be converted, because it would need {', '.join(added)}")
    rows: dict[str, tuple[HeadRows, ...]] = {}
    layers: list[LayerPlan] = []
    for attention in dict.fromkeys(_attention_of(name) for name in shapes):
        own = {n: s for n, s in shapes.items() if _attention_of(n) == attention}
        layer, explained = _explain_layer(config, old.get_submodule(attention), attention, own)
        rows |= explained
        if layer is not None:
            _check_sharing(family, old, new, layer)
            layers.append(layer)
    others = sorted({_within_layer(name) for name in shapes if name not in rows})
    if others:
        raise ValueError(
            f"{family} cannot be converted, because {', '.join(others)} depends on the number of "
            f"key/value heads in a way that pooling heads does not describe: {SUPPORTED}"
        )
    return shapes, rows, tuple(layers)


def _check_sharing(
    family: str, old: PreTrainedModel, new: PreTrainedModel, layer: LayerPlan
) -> None:
    """Refuse layers whose code does not share a key/value head among more query heads."""
    before, after = (
        vars(model.get_submodule(layer.name)).get("num_key_value_groups") for model in (old, new)
    )
    if before is not None and after is not None and (
        before < 1 or before * layer.heads != after * layer.new_heads
    ):  # fmt: skip
        raise ValueError(
            f"{family} cannot be converted, because {layer.name} would share each of "
            f"{layer.new_heads} key/value heads among {after} query heads, where it shares each of "
            f"{layer.heads} among {before} now"
        )


def _tensor_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {n: t.shape for n, t in (*model.named_parameters(), *model.named_buffers())}


def _attention_of(name: str) -> str:
    """The attention layer that a parameter belongs to: what holds the projection or norm."""
    parts = name.split(".")
    for place in range(len(parts) - 1, 0, -1):
        if parts[place] in _KEY | _VALUE | _FUSED or _KEY_NORM.match(parts[place]):
            return ".".join(parts[:place])
    return ".".join(parts[:-2])


def _kind(name: str, attention: str) -> str:
    """The projection or norm within its attention layer."""
    return name.removeprefix(attention + ".").split(".")[0]


def _within_layer(name: str) -> str:
    return re.sub(r"^.*?layers?\.\d+\.", "", name)


def _explain_layer(
    config: PreTrainedConfig,
    module: nn.Module,
    attention: str,
    shapes: Mapping[str, tuple[torch.Size, torch.Size]],
) -> tuple[LayerPlan | None, dict[str, tuple[HeadRows, ...]]]:
    """The rows of one attention layer's parameters, as far as they can be explained."""
    head_dim = _head_dim(config, module)
    kinds = {name: _kind(name, attention) for name in shapes}
    linear = {
        name: type(module.get_submodule(name.removeprefix(attention + ".").rpartition(".")[0]))
        is nn.Linear
        for name in shapes
    }
    rows: dict[str, tuple[HeadRows, ...]] = {}
    keys: tuple[str, HeadRows] | None = None
    values: tuple[str, HeadRows] | None = None
    for name, (old, new) in shapes.items():
        if not name.endswith(".weight") or old[1:] != new[1:] or not new:
            continue
        if not linear[name]:
            continue
        if kinds[name] in _KEY and old[0] % head_dim == 0 == new[0] % head_dim:
            keys = name, HeadRows(0, old[0] // head_dim, new[0] // head_dim, head_dim)
        elif kinds[name] in _FUSED and _is_of_transformers(module):
            # Keys and values shrink alike: rows = queries + 2 * heads * head_dim.
            spans = _fused_rows(module, old[0], new[0], head_dim)
            if spans is not None:
                keys, values = (name, spans[0]), (name, spans[1])
    if keys is None:
        return None, {}
    heads, new_heads = keys[1].heads, keys[1].new_heads
    if heads % new_heads:
        return None, {}
    for name, (old, new) in shapes.items():
        kind = kinds[name]
        if old[1:] != new[1:] or not new:
            continue
        if kind in _FUSED and values is not None:
            rows[name] = (keys[1], values[1])
        elif kind in _KEY or kind in _VALUE or _KEY_NORM.match(kind):
            if old[0] % heads or old[0] * new_heads != new[0] * heads:
                continue
            if kind in _KEY | _VALUE and not linear[name]:
                continue
            rows[name] = (HeadRows(0, heads, new_heads, old[0] // heads),)
            if kind in _VALUE and name.endswith(".weight"):
                values = name, rows[name][0]
    value_dim = 0 if values is None else values[1].head_dim
    return LayerPlan(attention, heads, new_heads, head_dim, value_dim, keys, values), rows


def _head_dim(config: PreTrainedConfig, module: nn.Module) -> int:
    """Components per key head: the layer's own word, or the config's."""
    text = config.get_text_config()
    for holder in (vars(module), vars(text)):
        if type(holder.get("head_dim")) is int:
            return holder["head_dim"]
    return text.hidden_size // text.num_attention_heads


def _fused_rows(
    module: nn.Module, old: int, new: int, head_dim: int
) -> tuple[HeadRows, HeadRows] | None:
    """Where keys and values are in rows that hold queries, then keys, then values."""
    removed, rest = divmod(old - new, 2 * head_dim)
    groups = vars(module).get("num_key_value_groups")
    if not isinstance(groups, int):
        return None
    heads, uneven = divmod(old, (groups + 2) * head_dim)
    if rest or uneven or removed >= heads:
        return None
    start, new_heads = heads * groups * head_dim, heads - removed
    return (
        HeadRows(start, heads, new_heads, head_dim),
        HeadRows(start + heads * head_dim, heads, new_heads, head_dim),
    )


def _is_of_transformers(module: nn.Module) -> bool:
    # The order in which foreign code splits a fused projection cannot be seen from outside.
    return type(module).__module__.startswith("transformers.models.")


def _changed_attributes(
    old: PreTrainedModel, new: PreTrainedModel
) -> Iterator[tuple[str, str, Any]]:
    """Numbers, and lists of numbers, that a module has from the number of heads."""
    modules = dict(new.named_modules())
    for name, module in old.named_modules():
        for attribute, value in vars(module).items():
            changed = vars(modules[name]).get(attribute)
            if _is_plain(value) and _is_plain(changed) and changed != value:
                yield name, attribute, changed


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, int | float)
