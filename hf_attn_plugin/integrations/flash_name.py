"""Gap: transformers takes any name with "flash" in it for a kernel that it must fetch itself.

Making a model with ``attn_implementation="flash"`` would raise, and for the models that name their
own flash kernels (gpt-oss and others) it would quietly switch to one of these. For our names the
check is answered here: registered, and the model's attention goes through the interface. And masks
of chunks (Llama 4), which FlashAttention has not and `flash` has, would be refused to the name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_attn_plugin.compat import paged_names
from hf_attn_plugin.integrations.model_source import (
    is_language_model_without_attention,
    uses_interface,
)
from hf_attn_plugin.integrations.wrapping import unwrap, wrap

_IS_FLASH = "is_flash_attention_requested"
_CHECK = "_check_and_adjust_attn_implementation"
_SET = "set_attn_implementation"
_NOT_SO_CAUSAL = frozenset({"modeling_bridgetower"})
"""Modeling files with layers that call themselves causal and attend both ways, without a mask."""


def install(names: frozenset[str]) -> None:
    """Wrap what takes a name or asks about it; idempotent."""
    from transformers import masking_utils
    from transformers.modeling_utils import PreTrainedModel

    wrap(PreTrainedModel, _CHECK, lambda original: _check(original, names))
    wrap(PreTrainedModel, _SET, lambda original: _set(original, names))
    wrap(masking_utils, _IS_FLASH, lambda original: _is_flash(original, names))


def uninstall() -> None:
    """Put transformers' own functions back."""
    from transformers import masking_utils
    from transformers.modeling_utils import PreTrainedModel

    from hf_attn_plugin.integrations import forward_positions

    unwrap(PreTrainedModel, _CHECK)
    unwrap(PreTrainedModel, _SET)
    unwrap(masking_utils, _IS_FLASH)
    forward_positions.uninstall()


def _check(original: Callable[..., Any], names: frozenset[str]) -> Callable[..., Any]:
    """Our names need no kernel to be fetched."""
    from hf_attn_plugin.integrations import forward_positions  # loads torch

    def check(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str | None:
        name = str(attn_implementation).removeprefix("paged|")
        if name not in names:
            return original(self, attn_implementation, *args, **kwargs)
        refuse_bypassing(type(self), name)
        forward_positions.install(type(self), names)
        return attn_implementation if attn_implementation in paged_names(name) else name

    return check


def _set(original: Callable[..., Any], names: frozenset[str]) -> Callable[..., Any]:
    """Transformers only logs a warning, and keeps the attention that the model had."""
    from transformers.modeling_utils import PreTrainedModel

    from hf_attn_plugin.integrations import forward_positions  # loads torch

    def set_name(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        own = attn_implementation
        if isinstance(own, dict):
            own = own.get("")  # the model itself; its parts are named
        if isinstance(own, str) and own in names:
            refuse_bypassing(type(self), own)
        result = original(self, attn_implementation, *args, **kwargs)
        for part in self.modules():
            if isinstance(part, PreTrainedModel) and part.config._attn_implementation in names:
                forward_positions.install(type(part), names)
        return result

    return set_name


def _is_flash(original: Callable[..., Any], names: frozenset[str]) -> Callable[..., bool]:
    """In the masks' own module, our names are no FlashAttention kernel."""

    def is_flash(config: Any = None, *args: Any, **kwargs: Any) -> bool:
        if getattr(config, "_attn_implementation", None) in names:
            return False
        return bool(original(config, *args, **kwargs))

    return is_flash


def refuse_bypassing(model_class: Any, name: str) -> None:
    """Refuse a model class in which the registered function would never be called.

    Such a class accepts every name and computes its own attention, or is a language model without
    any, so nothing that was asked for would happen. Backbones without attention (convolutions in
    front of a transformer) are let be: a name given to the whole is not about them.
    """
    if model_class.__module__.rpartition(".")[2] in _NOT_SO_CAUSAL:
        raise ValueError(
            f"{model_class.__name__} joins text and image in layers that call themselves causal "
            f"and attend in both directions, so {name!r} would compute something else in them. Use "
            "attn_implementation='eager' for this model."
        )
    if not uses_interface(model_class):
        raise ValueError(
            f"{model_class.__name__} computes attention by itself and ignores attn_implementation, "
            f"so {name!r} would change nothing in it. Use a model whose attention goes through "
            "transformers' attention interface (Llama, Mistral, Qwen, Gemma, BERT, ...); in a "
            "multimodal model, name the part: attn_implementation={'text_config': "
            f"{name!r}}}."
        )
    if is_language_model_without_attention(model_class):
        raise ValueError(
            f"{model_class.__name__} holds no attention, so {name!r} would change nothing in it. "
            "Load it without attn_implementation."
        )
