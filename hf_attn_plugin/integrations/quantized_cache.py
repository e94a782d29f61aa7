"""Gap: transformers refuses `QuantizedCache` for our cache layers with a riddle of layer types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import QuantizedCache

from hf_attn_plugin.integrations.wrapping import unwrap, wrap

# Why each method that has cache layers of its own cannot use it, and what to use instead.
REASONS = {
    "sparq": "that one restores all keys and values at every step, so reading few of them saves "
    "nothing. Use the default cache; SparQConfig(key_copy='int8') or 'int4' makes its second copy "
    "of the keys smaller.",
    "h2o": "it needs to know how much attention every key has drawn, which only the cache that is "
    "made for it keeps. Use the default cache.",
    "linear": "it keeps a state of fixed size, and no keys and values that could be quantized. Use "
    "the default cache.",
}


def _checked(original: Callable[..., None]) -> Callable[..., None]:
    def checked(
        self: Any, backend: str, config: PreTrainedConfig, *args: Any, **kwargs: Any
    ) -> None:
        text_config = config.get_text_config(decoder=True)
        name = getattr(text_config, "_attn_implementation", None)
        if name in REASONS:
            raise ValueError(
                f"attn_implementation={name!r} does not work over a quantized cache: "
                f"{REASONS[name]} For the quantized cache use 'flash' or 'sdpa'."
            )
        original(self, backend, config, *args, **kwargs)

    return checked


def install() -> None:
    """Let `QuantizedCache` say why models of some methods cannot use it; idempotent."""
    wrap(QuantizedCache, "__init__", _checked)


def uninstall() -> None:
    """Undo `install`, unless somebody else has wrapped it since."""
    unwrap(QuantizedCache, "__init__")
