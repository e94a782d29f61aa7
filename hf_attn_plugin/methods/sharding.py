"""Attention modules that hold a part of a sequence, and what they are told of the whole."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.parallel.attention import sharded_attention
from hf_attn_plugin.parallel.shard import Shard
from hf_attn_plugin.patterns import Pattern, PatternMask
from hf_attn_plugin.patterns.documents import number_chunks

if TYPE_CHECKING:
    from hf_attn_plugin.methods.call import AttentionCall
    from hf_attn_plugin.ops.torch.linear_features import FeatureMap

# Hangs on the modules that attend, so that nothing is shared between models, and so that the
# threads in which autograd computes checkpointed layers anew find it too.
ROWS_ATTRIBUTE = "_hf_attn_rows"

SHARDED = ("flash", "ring", "sliding_window", "longformer", "strided", "linear")
"""Methods that compute over a sequence that is spread over ranks."""


class Rows(abc.ABC):
    """The whole batch rows of which the modules hold a part.

    Attributes:
        length: Tokens of the whole rows.
        share: How many of them the modules hold.
    """

    length: int
    share: int

    @abc.abstractmethod
    def pattern(
        self, causal: bool, band: int | None, chunk: int | None, device: torch.device
    ) -> Pattern:
        """What the model lets attend in the whole rows; one object for all layers of a kind.

        Args:
            causal: Of the layer.
            band: The layer's own window, or None.
            chunk: Tokens of the layer's own chunks (Llama 4), or None.
            device: Where its tensors are.
        """

    @abc.abstractmethod
    def attend(self, call: AttentionCall, pattern: Pattern) -> Tensor:
        """Exact attention of the tokens held here, ``[batch, heads, share, value_dim]``."""

    @abc.abstractmethod
    def attend_linear(
        self, call: AttentionCall, pattern: Pattern, feature_map: FeatureMap
    ) -> tuple[Tensor, None]:
        """Linear attention of the tokens held here, ``[batch, share, heads, value_dim]``."""


@dataclasses.dataclass(eq=False)
class WholeRows:
    """What is known of whole rows.

    Attributes:
        length: Tokens of a row, appended ones included.
        valid: bool ``[batch, length]``, False at the caller's padding; None without any.
        appended: Tokens at the end of every row that were added to make it divide.
        documents: int64 ``[batch or 1, length]``, packed documents; None for one per row.
        both_ways: Whether layers that look in both directions keep them apart too. They do where
            lengths told them; positions tell nothing to an encoder.
        named: Whether the batch names tokens of its own (``global_attention_mask``). Methods keep
            them with the pattern, which then must end with the batch.
    """

    length: int
    valid: Tensor | None = None
    appended: int = 0
    documents: Tensor | None = None
    both_ways: bool = False
    named: bool = False
    _patterns: dict[Any, Pattern] = dataclasses.field(default_factory=dict, repr=False)

    def pattern(
        self, causal: bool, band: int | None, chunk: int | None, device: torch.device
    ) -> Pattern:
        """See `Rows.pattern`."""
        key = (causal, band, chunk, device)
        if key not in self._patterns:
            self._patterns[key] = self._make(causal, band, chunk, device)
        return self._patterns[key]

    def _make(
        self, causal: bool, band: int | None, chunk: int | None, device: torch.device
    ) -> Pattern:
        documents = self.documents if causal or self.both_ways else None
        valid = self.valid
        if valid is None and documents is None and self.appended and not causal:
            # Elsewhere nothing before the appended tokens sees them.
            valid = (torch.arange(self.length, device=device) < self.length - self.appended)[None]
        plain = _plain.__wrapped__ if self.named else _plain
        whole = plain(self.length, causal, band)
        if valid is not None or documents is not None:
            whole = whole.replace(
                key_valid=valid, q_documents=documents, kv_documents=documents
            ).to(device)
        if chunk is None:
            return whole
        chunks = _chunks(whole, chunk, device)
        # A chunk is no document: it has no first tokens of its own.
        ranks = whole.key_ranks(device)
        return whole.replace(q_documents=chunks, kv_documents=chunks, kv_ranks=ranks)


@functools.lru_cache(maxsize=32)
def _plain(length: int, causal: bool, band: int | None) -> Pattern:
    """One object for all batches, so that what is derived from it is derived once."""
    return Pattern(q_len=length, kv_len=length, causal=causal, band=band)


@dataclasses.dataclass(eq=False)
class ShardedRows(Rows):
    """Rows spread over the ranks of a process group.

    Attributes:
        shard: This rank's part.
        whole: What is known of the rows.
    """

    shard: Shard
    whole: WholeRows

    def __post_init__(self) -> None:
        self.length = self.shard.layout.length
        self.share = self.shard.layout.share

    def pattern(
        self, causal: bool, band: int | None, chunk: int | None, device: torch.device
    ) -> Pattern:
        """See `Rows.pattern`."""
        return self.whole.pattern(causal, band, chunk, device)

    def attend(self, call: AttentionCall, pattern: Pattern) -> Tensor:
        """See `Rows.attend`."""
        return sharded_attention(
            call.query,
            call.key,
            call.value,
            pattern,
            self.shard,
            scaling=call.scaling,
            softcap=call.softcap,
            sinks=call.sinks,
        )

    def attend_linear(
        self, call: AttentionCall, pattern: Pattern, feature_map: FeatureMap
    ) -> tuple[Tensor, None]:
        """See `Rows.attend_linear`."""
        from hf_attn_plugin.parallel.linear import ring_linear_attention

        output = ring_linear_attention(
            call.query,
            call.key,
            call.value,
            pattern,
            self.shard,
            feature_map=feature_map,
            scaling=call.scaling,
        )
        return output.transpose(1, 2).contiguous(), None


def _chunks(whole: Pattern, size: int, device: torch.device) -> Tensor:
    """Numbers of (document, chunk) pairs, int64 ``[batch or 1, length]``.

    Chunks are counted from the first valid token of each document.
    """
    index = torch.arange(whole.kv_len, device=device)[None]
    first = torch.zeros_like(index)
    if whole.key_valid is not None:
        first = (whole.key_valid.to(device).cumsum(1) == 0).sum(1, keepdim=True)
    if whole.kv_documents is not None:
        return number_chunks(whole.kv_documents.to(device), size, first)
    return (index - first).div(size, rounding_mode="floor")


def rows_of(module: nn.Module) -> Rows | None:
    """What a module was told of the rows that it holds a part of; None where it holds all."""
    rows: Rows | None = getattr(module, ROWS_ATTRIBUTE, None)
    return rows


def whole_pattern(
    method: str,
    module: nn.Module,
    rows: Rows,
    query: Tensor,
    key: Tensor,
    mask: Tensor | PatternMask | None,
    *,
    causal: bool,
    band: int | None,
    chunk: int | None,
    lengths: bool,
) -> Pattern:
    """The pattern of whole rows, of a layer whose mask was made for a part of them.

    The mask tells whether the layer looks back only, and its window. What it says of documents and
    padding is of no use: it was made without knowing of the other parts.

    Args:
        method: The ``attn_implementation``.
        module: The attention module.
        rows: What it was told.
        query: ``[batch, heads, share, head_dim]``.
        key: ``[batch, kv_heads, share, head_dim]``.
        mask: The layer's mask.
        causal: Whether the layer looks back only, if there is no mask to tell.
        band: Its window, if there is no mask to tell.
        chunk: Tokens of its chunks, or None.
        lengths: Whether the call was told lengths of packed documents.

    Raises:
        ValueError: The call is not one of self-attention over exactly these tokens, or its mask is
            not one that can be said of the whole rows.
    """
    inside = f"attn_implementation={method!r} inside sequence_parallel"
    who = type(module).__name__
    if method not in SHARDED:
        raise ValueError(
            f"{inside}: this method decodes, and does not run over a sequence that is spread over "
            f"ranks; {', '.join(map(repr, SHARDED))} do. In training it is dense: use 'ring'."
        )
    if torch.compiler.is_compiling():
        raise ValueError(f"{inside} does not run under torch.compile. Call the uncompiled model.")
    if (query.shape[2], key.shape[2]) != (rows.share, rows.share):
        raise ValueError(
            f"{inside}: {who} attends from {query.shape[2]} queries to {key.shape[2]} keys, and "
            f"this rank holds {rows.share} tokens. Pass the model the shard's batch, no cache, and "
            "no model with cross-attention."
        )
    if lengths:
        raise ValueError(
            f"{inside}: cu_seq_lens_q and cu_seq_lens_k tell the documents of whole rows. Put them "
            "into the batch that sequence_parallel gets, and call the model with the shard's batch."
        )
    if isinstance(mask, Tensor):
        raise ValueError(
            f"{inside}: {who} is given an attention mask of shape {tuple(mask.shape)}, which does "
            "not cover the other ranks' tokens. Put a 2D attention_mask (and position_ids for "
            "packed documents) into the batch that sequence_parallel gets."
        )
    if mask is not None:
        if mask.pattern.dense is not None:
            raise ValueError(
                f"{inside}: the mask that {type(module).__name__} is given is none of those that "
                "can be said of the whole sequence (causal or not, windows, chunks, padding, "
                "packed documents), such as blocks of images that attend in both directions. Run "
                "this model on one GPU."
            )
        causal, band = mask.pattern.causal, mask.pattern.band
    return rows.pattern(causal, band, chunk, query.device)
