"""Which parameters `method="aligned"` turns, in layers where that is known to be exact."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attn_plugin.convert.gqa_aligned import (
    LayerHeads,
    RotaryPlanes,
    group_heads,
    merge_heads,
)
from hf_attn_plugin.convert.gqa_plan import GqaPlan, LayerPlan, build_without_weights
from hf_attn_plugin.convert.gqa_rotary import rotary_planes

_QUERY = ("q_proj", "query", "query_proj", "q", "wq")
_OUTPUT = ("o_proj", "dense", "out_proj", "wo", "c_proj")
_NORM = re.compile(r"(q|k|qk|query|key)_?(layer)?norm$")
_HARMLESS = (nn.Dropout,)


@dataclass(frozen=True)
class AlignedLayer:
    """One attention layer that can be turned exactly, and where its weights are.

    Attributes:
        plan: What changes in it whatever the method.
        query: `(parameter, first row)` of the queries' weight.
        output: The output projection's weight.
        query_heads: Query heads.
        planes: In which planes keys may be turned, or None where they may not.
        per_query_head: Other parameters whose rows belong to query heads (norms, sinks).
        per_kv_head: Those whose rows belong to key/value heads.
        names: All parameters that change.
    """

    plan: LayerPlan
    query: tuple[str, int]
    output: str
    query_heads: int
    planes: RotaryPlanes | None
    per_query_head: tuple[str, ...]
    per_kv_head: tuple[str, ...]
    names: tuple[str, ...]


def plan_aligned(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, plan: GqaPlan
) -> tuple[AlignedLayer, ...]:
    """Find out how the heads of every layer of a plan can be turned without changing the model.

    Raises:
        ValueError: Where something in a layer could notice, so that it would not be exact.
    """
    text = config.get_text_config()
    if getattr(text, "num_kv_shared_layers", None):
        raise _inexact(config, "some of its layers use the keys and values of others")
    if any(getattr(c, "clip_qkv", None) for c in (text, getattr(text, "attn_config", None))):
        raise _inexact(config, "it clips queries, keys and values (`clip_qkv`)")
    model = build_without_weights(model_class, config)
    return tuple(_layer(config, model.get_submodule(layer.name), layer) for layer in plan.layers)


def align_layer(
    layer: AlignedLayer, read: Callable[[str], Tensor], covariance: Tensor | None
) -> dict[str, Tensor]:
    """Group, turn and merge the heads of one layer.

    Args:
        layer: The layer.
        read: Gives a parameter by its name.
        covariance: Second moment of its inputs with a 1 appended, float64
            ``[inputs + 1, inputs + 1]``, or None.

    Returns:
        The new values of `layer.names`, float64 on the CPU.

    Raises:
        ValueError: If a parameter or the covariance is not finite.
    """
    old = {name: read(name).detach().to("cpu", torch.float64) for name in layer.names}
    plan = layer.plan
    assert plan.values is not None
    for name, tensor in old.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that are not finite")
    if covariance is not None and not bool(torch.isfinite(covariance).all()):
        raise ValueError(
            f"the inputs of {plan.name} on the calibration batches are not finite, or too large: "
            "calibrate in a wider dtype (`model.float()`), or convert without calibration"
        )
    heads = LayerHeads(
        _rows(old, *layer.query, layer.query_heads, plan.key_dim),
        _rows(old, plan.keys[0], plan.keys[1].start, plan.heads, plan.key_dim),
        _rows(old, plan.values[0], plan.values[1].start, plan.heads, plan.value_dim),
        old[layer.output].unflatten(1, (layer.query_heads, plan.value_dim)).transpose(0, 1),
    )
    order = group_heads(heads, plan.new_heads, layer.planes, covariance)
    merged = merge_heads(heads.reorder(order), plan.new_heads, layer.planes, covariance)

    new: dict[str, Tensor] = {layer.output: merged.output.transpose(0, 1).flatten(1)}
    parts: dict[str, list[Tensor]] = {}
    for name, part in (
        (layer.query[0], merged.query),
        (plan.keys[0], merged.key),
        (plan.values[0], merged.value),
    ):
        parts.setdefault(name, []).append(part.flatten(0, 1))  # of a fused weight in its order
    for name, rows in parts.items():
        new[name] = torch.cat(rows)[:, :-1]
        if _bias(name) in old:
            new[_bias(name)] = torch.cat(rows)[:, -1]
    for name in layer.per_query_head:
        by_head = old[name].unflatten(0, (plan.heads, layer.query_heads // plan.heads, -1))
        new[name] = by_head[order].flatten(0, 2)
    for name in layer.per_kv_head:
        by_head = old[name].unflatten(0, (plan.heads, -1))[order]
        new[name] = by_head.unflatten(0, (plan.new_heads, -1)).mean(1).flatten(0, 1)
    return new


def _rows(tensors: Mapping[str, Tensor], name: str, start: int, heads: int, dim: int) -> Tensor:
    """Rows of a weight head by head, the bias as a last column."""
    weight = tensors[name]
    bias = tensors.get(_bias(name), torch.zeros(len(weight), dtype=weight.dtype))
    rows = torch.cat([weight, bias[:, None]], 1)[start : start + heads * dim]
    return rows.unflatten(0, (heads, dim))


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _layer(config: PreTrainedConfig, module: nn.Module, plan: LayerPlan) -> AlignedLayer:
    if not type(module).__module__.startswith("transformers.models."):
        raise _inexact(config, f"the code of {type(module).__name__} is not transformers' own")
    if plan.values is None:
        raise _inexact(config, f"the keys of {plan.name} serve as values")
    prefix = plan.name + "."
    shapes = {name: p.shape for name, p in module.named_parameters()}
    children = dict(module.named_children())
    key, value = (name.removeprefix(prefix) for name in (plan.keys[0], plan.values[0]))
    output = next((f"{name}.weight" for name in _OUTPUT if name in children), "")
    query = key if key == value else next((f"{n}.weight" for n in _QUERY if n in children), "")
    projections = {query, key, value, output}
    rest = set(shapes) - projections - {_bias(name) for name in projections}
    query_rows = plan.keys[1].start if key == value else shapes.get(query, (0,))[0]
    query_heads = query_rows // plan.key_dim
    expected = (query_heads * plan.key_dim, query_heads * plan.value_dim)
    if (
        not {query, output} <= set(shapes)
        or (query_rows, shapes[output][1]) != expected
        or query_heads % plan.heads
        or any(
            type(module.get_submodule(n.rpartition(".")[0])) is not nn.Linear for n in projections
        )
    ):
        raise _inexact(config, f"{plan.name} has not just projections of as many rows as heads")

    norms = {name for name in children if _NORM.match(name)}
    per_query: list[str] = []
    per_kv: list[str] = []
    for name in sorted(rest):
        rows, width = shapes[name][0], shapes[name].numel()
        of_query = name == "sinks" or name.startswith("q")
        heads = query_heads if of_query else plan.heads
        if name == "sinks" and width == query_heads:
            per_query.append(name)
        elif name.split(".")[0] not in norms:
            raise _inexact(config, f"{plan.name} has {name} beside its projections")
        elif width == plan.key_dim:
            continue  # the same for all heads
        elif width == heads * plan.key_dim and rows in (width, heads):
            (per_query if of_query else per_kv).append(name)
        else:
            raise _inexact(config, f"{name} of {plan.name} does not belong to single heads")
    for name, child in children.items():
        known = {n.split(".")[0] for n in projections} | norms
        rotary = type(child).__name__.endswith("RotaryEmbedding")
        if name not in known and not rotary and not isinstance(child, _HARMLESS):
            raise _inexact(config, f"{plan.name} has {name} beside its projections")
    names = [*projections, *(_bias(n) for n in projections - {output}), *per_query, *per_kv]
    return AlignedLayer(
        plan=plan,
        query=(prefix + query, 0),
        output=prefix + output,
        query_heads=query_heads,
        planes=None if norms else rotary_planes(module, config.get_text_config(), plan.key_dim),
        per_query_head=tuple(prefix + name for name in per_query),
        per_kv_head=tuple(prefix + name for name in per_kv),
        names=tuple(prefix + name for name in names if name in shapes),
    )


def _inexact(config: PreTrainedConfig, reason: str) -> ValueError:
    return ValueError(
        f"method='aligned' cannot convert {config.model_type}, because {reason}, so its heads "
        f"cannot be turned without changing the model: use method='mean'"
    )
