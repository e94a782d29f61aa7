"""Gap: transformers' caches hold keys one way only.

The dynamic cache layer that ``sparq`` reads: keys stored a second time by component, running sums
of the values. `cache_layers` puts it in its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from hf_attn_plugin.config import SparQConfig, parameters_of
from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.ops.sparq.key_copy import FullBuffer, QuantizedBuffer, allocate_copy
from hf_attn_plugin.ops.sparq.state import SparQState, attach_state
from hf_attn_plugin.ops.sparq.store import stored_by_kernel
from hf_attn_plugin.ops.sparq.sums import RunningSums


@dataclass(frozen=True, eq=False)
class _Buffers:
    """Memory of one layer, of which the first positions are in use.

    Attributes:
        keys: [B, Hkv, capacity, D].
        values: [B, Hkv, capacity, Dv].
        copy: The keys once more; None without.
        complete: Whether what was stored last is still all in use. If not, the memory after it was
            handed out before and must not be written again.
        by_kernel: Whether a kernel stores single tokens.
    """

    keys: Tensor
    values: Tensor
    copy: FullBuffer | QuantizedBuffer | None
    complete: bool = True
    by_kernel: bool = False

    @classmethod
    def allocate(cls, keys: Tensor, values: Tensor, capacity: int, key_copy: str) -> _Buffers:
        """Empty buffers for ``capacity`` positions of such keys and values."""
        batch, kv_heads, _, head_dim = keys.shape
        return cls(
            keys=keys.new_empty(batch, kv_heads, capacity, head_dim),
            values=values.new_empty(batch, kv_heads, capacity, values.shape[-1]),
            copy=allocate_copy(key_copy, keys, capacity),
            by_kernel=stored_by_kernel(keys, values),
        )

    def moved(self, keys: Tensor, values: Tensor, capacity: int) -> _Buffers:
        """Larger buffers that hold ``keys`` and ``values``, the first positions of these."""
        new = self.allocate(keys, values, capacity, "none")
        new.write(0, keys, values)
        copy = None if self.copy is None else self.copy.moved(keys, capacity)
        return dataclasses.replace(new, copy=copy)

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.keys.shape[2]

    @property
    def writable(self) -> bool:
        """Whether there may be written at the end.

        Inference-mode tensors are frozen outside of this mode.
        """
        return self.complete and (not self.keys.is_inference() or torch.is_inference_mode_enabled())

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values from position ``start`` on."""
        stop = start + keys.shape[2]
        if self.by_kernel and keys.shape[2] == 1:
            self._write_token(start, keys, values)
            return
        # `.data` leaves the version counters alone. Autograd may have saved a view returned
        # earlier; no such view reaches `start`, so what it saved stays as it was.
        self.keys.data[:, :, start:stop] = keys
        self.values.data[:, :, start:stop] = values
        if self.copy is not None:
            self.copy.append(start, keys)

    def _write_token(self, start: int, key: Tensor, value: Tensor) -> None:
        """`write` of one token in one launch, which leaves version counters alone too."""
        from hf_attn_plugin.ops.triton.sparq_append import append_token

        column, place = (None, 0) if self.copy is None else self.copy.column(start)
        append_token(key, value, self.keys, self.values, column, start, place)
        if self.copy is not None:
            self.copy.finish(start + 1)

    def map(self, function: Callable[[Tensor], Tensor]) -> _Buffers:
        """Buffers with ``function`` applied to each."""
        copy = None if self.copy is None else self.copy.map(function)
        keys, values = function(self.keys), function(self.values)
        by_kernel = stored_by_kernel(keys, values)
        return _Buffers(keys, values, copy, self.complete, by_kernel)

    @property
    def copy_bytes(self) -> int:
        """Bytes allocated for the keys' copy."""
        return 0 if self.copy is None else self.copy.nbytes


class SparQLayer(DynamicLayer):
    """A dynamic cache layer for SparQ decoding (arXiv 2312.04985).

    The keys are stored a second time component-major, so that reading r components of all keys
    reads r contiguous rows. All tensors live in buffers that grow by a block when they are full:
    appending a token costs one small write, where concatenation would copy the whole cache and
    cost more than dense attention. In full, the copy adds half to the memory of a plain cache where
    keys and values are equally wide; all that has headroom for up to a quarter more positions, and
    at most `MAX_HEADROOM`.

    ``update`` returns views of the buffers, and leaves a `SparQState` on the keys. Memory that was
    ever returned is never written again. With gradients enabled nothing is written in place at all:
    keys and values are concatenated as in a plain layer, and carry no state.

    Args:
        key_copy: How the keys are kept a second time: a ``SparQConfig.key_copy``.
    """

    MIN_HEADROOM = 64  # positions; spares short prompts the first few growths
    # Copying S positions once in so many steps is a thousandth of what the steps read of them.
    MAX_HEADROOM = 4096
    _ALIGNED = 64  # capacities on GPUs, whose kernels load rows that begin at multiples of 16 bytes

    def __init__(self, key_copy: str = "full", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.key_copy = key_copy
        self._buffers: _Buffers | None = None
        self._sums = RunningSums()

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
            headroom = min(max(self.MIN_HEADROOM, length // 4), self.MAX_HEADROOM)
            unit = self._ALIGNED if key_states.is_cuda else 1
            capacity = -(-(length + headroom) // unit) * unit
            if old and buffers is not None:
                buffers = buffers.moved(*self._stored(), capacity)
            else:
                buffers = _Buffers.allocate(key_states, value_states, capacity, self.key_copy)
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
        components = None if buffers.copy is None else buffers.copy.components(length)
        attach_state(self.keys, SparQState(self.key_copy, components, self._sums))
        return self.keys, self.values

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to what is stored, whatever holds it."""
        if self._buffers is None or not self._buffers.complete:
            self._buffers = None
            self.keys, self.values = map(function, self._stored())
        else:
            # The whole buffers, so that the next update need not allocate and copy again.
            self._show(self._buffers.map(function), self.get_seq_length())

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length() > 0:
            self._sums.map_batch(function)
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
        if after != before and self._buffers is not None:
            self._buffers = dataclasses.replace(self._buffers, complete=False)
        self._sums.crop(after)

    def reset(self) -> None:
        """Forget all positions."""
        self.keys = self.values = self._buffers = None
        self.is_initialized = False
        self._sums = RunningSums()

    def offload(self) -> None:
        """Move keys and values to the CPU; the running sums are small and stay."""
        if self.is_initialized:
            self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move keys and values back to their device."""
        if self.is_initialized and self._stored()[0].device != self.device:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def nbytes(self) -> dict[str, int]:
        """Bytes allocated: see `kv_cache_bytes`."""
        stored = [] if self.keys is None or self.values is None else [self.keys, self.values]
        buffers = self._buffers
        if buffers is not None:
            stored = [buffers.keys, buffers.values]
        sizes = [nbytes(tensor) for tensor in stored] or [0, 0]
        return {
            "keys": sizes[0],
            "values": sizes[1],
            "key_copy": 0 if buffers is None else buffers.copy_bytes,
            "value_sums": self._sums.nbytes,
        }


def keeps_copy(key_copy: str, config: PreTrainedConfig) -> bool:
    """Whether caches for this model keep the keys a second time, in this way.

    Not with multi-head latent attention: what it caches are latents, from which the keys are made
    only after the cache. A second copy of them would be of no use.
    """
    latent = getattr(config, "kv_lora_rank", None) is not None
    return not latent and parameters_of(config, SparQConfig).key_copy == key_copy
