"""Which pairs a layer should attend to, from eager's mask and the methods' written definitions.

Nothing here uses `Pattern`: what is checked must not be what checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.config import (
    METHOD_CONFIGS,
    LongformerConfig,
    SlidingWindowConfig,
    StridedConfig,
    parameters_of,
)


def is_approximate(method: str, q_len: int, kv_len: int) -> bool:
    """Whether a method leaves out pairs that only it can tell, as decode-only ones do in a step."""
    parameters = METHOD_CONFIGS.get(method)
    return parameters is not None and parameters.decode_only and q_len == 1 < kv_len


def is_linear(method: str, module: nn.Module, window: int | None) -> bool:
    """Whether a layer computes linear attention.

    Under ``linear`` layers with a window or chunks of their own stay softmax attention.

    Args:
        method: The layer's ``attn_implementation``.
        module: The attention module.
        window: The ``sliding_window`` that it passes to its attention function.
    """
    if method != "linear":
        return False
    config: Any = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and isinstance(layer, int) and layer < len(kinds):
        return kinds[layer] not in ("sliding_attention", "chunked_attention")
    return window is None and getattr(config, "attention_chunk_size", None) is None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a batch says about its tokens, cached ones included: ``[batch or 1, total]`` each.

    Attributes:
        valid: bool, False at padding.
        document: int64, which of the packed documents a token is in.
        rank: int64, how many valid tokens of the same document precede a token.
        marked: bool, tokens named in ``global_attention_mask``; or None.
        past: Tokens that are cached already.
        told: Whether ``cu_seq_lens_q`` tells the documents, which then hold for encoders too;
            positions that start again mean documents only where attention looks back, or where
            transformers' own masks keep them apart.
        own_mask: Whether the batch holds a 4D mask.
    """

    valid: Tensor
    document: Tensor
    rank: Tensor
    marked: Tensor | None
    past: int
    told: bool
    own_mask: bool

    def as_one_document(self) -> Tokens:
        """The same without the documents."""
        counted = self.valid.long()
        return dataclasses.replace(
            self, document=torch.zeros_like(self.document), rank=counted.cumsum(1) - counted
        )


def read_tokens(batch: Mapping[str, Any], past: int) -> Tokens | None:
    """The tokens of a batch; None where it holds none that could be counted.

    Packed documents are told by ``cu_seq_lens_q``, or by ``position_ids`` that do not go up from
    one valid token to the next; not beside a 4D mask of the caller's own, which is the whole truth.
    Of positions along four axes ``[4, batch or 1, tokens]`` the first numbers the text; along three
    a document starts where all of them are 0, as images make them go back inside of one too.
    """
    ids = batch.get("input_ids")
    if ids is None:
        ids = batch.get("inputs_embeds")
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        return None
    rows, total = ids.shape[0], past + ids.shape[1]
    mask = batch.get("attention_mask")
    own_mask = isinstance(mask, Tensor) and mask.ndim == 4
    valid = [[True] * total for _ in range(rows)]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        missing = [False] * (total - mask.shape[1])
        valid = [[bool(x) for x in row[:total]] + missing for row in mask.tolist()]
    documents = [[0] * total for _ in range(rows)]
    positions, lengths = batch.get("position_ids"), batch.get("cu_seq_lens_q")
    if isinstance(lengths, Tensor):
        ends = lengths.tolist()[1:]
        documents = [[sum(end <= token for end in ends) for token in range(total)]]
    elif isinstance(positions, Tensor) and not past and not own_mask:
        documents = _of_positions(positions, valid) or documents
    ranks = [_ranks(*row) for row in zip(valid, documents, strict=True)]
    marked = batch.get("global_attention_mask")
    return Tokens(
        valid=torch.tensor(valid),
        document=torch.tensor(documents),
        rank=torch.tensor(ranks),
        marked=None if marked is None else marked.cpu().bool(),
        past=past,
        told=isinstance(lengths, Tensor),
        own_mask=own_mask,
    )


def _of_positions(positions: Tensor, valid: list[list[bool]]) -> list[list[int]] | None:
    if positions.ndim not in (2, 3) or positions.shape[-1] != len(valid[0]):
        return None
    read: Callable[..., list[int]] = _documents
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]
    elif positions.ndim == 3:
        positions, read = positions.abs().amax(0), _documents_at_zeros
    numbered = positions.expand(len(valid), -1).tolist()
    return [read(*row) for row in zip(numbered, valid, strict=True)]


def _documents_at_zeros(positions: list[int], valid: list[bool]) -> list[int]:
    number, begun, found = 0, False, []
    for position, real in zip(positions, valid, strict=True):
        number += real and begun and position == 0
        begun = begun or real
        found.append(number)
    return found


def _documents(positions: list[int], valid: list[bool]) -> list[int]:
    number, before, found = 0, None, []
    for position, real in zip(positions, valid, strict=True):
        if real and before is not None and position <= before:
            number += 1
        before = position if real else before
        found.append(number)
    return found


def _ranks(valid: list[bool], documents: list[int]) -> list[int]:
    seen: dict[int, int] = {}
    ranks = []
    for real, document in zip(valid, documents, strict=True):
        ranks.append(seen.get(document, 0))
        seen[document] = ranks[-1] + real
    return ranks


