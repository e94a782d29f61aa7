"""What the host tells kernels for Hopper of tensors: descriptors of the tiles that TMA moves."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device has these GPUs' own instructions: no other generation does."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def descriptor(base: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """Tiles of shape ``block`` of memory with these strides, in elements."""
    unit = 16 // base.element_size()
    # A dimension of one entry has a stride that nobody uses: any valid one will do.
    steps = [step if count > 1 else unit for count, step in zip(shape, strides, strict=True)]
    layout = _layout(tuple(block), base.dtype)
    return TensorDescriptor(base, shape, [*steps[:-1], 1], block, layout)


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), DTYPES[dtype])


def of_keys(tensor: Tensor, tokens: int) -> Any:
    """Tiles of tokens of one head."""
    block = [1, 1, tokens, tensor.shape[3]]
    return descriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
