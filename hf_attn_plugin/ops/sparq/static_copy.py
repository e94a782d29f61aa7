"""The second copy of the keys in a cache of fixed length, for compiled decoding steps.

The tensors stay where they are and no shape depends on how many positions are in use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.ops.sparq import key_copy
from hf_attn_plugin.ops.sparq.key_copy import FullComponents, QuantizedComponents, quantize


@dataclass(frozen=True, eq=False)
class StaticFullCopy:
    """`FullComponents` of fixed length.

    Attributes:
        keys_t: [B, Hkv, D, S].
    """

    keys_t: Tensor

    @classmethod
    def allocate(cls, keys: Tensor, length: Tensor) -> StaticFullCopy:
        """For ``keys`` [B, Hkv, S, D]."""
        batch, kv_heads, positions, head_dim = keys.shape
        # Rows that begin at multiples of 16 bytes, as kernels load them.
        room = -(-positions // key_copy.GROUP) * key_copy.GROUP
        return cls(keys.new_zeros(batch, kv_heads, head_dim, room)[..., :positions])

    @property
    def components(self) -> FullComponents:
        """What a decoding step reads."""
        return FullComponents(self.keys_t)

    def append(self, at: Tensor, new: Tensor, keys: Tensor) -> None:
        """Store the keys ``new`` [B, Hkv, n, D] at the positions ``at`` [n]."""
        self.keys_t.index_copy_(3, at, new.transpose(2, 3))

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [self.keys_t]

    def rows(self) -> list[Tensor]:
        """Those with a batch dimension."""
        return [self.keys_t]

    def stored(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order in which `ops.triton.sparq_append` takes them."""
        return self.keys_t, None, None, None, None

    def map(self, function: Callable[[Tensor], Tensor]) -> StaticFullCopy:
        """``function`` applied to every tensor with a batch dimension."""
        return StaticFullCopy(function(self.keys_t))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return nbytes(self.keys_t)


@dataclass(frozen=True, eq=False)
class StaticQuantizedCopy:
    """`QuantizedComponents` of fixed length.

    In PyTorch, every step quantises the whole group that it adds to, again and again until the
    group is full; until then the tail covers it. So no step depends on where in a group it is. The
    kernel of `ops.triton.sparq_append` quantises a group when it is full.

    Attributes:
        components: What a decoding step reads; ``codes`` has room for one group more than S
            positions need, which the tail lies over when the cache is full.
    """

    components: QuantizedComponents

    @classmethod
    def allocate(cls, keys: Tensor, length: Tensor, bits: int) -> StaticQuantizedCopy:
        """For ``keys`` [B, Hkv, S, D] of which the first ``length``, 0-dimensional, are in use."""
        batch, kv_heads, positions, head_dim = keys.shape
        group = key_copy.GROUP
        shape = (batch, kv_heads, head_dim, -(-positions // group) + 1)
        return cls(
            QuantizedComponents(
                codes=keys.new_zeros(*shape, group * bits // 8, dtype=torch.uint8),
                scale=keys.new_zeros(shape),
                offset=keys.new_zeros(shape),
                tail=keys.new_zeros(batch, kv_heads, head_dim, group),
                bits=bits,
                tail_at=torch.zeros_like(length),
                length=positions,
            )
        )

    def append(self, at: Tensor, new: Tensor, keys: Tensor) -> None:
        """Quantise the groups of the positions ``at`` [n].

        ``keys`` [B, Hkv, S, D] has the new ones already.
        """
        store, group = self.components, key_copy.GROUP
        touched = (new.shape[2] + group - 2) // group + 1  # at most, wherever the first one is
        last_group = store.codes.shape[3] - 1
        for start in range(0, touched, key_copy.CHUNK):
            some = torch.arange(start, min(start + key_copy.CHUNK, touched), device=at.device)
            groups = (at[0] // group + some).clamp(max=last_group)
            made = quantize(self._columns(groups, keys).unflatten(-1, (-1, group)), store.bits)
            for buffer, part in zip((store.codes, store.scale, store.offset), made, strict=True):
                buffer.index_copy_(3, groups, part)
        tail_group = (at[-1:] + 1) // group
        store.tail.copy_(self._columns(tail_group, keys))
        assert store.tail_at is not None
        store.tail_at.copy_(tail_group[0] * group)

    @staticmethod
    def _columns(groups: Tensor, keys: Tensor) -> Tensor:
        """The keys of these groups, [B, Hkv, D, groups · GROUP]; anything past the last key."""
        at = groups[:, None] * key_copy.GROUP + torch.arange(key_copy.GROUP, device=groups.device)
        at = at.flatten().clamp(max=keys.shape[2] - 1)
        return keys.index_select(2, at).transpose(2, 3)

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        parts = self.components
        assert parts.tail_at is not None
        return [*self.rows(), parts.tail_at]

    def rows(self) -> list[Tensor]:
        """Those with a batch dimension."""
        parts = self.components
        return [parts.codes, parts.scale, parts.offset, parts.tail]

    def stored(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order in which `ops.triton.sparq_append` takes them."""
        parts = self.components
        return parts.tail, parts.codes, parts.scale, parts.offset, parts.tail_at

    def map(self, function: Callable[[Tensor], Tensor]) -> StaticQuantizedCopy:
        """``function`` applied to every tensor with a batch dimension."""
        store = self.components
        return StaticQuantizedCopy(
            dataclasses.replace(
                store,
                codes=function(store.codes),
                scale=function(store.scale),
                offset=function(store.offset),
                tail=function(store.tail),
            )
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return nbytes(*self.tensors())


def allocate_static_copy(
    kind: str, keys: Tensor, length: Tensor
) -> StaticFullCopy | StaticQuantizedCopy | None:
    """The copy of a ``SparQConfig.key_copy`` for ``keys`` [B, Hkv, S, D]; None for "none"."""
    if kind == "none":
        return None
    if kind == "full":
        return StaticFullCopy.allocate(keys, length)
    return StaticQuantizedCopy.allocate(keys, length, key_copy.BITS[kind])
