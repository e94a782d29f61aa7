"""Gap: transformers overlooks packed documents whenever a cache is made or a mask is passed.

Its masks separate documents by ``position_ids`` in training only, so that a plain forward pass, in
which a cache is made too, lets every document attend to those before it. In training they cut at
every position that is not the next one, also where positions jump ahead inside one document
(positions skipped to train for a longer context). The masks of our names are told here what is true
of both: a document starts where positions do not go up. The attention functions read
``position_ids`` themselves too, but not every model passes them on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.compat import chunks_begin_anew
from hf_attn_plugin.integrations.forward_positions import put_documents_on, told_positions
from hf_attn_plugin.integrations.wrapping import ORIGINAL as _MARK  # noqa: F401  a test reads it
from hf_attn_plugin.integrations.wrapping import unwrap, wrap
from hf_attn_plugin.patterns import PatternMask
from hf_attn_plugin.patterns.documents import (
    CONTINUED,
    begin_again,
    number_in_cache,
    numbers_tokens,
    restarts,
)
from hf_attn_plugin.patterns.refusal import refuse_where

_FUNCTION = "_preprocess_mask_arguments"
_ONE_DOCUMENT = "_hf_attn_plugin_one_document"
_OF_SEVERAL = (
    "the cache holds packed documents, of which the first has {} tokens, and tokens after it would "
    "attend to all of them. Cache each document as a batch row of its own, in a new cache."
)

_CHUNKS = (
    "in a model with chunked attention (attention_chunk_size) chunks would not begin anew in each "
    "packed document under torch.compile, over a cache that is not as long as the call or with "
    "transformers 5.17. Run it uncompiled, or pass each document as a batch row of its own."
)


def install(names: frozenset[str]) -> None:
    """Wrap the function that all of transformers' masks begin with; idempotent."""
    from transformers import masking_utils

    wrap(masking_utils, _FUNCTION, lambda original: _separating(original, names))


def uninstall() -> None:
    """Put transformers' own function back."""
    from transformers import masking_utils

    unwrap(masking_utils, _FUNCTION)


@contextlib.contextmanager
def jumps_cut_nothing() -> Iterator[None]:
    """Transformers' own masks, too, begin a document only where positions do not go up.

    Inside the block eager attention is called with the documents that our names keep apart.
    """
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices

    def find(position_ids: Tensor) -> Tensor | None:
        # Written without `restarts`: what it is compared with uses that.
        cuts = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) <= 0
        return cuts.cumsum(-1) if bool(cuts.any()) else None

    masking_utils.find_packed_sequence_indices = find
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _separating(original: Callable[..., Any], names: frozenset[str]) -> Callable[..., Any]:
    anew = chunks_begin_anew()

    def preprocess(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Any,
        past_key_values: Any,
        position_ids: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        found = original(
            config, inputs_embeds, attention_mask, past_key_values, position_ids, *args, **kwargs
        )
        ready, valid, documents, q_length, kv_length, q_offset, kv_offset = found
        if config._attn_implementation not in names or ready:
            return found
        if isinstance(attention_mask, PatternMask) or not numbers_tokens(config):
            return found  # made before, with the documents in it, or there are none
        if len(args) + len(kwargs) > 1:  # masks that look both ways name the encoder's states too
            return found
        positions = told_positions(attention_mask, position_ids)
        rows, compiling = inputs_embeds.shape[0], torch.compiler.is_compiling()
        device, slots = inputs_embeds.device, kv_offset + kv_length
        valid = _of_one_document(past_key_values, q_offset, valid, (rows, slots), device)
        if compiling:
            valid, documents = _unseen(positions, valid, q_length, kv_length, q_offset, kv_offset)
        else:
            documents = _documents(positions, valid, q_length, kv_length, q_offset, kv_offset)
            _remember(past_key_values, q_offset, documents)
        if documents is not None:
            documents = documents.expand(rows, -1)  # transformers looks them up by batch row
            # Told by the mask, not as transformers' own term: that would count positions anew in
            # each document, also where a term indexes the row by them (Gemma 3's blocks of images).
            # Only chunks have to begin anew.
            if not getattr(config, "attention_chunk_size", None) or position_ids is None:
                return ready, put_documents_on(valid, documents), None, *found[3:]
            if compiling:
                if isinstance(q_offset, Tensor) or q_length != kv_length or not anew:
                    several = (documents > 0) & (documents < q_length)
                    documents = refuse_where(several, _CHUNKS, documents)
                    return ready, put_documents_on(valid, documents), None, *found[3:]
                valid = put_documents_on(valid, documents)
        return ready, valid, documents, q_length, kv_length, q_offset, kv_offset

    return preprocess


def _remember(cache: Any, q_offset: int | Tensor, documents: Tensor | None) -> None:
    """Keep with a cache, as it begins, how many of its tokens are of one document; or forget it."""
    if cache is None or (documents is None and not hasattr(cache, _ONE_DOCUMENT)):
        return
    if int(q_offset) > 0:
        return
    if documents is not None:
        of_first = (documents == documents[:, :1]).sum(1).min()
        setattr(cache, _ONE_DOCUMENT, int(of_first))
    else:
        delattr(cache, _ONE_DOCUMENT)


def _of_one_document(
    cache: Any, q_offset: int | Tensor, valid: Any, shape: tuple[int, int], device: torch.device
) -> Any:
    """The mask, where what is cached is one document; the row may have been cropped to its first.

    A cache that began in a compiled graph does not tell, since no value was looked at there.
    """
    known = getattr(cache, _ONE_DOCUMENT, None)
    if known is None:
        return valid
    wrong = q_offset > known
    if not isinstance(wrong, Tensor):
        if not wrong:
            if int(q_offset) > 0:  # all that is cached, and what comes now, is one document
                delattr(cache, _ONE_DOCUMENT)
            return valid
        wrong = torch.ones((), dtype=torch.bool, device=device)
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=device)
    return refuse_where(wrong, _OF_SEVERAL.format(known), valid)


