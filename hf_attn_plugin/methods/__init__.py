"""One file per ``attn_implementation`` name."""

from collections.abc import Callable
from typing import Any

from hf_attn_plugin.methods.exact_topk import exact_topk_attention
from hf_attn_plugin.methods.flash import flash_attention
from hf_attn_plugin.methods.h2o import h2o_attention
from hf_attn_plugin.methods.linear import linear_attention_forward
from hf_attn_plugin.methods.lm_infinite import lm_infinite_attention
from hf_attn_plugin.methods.longformer import longformer_attention
from hf_attn_plugin.methods.ring import ring_attention
from hf_attn_plugin.methods.sliding_window import sliding_window_attention
from hf_attn_plugin.methods.sparq import sparq_attention
from hf_attn_plugin.methods.strided import strided_attention

METHODS: dict[str, Callable[..., Any]] = {
    "flash": flash_attention,
    "ring": ring_attention,
    "sliding_window": sliding_window_attention,
    "longformer": longformer_attention,
    "strided": strided_attention,
    "sparq": sparq_attention,
    "exact_topk": exact_topk_attention,
    "h2o": h2o_attention,
    "lm_infinite": lm_infinite_attention,
    "linear": linear_attention_forward,
}
