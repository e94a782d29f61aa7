"""Fewer key/value heads: multi-head to grouped-query or multi-query attention (arXiv 2305.13245).

What has to change is not listed family by family. The model class is built twice without weights,
with the old and with the new number of heads in its config, and the two are compared: parameters
whose shape differs are to be pooled, integer attributes that differ are to be set. A family in
which anything but the outputs of a `k_proj` and `v_proj` differs is refused before a weight is
touched.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Method = Literal["mean", "first", "random"]
METHODS: tuple[str, ...] = get_args(Method)

SUPPORTED = (
    "supported are decoders with separate k_proj and v_proj and `num_key_value_heads` in their "
    "config, such as Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma 1 to 3, gpt-oss, Phi, "
    "StarCoder2 or SmolLM3"
)


@dataclass(frozen=True)
class GqaPlan:
    """What a conversion changes in a model; made from the config alone, without weights.

    Attributes:
        old_heads: Key/value heads per layer before.
        new_heads: Key/value heads per layer after.
        shapes: For every parameter that is pooled, its name and its shapes before and after.
        attributes: `(module name, attribute, new value)` for every integer to set.
    """

    old_heads: int
    new_heads: int
    shapes: dict[str, tuple[torch.Size, torch.Size]]
    attributes: tuple[tuple[str, str, int], ...]

    def cache_elements(self) -> tuple[int, int]:
        """Elements that the KV cache holds per token, all layers together: before and after."""
        weights = [shape for name, shape in self.shapes.items() if name.endswith(".weight")]
        return sum(old[0] for old, _ in weights), sum(new[0] for _, new in weights)


def to_gqa(
    model: PreTrainedModel, num_key_value_heads: int, method: Method = "mean", seed: int = 0
) -> PreTrainedModel:
    """Reduce the number of key/value heads of a model, in place (arXiv 2305.13245, section 2.1).

    Query heads are grouped in their order, and the key and value heads of each group become one;
    so a model that already shares heads can be reduced further. One key/value head is multi-query
    attention. Weights and biases, the layers' attributes and the config are changed together,
    dtype, device, `requires_grad` and tied weights stay. Afterwards the model needs uptraining:
    the paper trains on for 5 % of the pre-training steps. Create optimizers after this call.

    Args:
        model: A decoder as `from_pretrained` returns it, all weights in memory, not quantized.
        num_key_value_heads: New number of key/value heads per layer, a divisor of the present
            one. The present number leaves the model untouched, bit for bit.
        method: `"mean"` pools the heads of a group, the paper's choice; `"first"` keeps the first
            head of each, `"random"` draws new ones with the model's own initializer (the paper's
            two baselines).
        seed: For `"random"`; the global random state is left alone.

    Returns:
        The same model.

    Raises:
        ValueError: If the number or the method is not valid, or the family or the state of the
            model is not supported. The model is then unchanged.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    _check_model(model)
    plan = plan_gqa(type(model), model.config, num_key_value_heads)
    if plan.new_heads == plan.old_heads:
        return model
    _check_weights(model, plan)

    # `.data` keeps the Parameter objects, and with them ties, requires_grad and hooks.
    for name, values in _new_values(model, plan, method, seed):
        parameter = model.get_parameter(name)
        parameter.data = values.to(parameter.device, parameter.dtype)
        parameter.grad = None
    for module_name, attribute, value in plan.attributes:
        setattr(model.get_submodule(module_name), attribute, value)
    model.config.get_text_config().num_key_value_heads = plan.new_heads
    return model


def pool_heads(
    weight: torch.Tensor, num_heads: int, new_heads: int, method: Literal["mean", "first"] = "mean"
) -> torch.Tensor:
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
    _check_heads(num_heads, new_heads)
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


def plan_gqa(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, num_key_value_heads: int
) -> GqaPlan:
    """Work out a conversion from the config, without weights.

    Args:
        model_class: The class that `config` is for, for example `LlamaForCausalLM`.
        config: Its config; it is not changed.
        num_key_value_heads: New number of key/value heads per layer.

    Returns:
        The plan; with the present number of heads it changes nothing.

    Raises:
        ValueError: If the number is not valid or the family is not supported.
    """
    old_heads = _key_value_heads(config)
    _check_heads(old_heads, num_key_value_heads)
    if num_key_value_heads == old_heads:
        return GqaPlan(old_heads, old_heads, {}, ())

    new_config = copy.deepcopy(config)
    new_config.get_text_config().num_key_value_heads = num_key_value_heads
    old, new = (_build_without_weights(model_class, c) for c in (copy.deepcopy(config), new_config))
    new_shapes = {name: parameter.shape for name, parameter in new.named_parameters()}
    shapes = {
        name: (parameter.shape, new_shapes.get(name, torch.Size()))
        for name, parameter in old.named_parameters()
        if parameter.shape != new_shapes.get(name)
    }
    _check_shapes(config, shapes, old_heads, num_key_value_heads)
    _check_groups(config, old, shapes, old_heads)
    new_modules = dict(new.named_modules())
    attributes = tuple(
        (module_name, attribute, vars(new_modules[module_name])[attribute])
        for module_name, module in old.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, int) and vars(new_modules[module_name])[attribute] != value
    )
    return GqaPlan(old_heads, num_key_value_heads, shapes, attributes)


