"""What SparQ decoding keeps of a growing KV cache, and its way from the cache to the attention.

Transformers hands an attention function the cached keys and values but not the cache, so the state
travels as an attribute of the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_STATE = "_sparq_state"


@dataclass(eq=False)
class RunningMean:
    """Sum of the visible values of a growing cache, one addition per new position.

    Which positions are visible is known to the attention function only, so it adds them. A position
    keeps the visibility with which it was added.

    Attributes:
        counted: Positions accounted for, visible or not.
        total: float32 (float64 for float64 values) [B, Hkv, Dv], sum of the visible ones.
        seen: [B], how many were visible.
    """

    counted: int = 0
    total: Tensor | None = None
    seen: Tensor | None = None

    def update(self, values: Tensor, visible: Tensor | None = None) -> tuple[Tensor, int]:
        """Add the positions not yet counted.

        Args:
            values: [B, Hkv, S, Dv], all cached values.
            visible: bool [B, S] or [1, S], which of them count; None is all.

        Returns:
            The mean [B, Hkv, Dv] of all visible values, in the dtype of ``total`` and 0 where none
            was visible; and the bytes of ``values`` read for it.
        """
        batch, kv_heads, length, width = values.shape
        total, seen = self.total, self.seen
        if total is None or seen is None or self.counted > length:
            dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
            total = values.new_zeros(batch, kv_heads, width, dtype=dtype)
            seen = torch.zeros(batch, dtype=torch.int64, device=values.device)
            self.counted = 0
        new = values[:, :, self.counted :]
        read = new.numel() * new.element_size()
        if visible is None:
            total = total + new.sum(dim=2, dtype=total.dtype)
            seen = seen + new.shape[2]
        else:
            weights = visible[:, self.counted :].expand(batch, -1)
            new = torch.where(weights[:, None, :, None], new, 0)
            total = total + new.sum(dim=2, dtype=total.dtype)
            seen = seen + weights.sum(dim=1)
        self.total, self.seen, self.counted = total, seen, length
        return total / seen.clamp_min(1)[:, None, None], read

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension, such as a reordering of beams."""
        if self.total is not None and self.seen is not None:
            self.total, self.seen = function(self.total), function(self.seen)


@dataclass(frozen=True, eq=False)
class SparQState:
    """What goes with one state of the cached keys.

    It holds tensors only and nothing that leads back to the cache, so that it can be copied and
    saved with the keys and dies with them.

    Attributes:
        keys_t: [B, Hkv, D, S], the same keys component-major.
        running_mean: The running mean of that cache layer, shared by all its states.
    """

    keys_t: Tensor
    running_mean: RunningMean

    def mean(self, values: Tensor, visible: Tensor | None = None) -> tuple[Tensor, int]:
        """Mean of the visible values, and the bytes read for it: `RunningMean.update`."""
        return self.running_mean.update(values, visible)


def attach_state(keys: Tensor, state: SparQState) -> None:
    """Leave ``state`` on the tensor ``keys``; tensors computed from it do not have it."""
    setattr(keys, _STATE, state)


def sparq_state(keys: Tensor) -> SparQState | None:
    """The state that the cache left on these keys, None on any other tensor."""
    return getattr(keys, _STATE, None)
