"""Counting what decoding reads of the KV cache, where a caller asked for it."""

from __future__ import annotations

import collections
import dataclasses

from torch import nn

# The counter hangs on the module that attends, so that no state is shared between models.
COUNTER_ATTRIBUTE = "_hf_attn_reads"


@dataclasses.dataclass
class CacheReadCounter:
    """What the attention calls of a model did.

    Attributes:
        calls: Number of attention calls, by ``attn_implementation``.
        decode_calls: Calls with one query per sequence, over all layers.
        kv_bytes_read: Bytes of keys and values (and of their copies) that these read.
        kv_bytes_dense: Bytes that dense attention would have read in the same calls.
    """

    calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    decode_calls: int = 0
    kv_bytes_read: int = 0
    kv_bytes_dense: int = 0
    _layers: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    _last: tuple[int, int] | None = None

    @property
    def decode_steps(self) -> int:
        """Decoding steps of the whole model."""
        return max(self._layers.values(), default=0)

    @property
    def ratio(self) -> float | None:
        """Bytes read as a share of dense attention's; None before the first decoding step."""
        return self.kv_bytes_read / self.kv_bytes_dense if self.kv_bytes_dense else None

    def add(self, layer: int, method: str, read: int | None, dense: int | None) -> None:
        """Count one call; ``read`` and ``dense`` are None unless it is a decoding step."""
        self.calls[method] += 1
        self._last = None
        if read is not None and dense is not None:
            self._last = read, dense
            self.decode_calls += 1
            self._layers[layer] += 1
            self.kv_bytes_read += read
            self.kv_bytes_dense += dense

    def correct(self, read: int, dense: int) -> None:
        """Put these in the place of what the last call counted, if it was a decoding step."""
        if self._last is not None:
            self.kv_bytes_read += read - self._last[0]
            self.kv_bytes_dense += dense - self._last[1]
            self._last = read, dense


def is_counted(module: nn.Module) -> bool:
    """Whether somebody counts what ``module`` reads."""
    return hasattr(module, COUNTER_ATTRIBUTE)


def record(
    module: nn.Module, method: str, *, read: int | None = None, dense: int | None = None
) -> None:
    """Report a call to the counter on ``module``, if there is one."""
    counter = getattr(module, COUNTER_ATTRIBUTE, None)
    if counter is not None:
        counter.add(id(module), method, read, dense)
