"""Checkpoint surgery: fewer key/value heads, more positions."""

from hf_attn_plugin.convert.gqa import GqaPlan, plan_gqa, pool_heads, to_gqa
from hf_attn_plugin.convert.rope import extend_context

__all__ = ["GqaPlan", "extend_context", "plan_gqa", "pool_heads", "to_gqa"]
