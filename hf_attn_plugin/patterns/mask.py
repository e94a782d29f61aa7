"""A pattern that travels through transformers in place of an attention mask."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import torch

from hf_attn_plugin.patterns.pattern import Pattern

_NO_VALUES = (
    "this model's code {}, but under this attention the mask is a pattern and holds no values. "
    "Use attn_implementation='sdpa' or 'eager'."
)


class NoMaskValuesError(AttributeError, ValueError):
    """A model's code wants the values of a mask that holds none.

    An AttributeError, so that ``hasattr`` works as ever, and a ValueError like every refusal.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class PatternMask:
    """Stands in for a ``[batch, 1, q_len, kv_len]`` mask without holding one.

    It has what transformers and accelerate ask of a mask on the way: ``ndim`` and ``shape`` (so
    that it counts as ready made), ``contiguous`` (static caches) and ``to`` (device maps).

    Attributes:
        pattern: Which pairs attend.
        batch_size: Batch of the call.
    """

    pattern: Pattern
    batch_size: int

    @property
    def ndim(self) -> int:
        """Always 4."""
        return 4

    @property
    def shape(self) -> torch.Size:
        """``[batch, 1, q_len, kv_len]``."""
        return torch.Size((self.batch_size, 1, self.pattern.q_len, self.pattern.kv_len))

    def __getattr__(self, name: str) -> Any:
        raise NoMaskValuesError(_NO_VALUES.format(f"asks its attention mask for {name!r}"))

    def _refuse(self, *args: Any) -> Any:
        raise NoMaskValuesError(_NO_VALUES.format("computes with its attention mask"))

    # Python looks operators up on the class, past __getattr__.
    __getitem__ = __invert__ = __neg__ = __bool__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise NoMaskValuesError(_NO_VALUES.format("computes with its attention mask"))

    def __eq__(self, other: object) -> bool:
        return self._refuse() if isinstance(other, int | float | torch.Tensor) else self is other

    __hash__ = object.__hash__

    def contiguous(self) -> PatternMask:
        """Itself."""
        return self

    def to(self, device: Any = None, *args: Any, **kwargs: Any) -> PatternMask:
        """The mask with its pattern's tensors on ``device``; other arguments do not apply."""
        if isinstance(device, torch.dtype):
            return self
        moved = self.pattern.to(device)
        return self if moved is self.pattern else PatternMask(moved, self.batch_size)
