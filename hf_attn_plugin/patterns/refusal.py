"""A refusal that depends on values and can be compiled."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_where(wrong: Tensor, message: str, otherwise: Tensor) -> Tensor:
    """``otherwise``, unless ``wrong`` holds anywhere.

    Under torch.compile no value can be looked at while a graph is traced. There this is an operator
    of the graph, which looks when it runs, so that the graph stays whole. On a GPU that waits for
    all work before it, and CUDA graphs leave it out: for calls that are rare or long.

    Args:
        wrong: bool, any shape.
        message: Of the error.
        otherwise: What the computation goes on with. Something has to follow from the result, or
            the operator is left out as dead code.

    Raises:
        ValueError: ``wrong`` holds somewhere; under torch.compile when the graph runs.
    """
    if torch.compiler.is_compiling():
        checked: Tensor = _checked(wrong, message, otherwise)
        return checked
    if bool(wrong.any()):
        raise ValueError(message)
    return otherwise


@torch.library.custom_op(
    "hf_attn_plugin::refuse_where", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _checked(wrong: Tensor, message: str, otherwise: Tensor) -> Tensor:
    if bool(wrong.any()):
        raise ValueError(message)
    return otherwise.clone()


@_checked.register_fake
def _(wrong: Tensor, message: str, otherwise: Tensor) -> Tensor:
    return torch.empty_like(otherwise)
