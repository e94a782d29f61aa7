"""Gap: transformers' static cache holds keys one way only.

The static cache layer that ``sparq`` reads; `cache_layers` puts it in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.ops.sparq.state import SparQState, attach_state
from hf_attn_plugin.ops.sparq.static_copy import (
    StaticFullCopy,
    StaticQuantizedCopy,
    allocate_static_copy,
)
from hf_attn_plugin.ops.sparq.store import stored_by_kernel
from hf_attn_plugin.ops.sparq.sums import StaticRunningSums


class SparQStaticLayer(StaticLayer):
    """A static cache layer for SparQ decoding (arXiv 2312.04985), in fixed memory.

    Like `SparQLayer`, with all tensors of the full length from the start and written in place, so
    that a decoding step can be compiled.

    Args:
        key_copy: How the keys are kept a second time: a ``SparQConfig.key_copy``.
        max_cache_len: Positions there is room for.
    """

    def __init__(self, key_copy: str, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(max_cache_len=max_cache_len, **kwargs)
        self.key_copy = key_copy
        self._copy: StaticFullCopy | StaticQuantizedCopy | None = None
        self._sums: StaticRunningSums | None = None
        self._by_kernel = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything for such keys and values."""
        super().lazy_initialization(key_states, value_states)
        keys, values = self._stored()
        self._copy = allocate_static_copy(self.key_copy, keys, self.cumulative_length)
        settle = torch._dynamo.mark_static_address
        self._sums = StaticRunningSums(self.cumulative_length, settle)
        self._by_kernel = stored_by_kernel(keys, values)
        if not torch.compiler.is_compiling():
            for tensor in [] if self._copy is None else self._copy.tensors():
                settle(tensor)
            settle(self._sums.counted)
        self._attach()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store ``[B, Hkv, new, D]`` keys and values; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._by_kernel and key_states.shape[2] == 1 and not torch.is_grad_enabled():
            return self._store_token(key_states, value_states)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self._copy is not None:
            new = key_states.shape[2]
            # super() has counted them already.
            at = self.cumulative_length - new + torch.arange(new, device=keys.device)
            self._copy.append(at, key_states.detach(), keys.detach())
        return keys, values

    def _store_token(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`update` of one token, in one launch and that of its count."""
        from hf_attn_plugin.ops.triton.sparq_append import store_token_at

        keys, values = self._stored()
        self.cumulative_length.add_(1)
        copy: tuple[Tensor | None, ...] = (None,) * 5
        if self._copy is not None:
            copy = self._copy.stored()
        store_token_at(key, value, keys, values, *copy, self.cumulative_length)
        return keys, values

    def _stored(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _attach(self) -> None:
        """Leave the state on the keys, which stay the same tensor while the layer lives."""
        assert self._sums is not None
        components = None if self._copy is None else self._copy.components
        keys, _ = self._stored()
        attach_state(
            keys, SparQState(self.key_copy, components, self._sums, self.cumulative_length)
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = map(function, self._stored())
        self._by_kernel = stored_by_kernel(self.keys, self.values)
        if self._copy is not None:
            self._copy = self._copy.map(function)
        self._attach()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue beam ``beam_idx[i]``; the tensors stay where they are."""
        if self.is_initialized:
            assert self._sums is not None
            reorder = lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device))  # noqa: E731
            self._sums.map_batch(reorder)
            copied = [] if self._copy is None else self._copy.rows()
            for tensor in (*self._stored(), *copied):
                tensor.copy_(reorder(tensor))

    def reset(self) -> None:
        """Forget all positions; the tensors stay where they are."""
        super().reset()
        if self._copy is not None:
            for tensor in self._copy.tensors():
                tensor.zero_()
        if self._sums is not None:
            self._sums.reset()

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
        return {
            "keys": 0 if self.keys is None else nbytes(self.keys),
            "values": 0 if self.values is None else nbytes(self.values),
            "key_copy": 0 if self._copy is None else self._copy.nbytes,
            "value_sums": 0 if self._sums is None else self._sums.nbytes,
        }
