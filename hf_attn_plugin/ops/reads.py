"""What a decoding step read of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CacheReads:
    """Bytes of KV cache that one decoding step read, counted from the tensors it gathered.

    Attributes:
        keys: Rows of keys read for exact attention.
        values: Rows of values read for exact attention.
        components: Key components read to find these rows.
        mean: What the mean value took: the running sums, or the values it was computed from.
        dense: What dense attention would have read, all cached keys and values.
    """

    keys: int
    values: int
    components: int
    mean: int
    dense: int

    @property
    def total(self) -> int:
        """Bytes read in all."""
        return self.keys + self.values + self.components + self.mean


def nbytes(*tensors: Tensor) -> int:
    """Bytes of all elements of ``tensors``."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