@dataclasses.dataclass(frozen=True)
class ExpectedPairs:
    """The pairs that a layer should attend to.

    Attributes:
        bias: What eager attention adds to the scores, ``[batch or 1, heads or 1, q_len, kv_len]``;
            None adds nothing.
        allowed: bool of the same kind of shape.
        left_out: Whether the method leaves out any pair that the model lets attend.
    """

    bias: Tensor | None
    allowed: Tensor
    left_out: bool

    def additive(self, dtype: torch.dtype) -> Tensor:
        """A mask as eager attention takes it: lowest where a pair does not attend."""
        allowed = self.allowed
        zeros = torch.zeros((), dtype=dtype, device=allowed.device)
        base = zeros if self.bias is None else self.bias.to(dtype)
        return torch.where(allowed, base, torch.finfo(dtype).min)


def describes(tokens: Tokens, q_len: int) -> bool:
    """Whether a call with so many queries is about these tokens."""
    return q_len + tokens.past == tokens.valid.shape[1]


def expected_pairs(
    method: str,
    module: nn.Module,
    eager_mask: Tensor | None,
    tokens: Tokens | None,
    q_len: int,
    kv_len: int,
    device: torch.device,
    causal: bool,
) -> ExpectedPairs:
    """Eager's mask, packed documents kept apart, and what the method's definition leaves of it.

    Args:
        method: The layer's ``attn_implementation``.
        module: The attention module; its config holds the method's parameters.
        eager_mask: The mask that transformers makes for eager attention in this very call:
            bool (True attends), float (added to the scores), or None (nothing is masked).
        tokens: Of the batch, as one document where this layer is not to keep documents apart. None
            where there are none (encoder-decoders); where they do not describe this call either
            (towers of other modalities), only eager's mask counts.
        q_len: Queries of the call.
        kv_len: Keys of the call.
        device: Where to make it.
        causal: Whether the layer looks back only.
    """
    bias = None
    if eager_mask is None:
        allowed = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=device)
    elif eager_mask.dtype == torch.bool:
        allowed = eager_mask[..., :kv_len].to(device)
    else:
        mask = eager_mask[..., :kv_len].to(device)
        allowed = mask > torch.finfo(mask.dtype).min / 2
        left = mask.masked_fill(~allowed, 0)
        bias = left if bool(left.any()) else None
    if tokens is None or not describes(tokens, q_len):
        return ExpectedPairs(bias, allowed, False)
    total = tokens.valid.shape[1]
    first_key = max(0, total - kv_len)  # a window layer's cache has dropped the keys before
    query_at = torch.arange(tokens.past, total)
    key_at = torch.arange(first_key, first_key + kv_len)
    token_of_key = key_at.clamp(max=total - 1)  # a static cache is longer; eager's mask says so
    chunk = _chunk_size(module)
    if chunk and not tokens.past and not tokens.own_mask and bool(tokens.document.any()):
        # Eager's mask of this call may know nothing of documents, and its chunks then run on from
        # one into the next; they start anew in each.
        allowed = _chunked(tokens, chunk)[:, None, :, token_of_key].to(device)
    apart = tokens.document[:, query_at, None] != tokens.document[:, None, token_of_key]
    allowed = allowed & ~apart[:, None].to(device)
    kept = _kept_by_method(method, module, tokens, query_at, key_at, token_of_key, causal)
    if kept is None:
        return ExpectedPairs(bias, allowed, False)
    kept = kept[:, None].to(device)
    return ExpectedPairs(bias, allowed & kept, bool((allowed & ~kept).any()))


def _kept_by_method(
    method: str,
    module: nn.Module,
    tokens: Tokens,
    query_at: Tensor,
    key_at: Tensor,
    token_of_key: Tensor,
    causal: bool,
) -> Tensor | None:
    """Bool ``[batch or 1, queries, keys]``: the methods as README and config.py define them."""
    config: Any = getattr(module, "config", None)
    distance = (query_at[:, None] - key_at[None, :]).abs()[None]
    if method == "sliding_window":
        sliding = parameters_of(config, SlidingWindowConfig)
        window = sliding.window
        if window is None:
            own = getattr(config, "sliding_window", None)
            # Encoders' configs give the largest distance, not the number of keys.
            window = SlidingWindowConfig.DEFAULT_WINDOW if not own else own + (not causal)
        sinks = _first(tokens, sliding.num_sink_tokens)[:, None, token_of_key]
        return (distance < window) | sinks
    if method == "longformer":
        longformer = parameters_of(config, LongformerConfig)
        near = distance < longformer.window * longformer.dilation
        near = near & (distance % longformer.dilation == 0)
        anywhere = _first(tokens, longformer.num_global_tokens)
        if tokens.marked is not None:
            anywhere = anywhere | tokens.marked
        return near | anywhere[:, query_at, None] | anywhere[:, None, token_of_key]
    if method == "strided":
        strided = parameters_of(config, StridedConfig)
        return (distance < strided.window) | (distance % strided.stride == 0)
    return None


def _chunk_size(module: nn.Module) -> int | None:
    """Tokens per chunk, where the model attends in chunks in this layer (Llama 4)."""
    config: Any = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not kinds or not isinstance(layer, int) or kinds[layer] != "chunked_attention":
        return None
    return int(config.attention_chunk_size)


def _chunked(tokens: Tokens, size: int) -> Tensor:
    """Bool ``[batch, tokens, tokens]``: valid keys up to the query, in its document's same chunk.

    Padding on the left does not count.
    """
    index = torch.arange(tokens.valid.shape[1])
    same = tokens.document[:, :, None] == tokens.document[:, None, :]
    first = torch.where(same & tokens.valid[:, None], index, len(index)).amin(2)
    chunk = torch.div(index - first, size, rounding_mode="floor")
    same = same & (chunk[:, :, None] == chunk[:, None, :]) & (index[:, None] >= index)
    return same & tokens.valid[:, None]


def _first(tokens: Tokens, count: int) -> Tensor:
    """The first valid tokens of every document."""
    return tokens.valid & (tokens.rank < count)
