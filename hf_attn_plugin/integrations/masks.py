"""The mask function registered with transformers: it reads the pattern out of the mask functions.

Transformers describes a mask as nested closures (causal, and a window, and packed documents, ...).
The known ones become a `Pattern`; anything else is evaluated once into a dense mask, so that no
mask is ever lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from hf_attn_plugin.integrations.forward_positions import documents_on, masks_nothing
from hf_attn_plugin.ops.triton.decode_plan import is_capturing
from hf_attn_plugin.patterns import Pattern, PatternMask
from hf_attn_plugin.patterns.documents import number_chunks

MaskFunction = Callable[..., Any]


# The makers of mask functions whose meaning is known.
_MAKERS = (
    "and_masks",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "chunked_overlay",
)


@dataclasses.dataclass
class _Terms:
    """What a mask function was found to ask for."""

    causal: bool = False
    band: int | None = None
    symmetric_band: int | None = None
    documents: Tensor | None = None
    chunk: tuple[int, Tensor] | None = None


def pattern_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | PatternMask | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> PatternMask:
    """Transformers' mask interface; the arguments are those of ``masking_utils.sdpa_mask``.

    Returns:
        A `PatternMask`. Under ``torch.compile``, which cannot follow closures, and for mask
        functions that are not known, its pattern holds a dense mask.
    """
    if isinstance(attention_mask, PatternMask):  # static caches hand a finished mask in again
        return attention_mask

    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # the static cache counts on in this very tensor

    def dense() -> Tensor:
        make: Callable[..., Any] = masking_utils.sdpa_mask
        mask: Tensor = make(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )
        return mask

    told = documents_on(attention_mask)
    if masks_nothing(attention_mask):
        attention_mask = None
    terms = _Terms()
    known = not torch.compiler.is_compiling() and _read(mask_function, terms)
    if terms.documents is None:
        terms.documents = told
    # Left to the dense mask: a window that is open towards the end, and the empty one that models
    # with their windows switched off make and never use.
    if terms.band is not None and (not terms.causal or terms.band < 1):
        known = False
    end = q_offset + q_length if known and terms.causal else None
    key_valid, kv_ranks = _padding(attention_mask, kv_length, kv_offset, end)
    if not known:
        if told is None and not torch.compiler.is_compiling():
            told = _packed(mask_function)  # `dense` has them; first tokens are counted by them
        pattern = Pattern(
            q_len=q_length,
            kv_len=kv_length,
            causal=False,
            q_offset=q_offset,
            kv_offset=kv_offset,
            key_valid=key_valid,
            kv_ranks=kv_ranks,
            q_documents=None if told is None else _of_queries(told, q_length, q_offset),
            kv_documents=told,
            dense=dense(),
        )
        return PatternMask(pattern, batch_size)
    bands = [band for band in (terms.band, terms.symmetric_band) if band is not None]
    documents = _documents(terms, q_length, kv_length, q_offset, kv_offset, device)
    if terms.chunk is not None:
        # A chunk is no document: it has no first tokens of its own.
        own = terms.documents
        kv_ranks = Pattern(
            q_len=q_length,
            kv_len=kv_length,
            kv_offset=kv_offset,
            key_valid=None if key_valid is None else key_valid.to(device),
            q_documents=None if own is None else own[:, :q_length],
            kv_documents=own,
            kv_ranks=kv_ranks,
        ).key_ranks(device)
    pattern = Pattern(
        q_len=q_length,
        kv_len=kv_length,
        causal=terms.causal,
        band=min(bands, default=None),
        q_offset=q_offset,
        kv_offset=kv_offset,
        key_valid=key_valid,
        kv_ranks=kv_ranks,
        q_documents=documents[0],
        kv_documents=documents[1],
    )
    return PatternMask(pattern, batch_size)


def _padding(
    attention_mask: Tensor | None, kv_length: int, kv_offset: int, end: int | Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which of this layer's keys are valid, and their ranks where the layer dropped the first keys.

    The 2D mask covers every token seen; a rolling window layer holds only the last ones. ``end`` is
    one after the last query, where nothing sees further than itself.
    """
    if attention_mask is None:
        return None, None
    if attention_mask.ndim != 2:
        raise ValueError(
            "attention_mask must be [batch, tokens] or [batch, 1 or heads, queries, keys]; "
            f"got {tuple(attention_mask.shape)}."
        )
    valid = attention_mask.bool()
    missing = kv_length + kv_offset - valid.shape[1]
    looks = not torch.compiler.is_compiling() and not is_capturing(valid.device)
    if missing > 0:
        # What it does not cover of a static cache are places after the last query.
        if looks and end is not None and kv_offset == 0:
            covered = torch.as_tensor(end <= valid.shape[1], device=valid.device)
            if bool((covered & valid.all()).all()):
                return None, None
        valid = torch.nn.functional.pad(valid, (0, missing))
    window = slice(kv_offset, kv_offset + kv_length)
    ranks = None
    if kv_offset > 0:
        counted = valid.to(torch.int64)
        ranks = (counted.cumsum(1) - counted)[:, window]
    valid = valid[:, window]
    if looks and bool(valid.all()):
        return None, ranks
    return valid, ranks


