"""H2O, the heavy-hitter oracle (arXiv 2306.14048): which keys a growing cache keeps.

Transformers hands an attention function the cached keys and values but not the cache, so the state
travels as an attribute of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn_plugin.ops.baselines import capped_scores, masked_softmax, weigh_all
from hf_attn_plugin.ops.choice import Choice, most_recent
from hf_attn_plugin.ops.reads import nbytes

_STATE = "_h2o_state"
# Scores of one block of queries, in bytes: the whole matrix of a prompt would be S × S.
_BLOCK_BYTES = 2**26


@dataclass(eq=False)
class H2OState:
    """The keys that are kept of one layer's cache, and the attention that each has drawn so far.

    What is evicted never comes back. Query heads that share a KV head share its keys, and their
    attention weights are added up.

    Attributes:
        counted: Cached positions that are accounted for, kept or not.
        index: int64 [B, Hkv, m], the positions kept, ascending.
        scores: float32 (float64 for float64 keys) [B, Hkv, m], sum over all queries so far of the
            softmax weight that a position got; −inf where there is padding.
    """

    counted: int = 0
    index: Tensor | None = None
    scores: Tensor | None = None

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """``index`` and ``scores``, once there are any."""
        if self.index is None or self.scores is None:
            raise ValueError("H2OState: no position has been appended yet.")
        return self.index, self.scores

    @property
    def has_evicted(self) -> bool:
        """Whether a position was dropped."""
        return self.index is not None and self.index.shape[-1] < self.counted

    def append(self, keys: Tensor, visible: Tensor | None = None) -> None:
        """Take up the positions of ``keys`` [B, Hkv, S, D] that are not yet counted.

        Args:
            keys: All cached keys.
            visible: bool [B or 1, S], False at padding, which is never kept. None is all.
        """
        batch, kv_heads, length, _ = keys.shape
        shape = (batch, kv_heads, length - self.counted)
        new = torch.arange(self.counted, length, device=keys.device).expand(shape)
        dtype = torch.promote_types(keys.dtype, torch.float32)
        scores = torch.zeros(shape, dtype=dtype, device=keys.device)
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, self.counted :], -math.inf)
        if self.index is not None and self.scores is not None:
            new = torch.cat([self.index, new], dim=-1)
            scores = torch.cat([self.scores, scores], dim=-1)
        self.index, self.scores, self.counted = new, scores, length

    def evict(self, top_k: int, local_window: int) -> None:
        """Keep ``top_k`` positions: the last ``local_window``, and those of the largest scores."""
        index, scores = self.kept
        if index.shape[-1] <= top_k:
            return
        recent = most_recent(scores > -math.inf, local_window)
        best = scores.masked_fill(recent, math.inf).topk(top_k).indices
        best = best.sort(dim=-1).values  # `most_recent` reads the order
        self.index, self.scores = index.gather(-1, best), scores.gather(-1, best)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor | None,
        *,
        seen: Callable[[int, int], Tensor],
        counts: Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor | None, int]:
        """Attention over the positions kept; what each of them gets is added to its score.

        Block after block of queries, so that no queries × keys tensor is ever made.

        Args:
            query: [B, H, q, D].
            keys: [B, Hkv, S, D].
            values: [B, Hkv, S, Dv]; None only adds up the scores.
            seen: ``seen(start, stop)`` is bool [B or 1, 1, stop − start, S]: what these queries
                may see.
            counts: bool [B or 1, q], False for queries that are padding. None is all.
            scaling: Factor of the scores; None is 1/√D.
            softcap: Scores become softcap · tanh(scores / softcap).
            sinks: [H], one more logit per query head in the denominator.

        Returns:
            The output [B, H, q, Dv] in the query's dtype or None, and the bytes of ``keys`` and
            ``values`` read.
        """
        index, scores = self.kept
        if self.has_evicted:
            chosen = Choice(index)
            keys, _ = chosen.take(keys)
            values = None if values is None else chosen.take(values)[0]
        read = nbytes(keys) + (0 if values is None else nbytes(values))
        keys = keys.to(scores.dtype)  # once for all blocks
        batch, heads, q_len, _ = query.shape
        kv_heads, kept = index.shape[1:]
        rows = max(1, _BLOCK_BYTES // (scores.element_size() * batch * heads * max(kept, 1)))
        outputs = []
        for start in range(0, q_len, rows):
            stop = min(start + rows, q_len)
            mask = seen(start, stop).expand(batch, kv_heads, -1, -1)
            if self.has_evicted:
                mask = mask.gather(-1, index[:, :, None].expand(-1, -1, stop - start, -1))
            mask = mask & (scores > -math.inf)[:, :, None]
            weights = masked_softmax(
                capped_scores(query[:, :, start:stop], keys, scaling, softcap),
                mask[:, :, None],
                sinks,
            )
            if values is not None:
                outputs.append(weigh_all(weights, values).to(query.dtype))
            drawn = weights.detach()
            if counts is not None:
                drawn = drawn * counts[:, None, None, start:stop, None]
            self.scores = scores = scores + drawn.sum((2, 3))
        return (torch.cat(outputs, dim=2) if outputs else None), read

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension, such as a reordering of beams."""
        if self.index is not None and self.scores is not None:
            self.index, self.scores = function(self.index), function(self.scores)


def attach_h2o_state(keys: Tensor, state: H2OState) -> None:
    """Leave ``state`` on the tensor ``keys``; tensors computed from it do not have it."""
    setattr(keys, _STATE, state)


def h2o_state(keys: Tensor) -> H2OState | None:
    """The state that the cache left on these keys, None on any other tensor."""
    return getattr(keys, _STATE, None)
