"""What linear attention keeps between calls, and its way from the cache to the attention.

Transformers hands an attention function the keys and values but not the cache, and only the
attention function knows which keys are padding. So the cache layer leaves a slot on the new keys,
and the attention function takes the state out of it and puts the next one in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.ops.torch.linear_features import FeatureMap

_SLOT = "_linear_attention_slot"
SUMS, LOG_SCALE = 0, 1  # keys of the two parts of a state among a cache layer's recurrent states


@dataclasses.dataclass(frozen=True, eq=False)
class LinearState:
    """What linear attention keeps of the keys and values it has seen; its size does not grow.

    Attributes:
        sums: float32 (float64 for float64 inputs) ``[batch, kv_heads, features, value_dim + 1]``,
            sums of ``phi(k) (v, 1)^T`` over the visible keys, times ``exp(-log_scale)``.
        log_scale: ``[batch, kv_heads]``, the logarithm of the largest factor among the keys; -inf
            where none was visible. A factor common to all sums, it leaves the output alone.
        feature_map: The features the sums are made of.
    """

    sums: Tensor
    log_scale: Tensor
    feature_map: FeatureMap

    @property
    def nbytes(self) -> int:
        """Bytes that a decoding step reads of it."""
        return nbytes(self.sums, self.log_scale)


@dataclasses.dataclass(eq=False)
class StateSlot:
    """The state of one cache layer. It holds nothing that leads back to the cache or to keys.

    Attributes:
        tensors: The layer's ``recurrent_states``, shared with it: `SUMS` and `LOG_SCALE`.
        feature_map: The features of the state in ``tensors``.
        tokens: Tokens that the state covers, padding included.
    """

    tensors: dict[int, Tensor | None]
    feature_map: FeatureMap | None = None
    tokens: int = 0

    def read(self, start: int) -> LinearState | None:
        """The state of the ``start`` tokens so far; None when there are none yet.

        Raises:
            ValueError: The state covers other tokens: some went into the cache without passing
                through attention, a forward pass broke off, or the layer attends a second time.
        """
        if self.tokens > start:
            raise ValueError(
                "attn_implementation='linear': this layer attends more than once to the keys that "
                "it put into its cache (differential attention, DiffLlama), and the cache has room "
                "for one state. Pass use_cache=False in training, or use "
                "attn_implementation='flash'."
            )
        if self.tokens != start:
            raise ValueError(
                f"attn_implementation='linear': the cache was given {start} tokens, and attention "
                f"has seen {self.tokens} of them. Keys cannot be put into this cache by hand "
                "(prefix tuning), and after a forward pass that broke off it cannot be used any "
                "more: start with a new cache, or use attn_implementation='flash'."
            )
        sums, log_scale = self.tensors[SUMS], self.tensors[LOG_SCALE]
        if sums is None or log_scale is None or self.feature_map is None:
            return None
        return LinearState(sums, log_scale, self.feature_map)

    def write(self, state: LinearState, tokens: int) -> None:
        """Put in the state after ``tokens`` tokens."""
        self.tensors[SUMS], self.tensors[LOG_SCALE] = state.sums, state.log_scale
        self.feature_map, self.tokens = state.feature_map, tokens

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension, such as a reordering of beams."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = None if tensor is None else function(tensor)

    def clear(self) -> None:
        """Forget everything."""
        self.tensors[SUMS] = self.tensors[LOG_SCALE] = None
        self.feature_map, self.tokens = None, 0


def attach_slot(keys: Tensor, slot: StateSlot, start: int) -> None:
    """Leave ``slot`` on the new ``keys``, which follow ``start`` earlier tokens."""
    setattr(keys, _SLOT, (slot, start))


def attached_slot(keys: Tensor) -> tuple[StateSlot, int] | None:
    """The slot that the cache left on these keys and the number of earlier tokens, or None."""
    return getattr(keys, _SLOT, None)
