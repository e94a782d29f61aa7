"""A pattern that travels through transformers in place of an attention mask."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hf_attn_plugin.patterns.pattern import Pattern


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
        raise AttributeError(
            f"this model's code asks its attention mask for {name!r}, but under this attention the "
            "mask is a pattern and holds no values. Use attn_implementation='sdpa' or 'eager'."
        )

    def contiguous(self) -> PatternMask:
        """Itself."""
        return self

    def to(self, device: Any = None, *args: Any, **kwargs: Any) -> PatternMask:
        """The mask with its pattern's tensors on ``device``; other arguments do not apply."""
        if isinstance(device, torch.dtype):
            return self
        moved = self.pattern.to(device)
        return self if moved is self.pattern else PatternMask(moved, self.batch_size)