def _documents(
    positions: Tensor | None,
    valid: Any,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
) -> Tensor | None:
    """The document of every key, ``[batch or 1, kv_length]``, where there is more than one."""
    known = isinstance(positions, Tensor) and positions.ndim in (2, 3)
    if positions is None or not known or positions.shape[-1] != q_length:
        return None
    if q_length < 2:
        return None
    real = None
    if isinstance(valid, Tensor) and valid.ndim == 2:
        start = int(q_offset)
        real = valid.bool()
        valid = real[:, start : start + q_length]
        if valid.shape[1] != q_length:
            return None
    else:
        valid = None
    starts = restarts(positions, valid)
    past = int(q_offset)
    if past > 0:
        cached = positions.new_ones(1).bool() if real is None else real[:, :past].any(1)
        if bool(starts.any()) or bool(begin_again(positions, valid, cached).any()):
            raise ValueError(CONTINUED)
    if not bool(starts.any()):
        return None
    if kv_offset > 0:
        raise ValueError(CONTINUED)
    # The slots of a static cache that nothing was written to belong to no document.
    documents = starts.to(torch.int64).cumsum(1)
    return torch.nn.functional.pad(documents, (0, kv_length - q_length), value=q_length)


def _unseen(
    positions: Tensor | None,
    valid: Any,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
) -> tuple[Any, Tensor | None]:
    """The mask, and `_documents`, where no value may be looked at before the graph runs."""
    if positions is None or positions.shape[-1] != q_length or q_length < 2:
        return valid, None
    real = valid.bool() if isinstance(valid, Tensor) and valid.ndim == 2 else None
    begun = None  # rows of which anything is cached; of a new dynamic cache that is known
    if isinstance(q_offset, Tensor) or q_offset > 0:
        slots = q_length + kv_length if real is None else real.shape[1]
        cached = torch.arange(slots, device=positions.device)[None] < q_offset
        begun = (cached if real is None else cached & real).any(1)
    if real is not None:
        index = torch.arange(q_length, device=real.device) + q_offset
        real = real[:, index.clamp(max=real.shape[1] - 1)]
    starts = restarts(positions, real)
    documents = None
    if isinstance(kv_offset, int) and kv_offset == 0:
        documents = number_in_cache(starts, q_offset, kv_length)
    if begun is None:
        return valid, documents
    continued = (starts.any(1) & begun) | begin_again(positions, real, begun)
    if documents is not None:
        return valid, refuse_where(continued, CONTINUED, documents)
    # A window's cache that rolls has begun, so that there is one document.
    if valid is None:
        valid = positions.new_ones(positions.shape[0], kv_offset + kv_length).bool()
    return refuse_where(continued, CONTINUED, valid), None
