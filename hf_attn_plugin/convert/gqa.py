"""Fewer key/value heads: from multi-head to grouped-query attention (arXiv 2305.13245)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attn_plugin.convert.gqa_calibration import input_covariances
from hf_attn_plugin.convert.gqa_layers import Conversion, Method
from hf_attn_plugin.convert.gqa_plan import set_heads
from hf_attn_plugin.convert.in_place import replace_parameters


def to_gqa(
    model: PreTrainedModel,
    num_key_value_heads: int,
    method: Method = "mean",
    seed: int = 0,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> PreTrainedModel:
    """Reduce the number of key/value heads of a model, in place (arXiv 2305.13245, section 2.1).

    Query heads are grouped, and the key and value heads of each group become one; so a model that
    already shares heads can be reduced further. One key/value head is multi-query attention.
    Weights and biases, the layers' attributes and the config are changed together; dtype, device,
    `requires_grad` and tied weights stay. Of a model with several towers the text decoder is
    converted. Afterwards the model needs uptraining: the paper trains on for 5 % of the
    pre-training steps. What changes becomes a new `Parameter` without a gradient: create
    optimizers, and hooks on parameters, after this call.

    A norm over the keys of all heads together (OLMo 2) is pooled with them: the result is what it
    was where the heads of a group are equal, and otherwise an approximation like the rest.

    Args:
        model: A decoder as `from_pretrained` returns it, all weights in memory, not quantized.
        num_key_value_heads: New number of key/value heads per layer, a divisor of the present
            one. The present number leaves the model untouched, bit for bit. Where layers have
            different numbers, those that have more are reduced to this one.
        method: `"mean"` pools the heads of a group, the paper's choice; `"first"` keeps the first
            head of each, `"random"` draws new ones with the model's own initializer (the paper's
            two baselines); queries stay as they are in these three. `"aligned"` puts similar heads
            into one group, turns them towards each other in ways that leave the model what it is,
            and merges them with the least squared error (see `gqa_aligned`, and
            arXiv 2412.20677 for the idea); queries and output projections take up the turns. Keys
            that pass a norm cannot be turned, and are averaged.
        seed: For `"random"`, from 0 to 2**32 - 1; the global random state is left alone.
        calibration: For `"aligned"`: batches of real inputs, arguments of `model.forward`, on
            which the error is measured. Without them it is that of the weights, which was no worse
            after uptraining where both were measured (`eval/gqa_study.py`).

    Returns:
        The same model.

    Raises:
        ValueError: If the number or the method is not valid, or the family or the state of the
            model is not supported. The model is then unchanged.
    """
    if calibration is not None and method != "aligned":
        raise ValueError(f"calibration is for method='aligned', method={method!r} does not use it")
    _check_model(model)
    conversion = Conversion(type(model), model.config, num_key_value_heads, method, seed)
    plan = conversion.plan
    if plan.new_heads == plan.old_heads:
        return model
    _check_weights(model, conversion)
    covariances = None if calibration is None else input_covariances(model, plan, calibration)

    values: dict[str, Tensor] = {}
    for layer in conversion.parameters:
        values |= conversion.new_tensors(layer, model.get_parameter, covariances)
    # Nothing is changed before everything has been computed: a failure leaves the model whole.
    replace_parameters(model, values)
    for module_name, attribute, number in plan.attributes:
        setattr(model.get_submodule(module_name), attribute, number)
    set_heads(model.config, plan.new_heads)
    return model


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


def _check_weights(model: PreTrainedModel, conversion: Conversion) -> None:
    for name in (name for names in conversion.parameters.values() for name in names):
        shape = conversion.old_shape(name)
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            raise ValueError(f"the model has no parameter {name}, as its config says") from None
        module = name.rpartition(".")[0]
        projection = model.get_submodule(module)
        if type(projection) is not nn.Linear and conversion.is_linear(module):
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
