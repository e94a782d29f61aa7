"""Gap: transformers takes any name with "flash" in it for a kernel that it must fetch itself.

Making a model with ``attn_implementation="flash"`` would raise, and for the models that name their
own flash kernels (gpt-oss and others) it would quietly switch to one of these. For our names the
check is answered here: registered, and the model's attention goes through the interface.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_METHOD = "_check_and_adjust_attn_implementation"
_MARK = "_hf_attn_plugin_original"


def install(names: frozenset[str]) -> None:
    """Wrap ``PreTrainedModel._check_and_adjust_attn_implementation``; idempotent."""
    from transformers.modeling_utils import PreTrainedModel

    original = PreTrainedModel._check_and_adjust_attn_implementation
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def check(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        name = (attn_implementation or "").removeprefix("paged|")
        if name not in names:
            return original(self, attn_implementation, *args, **kwargs)
        refuse_bypassing(type(self), name)
        assert attn_implementation is not None
        return attn_implementation

    setattr(check, _MARK, original)
    setattr(PreTrainedModel, _METHOD, check)


def uninstall() -> None:
    """Put transformers' own method back."""
    from transformers.modeling_utils import PreTrainedModel

    wrapped = PreTrainedModel._check_and_adjust_attn_implementation
    original: Callable[..., str] | None = getattr(wrapped, _MARK, None)
    if original is not None:
        setattr(PreTrainedModel, _METHOD, original)


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
