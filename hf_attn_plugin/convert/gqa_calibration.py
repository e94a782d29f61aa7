"""What a model's attention layers are given on real text, for a conversion that fits it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attn_plugin.convert.gqa_plan import GqaPlan
from hf_attn_plugin.convert.in_place import evaluating


def input_covariances(
    model: PreTrainedModel, plan: GqaPlan, batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Second moments of the inputs of the layers that a conversion changes.

    Args:
        model: The model before its conversion; left as it was, its modules' modes included.
        plan: The conversion.
        batches: Arguments of `model.forward`, for example `{"input_ids": ...}`. Where a 2D
            `attention_mask` is among them, padding does not count.

    Returns:
        For every layer the mean of `x xᵀ` over tokens, `x` being its input with a 1 appended:
        float64 on the CPU, `[inputs + 1, inputs + 1]`.

    Raises:
        ValueError: If there is no batch, one is no mapping, or a layer is never called.
    """
    if isinstance(batches, Mapping | Tensor):
        raise _no_batches(batches)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    valid: Tensor | None = None

    def observer(layer: str) -> Any:
        def observe(_: Any, inputs: tuple[Tensor, ...]) -> None:
            states = inputs[0].detach()
            if valid is not None and states.shape[:-1] == valid.shape:
                states = states[valid]
            states = states.flatten(0, -2).float()
            states = torch.cat([states, states.new_ones(len(states), 1)], 1)
            product = (states.mT @ states).to("cpu", torch.float64)
            sums[layer] = sums[layer] + product if layer in sums else product
            counts[layer] = counts.get(layer, 0) + len(states)

        return observe

    hooks = [
        model.get_submodule(layer.keys[0].rpartition(".")[0]).register_forward_pre_hook(
            observer(layer.name)
        )
        for layer in plan.layers
    ]
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                if not isinstance(batch, Mapping):
                    raise _no_batches([batch])
                mask = batch.get("attention_mask")
                valid = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    missed = [layer.name for layer in plan.layers if not counts.get(layer.name)]
    if missed:
        raise ValueError(
            f"the calibration batches never reach {missed[0]}: give at least one batch, and one "
            f"that the whole model takes part in"
        )
    return {name: total / counts[name] for name, total in sums.items()}


def _no_batches(given: Any) -> ValueError:
    held = (
        f"a list of {type(given[0]).__name__}" if isinstance(given, list) else type(given).__name__
    )
    return ValueError(
        f"calibration must be batches, each a mapping of arguments of the model's forward, such as "
        f"[{{'input_ids': ids}}], got {held}"
    )
