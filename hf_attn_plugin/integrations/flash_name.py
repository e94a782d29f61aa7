"""Gap: transformers takes any name with "flash" in it for a kernel that it must fetch itself.

Making a model with ``attn_implementation="flash"`` would raise, and for the models that name their
own flash kernels (gpt-oss and others) it would quietly switch to one of these. For our names the
check is answered here: registered, and the model's attention goes through the interface. And masks
of chunks (Llama 4), which FlashAttention has not and `flash` has, would be refused to the name.
"""

from __future__ import annotations

import functools
from typing import Any

from hf_attn_plugin.compat import paged_names
from hf_attn_plugin.integrations.model_source import (
    is_language_model_without_attention,
    uses_interface,
)

_IS_FLASH = "is_flash_attention_requested"
_CHECK = "_check_and_adjust_attn_implementation"
_SET = "set_attn_implementation"
_MARK = "_hf_attn_plugin_original"


def install(names: frozenset[str]) -> None:
    """Wrap the methods of ``PreTrainedModel`` that take a name; idempotent."""
    from transformers.modeling_utils import PreTrainedModel

    if hasattr(getattr(PreTrainedModel, _CHECK), _MARK):
        return
    original_check = getattr(PreTrainedModel, _CHECK)
    original_set = getattr(PreTrainedModel, _SET)

    @functools.wraps(original_check)
    def check(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str | None:
        name = str(attn_implementation).removeprefix("paged|")
        if name not in names:
            return original_check(self, attn_implementation, *args, **kwargs)
        refuse_bypassing(type(self), name)
        return attn_implementation if attn_implementation in paged_names(name) else name

    @functools.wraps(original_set)
    def set_name(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        # Transformers only logs a warning, and keeps the attention that the model had.
        own = attn_implementation
        if isinstance(own, dict):
            own = own.get("")  # the model itself; its parts are named
        if isinstance(own, str) and own in names:
            refuse_bypassing(type(self), own)
        return original_set(self, attn_implementation, *args, **kwargs)

    for method, wrapper, original in (
        (_CHECK, check, original_check),
        (_SET, set_name, original_set),
    ):
        setattr(wrapper, _MARK, original)
        setattr(PreTrainedModel, method, wrapper)
    _install_for_masks(names)


def _install_for_masks(names: frozenset[str]) -> None:
    """In the masks' own module, our names are no FlashAttention kernel."""
    from transformers import masking_utils

    original = getattr(masking_utils, _IS_FLASH)

    @functools.wraps(original)
    def is_flash(config: Any = None, *args: Any, **kwargs: Any) -> bool:
        if getattr(config, "_attn_implementation", None) in names:
            return False
        return bool(original(config, *args, **kwargs))

    setattr(is_flash, _MARK, original)
    setattr(masking_utils, _IS_FLASH, is_flash)


def uninstall() -> None:
    """Put transformers' own methods back."""
    from transformers import masking_utils
    from transformers.modeling_utils import PreTrainedModel

    for method in (_CHECK, _SET):
        original = getattr(getattr(PreTrainedModel, method), _MARK, None)
        if original is not None:
            setattr(PreTrainedModel, method, original)
    original = getattr(getattr(masking_utils, _IS_FLASH), _MARK, None)
    if original is not None:
        setattr(masking_utils, _IS_FLASH, original)


def refuse_bypassing(model_class: Any, name: str) -> None:
    """Refuse a model class in which the registered function would never be called.

    Such a class accepts every name and computes its own attention, or is a language model without
    any, so nothing that was asked for would happen. Backbones without attention (convolutions in
    front of a transformer) are let be: a name given to the whole is not about them.
    """
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
