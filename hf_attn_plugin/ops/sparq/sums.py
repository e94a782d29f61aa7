"""Sums of the values, for the mean value that takes the place of the keys left out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn_plugin.ops.choice import Choice
from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.ops.scores import weigh


@dataclass(frozen=True, eq=False)
class BlockSums:
    """Sums of the visible values of each block of positions.

    Attributes:
        total: float32 (float64 for float64 values) [B, Hkv, blocks, Dv].
        seen: int64 [B, blocks], how many values each block's sum has.
        block: Positions per block; None is one block for all.
    """

    total: Tensor
    seen: Tensor
    block: int | None

    @classmethod
    def of(cls, values: Tensor, visible: Tensor | None, block: int | None) -> BlockSums:
        """The sums of ``values`` [B, Hkv, S, Dv]; ``visible`` bool [B or 1, S], None is all."""
        sums = cls.empty(values, 1 if block is None else math.ceil(values.shape[2] / block), block)
        sums.add(0, values, visible)
        return sums

    @classmethod
    def empty(cls, values: Tensor, blocks: int, block: int | None) -> BlockSums:
        """Sums of nothing for such values."""
        batch, kv_heads, _, width = values.shape
        dtype = torch.promote_types(values.dtype, torch.float32)
        return cls(
            total=values.new_zeros(batch, kv_heads, blocks, width, dtype=dtype),
            seen=torch.zeros(batch, blocks, dtype=torch.int64, device=values.device),
            block=block,
        )

    def add(self, start: int, values: Tensor, visible: Tensor | None) -> None:
        """Add values, in place, whose positions begin at ``start``."""
        batch, stop = values.shape[0], start + values.shape[2]
        if visible is not None:
            values = torch.where(visible[:, None, :, None], values, 0)
        block = stop + 1 if self.block is None else self.block
        # Up to the next boundary, whole blocks, and what is left of the last one.
        whole = min(stop, math.ceil(start / block) * block)
        edges = sorted({start, whole, max(whole, stop // block * block), stop})
        for first, last in itertools.pairwise(edges):
            shape = (max(1, (last - first) // block), -1)
            at = slice(first // block, first // block + shape[0])
            part = values[:, :, first - start : last - start].unflatten(2, shape)
            self.total[:, :, at] += part.sum(dim=3, dtype=self.total.dtype)
            if visible is None:
                self.seen[:, at] += part.shape[3]
            else:
                weights = visible[:, first - start : last - start].expand(batch, -1)
                self.seen[:, at] += weights.unflatten(1, shape).sum(dim=2)

    def lacks(self, values: Tensor, visible: Tensor | None) -> bool:
        """Whether these are sums of other positions than ``visible``, told by their number."""
        wanted = values.shape[2] if visible is None else visible.sum(-1)
        return bool((self.seen.sum(-1) != wanted).any())

    def restart(self, values: Tensor, visible: Tensor | None) -> None:
        """Sum up ``values``, whose positions begin at 0, anew and in place."""
        self.total.zero_()
        self.seen.zero_()
        self.add(0, values, visible)

    def map(self, function: Callable[[Tensor], Tensor]) -> BlockSums:
        """``function`` applied to every tensor."""
        return BlockSums(function(self.total), function(self.seen), self.block)

    def head(self, blocks: int) -> BlockSums:
        """The first ``blocks`` blocks, as views."""
        return BlockSums(self.total[:, :, :blocks], self.seen[:, :blocks], self.block)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return nbytes(self.total)


def reallocate(
    output: Tensor,
    approximate: Tensor,
    chosen: Choice,
    attended: Tensor | None,
    chosen_values: Tensor,
    sums: BlockSums,
) -> Tensor:
    """Give the approximate mass of the keys left out to mean values.

    With one block for all, as in the paper: α·output + (1 - α)·v̄, where v̄ is the mean of all
    visible values. With several: α·output + Σ_b m_b·v̄_b, where v̄_b is the mean of the visible
    values of block b that were left out, and m_b their approximate mass.

    Args:
        output: [B, Hkv, G, Dv], attention over the chosen keys.
        approximate: [B, Hkv, G, S], the approximate softmax.
        chosen: The keys chosen.
        attended: bool [B, Hkv, k], which of them are visible; None is all. The others have no mass.
        chosen_values: [B, Hkv, k, Dv].
        sums: Of all visible values.
    """
    mass = chosen.gather(approximate)
    alpha = mass.sum(-1, keepdim=True)
    total, seen = sums.total.to(output.dtype), sums.seen
    if sums.block is None:
        mean = total[:, :, 0] / seen[:, :1, None].clamp_min(1)
        return alpha * output + (1 - alpha) * mean[:, :, None]

    blocks, index = seen.shape[1], chosen.index
    at = index[:, :, None].expand_as(mass)
    left = approximate.scatter(-1, at, approximate.gather(-1, at) - mass)
    left = torch.nn.functional.pad(left, (0, blocks * sums.block - left.shape[-1]))
    left = left.unflatten(-1, (blocks, sums.block)).sum(-1)  # [B, Hkv, G, blocks]

    block_of = index // sums.block
    taken = torch.ones_like(index) if attended is None else attended.to(index.dtype)
    rest = seen[:, None].expand(*index.shape[:2], -1).scatter_add(-1, block_of, -taken)
    weights = left / rest[:, :, None].clamp_min(1)
    # The sum over what was left out of a block is the block's sum less what was chosen of it.
    minus = weights.gather(-1, block_of[:, :, None].expand_as(mass)) * taken[:, :, None]
    return alpha * output + weights @ total - weigh(minus, chosen_values)


class RunningSums:
    """`BlockSums` of a growing cache, one addition per new position.

    Which positions are visible is known to the attention function only, so it adds them. When a
    mask shows or hides earlier positions, so that another number of them counts, all is summed up
    anew; that one shows as many as it hides goes unnoticed.

    Attributes:
        counted: Positions accounted for, visible or not.
    """

    def __init__(self) -> None:
        self.counted = 0
        self._sums: BlockSums | None = None  # with room for more blocks
        self._unmasked = True  # So far; then nothing need be compared, which would stop a GPU.

    def update(
        self, values: Tensor, visible: Tensor | None, block: int | None, new: int = 1
    ) -> tuple[BlockSums, int]:
        """Add the positions not yet counted.

        Args:
            values: [B, Hkv, S, Dv], all cached values.
            visible: bool [B, S] or [1, S], which of them count; None is all.
            block: Positions per block; None is one block for all. Another one than before starts
                anew.
            new: Queries of this call; what was not counted is known here without it.

        Returns:
            The sums over all visible values, and the bytes of ``values`` read for them.
        """
        length = values.shape[2]
        blocks = 1 if block is None else math.ceil(length / block)
        sums = self._sums
        if sums is None or sums.block != block or self.counted > length:
            self.counted, sums = 0, BlockSums.empty(values, blocks, block)
        if sums.seen.shape[1] < blocks or _is_frozen(sums.total):
            larger = BlockSums.empty(values, blocks + blocks // 4, block)
            larger.total[:, :, : sums.seen.shape[1]] = sums.total
            larger.seen[:, : sums.seen.shape[1]] = sums.seen
            sums = larger
        added = values[:, :, self.counted :]
        sums.add(self.counted, added, None if visible is None else visible[:, self.counted :])
        self._unmasked = self._unmasked and visible is None
        if not self._unmasked and sums.lacks(values, visible):
            added = values
            sums.restart(values, visible)
        self._sums, self.counted = sums, length
        return sums.head(blocks), nbytes(added)

    def follow(
        self, values: Tensor, visible: Tensor | None, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`update` with one block for all and one new position, on a GPU, in one launch.

        Args:
            values: [B, Hkv, S, Dv], all cached values; float16, bfloat16 or float32.
            visible: bool [B or 1, S], which of them count; None is all.
            wanted: int64 [B or 1], how many these are; given with ``visible``.

        Returns:
            The sums, float32 [B, Hkv, Dv], and how many values they have, int64 [B]; no value was
            waited for.
        """
        sums, length = self._sums, values.shape[2]
        if sums is None or sums.block is not None or self.counted >= length:
            sums = BlockSums.empty(values, 1, None)
        elif _is_frozen(sums.total):
            sums = sums.map(torch.clone)
        _add_value(values, sums, visible, wanted, None, None, length)
        self._unmasked = self._unmasked and visible is None
        self._sums, self.counted = sums, length
        return sums.total[:, :, 0], sums.seen[:, 0]

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension, such as a reordering of beams."""
        if self._sums is not None:
            self._sums = self._sums.map(function)

    def crop(self, length: int) -> None:
        """Forget the positions from ``length`` on; what shares a block with them is added again."""
        if length < self.counted and self._sums is not None:
            block = self._sums.block
            kept = 0 if block is None else length // block
            if _is_frozen(self._sums.total):
                self._sums = self._sums.map(torch.clone)
            self._sums.total[:, :, kept:] = 0
            self._sums.seen[:, kept:] = 0
            self.counted = 0 if block is None else kept * block

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._sums is None else nbytes(self._sums.total, self._sums.seen)


class StaticRunningSums:
    """`RunningSums` of a cache whose tensors stay in place, for compiled decoding steps.

    Args:
        length: 0-dimensional int64, the positions in use; the cache layer counts it up.
        settle: Told of every tensor that is made later and then stays where it is.

    Attributes:
        length: See above.
        counted: 0-dimensional int64, the positions accounted for.
    """

    def __init__(self, length: Tensor, settle: Callable[[Tensor], object] | None = None) -> None:
        self.length = length
        self.counted = torch.zeros_like(length)
        self._sums: BlockSums | None = None
        self._settle = settle

    def update(
        self, values: Tensor, visible: Tensor | None, block: int | None, new: int = 1
    ) -> tuple[BlockSums, int]:
        """See `RunningSums.update`; a traced graph adds exactly the last ``new`` positions."""
        sums = self._of_blocks(values, block)
        if torch.compiler.is_compiling():
            first = self.length - new
            torch._assert_async(
                self.counted == first,
                "sparq: the running mean of this cache has gaps; run the prefill uncompiled.",
            )
            at = first + torch.arange(new, device=first.device)
            added = values.index_select(2, at)
            weights = torch.ones_like(at, dtype=torch.bool)[None]
            if visible is not None:
                weights = visible.index_select(1, at)
            added = torch.where(weights[:, None, :, None], added, 0).to(sums.total.dtype)
            to = torch.zeros_like(at) if block is None else at // block
            sums.total.index_add_(2, to, added)
            sums.seen.index_add_(1, to, weights.expand(values.shape[0], -1).long())
        else:
            start, stop = int(self.counted), int(self.length)
            added = values[:, :, start:stop]
            sums.add(start, added, None if visible is None else visible[:, start:stop])
            past = values[:, :, :stop], None if visible is None else visible[:, :stop]
            if sums.lacks(*past):
                added = past[0]
                sums.restart(*past)
        self.counted.copy_(self.length)
        return sums, nbytes(added)

    def follow(
        self, values: Tensor, visible: Tensor | None, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `RunningSums.follow`; ``wanted`` counts positions in use only."""
        sums = self._of_blocks(values, None)
        _add_value(values, sums, visible, wanted, self.length, self.counted, 0)
        return sums.total[:, :, 0], sums.seen[:, 0]

    def _of_blocks(self, values: Tensor, block: int | None) -> BlockSums:
        """The sums in such blocks; new ones where there are none."""
        if self._sums is None or self._sums.block != block:
            blocks = 1 if block is None else math.ceil(values.shape[2] / block)
            self._sums = BlockSums.empty(values, blocks, block)
            self.counted.zero_()
            if self._settle is not None and not torch.compiler.is_compiling():
                self._settle(self._sums.total)
                self._settle(self._sums.seen)
        return self._sums

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension, such as a reordering of beams, in place."""
        if self._sums is not None:
            for tensor in (self._sums.total, self._sums.seen):
                tensor.copy_(function(tensor))

    def reset(self) -> None:
        """Forget all positions; the tensors stay where they are."""
        self.counted.zero_()
        if self._sums is not None:
            self._sums.total.zero_()
            self._sums.seen.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._sums is None else nbytes(self._sums.total, self._sums.seen)


def _add_value(
    values: Tensor,
    sums: BlockSums,
    visible: Tensor | None,
    wanted: Tensor | None,
    length: Tensor | None,
    counted: Tensor | None,
    last: int,
) -> None:
    from hf_attn_plugin.ops.triton.sparq_append import add_value

    add_value(values, sums.total, sums.seen, visible, wanted, length, counted, last)


def _is_frozen(tensor: Tensor) -> bool:
    """Whether this mode may not write: inference-mode tensors are frozen outside of it."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
