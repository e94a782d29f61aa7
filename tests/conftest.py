"""Fixtures for all tests; helpers that tests import live in ``tiny.py`` beside this file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

sys.path.insert(0, str(Path(__file__).parent))  # `from tiny import ...`, whatever the import mode

pytest_plugins = ["families.plugin"]  # pytest -m families

# Tensors are tiny here: threads take longer to wait for each other than one takes for all of it.
# Other cores are for other processes (pytest -n).
if not torch.cuda.is_available():
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what tests start

# `with torch.device(...)` knows the functions that make tensors by identity, and remembers them
# from its first use on: that must not be one with the fixture below in force.
_device_constructors()


@pytest.fixture(autouse=True)
def _nan_in_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN, so that reading it cannot go unnoticed."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def registries() -> Iterator[None]:
    """Puts transformers' registries and the functions we wrap back after the test."""
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        cache_utils,
        masking_utils,
    )
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel

    tables = [
        AttentionInterface._global_mapping,
        AttentionMaskInterface._global_mapping,
        cache_utils.DYNAMIC_LAYER_TYPE_MAPPING,
        cache_utils.STATIC_LAYER_TYPE_MAPPING,
    ]
    saved = [dict(table) for table in tables]
    wrapped: list[tuple[Any, str]] = [
        (PreTrainedModel, "_check_and_adjust_attn_implementation"),
        (PreTrainedModel, "set_attn_implementation"),
        (masking_utils, "is_flash_attention_requested"),
        (masking_utils, "_preprocess_mask_arguments"),
        (PreTrainedConfig, "attn_params"),
        (cache_utils, "get_layer_types_and_kwargs"),
        (cache_utils.DynamicCache, "__init__"),
        (cache_utils.QuantizedCache, "__init__"),
    ]
    values = [vars(owner).get(name) for owner, name in wrapped]
    yield
    for table, content in zip(tables, saved, strict=True):
        table.clear()
        table.update(content)
    for (owner, name), value in zip(wrapped, values, strict=True):
        if value is not None:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)
