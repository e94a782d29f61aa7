"""Gap: transformers' caches hold keys one way only.

The cache that ``sparq`` reads: keys stored a second time component-major, running mean value.

``install()`` makes transformers build it by itself wherever it builds a `DynamicCache` for a model
whose attention implementation is ``sparq``. Static caches keep their own layers, since a compiled
decoding step cannot carry this one's Python state; ``sparq`` then works without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicLayer, StaticLayer

from hf_attn_plugin.ops.sparq_state import RunningMean, SparQState, attach_state

METHOD = "sparq"
LAYER_TYPE = "sparq:full_attention"


@dataclass(frozen=True, eq=False)
class _Buffers:
    """Memory of one layer, of which the first positions are in use."""

    keys: Tensor  # [B, Hkv, capacity, D]
    values: Tensor  # [B, Hkv, capacity, Dv]
    keys_t: Tensor  # [B, Hkv, D, capacity]

    @classmethod
    def allocate(cls, keys: Tensor, values: Tensor, capacity: int) -> _Buffers:
        """Empty buffers for ``capacity`` positions of such keys and values."""
        batch, kv_heads, _, head_dim = keys.shape
        return cls(
            keys=keys.new_empty(batch, kv_heads, capacity, head_dim),
            values=values.new_empty(batch, kv_heads, capacity, values.shape[-1]),
            keys_t=keys.new_empty(batch, kv_heads, head_dim, capacity),
        )

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.keys.shape[2]

    @property
    def writable(self) -> bool:
        """Whether this mode may write: inference-mode tensors are frozen outside of it."""
        return not self.keys.is_inference() or torch.is_inference_mode_enabled()

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values from position ``start`` on."""
        stop = start + keys.shape[2]
        # `.data` leaves the version counters alone. Autograd may have saved a view returned
        # earlier; no such view reaches `start`, so what it saved stays as it was.
        self.keys.data[:, :, start:stop] = keys
        self.values.data[:, :, start:stop] = values
        self.keys_t.data[..., start:stop] = keys.transpose(2, 3)

    def map(self, function: Callable[[Tensor], Tensor]) -> _Buffers:
        """Buffers with ``function`` applied to each."""
        return _Buffers(function(self.keys), function(self.values), function(self.keys_t))


class SparQLayer(DynamicLayer):
    """A dynamic cache layer for SparQ decoding (arXiv 2312.04985).

    The keys are stored a second time component-major, so that reading r components of all keys
    reads r contiguous rows. All three tensors live in buffers that grow by a quarter when they are
    full: appending a token costs one small write, where concatenation would copy the whole cache
    and cost more than dense attention. That takes 1.5 times the memory of a plain cache where keys
    and values are equally wide, and up to a quarter of that again.

    ``update`` returns views of the buffers, and leaves a `SparQState` on the keys. Memory that was
    ever returned is never written again. With gradients enabled nothing is written in place at all:
    keys and values are concatenated as in a plain layer, and carry no state.
    """

    MIN_HEADROOM = 64  # positions; spares short prompts the first few growths

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: _Buffers | None = None
        self._mean = RunningMean()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, Hkv, new, D]`` keys and values; return all of them."""
        if torch.is_grad_enabled():
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        length = old + key_states.shape[2]
        buffers = self._buffers
        if buffers is None or buffers.capacity < length or not buffers.writable:
            headroom = max(self.MIN_HEADROOM, length // 4)
            buffers = _Buffers.allocate(key_states, value_states, length + headroom)
            if old:
                buffers.write(0, *self._stored())
        buffers.write(old, key_states, value_states)
        return self._show(buffers, length)

    def _stored(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _show(self, buffers: _Buffers, length: int) -> tuple[Tensor, Tensor]:
        """Make ``keys`` and ``values`` the first ``length`` positions of the buffers."""
        self._buffers = buffers
        self.keys = buffers.keys[:, :, :length]
        self.values = buffers.values[:, :, :length]
        attach_state(self.keys, SparQState(buffers.keys_t[..., :length], self._mean))
        return self.keys, self.values

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to what is stored, whatever holds it."""
        if self._buffers is None:
            self.keys, self.values = map(function, self._stored())
        else:
            # The whole buffers, so that the next update need not allocate and copy again.
            self._show(self._buffers.map(function), self.get_seq_length())

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length() > 0:
            self._mean.map_batch(function)
            self._map(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue beam ``beam_idx[i]``."""
        self._map_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._map_batch(lambda tensor: tensor[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` positions; the next update moves to new buffers."""
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        after = self.get_seq_length()
        if after != before:
            self._buffers = None
        if after < self._mean.counted:
            self._mean = RunningMean()

    def reset(self) -> None:
        """Forget all positions."""
        self.keys = self.values = self._buffers = None
        self.is_initialized = False
        self._mean = RunningMean()

    def offload(self) -> None:
        """Move keys and values to the CPU; the running mean is small and stays."""
        if self.is_initialized:
            self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move keys and values back to their device."""
        if self.is_initialized and self._stored()[0].device != self.device:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))


# In transformers 5.17 the second part is one dictionary for all layers; it is only handed on.
LayerTypes = Callable[[PreTrainedConfig], tuple[list[str], list[dict[Any, Any]]]]


@dataclass(frozen=True)
class _SparQLayerTypes:
    """transformers' ``get_layer_types_and_kwargs``, with our layer in models that use ``sparq``."""

    original: LayerTypes

    def __call__(self, config: PreTrainedConfig) -> tuple[list[str], list[dict[Any, Any]]]:
        layer_types, layer_kwargs = self.original(config)
        installed = LAYER_TYPE in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
        if installed and getattr(config, "_attn_implementation", None) == METHOD:
            layer_types = [LAYER_TYPE if t == "full_attention" else t for t in layer_types]
        return layer_types, layer_kwargs


def install() -> None:
    """Make transformers use `SparQLayer` in the dynamic caches of models that use ``sparq``.

    Only full-attention layers change; those with a sliding window keep their own. Calling it again
    does nothing.
    """
    if LAYER_TYPE in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING:
        return
    cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = SparQLayer
    cache_utils.STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = StaticLayer
    current = cache_utils.get_layer_types_and_kwargs
    if not isinstance(current, _SparQLayerTypes):
        cache_utils.get_layer_types_and_kwargs = _SparQLayerTypes(current)


def uninstall() -> None:
    """Undo `install`. Caches that exist already keep their layers and go on working.

    Where somebody else has wrapped the same function since, ours stays underneath and does nothing.
    """
    cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.pop(LAYER_TYPE, None)
    cache_utils.STATIC_LAYER_TYPE_MAPPING.pop(LAYER_TYPE, None)
    current = cache_utils.get_layer_types_and_kwargs
    if isinstance(current, _SparQLayerTypes):
        cache_utils.get_layer_types_and_kwargs = current.original  # type: ignore[assignment]