def _build_without_weights(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        return model_class(config)


def _new_values(
    model: PreTrainedModel, plan: GqaPlan, method: Method, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    if method != "random":
        for name in plan.shapes:
            parameter = model.get_parameter(name)
            yield name, pool_heads(parameter, plan.old_heads, plan.new_heads, method)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, (_, shape) in plan.shapes.items():
            if not name.endswith(".weight"):
                continue
            bias = name.removesuffix("weight") + "bias"
            linear = nn.Linear(shape[1], shape[0], bias=bias in plan.shapes, dtype=torch.float32)
            model._init_weights(linear)
            yield name, linear.weight.detach()
            if bias in plan.shapes:
                yield bias, linear.bias.detach()


def _check_heads(old_heads: int, new_heads: int) -> None:
    valid = [n for n in range(1, old_heads + 1) if old_heads % n == 0]
    if isinstance(new_heads, bool) or not isinstance(new_heads, int) or new_heads not in valid:
        raise ValueError(
            f"{old_heads} key/value heads cannot become {new_heads!r}: "
            f"the new number must be one of {', '.join(map(str, valid))}"
        )


def _key_value_heads(config: PreTrainedConfig) -> int:
    """The number of key/value heads per layer, where one number says it for all layers."""
    family = config.model_type
    if config.is_encoder_decoder:
        raise ValueError(f"{family} is an encoder-decoder, which cannot be converted: {SUPPORTED}")
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None)
    mixed = getattr(text, "is_heterogeneous", False)
    if heads is None and not mixed:
        raise ValueError(
            f"{family} has no `num_key_value_heads` in its config, its code cannot share key/value "
            f"heads that way: {SUPPORTED}"
        )
    mixed = mixed or any(
        name.endswith(("_key_value_heads", "key_value_heads_per_layer")) and value is not None
        for name, value in vars(text).items()
        if name != "num_key_value_heads"
    )
    if mixed or not isinstance(heads, int):
        raise ValueError(
            f"{family} has layers with different numbers of key/value heads, which cannot be "
            f"converted: {SUPPORTED}"
        )
    return heads


def _check_shapes(
    config: PreTrainedConfig,
    shapes: dict[str, tuple[torch.Size, torch.Size]],
    old_heads: int,
    new_heads: int,
) -> None:
    family = config.model_type
    if not shapes:
        raise ValueError(
            f"no weight of {family} depends on `num_key_value_heads`, so there is nothing to pool: "
            f"{SUPPORTED}"
        )
    others = {
        name.rpartition("layers.")[2].partition(".")[2] or name
        for name, (old, new) in shapes.items()
        if name.split(".")[-2:-1] not in (["k_proj"], ["v_proj"])
        or not new
        or old[0] * new_heads != new[0] * old_heads
        or old[1:] != new[1:]
    }
    if others:
        raise ValueError(
            f"{family} cannot be converted, because {', '.join(sorted(others))} depends on the "
            f"number of key/value heads and is not the output of a separate k_proj or v_proj (a "
            f"fused projection, or a norm over all heads): {SUPPORTED}"
        )


def _check_groups(
    config: PreTrainedConfig, model: PreTrainedModel, names: Iterable[str], old_heads: int
) -> None:
    """Refuse layers that hold another number of heads than the config says (MiMo-V2-Flash)."""
    groups = config.get_text_config().num_attention_heads // old_heads
    for name in names:
        attention = name.rsplit(".", 2)[0]
        present = getattr(model.get_submodule(attention), "num_key_value_groups", None)
        if present != groups:
            raise ValueError(
                f"{config.model_type} cannot be converted, because {attention} shares each "
                f"key/value head among {present} query heads where its config says {groups}: "
                f"{SUPPORTED}"
            )


def _check_model(model: PreTrainedModel) -> None:
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model carries PEFT adapters, whose shapes would no longer fit: merge them first "
            "(`model = model.merge_and_unload()`), or add adapters after the conversion"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"to_gqa takes a transformers model, got {type(model).__name__}: "
            "unwrap it first (`accelerator.unwrap_model`), or convert before wrapping or compiling"
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the model is quantized: load it without quantization, convert it, and quantize it anew"
        )


def _check_weights(model: PreTrainedModel, plan: GqaPlan) -> None:
    for name, (shape, _) in plan.shapes.items():
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            raise ValueError(f"the model has no parameter {name}, as its config says") from None
        projection = model.get_submodule(name.rpartition(".")[0])
        if type(projection) is not nn.Linear:
            raise ValueError(
                f"{name} is in a {type(projection).__name__}, and only a plain torch.nn.Linear can "
                "be converted: remove adapters and quantization first"
            )
        if parameter.is_meta:
            raise ValueError(
                f"{name} has no data (meta device): load the weights into memory, without "
                "offloading to disk or CPU"
            )
        if parameter.shape != shape or not parameter.is_floating_point():
            raise ValueError(
                f"{name} is {parameter.dtype} {list(parameter.shape)}, but the config says a "
                f"floating dtype and {list(shape)}"
            )
