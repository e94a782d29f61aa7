"""What hangs on a model while it holds a part of a sequence, and is taken off again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.methods.sharding import ROWS_ATTRIBUTE, Rows


@contextlib.contextmanager
def hung(model: nn.Module, rows: Rows) -> Iterator[None]:
    """All modules of ``model`` are told of ``rows`` inside the block.

    Raises:
        ValueError: They are told of others already.
    """
    modules = list(model.modules())
    refuse_nested(model)
    try:
        for module in modules:
            setattr(module, ROWS_ATTRIBUTE, rows)
        yield
    finally:
        for module in modules:
            if getattr(module, ROWS_ATTRIBUTE, None) is rows:
                delattr(module, ROWS_ATTRIBUTE)


def refuse_nested(model: nn.Module) -> None:
    """Refuse a model that is inside such a block."""
    if any(hasattr(module, ROWS_ATTRIBUTE) for module in model.modules()):
        raise ValueError(
            "sequence_parallel: this model is inside another sequence_parallel block. Leave that "
            "one first: a block holds one batch, forward and backward."
        )


@contextlib.contextmanager
def whole_rotary(model: nn.Module, last: Tensor) -> Iterator[None]:
    """RoPE that depends on the longest position of a call (dynamic, longrope) sees the whole's.

    Args:
        model: The model.
        last: The largest position in the whole rows, 0-d.
    """
    handles = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(isinstance(k, str) and ("dynamic" in k or k == "longrope") for k in kinds):
            handles.append(module.register_forward_pre_hook(_OneMore(last), with_kwargs=True))
            handles.append(module.register_forward_hook(_one_less))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _OneMore:
    """Puts the largest position behind a rotary module's own."""

    def __init__(self, last: Tensor) -> None:
        self.last = last

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": self._extend(kwargs["position_ids"])}
        return (args[0], self._extend(args[1]), *args[2:]), kwargs

    def _extend(self, positions: Tensor) -> Tensor:
        last = self.last.to(positions).expand(*positions.shape[:-1], 1)
        return torch.cat([positions, last], -1)


def _one_less(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output[..., :-1, :]
    return tuple(part[..., :-1, :] for part in output)
