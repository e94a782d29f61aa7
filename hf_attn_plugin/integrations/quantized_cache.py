"""Gap: transformers refuses `QuantizedCache` for ``sparq`` with a message about layer types."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import QuantizedCache

from hf_attn_plugin.config import SparQConfig

_ORIGINAL = "_hf_attn_original"


def install() -> None:
    """Let `QuantizedCache` say why ``sparq`` models cannot use it; idempotent."""
    original = QuantizedCache.__init__
    if hasattr(original, _ORIGINAL):
        return

    @functools.wraps(original)
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

    setattr(checked, _ORIGINAL, original)
    QuantizedCache.__init__ = checked  # type: ignore[method-assign]


def uninstall() -> None:
    """Undo `install`, unless somebody else has wrapped it since."""
    original = getattr(QuantizedCache.__init__, _ORIGINAL, None)
    if original is not None:
        QuantizedCache.__init__ = original  # type: ignore[method-assign]
