"""Gap: transformers refuses `QuantizedCache` for ``sparq`` with a message about layer types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import QuantizedCache

from hf_attn_plugin.config import SparQConfig
from hf_attn_plugin.integrations.wrapping import unwrap, wrap


def _checked(original: Callable[..., None]) -> Callable[..., None]:
    def checked(
        self: Any, backend: str, config: PreTrainedConfig, *args: Any, **kwargs: Any
    ) -> None:
        text_config = config.get_text_config(decoder=True)
        if getattr(text_config, "_attn_implementation", None) == SparQConfig.name:
            raise ValueError(
                "attn_implementation='sparq' does not work over a quantized cache: that one "
                "restores all keys and values at every step, so reading few of them saves nothing. "
                "Use the default cache; SparQConfig(key_copy='int8') or 'int4' makes its second "
                "copy of the keys smaller. For the quantized cache use 'flash' or 'sdpa'."
            )
        original(self, backend, config, *args, **kwargs)

    return checked


def install() -> None:
    """Let `QuantizedCache` say why ``sparq`` models cannot use it; idempotent."""
    wrap(QuantizedCache, "__init__", _checked)


def uninstall() -> None:
    """Undo `install`, unless somebody else has wrapped it since."""
    unwrap(QuantizedCache, "__init__")
