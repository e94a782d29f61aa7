"""Checkpoint surgery: fewer key/value heads, more positions."""

from hf_attn_plugin.convert.gqa import to_gqa
from hf_attn_plugin.convert.gqa_layers import pool_heads
from hf_attn_plugin.convert.gqa_plan import GqaPlan, plan_gqa
from hf_attn_plugin.convert.linearize import AttentionDistillation, attention_output_errors
from hf_attn_plugin.convert.long_encoder import (
    LongEncoderPlan,
    plan_long_encoder,
    tile_positions,
    to_long_encoder,
)
from hf_attn_plugin.convert.rope import extend_context

__all__ = [
    "AttentionDistillation",
    "GqaPlan",
    "LongEncoderPlan",
    "attention_output_errors",
    "extend_context",
    "plan_gqa",
    "plan_long_encoder",
    "pool_heads",
    "tile_positions",
    "to_gqa",
    "to_long_encoder",
]
