"""The operations: exact attention over a pattern, and SparQ's decoding step."""

from hf_attn_plugin.ops.attention import attention
from hf_attn_plugin.ops.backend import Backend, Choice, choose_backend
from hf_attn_plugin.ops.reference import reference_attention

__all__ = ["Backend", "Choice", "attention", "choose_backend", "reference_attention"]
