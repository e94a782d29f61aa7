"""Evaluating ``sparq`` itself where dense attention would stand in for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_attn_plugin.config import SparQConfig, configure, parameters_of


def choose_always(model: Any) -> bool:
    """Let ``sparq`` choose keys at every length, unless its ``dense_below`` says otherwise.

    On a GPU it is dense over short caches, where that is faster; scores and bytes of a small
    evaluation would then be dense attention's.

    Returns:
        Whether the model's parameters were changed.
    """
    text: Any = model.config.get_text_config()
    parameters = parameters_of(text, SparQConfig)
    device = getattr(model, "device", None)
    if (
        text._attn_implementation != SparQConfig.name
        or parameters.dense_below is not None
        or getattr(device, "type", None) != "cuda"
    ):
        return False
    configure(model, dataclasses.replace(parameters, dense_below=0))
    return True
