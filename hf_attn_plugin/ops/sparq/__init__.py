"""SparQ decoding: the step itself, and what it keeps of a KV cache."""

from hf_attn_plugin.ops.sparq.decode import sparq_decode
from hf_attn_plugin.ops.sparq.reads import CacheReads

__all__ = ["CacheReads", "sparq_decode"]