def _of_queries(documents: Tensor, q_length: int, q_offset: int | Tensor) -> Tensor:
    """The queries' part of the numbers of all keys; under torch.compile they may be anywhere."""
    if not torch.compiler.is_compiling():
        return documents[:, :q_length]
    return documents[:, torch.arange(q_length, device=documents.device) + q_offset]


def _documents(
    terms: _Terms,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> tuple[Tensor | None, Tensor | None]:
    """Document numbers of queries and keys, of which every chunk has one of its own."""
    if terms.documents is not None:
        numbers = terms.documents
        if terms.chunk is not None:
            # transformers < 5.23 lets them run on from document to document, so that one packed
            # behind another is computed otherwise than alone.
            size, left_padding = terms.chunk
            numbers = number_chunks(numbers, size, left_padding.to(numbers.device).view(-1, 1))
        return numbers[:, :q_length], numbers  # a static cache has empty slots
    if terms.chunk is None:
        return None, None
    size, left_padding = terms.chunk
    pads = left_padding.to(device).view(-1, 1)
    q_chunk = (torch.arange(q_length, device=device)[None] + q_offset - pads) // size
    kv_chunk = (torch.arange(kv_length, device=device)[None] + kv_offset - pads) // size
    return q_chunk, kv_chunk


def _read(function: MaskFunction, terms: _Terms) -> bool:
    """Collect what ``function`` asks for; False when any part of it is unknown."""
    if function is masking_utils.causal_mask_function:
        terms.causal = True
        return True
    if function is masking_utils.bidirectional_mask_function:
        return True
    maker = _maker(function)
    cells = _cells(function)
    if maker == "and_masks":
        return all(_read(part, terms) for part in cells["mask_functions"])
    if maker == "sliding_window_overlay":
        terms.band = cells["sliding_window"]
        return True
    if maker == "sliding_window_bidirectional_overlay":
        terms.symmetric_band = cells["sliding_window"] + 1  # its distance is inclusive
        return True
    if maker == "packed_sequence_mask_function":
        terms.documents = cells["packed_sequence_mask"].to(torch.int64)
        return True
    if maker == "remap_positions_for_packed_sequence":
        return _read(cells["mask_function"], terms)
    if maker == "chunked_overlay":
        terms.chunk = (cells["chunk_size"], cells["left_padding"])
        return True
    return False


def _packed(function: MaskFunction) -> Tensor | None:
    """The packed documents that a mask function keeps apart, whatever else it asks for."""
    maker, cells = _maker(function), _cells(function)
    if maker == "packed_sequence_mask_function":
        documents: Tensor = cells["packed_sequence_mask"]
        return documents.to(torch.int64)
    parts = cells["mask_functions"] if maker == "and_masks" else ()
    return next((found for found in map(_packed, parts) if found is not None), None)


def _maker(function: MaskFunction) -> str | None:
    """The function of ``masking_utils`` that made this closure, known by the code it holds.

    Names would not do: a user's function can carry upstream's, by ``functools.wraps`` for one.
    """
    code = getattr(function, "__code__", None)
    for name in _MAKERS:
        maker = getattr(masking_utils, name, None)  # 5.17 does not have all of them
        if maker is not None and code is not None and code in maker.__code__.co_consts:
            return name
    return None


def _cells(function: MaskFunction) -> dict[str, Any]:
    """The variables a closure holds, by name."""
    code = getattr(function, "__code__", None)
    closure = getattr(function, "__closure__", None) or ()
    names = code.co_freevars if code is not None else ()
    return dict(zip(names, (cell.cell_contents for cell in closure), strict=True))
