"""Which query components, and which keys, a decoding step uses; and reading just these."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn_plugin.ops.reads import nbytes


@dataclass(frozen=True)
class Choice:
    """Some indices per sequence and key/value head.

    Attributes:
        index: int64 [B, Hkv, n], all different within a row.
        keep: bool [B, Hkv, n]; the others fill rows up and are not chosen. None keeps all.
    """

    index: Tensor
    keep: Tensor | None = None

    def trimmed(self) -> Choice:
        """As short as the longest row; a traced graph must not look at values and stays as is."""
        if self.keep is None or torch.compiler.is_compiling():
            return self
        longest = max(1, int(self.keep.sum(-1).max()))
        return Choice(self.index[..., :longest], self.keep[..., :longest])

    def masked(self, tensor: Tensor) -> Tensor:
        """``tensor`` [B, Hkv, G, n] with 0 where nothing is chosen."""
        return tensor if self.keep is None else tensor.masked_fill(~self.keep[:, :, None], 0)

    def gather(self, tensor: Tensor) -> Tensor:
        """The chosen entries of ``tensor`` [B, Hkv, G, N], 0 where nothing is chosen."""
        index = self.index[:, :, None].expand(-1, -1, tensor.shape[2], -1)
        return self.masked(tensor.gather(-1, index))

    def seen(self, visible: Tensor | None) -> Tensor | None:
        """Which are ``visible``, bool [B or 1, N]: bool [B, Hkv, n], None is all."""
        if visible is None:
            return None
        at_batch = torch.arange(self.index.shape[0], device=visible.device)[:, None, None]
        return visible.expand(self.index.shape[0], -1)[at_batch, self.index]

    def take(self, table: Tensor) -> tuple[Tensor, int]:
        """Rows [B, Hkv, n, W] of ``table`` [B, Hkv, N, W], and the bytes read of it.

        What is not kept is not read and is 0, except in a traced graph, whose shapes are fixed:
        there all n rows are read.
        """
        if self.keep is None or torch.compiler.is_compiling():
            batch, kv_heads, _ = self.index.shape
            at_batch = torch.arange(batch, device=table.device)[:, None, None]
            at_head = torch.arange(kv_heads, device=table.device)[None, :, None]
            rows = table[at_batch, at_head, self.index]
            return rows, nbytes(rows)
        at = self.keep.nonzero(as_tuple=True)
        read = table[at[0], at[1], self.index[at]]
        return self._spread(read), nbytes(read)

    def take_components(self, table: Tensor) -> tuple[Tensor, int]:
        """`take` for component-major tables [B, Hkv, D, ...], whose rows are long."""
        # Whole rows of a matrix: several times faster on a CPU than gather() with an expanded
        # index. The flattening is a view of our cache's buffer; other strides may cost a copy.
        batch, kv_heads, components = table.shape[:3]
        heads = torch.arange(batch * kv_heads, device=table.device).view(batch, kv_heads, 1)
        rows, flat = heads * components + self.index, table.flatten(0, 2)
        if self.keep is None or torch.compiler.is_compiling():
            read = flat.index_select(0, rows.flatten())
            return read.view(*self.index.shape, *table.shape[3:]), nbytes(read)
        read = flat.index_select(0, rows[self.keep])
        return self._spread(read), nbytes(read)

    def _spread(self, read: Tensor) -> Tensor:
        """The rows that were read at their places in [B, Hkv, n, ...], 0 elsewhere."""
        assert self.keep is not None
        rows = read.new_zeros(*self.index.shape, *read.shape[1:])
        rows[self.keep] = read
        return rows


def choose_components(magnitude: Tensor, rank: int, coverage: float | None) -> Choice:
    """The ``rank`` largest of ``magnitude`` [B, Hkv, D], or the fewest that reach ``coverage``."""
    if coverage is None:
        return Choice(magnitude.topk(rank, sorted=False).indices)
    largest, index = magnitude.topk(rank)
    return Choice(index, _reaching(largest, coverage * magnitude.sum(-1, keepdim=True))).trimmed()


def choose_keys(
    mass: Tensor,
    top_k: int,
    local_window: int,
    visible: Tensor | None,
    coverage: float | None,
) -> Choice:
    """The ``top_k`` positions with the largest ``mass`` [B, Hkv, S], the local window among them.

    With ``coverage``, the fewest that have this share of all mass, taken in this order: the local
    window, then the others by their mass; at most ``top_k``, at least one. Of keys with exactly the
    same mass any may be taken (the kernels take the first). Rows that see fewer
    positions than are to be chosen are filled up with invisible ones, or without ``coverage``
    simply have them.
    """
    if visible is None:
        ranking = mass.clone()
        ranking[..., max(0, mass.shape[-1] - local_window) :] = math.inf
    else:
        ranking = mass.masked_fill(most_recent(visible, local_window)[:, None], math.inf)
        # Below the 0 to which the score of a visible key may underflow.
        ranking = ranking.masked_fill(~visible[:, None], -1.0)
    if coverage is None:
        return Choice(ranking.topk(top_k, sorted=False).indices)
    ranked, index = ranking.topk(top_k)
    keep = _reaching(mass.gather(-1, index), coverage * mass.sum(-1, keepdim=True))
    keep = (keep | ranked.isposinf()) & (ranked >= 0)
    return Choice(index, keep).trimmed()


def most_recent(seen: Tensor, count: int) -> Tensor:
    """Which of the ``seen`` positions, bool [..., S], are among the last ``count`` of them."""
    return seen & (seen.flip(-1).cumsum(-1).flip(-1) <= count)


def _reaching(descending: Tensor, target: Tensor) -> Tensor:
    """The fewest first entries whose sum reaches ``target``, at least one; bool."""
    before = torch.nn.functional.pad(descending.cumsum(-1)[..., :-1], (1, 0))
    first = torch.arange(descending.shape[-1], device=descending.device) == 0
    return (before < target) | first
