"""Long-context attention for Hugging Face Transformers, chosen by name.

Importing the package registers its attention implementations::

    import hf_attn_plugin
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparq")

The import is light: nothing of torch, and none of the optional packages, is loaded by it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_attn_plugin.config import (
    ExactTopKConfig,
    FlashConfig,
    H2OConfig,
    LinearConfig,
    LMInfiniteConfig,
    LongformerConfig,
    RingConfig,
    SlidingWindowConfig,
    SparQConfig,
    StridedConfig,
    configure,
    redraw_features,
)
from hf_attn_plugin.integrations.registry import implementations, register

if TYPE_CHECKING:
    from hf_attn_plugin.integrations.cache_bytes import kv_cache_bytes
    from hf_attn_plugin.integrations.counters import count_reads
    from hf_attn_plugin.ops import attention
    from hf_attn_plugin.ops.attention import SlowAttentionWarning
    from hf_attn_plugin.ops.linear import linear_attention
    from hf_attn_plugin.patterns import Pattern
    from hf_attn_plugin.patterns.picture import show_pattern
    from hf_attn_plugin.sequence_parallelism import sequence_parallel
    from hf_attn_plugin.verification import verify

__version__ = "0.1.0"

__all__ = [
    "ExactTopKConfig",
    "FlashConfig",
    "H2OConfig",
    "LMInfiniteConfig",
    "LinearConfig",
    "LongformerConfig",
    "Pattern",
    "RingConfig",
    "SlidingWindowConfig",
    "SlowAttentionWarning",
    "SparQConfig",
    "StridedConfig",
    "attention",
    "configure",
    "count_reads",
    "implementations",
    "kv_cache_bytes",
    "linear_attention",
    "redraw_features",
    "sequence_parallel",
    "show_pattern",
    "verify",
]

# Public names whose modules need torch; loaded when first used.
_LAZY = {
    "Pattern": "hf_attn_plugin.patterns",
    "SlowAttentionWarning": "hf_attn_plugin.ops.attention",
    "attention": "hf_attn_plugin.ops",
    "count_reads": "hf_attn_plugin.integrations.counters",
    "kv_cache_bytes": "hf_attn_plugin.integrations.cache_bytes",
    "linear_attention": "hf_attn_plugin.ops.linear",
    "sequence_parallel": "hf_attn_plugin.sequence_parallelism",
    "show_pattern": "hf_attn_plugin.patterns.picture",
    "verify": "hf_attn_plugin.verification",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
