"""The launches of a call, recorded once and repeated for the next calls of the same layout.

A model calls attention once per layer with tensors of one layout, and working out and examining the
seventy arguments of a kernel takes the host longer than a short call takes the GPU. So the first
call of a layout launches as it comes, and is recorded; those after it fill in where their tensors
lie. What a launch takes besides numbers is one of the call's tensors, scratch memory that the
recording hands out, or a tensor of the plan, which stays.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.triton.dispatch import launch


class Recording:
    """The launches of one layout, in order.

    Args:
        tensors: Of the call that is recorded, each a Python object of its own; None: not given.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._tensors: list[Tensor | None] = list(tensors)
        self._device = next(t.device for t in tensors if t is not None)
        self._scratch: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.launches: list[_Launch] = []

    def scratch(self, *shape: int) -> Tensor:
        """Contiguous float32 memory that lasts as long as a call."""
        return self._hand_out(torch.empty(shape, dtype=torch.float32, device=self._device))

    def scratch_like(self, tensor: Tensor) -> Tensor:
        """Float32 memory with a tensor's shape and order of dimensions, for as long as a call."""
        return self._hand_out(torch.empty_like(tensor, dtype=torch.float32))

    def _hand_out(self, memory: Tensor) -> Tensor:
        self._tensors.append(memory)
        self._scratch.append((memory.shape, memory.stride()))
        return memory

    def launch(
        self, kernel: Any, programs: int, arguments: dict[str, Any], fixed: dict[str, Any]
    ) -> None:
        """Run ``kernel`` in ``programs`` programs, and remember it.

        The arguments are those of `dispatch.launch`.
        """
        compiled = launch(kernel, programs, arguments, fixed)
        everything = arguments | fixed
        values = [everything[name] for name in kernel.arg_names]
        places = {id(t): place for place, t in enumerate(self._tensors) if t is not None}
        if compiled is not None:
            self.launches.append(_Launch(compiled[(programs, 1, 1)], values, places))
        else:  # the interpreter compiles nothing
            self.launches.append(_Launch(kernel[(programs,)], values, places, numbers=False))

    def close(self) -> None:
        """Let go of the tensors of the call that was recorded."""
        self._tensors.clear()

    def repeat(self, tensors: Sequence[Tensor | None]) -> None:
        """The same launches for other tensors of the same layout."""
        made = [
            torch.empty_strided(*shape_and_strides, dtype=torch.float32, device=self._device)
            for shape_and_strides in self._scratch
        ]
        everything = [*tensors, *made]
        for step in self.launches:
            step.run(everything)


class _Launch:
    """A compiled kernel with its arguments in order, but for those that are a call's.

    Args:
        start: What takes the arguments.
        values: The arguments of the first call.
        places: Where the first call's tensors, by their ids, stand among those of any call.
        numbers: Whether pointers are passed as numbers, which spares Triton to look up whose they
            are.
    """

    def __init__(
        self, start: Any, values: list[Any], places: dict[int, int], *, numbers: bool = True
    ) -> None:
        self._start, self._values, self._numbers = start, values, numbers
        self._stay: list[Tensor] = []
        self._pointers: list[tuple[int, int]] = []
        self._descriptors: list[tuple[int, int, type, dict[str, Any]]] = []
        for index, value in enumerate(values):
            tensor = getattr(value, "base", None) if hasattr(value, "block_shape") else value
            if not isinstance(tensor, Tensor):
                continue
            place = places.get(id(tensor))
            if place is None:
                # The plan's, all of int32: any other would be a call's that nobody gave.
                assert tensor.dtype == torch.int32
                self._stay.append(tensor)
                values[index] = tensor.data_ptr() if numbers else tensor
                continue
            values[index] = None
            if tensor is value:
                self._pointers.append((index, place))
            else:
                self._descriptors.append((index, place, type(value), {**vars(value), "base": None}))

    def run(self, tensors: Sequence[Any]) -> None:
        """Launch it with these."""
        values = self._values.copy()
        for index, place in self._pointers:
            tensor = tensors[place]
            values[index] = tensor.data_ptr() if self._numbers else tensor
        for index, place, kind, fields in self._descriptors:
            # Without the checks of the constructor, which the first one has passed.
            descriptor: Any = object.__new__(kind)
            descriptor.__dict__.update(fields, base=tensors[place])
            values[index] = descriptor
        self._start(*values)


def layout(tensor: Tensor | None) -> Hashable:
    """What launches depend on in a tensor: all but where it lies, and its values."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16
