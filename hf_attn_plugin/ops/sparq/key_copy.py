"""The keys stored a second time, component by component, in full or quantised.

Each copy comes as a growing buffer, which a cache layer owns, and as what a decoding step reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_attn_plugin.ops.choice import Choice
from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.ops.scores import BLOCK, combine

BITS = {"int8": 8, "int4": 4}
GROUP = 128  # positions that share a scale and an offset, per component
CHUNK = 32  # groups quantised at a time, so that no float32 copy of a long prompt is made
_CACHE_LINE = 64  # bytes


class Components(Protocol):
    """The keys [B, Hkv, S, D], to be read by component."""

    def scores(self, part: Tensor, chosen: Choice) -> tuple[Tensor, int]:
        """``part`` [B, Hkv, G, r] times the chosen components of all keys, [B, Hkv, G, S].

        In the dtype of ``part``. Also returns the bytes read.
        """


@dataclass(frozen=True, eq=False)
class FullComponents:
    """A copy in the keys' own dtype.

    Attributes:
        keys_t: [B, Hkv, D, S]; a component is one contiguous row.
    """

    keys_t: Tensor

    def scores(self, part: Tensor, chosen: Choice) -> tuple[Tensor, int]:
        """See `Components`."""
        rows, read = chosen.take_components(self.keys_t)
        return combine(part, rows), read


@dataclass(frozen=True, eq=False)
class StridedComponents:
    """No copy: components are picked out of the keys, at the price of the memory around them.

    Attributes:
        keys: [B, Hkv, S, D].
        counted: Whether the cache lines touched are counted, which takes a look at the choice.
    """

    keys: Tensor
    counted: bool = True

    def scores(self, part: Tensor, chosen: Choice) -> tuple[Tensor, int]:
        """See `Components`."""
        rows, _ = chosen.take(self.keys.transpose(2, 3))
        return combine(part, rows), self._lines(chosen) * _CACHE_LINE if self.counted else 0

    def _lines(self, chosen: Choice) -> int:
        """Cache lines that hold the chosen components."""
        keys, (batch, kv_heads, length, _) = self.keys, self.keys.shape
        every = math.ceil(nbytes(keys) / _CACHE_LINE)
        if torch.compiler.is_compiling():
            return every
        index = chosen.index
        if chosen.keep is not None:  # the fillers are not read
            index = torch.where(chosen.keep, index, index[..., :1])
        strides, size = keys.stride(), keys.element_size()

        def distinct(positions: int) -> int:
            at = (torch.arange(n, device=keys.device) for n in (batch, kv_heads, positions))
            starts = sum(
                a.view([-1 if i == axis else 1 for i in range(4)]) * strides[axis]
                for axis, a in enumerate(at)
            )
            address = (starts + index[:, :, None] * strides[3]) * size
            lines = (address + keys.data_ptr() % _CACHE_LINE) // _CACHE_LINE
            lines = lines.flatten(2).sort(-1).values
            return int((lines.diff(dim=-1) != 0).sum()) + batch * kv_heads

        # Keys and lines come to lie in the same way again after so many keys.
        period = _CACHE_LINE // math.gcd(strides[2] * size, _CACHE_LINE)
        if 2 * period >= length:
            return distinct(length)
        once, twice = distinct(period), distinct(2 * period)
        return min(every, math.ceil(once + (twice - once) * (length - period) / period))


@dataclass(frozen=True, eq=False)
class QuantizedComponents:
    """A copy of 8 or 4 bits per element, asymmetric per component and group of positions.

    An element is ``offset + code · scale``. The last positions, which do not fill a group yet, are
    kept in full.

    Attributes:
        codes: uint8 [B, Hkv, D, groups, bytes of a group]; with 4 bits, the first half of a
            group's positions sits in the low halves of its bytes.
        scale: [B, Hkv, D, groups], in the keys' dtype.
        offset: [B, Hkv, D, groups], in the keys' dtype.
        tail: [B, Hkv, D, t], the last positions in full.
        bits: 8 or 4.
        tail_at: In a cache of fixed length: a tensor holding the position of the tail's first
            element, which then covers what ``codes`` says of the same positions.
        length: In a cache of fixed length: S.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    tail: Tensor
    bits: int
    tail_at: Tensor | None = None
    length: int | None = None

    def scores(self, part: Tensor, chosen: Choice) -> tuple[Tensor, int]:
        """See `Components`."""
        taken = [
            chosen.take_components(t) for t in (self.codes, self.scale, self.offset, self.tail)
        ]
        (codes, scale, offset, tail), read = zip(*taken, strict=True)
        groups = max(1, BLOCK // GROUP)
        pieces = [
            part @ restore(c, s, o, self.bits, part.dtype)
            for c, s, o in zip(
                codes.split(groups, dim=3),
                scale.split(groups, dim=3),
                offset.split(groups, dim=3),
                strict=True,
            )
        ]
        last = combine(part, tail)
        if self.tail_at is None:
            return torch.cat([*pieces, last], dim=-1), sum(read)
        at = self.tail_at + torch.arange(tail.shape[-1], device=tail.device)
        return torch.cat(pieces, dim=-1).index_copy(-1, at, last)[..., : self.length], sum(read)


def quantize(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset of ``groups`` [..., GROUP], as `QuantizedComponents` holds them.

    The offset is the group's smallest element and the scale (largest - smallest) / (2^bits - 1),
    both in the elements' dtype; so an element is off by at most about half a scale.
    """
    exact = groups.to(torch.promote_types(groups.dtype, torch.float32))
    low, high = exact.aminmax(dim=-1, keepdim=True)
    levels = 2**bits - 1
    scale = ((high - low) / levels).to(groups.dtype)
    scale = torch.where(scale > 0, scale, 1)  # all elements equal: any scale does
    codes = ((exact - low) / scale.to(exact.dtype)).round().clamp(0, levels).to(torch.uint8)
    if bits == 4:
        first, second = codes.chunk(2, dim=-1)
        codes = first | (second << 4)
    return codes, scale[..., 0], low[..., 0].to(groups.dtype)


def restore(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """[B, Hkv, r, positions] of what `quantize` made."""
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    offset, scale = offset[..., None].to(dtype), scale[..., None].to(dtype)
    return torch.addcmul(offset, codes.to(dtype), scale).flatten(3)


@dataclass(eq=False)
class FullBuffer:
    """Room for `FullComponents`.

    Attributes:
        keys_t: [B, Hkv, D, capacity].
    """

    keys_t: Tensor

    @classmethod
    def allocate(cls, keys: Tensor, capacity: int) -> FullBuffer:
        """Room for ``capacity`` positions of such keys [B, Hkv, any, D]."""
        batch, kv_heads, _, head_dim = keys.shape
        return cls(keys.new_empty(batch, kv_heads, head_dim, capacity))

    def moved(self, keys: Tensor, capacity: int) -> FullBuffer:
        """A larger buffer that begins as this one does, for the positions of ``keys``."""
        new, length = self.allocate(keys, capacity), keys.shape[2]
        new.keys_t.data[..., :length] = self.keys_t[..., :length]
        return new

    def append(self, start: int, keys: Tensor) -> None:
        """Store keys from position ``start`` on."""
        self.keys_t.data[..., start : start + keys.shape[2]] = keys.transpose(2, 3)

    def column(self, position: int) -> tuple[Tensor, int]:
        """Where the key of a position goes: a tensor [B, Hkv, D, any] and the place in its rows."""
        return self.keys_t, position

    def finish(self, length: int) -> None:
        """To be called when ``column`` was written for the last of ``length`` positions."""

    def components(self, length: int) -> FullComponents:
        """The first ``length`` positions."""
        return FullComponents(self.keys_t[..., :length])

    def map(self, function: Callable[[Tensor], Tensor]) -> FullBuffer:
        """``function`` applied to every tensor."""
        return FullBuffer(function(self.keys_t))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return nbytes(self.keys_t)


@dataclass(eq=False)
class QuantizedBuffer:
    """Room for `QuantizedComponents`.

    Attributes:
        codes: uint8 [B, Hkv, D, groups, bytes of a group].
        scale: [B, Hkv, D, groups].
        offset: [B, Hkv, D, groups].
        tail: [B, Hkv, D, GROUP]; a new one for every group, so that no tensor that was handed out
            changes later.
        bits: 8 or 4.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    tail: Tensor
    bits: int

    @classmethod
    def allocate(cls, keys: Tensor, capacity: int, bits: int) -> QuantizedBuffer:
        """Room for ``capacity`` positions of such keys [B, Hkv, any, D]."""
        batch, kv_heads, _, head_dim = keys.shape
        groups = capacity // GROUP
        shape = (batch, kv_heads, head_dim, groups)
        return cls(
            codes=keys.new_empty(*shape, GROUP * bits // 8, dtype=torch.uint8),
            scale=keys.new_empty(shape),
            offset=keys.new_empty(shape),
            tail=keys.new_empty(batch, kv_heads, head_dim, GROUP),
            bits=bits,
        )

    def moved(self, keys: Tensor, capacity: int) -> QuantizedBuffer:
        """A larger buffer that begins as this one does, for the positions of ``keys``."""
        new, groups = self.allocate(keys, capacity, self.bits), keys.shape[2] // GROUP
        for name in ("codes", "scale", "offset"):
            getattr(new, name).data[:, :, :, :groups] = getattr(self, name)[:, :, :, :groups]
        new.append(groups * GROUP, keys[:, :, groups * GROUP :])
        return new

    def append(self, start: int, keys: Tensor) -> None:
        """Store keys from position ``start`` on, which must be where the last ones ended."""
        group, filled = divmod(start, GROUP)
        keys_t = keys.transpose(2, 3)
        room = GROUP - filled
        self.tail.data[..., filled : filled + keys.shape[2]] = keys_t[..., :room]
        if keys.shape[2] < room:
            return
        self._fill(group, self.tail)
        rest = keys_t[..., room:]
        whole = rest.shape[-1] // GROUP
        for first in range(0, whole, CHUNK):
            last = min(first + CHUNK, whole)
            self._fill(group + 1 + first, rest[..., first * GROUP : last * GROUP])
        self.tail = self.tail.new_empty(self.tail.shape)
        left = rest[..., whole * GROUP :]
        self.tail[..., : left.shape[-1]] = left

    def column(self, position: int) -> tuple[Tensor, int]:
        """See `FullBuffer.column`."""
        return self.tail, position % GROUP

    def finish(self, length: int) -> None:
        """See `FullBuffer.finish`: quantises the tail when it is full."""
        if length % GROUP == 0:
            self._fill(length // GROUP - 1, self.tail)
            self.tail = self.tail.new_empty(self.tail.shape)

    def _fill(self, group: int, keys_t: Tensor) -> None:
        """Quantise whole groups of positions into the buffers from ``group`` on."""
        made = quantize(keys_t.unflatten(-1, (-1, GROUP)), self.bits)
        for buffer, part in zip((self.codes, self.scale, self.offset), made, strict=True):
            buffer.data[:, :, :, group : group + part.shape[3]] = part

    def components(self, length: int) -> QuantizedComponents:
        """The first ``length`` positions, which must be all that were stored."""
        groups, left = divmod(length, GROUP)
        return QuantizedComponents(
            codes=self.codes[:, :, :, :groups],
            scale=self.scale[..., :groups],
            offset=self.offset[..., :groups],
            tail=self.tail[..., :left],
            bits=self.bits,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedBuffer:
        """``function`` applied to every tensor."""
        return QuantizedBuffer(
            codes=function(self.codes),
            scale=function(self.scale),
            offset=function(self.offset),
            tail=function(self.tail),
            bits=self.bits,
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return nbytes(self.codes, self.scale, self.offset, self.tail)


def allocate_copy(kind: str, keys: Tensor, capacity: int) -> FullBuffer | QuantizedBuffer | None:
    """The buffer of a ``SparQConfig.key_copy``, for ``capacity`` positions; None for "none"."""
    if kind == "none":
        return None
    if kind == "full":
        return FullBuffer.allocate(keys, capacity)
    return QuantizedBuffer.allocate(keys, capacity, BITS[kind])
