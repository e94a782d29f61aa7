"""Gap: transformers overlooks packed documents whenever a cache is made or a mask is passed.

Its masks separate documents by ``position_ids`` in training only, so that a plain forward pass, in
which a cache is made too, lets every document attend to those before it. The attention functions
here read ``position_ids`` themselves, but not every model passes them on; the masks of our names
are told here, where every model passes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.integrations.wrapping import ORIGINAL as _MARK  # noqa: F401  a test reads it
from hf_attn_plugin.integrations.wrapping import unwrap, wrap
from hf_attn_plugin.patterns import PatternMask
from hf_attn_plugin.patterns.documents import restarts

_FUNCTION = "_preprocess_mask_arguments"


def install(names: frozenset[str]) -> None:
    """Wrap the function that all of transformers' masks begin with; idempotent."""
    from transformers import masking_utils

    wrap(masking_utils, _FUNCTION, lambda original: _separating(original, names))


def uninstall() -> None:
    """Put transformers' own function back."""
    from transformers import masking_utils

    unwrap(masking_utils, _FUNCTION)


def _separating(original: Callable[..., Any], names: frozenset[str]) -> Callable[..., Any]:
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
        if config._attn_implementation not in names or ready or documents is not None:
            return found
        if isinstance(attention_mask, PatternMask):  # made before, with the documents in it
            return found
        documents = _documents(position_ids, valid, q_length, kv_length, q_offset, kv_offset)
        return ready, valid, documents, q_length, kv_length, q_offset, kv_offset

    return preprocess


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
    if q_length < 2 or torch.compiler.is_compiling():  # then no value may be looked at
        return None
    if isinstance(valid, Tensor) and valid.ndim == 2:
        start = int(q_offset)
        valid = valid[:, start : start + q_length].bool()
        if valid.shape[1] != q_length:
            return None
    else:
        valid = None
    starts = restarts(positions, valid)
    if not bool(starts.any()):
        return None
    if int(q_offset) > 0 or kv_offset > 0:
        raise ValueError(
            "position_ids start again inside the new tokens while earlier ones are cached: packed "
            "documents cannot be continued from a cache. Pass each document as a batch row of its "
            "own."
        )
    # The slots of a static cache that nothing was written to belong to no document.
    documents = starts.to(torch.int64).cumsum(1)
    return torch.nn.functional.pad(documents, (0, kv_length - q_length), value=q_length)
