"""Gap: some models tell neither their masks nor their attention which positions they were given.

Granite's hybrid models take ``position_ids`` and use them for RoPE alone, so that packed documents
would attend to each other under any name. Where a model's own ``forward`` makes causal masks and
hands ``position_ids`` to nobody by name, positions that start again travel on the 2D mask, from
which `packed_positions` reads them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.integrations.wrapping import unwrap, wrap
from hf_attn_plugin.patterns.documents import restarts

_POSITIONS = "_hf_attn_plugin_positions"
_DOCUMENTS = "_hf_attn_plugin_documents"
_MASK_MAKERS = frozenset({"create_causal_mask", "create_masks_for_generate"})


def install(model_class: Any, names: frozenset[str]) -> None:
    """Wrap ``forward`` of the classes in this one's file that keep positions to themselves.

    Idempotent. It is done when a model is given one of our names: before, its file is not loaded.
    """
    file = model_class.__module__
    classes: list[Any] = [x for x in vars(sys.modules[file]).values() if inspect.isclass(x)]
    for cls in classes:
        if cls.__module__ == file and keeps_positions(cls):
            wrap(cls, "forward", lambda original: _telling(original, names))


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


@functools.cache
def keeps_positions(cls: Any) -> bool:
    """Whether a model's own ``forward`` makes causal masks and passes ``position_ids`` to none."""
    forward = vars(cls).get("forward")
    if forward is None or "position_ids" not in inspect.signature(forward).parameters:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError):
        return False
    nodes = list(ast.walk(tree))
    told = any(isinstance(node, ast.keyword) and node.arg == "position_ids" for node in nodes)
    keys = [key for node in nodes if isinstance(node, ast.Dict) for key in node.keys]
    told = told or any(
        isinstance(key, ast.Constant) and key.value == "position_ids" for key in keys
    )
    makes = any(isinstance(node, ast.Name) and node.id in _MASK_MAKERS for node in nodes)
    return makes and not told


def _telling(original: Callable[..., Any], names: frozenset[str]) -> Callable[..., Any]:
    order = list(inspect.signature(original).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation in names and not torch.compiler.is_compiling():
            by_name = {**dict(zip(order, args, strict=False)), **kwargs}
            mask = _mask_with_positions(by_name)
            if mask is not None:
                args, kwargs = (), {**by_name, "attention_mask": mask}
        return original(self, *args, **kwargs)

    return forward


def _mask_with_positions(arguments: dict[str, Any]) -> Tensor | None:
    """The call's mask with its positions on it; None where they tell no documents."""
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if not isinstance(positions, Tensor) or not bool(restarts(positions).any()):
        return None
    if mask is None:
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        cache = arguments.get("past_key_values")
        if tokens is None:
            return None
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = positions.new_ones(tokens.shape[0], past + tokens.shape[1])
    elif not isinstance(mask, Tensor) or mask.ndim != 2:  # made already, or the whole truth
        return None
    mask = mask.view_as(mask)  # the caller's tensor stays as it is
    setattr(mask, _POSITIONS, positions)
    return mask
