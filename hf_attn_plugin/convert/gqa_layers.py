"""The new weights of a conversion, layer by layer, wherever the old ones are read from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attn_plugin.convert.gqa_plan import (
    GqaPlan,
    HeadRows,
    build_without_weights,
    plan_gqa,
)
from hf_attn_plugin.convert.gqa_structure import AlignedLayer, align_layer, plan_aligned

Method = Literal["mean", "first", "random", "aligned"]
METHODS: tuple[str, ...] = get_args(Method)


class Conversion:
    """A conversion that has been found possible.

    Args:
        model_class: The model's class.
        config: Its config; it is not changed.
        num_key_value_heads: As for `to_gqa`.
        method: As for `to_gqa`.
        seed: As for `to_gqa`.

    Attributes:
        plan: What changes whatever the method.
        parameters: The parameters that change, layer by layer; for `"aligned"` queries and output
            projections too.

    Raises:
        ValueError: As `to_gqa` does, for all that can be known without weights.
    """

    def __init__(
        self,
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        num_key_value_heads: int,
        method: Method = "mean",
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
        self.plan: GqaPlan = plan_gqa(model_class, config, num_key_value_heads)
        self.method: Method = method
        self._seed = seed
        self._skeleton = build_without_weights(model_class, config)
        self._aligned: dict[str, AlignedLayer] = {}
        if method == "aligned":
            layers = plan_aligned(model_class, config, self.plan)
            self._aligned = {layer.plan.name: layer for layer in layers}
        self.parameters: dict[str, tuple[str, ...]] = {
            layer.name: self._aligned[layer.name].names
            if self._aligned
            else tuple(name for name in self.plan.rows if name.startswith(layer.name + "."))
            for layer in self.plan.layers
        }

    @property
    def layers_with_turned_keys(self) -> int:
        """Layers in which `"aligned"` may turn keys; elsewhere it averages them."""
        return sum(layer.planes is not None for layer in self._aligned.values())

    def old_shape(self, name: str) -> torch.Size:
        """The shape of a parameter before."""
        return self._skeleton.get_parameter(name).shape

    def new_shape(self, name: str) -> torch.Size:
        """The shape of a parameter afterwards."""
        return self.plan.shapes[name][1] if name in self.plan.shapes else self.old_shape(name)

    def is_linear(self, module: str) -> bool:
        """Whether a module is a projection in an untouched model."""
        return type(self._skeleton.get_submodule(module)) is nn.Linear

    def new_tensors(
        self,
        layer: str,
        read: Callable[[str], Tensor],
        covariances: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The new parameters of one layer.

        Args:
            layer: One of `parameters`.
            read: Gives an old parameter by its name; every device and floating dtype.
            covariances: For `"aligned"`, the second moment of each layer's inputs.

        Returns:
            For every name in `parameters[layer]` a tensor of the new shape, in the old one's dtype
            and on its device, with a storage of its own.
        """
        if self._aligned:
            covariance = None if covariances is None else covariances[layer]
            new = align_layer(self._aligned[layer], read, covariance)
        elif self.method == "random":
            new = dict(self._random(layer, read))
        else:
            new = {
                name: pool_rows(read(name), self.plan.rows[name], self.method)
                for name in self.parameters[layer]
            }
        result = {}
        for name in self.parameters[layer]:
            old = read(name)
            if not bool(torch.isfinite(new[name]).all()):
                raise ValueError(f"{name} holds values that are not finite, or leads to such")
            result[name] = new[name].to(old.device, old.dtype).contiguous()
        return result

    def _random(self, layer: str, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """New heads as the model itself initializes them; norms have none, and are pooled."""
        names = list(self.plan.rows)
        for name in self.parameters[layer]:
            old, rows = read(name), self.plan.rows[name]
            module, _, kind = name.rpartition(".")
            if not self.is_linear(module):
                yield name, pool_rows(old, rows)
                continue
            bias = f"{module}.bias"
            if kind == "bias":
                continue  # comes with its weight
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                # A stream for each weight, so that it does not matter which are read first.
                torch.manual_seed(self._seed * len(names) + names.index(name))
                linear = nn.Linear(old.shape[1], len(old), bias in names, dtype=torch.float32)
                self._skeleton._init_weights(linear)
            yield name, _replace_rows(old, linear.weight.detach(), rows)
            if bias in names:
                yield bias, _replace_rows(read(bias), linear.bias.detach(), rows)


def pool_heads(
    weight: Tensor, num_heads: int, new_heads: int, method: Literal["mean", "first"] = "mean"
) -> Tensor:
    """Make one head of every `num_heads / new_heads` consecutive ones.

    Args:
        weight: A projection's weight `[num_heads * head_dim, in_features]` or its bias
            `[num_heads * head_dim]`, any floating dtype and device.
        num_heads: Heads in `weight`.
        new_heads: Heads in the result, a divisor of `num_heads`.
        method: The mean of the heads, taken in float64 and rounded once, or the `"first"` one.

    Returns:
        `[new_heads * head_dim, in_features]` or `[new_heads * head_dim]`, in a storage of its own,
        with the dtype and device of `weight`, detached.

    Raises:
        ValueError: If the heads do not divide, or `weight` is not floating point.
    """
    if new_heads < 1 or num_heads % new_heads:
        valid = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"{num_heads} key/value heads cannot become {new_heads!r}: "
            f"the new number must be one of {', '.join(map(str, valid))}"
        )
    if method not in ("mean", "first"):
        raise ValueError(f"method must be mean or first, got {method!r}")
    if weight.shape[0] % num_heads:
        raise ValueError(
            f"{weight.shape[0]} rows are not a whole number for each of {num_heads} heads"
        )
    if not weight.is_floating_point():
        raise ValueError(f"heads of dtype {weight.dtype} cannot be pooled: dequantize them first")
    head_dim = weight.shape[0] // num_heads
    # [new_heads, heads per group, head_dim, ...]
    groups = weight.detach().unflatten(0, (new_heads, num_heads // new_heads, head_dim))
    if method == "first":
        return groups[:, 0].flatten(0, 1).clone()
    # On the CPU, as not every device has float64; and the result is then the same on each.
    pooled = groups.to("cpu", torch.float64).mean(1).flatten(0, 1)
    return pooled.to(weight.device, weight.dtype)


def pool_rows(weight: Tensor, rows: tuple[HeadRows, ...], method: str = "mean") -> Tensor:
    """Pool the heads in some rows of a parameter, and keep the other rows."""
    parts, start = [], 0
    for run in rows:
        parts.append(weight[start : run.start].detach())
        # Cohere's norms have a row per head, and so a head of one row.
        pooled = pool_heads(
            weight[run.start : run.stop],
            run.heads,
            run.new_heads,
            "first" if method == "first" else "mean",
        )
        parts.append(pooled)
        start = run.stop
    parts.append(weight[start:].detach())
    return torch.cat(parts)


def _replace_rows(old: Tensor, fresh: Tensor, rows: tuple[HeadRows, ...]) -> Tensor:
    """The old rows outside the runs, and within each run the first of the fresh ones."""
    parts, start = [], 0
    for run in rows:
        parts.append(old[start : run.start].detach().to(fresh))
        parts.append(fresh[run.start : run.start + run.new_heads * run.head_dim])
        start = run.stop
    parts.append(old[start:].detach().to(fresh))
    return torch.cat(parts)
