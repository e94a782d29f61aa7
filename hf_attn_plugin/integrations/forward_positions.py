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
from hf_attn_plugin.patterns.documents import restarts

_POSITIONS = "_hf_attn_plugin_positions"
_DOCUMENTS = "_hf_attn_plugin_documents"

OWN_MASKS = frozenset({"modeling_blt", "modeling_glm5_next", "modeling_kosmos2"})
"""Modeling files of decoders that draw masks by themselves (BLT of its patches) and ask nothing."""


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


def put_documents_on(attention_mask: Tensor, documents: Tensor) -> Tensor:
    """The mask with the documents ``[batch, kv_length]`` on it.

    Transformers would take them as a term of the mask only along with ``position_ids``.
    """
    attention_mask = attention_mask.view_as(attention_mask)
    setattr(attention_mask, _DOCUMENTS, documents)
    return attention_mask


def documents_on(attention_mask: Any) -> Tensor | None:
    """The documents that `put_documents_on` left on the mask, or None."""
    return getattr(attention_mask, _DOCUMENTS, None)


def _telling(original: Callable[..., Any], names: frozenset[str]) -> Callable[..., Any]:
    order = list(inspect.signature(original).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation in names:
            by_name = {**dict(zip(order, args, strict=False)), **kwargs}
            mask = _mask_with_positions(self, by_name)
            if mask is not None:
                args, kwargs = (), {**by_name, "attention_mask": mask}
        return original(self, *args, **kwargs)

    return forward


def _mask_with_positions(model: Any, arguments: dict[str, Any]) -> Tensor | None:
    """The call's mask with its positions on it; None where they tell no documents, or are told."""
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(positions, Tensor) or not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return None
    length, valid = tokens.shape[1], None
    if length < 2 or positions.shape[-1] != length or arguments.get("cu_seq_lens_q") is not None:
        return None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:  # made already, or the whole truth
            return None
        if positions_on(mask) is positions:
            return None
        valid = mask[:, -length:].bool()  # padding is numbered in any way
        valid = valid if valid.shape[1] == length else None
    compiling = torch.compiler.is_compiling()  # then no value may be looked at
    if not (compiling or bool(restarts(positions, valid).any())):
        return None
    if not compiling and type(model).__module__.rpartition(".")[2] in OWN_MASKS:
        raise ValueError(
            f"{type(model).__name__} draws masks by itself that do not follow position_ids, so "
            "that packed documents (position_ids that start again) would attend to each other. "
            "Pass each document as a batch row of its own."
        )
    if mask is None:
        cache = arguments.get("past_key_values")
        if compiling and cache is not None:
            return None
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = positions.new_ones(tokens.shape[0], past + length)
    mask = mask.view_as(mask)  # the caller's tensor stays as it is
    setattr(mask, _POSITIONS, positions)
    return mask
