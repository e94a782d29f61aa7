"""Launches that look up what is compiled by what matters here, not by all arguments."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

_compiled: dict[Hashable, Any] = {}


def launch(kernel: Any, programs: int, arguments: dict[str, Any], fixed: dict[str, Any]) -> Any:
    """Run ``kernel`` in ``programs`` programs.

    Triton's own launch examines every one of some seventy arguments, which takes the host longer
    than the rest of a call. The code depends on ``fixed``, on the kind and alignment of tensors,
    and on nothing else, since the kernels declare the types of their numbers.

    Args:
        kernel: A jitted kernel whose numbers all have types and are not specialised.
        programs: How many.
        arguments: What differs between calls, always in the same order.
        fixed: What the kernel is compiled for, and options as ``num_warps``.

    Returns:
        The compiled kernel; None from the interpreter.
    """
    key: list[Hashable] = [id(kernel), *fixed.values()]
    for value in arguments.values():
        kind = type(value)
        if kind is int or kind is float:
            continue
        if isinstance(value, Tensor):
            key.append((value.dtype, value.device.index, value.data_ptr() % 16 == 0))
        elif value is None:
            key.append(None)
        else:  # a descriptor, Triton's or Gluon's
            key.append((value.base.dtype, *value.block_shape, getattr(value, "layout", None)))
    compiled = _compiled.get(tuple(key))
    if compiled is not None:
        everything = arguments | fixed
        compiled[(programs, 1, 1)](*[everything[name] for name in kernel.arg_names])
        return compiled
    compiled = kernel[(programs,)](**arguments, **fixed)
    if compiled is not None:
        _compiled[tuple(key)] = compiled
    return compiled


class _Threads(threading.local):
    """The devices whose CUDA context this thread has made current."""

    def __init__(self) -> None:
        self.devices: set[int | None] = set()


_threads = _Threads()


def on_device(tensor: Tensor) -> Any:
    """A context in which kernels run where ``tensor`` is.

    Triton encodes TMA descriptors before it looks for a CUDA context, and fails where a thread has
    none yet: autograd's, if a launch is the first thing that it does there and all memory comes
    from PyTorch's cache. Any launch of PyTorch's own makes the context current; one that fills an
    element may be part of a CUDA graph, too.
    """
    device = tensor.device
    if device.type == "cuda" and device.index not in _threads.devices:
        torch.empty(1, device=device).zero_()
        _threads.devices.add(device.index)
    return torch.cuda.device_of(tensor)
