"""Gap: not every model tells its masks or its attention which positions it was given.

Granite's hybrids, Kosmos-2.5, CLIP's text towers and others take ``position_ids`` for RoPE or
embeddings alone, so that packed documents would attend to each other under any name. So positions
that start again travel on the 2D mask too, through every model with one of our names, and
`packed_positions` reads them where the masks are made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.integrations.wrapping import unwrap, wrap
from hf_attn_plugin.patterns.documents import begin_again, numbers_tokens, restarts

_POSITIONS = "_hf_attn_plugin_positions"
_BY_LENGTHS = "_hf_attn_plugin_by_lengths"
_DOCUMENTS = "_hf_attn_plugin_documents"
_NO_PADDING = "_hf_attn_plugin_no_padding"

OWN_MASKS = frozenset({"modeling_blt", "modeling_glm5_next", "modeling_kosmos2"})
"""Modeling files of decoders that draw masks by themselves (BLT of its patches) and ask nothing."""

_PASS_LENGTHS = frozenset({"modeling_kosmos2"})  # cu_seq_lens_* reach their attention
_PARTS = frozenset({"BltGlobalTransformer", "BltLocalDecoder", "BltLocalEncoder", "BltPatcher"})
"""Parts that are given positions by the model around them, always."""

_DRAWS = (
    "{} draws masks by itself, so that packed documents (told by {}) would attend to each other. "
    "Pass each document as a batch row of its own."
)


def install(model_class: Any, names: frozenset[str]) -> None:
    """Wrap ``forward`` of a model class that takes positions and a mask; idempotent.

    It is done when a model is given one of our names: before, its file is not loaded.
    """
    owner = next(cls for cls in model_class.__mro__ if "forward" in vars(cls))
    if {"position_ids", "attention_mask"} <= set(inspect.signature(owner.forward).parameters):
        wrap(owner, "forward", lambda original: _telling(original, names))


def uninstall() -> None:
    """Put the models' own functions back."""
    from transformers import PreTrainedModel

    waiting = [PreTrainedModel]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if "forward" in vars(cls):
            unwrap(cls, "forward")


def positions_on(attention_mask: Any) -> Tensor | None:
    """The positions that a wrapped ``forward`` left on the mask, or None."""
    return getattr(attention_mask, _POSITIONS, None)


def told_positions(attention_mask: Any, position_ids: Tensor | None) -> Tensor | None:
    """What tells the documents: a mask's positions, or those that its maker was given.

    Where a caller told lengths and no positions, models number all tokens of a row on.
    """
    if position_ids is None or getattr(attention_mask, _BY_LENGTHS, False):
        return positions_on(attention_mask)
    return position_ids


def put_documents_on(attention_mask: Tensor | None, documents: Tensor) -> Tensor:
    """The mask, or one made to carry them, with the documents ``[batch, kv_length]`` on it.

    Transformers would take them as a term of the mask only along with ``position_ids``.
    """
    if attention_mask is None:
        mask = documents.new_ones(documents.shape, dtype=torch.bool)
    else:
        mask = attention_mask.view_as(attention_mask)
    setattr(mask, _DOCUMENTS, documents)
    setattr(mask, _NO_PADDING, attention_mask is None)
    return mask


def documents_on(attention_mask: Any) -> Tensor | None:
    """The documents that `put_documents_on` left on the mask, or None."""
    return getattr(attention_mask, _DOCUMENTS, None)


def masks_nothing(attention_mask: Any) -> bool:
    """Whether `put_documents_on` made this mask, so that it says nothing of padding."""
    return bool(getattr(attention_mask, _NO_PADDING, False))


def _telling(original: Callable[..., Any], names: frozenset[str]) -> Callable[..., Any]:
    order = list(inspect.signature(original).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation in names and numbers_tokens(self.config):
            by_name = {**dict(zip(order, args, strict=False)), **kwargs}
            mask = _mask_with_positions(self, by_name, names)
            if mask is not None:
                args, kwargs = (), {**by_name, "attention_mask": mask}
        return original(self, *args, **kwargs)

    return forward


def _mask_with_positions(
    model: Any, arguments: dict[str, Any], names: frozenset[str]
) -> Tensor | None:
    """The call's mask with its positions on it; None where they tell no documents, or are told."""
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    cache: Any = arguments.get("past_key_values")
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or tokens.shape[1] < 2:
        return None
    length, valid = tokens.shape[1], None
    file = type(model).__module__.rpartition(".")[2]
    lengths = arguments.get("cu_seq_lens_q")
    if isinstance(lengths, Tensor):
        if file in OWN_MASKS - _PASS_LENGTHS and lengths.shape[0] > 2:
            raise ValueError(_DRAWS.format(type(model).__name__, "cu_seq_lens_q"))
        if positions is not None or cache is not None or tokens.shape[0] != 1 or file in OWN_MASKS:
            return None
        positions = _positions_of(lengths, length)  # some models hand the lengths on to nobody
    if not isinstance(positions, Tensor) or positions.shape[-1] != length:
        return None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:  # made already, or the whole truth
            return None
        if positions_on(mask) is positions:
            return None
    elif not _reads_ours(model.config, names):
        return None  # other attention reads a mask as one document
    compiling = torch.compiler.is_compiling()  # then no value may be looked at
    counts = hasattr(cache, "get_seq_length") and not compiling
    past = int(cache.get_seq_length()) if counts else 0
    if not compiling:
        cached = positions.new_full((1,), past > 0).bool()
        if mask is not None:
            valid = mask[:, past : past + length].bool()  # padding is numbered in any way
            cached = mask[:, :past].bool().any(1)
            if valid.shape[1] != length:
                valid = None
        starts = restarts(positions, valid)
        if not bool(starts.any()) and not bool(begin_again(positions, valid, cached).any()):
            return None
    if file in OWN_MASKS and not (compiling and type(model).__name__ in _PARTS):
        told = "position_ids that start again"
        if compiling:
            told = "position_ids, of which torch.compile cannot tell whether they start again"
        raise ValueError(_DRAWS.format(type(model).__name__, told))
    if mask is None:
        seen = past + length
        if compiling and hasattr(cache, "get_seq_length"):
            past = cache.get_seq_length()  # a number that the graph holds, or a static cache's own
            seen = cache.get_max_length() if isinstance(past, Tensor) else past + length
        mask = positions.new_ones(tokens.shape[0], seen)
    mask = mask.view_as(mask)  # the caller's tensor stays as it is
    setattr(mask, _POSITIONS, positions)
    setattr(mask, _BY_LENGTHS, isinstance(lengths, Tensor))
    return mask


def _positions_of(lengths: Tensor, length: int) -> Tensor:
    """Positions in documents that cumulative lengths tell, int64 ``[1, length]``."""
    index = torch.arange(length, device=lengths.device)
    document = torch.searchsorted(lengths.long().contiguous(), index, right=True) - 1
    return (index - lengths.long()[document.clamp(max=lengths.shape[0] - 1)])[None]


def _reads_ours(config: Any, names: frozenset[str]) -> bool:
    """Whether every part of a model has one of our names; a part that has one tells for itself."""
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if part is None:
            continue
        if getattr(part, "_attn_implementation", None) not in names or not _reads_ours(part, names):
            return False
    return True
