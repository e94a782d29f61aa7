"""SparQ decoding: the step itself, and what it keeps of a KV cache."""

from hf_attn_plugin.ops.reads import CacheReads
from hf_attn_plugin.ops.sparq.decode import sparq_decode

__all__ = ["CacheReads", "sparq_decode"]
