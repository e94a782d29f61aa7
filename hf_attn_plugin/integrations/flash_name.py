"""Gap: transformers takes any name with "flash" in it for a kernel that it must fetch itself.

Making a model with ``attn_implementation="flash"`` would raise, and for the models that name their
own flash kernels (gpt-oss and others) it would quietly switch to one of these. For our names the
check is answered here: registered, and the model's attention goes through the interface.
"""

from __future__ import annotations

import functools
from typing import Any

from hf_attn_plugin.compat import paged_names

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


def uninstall() -> None:
    """Put transformers' own methods back."""
    from transformers.modeling_utils import PreTrainedModel

    for method in (_CHECK, _SET):
        original = getattr(getattr(PreTrainedModel, method), _MARK, None)
        if original is not None:
            setattr(PreTrainedModel, method, original)


def refuse_bypassing(model_class: Any, name: str) -> None:
    """Refuse a model class whose attention never calls the registered function.

    Such a class accepts every name and computes its own attention, so nothing that was asked for
    would happen.
    """
    if not _uses_interface(model_class):
        raise ValueError(
            f"{model_class.__name__} computes attention by itself and ignores attn_implementation, "
            f"so {name!r} would change nothing in it. Use a model whose attention goes through "
            "transformers' attention interface (Llama, Mistral, Qwen, Gemma, BERT, ...); in a "
            "multimodal model, name the part: attn_implementation={'text_config': "
            f"{name!r}}}."
        )


@functools.cache
def _uses_interface(model_class: Any) -> bool:
    return bool(model_class._can_set_attn_implementation())
