"""Attention over a sequence that is spread over the ranks of a process group."""

from hf_attn_plugin.parallel.attention import sharded_attention
from hf_attn_plugin.parallel.choice import Choice, choose, choose_way, suggested_length
from hf_attn_plugin.parallel.estimates import Shapes, Way
from hf_attn_plugin.parallel.layout import Layout, padded_length
from hf_attn_plugin.parallel.plan import Plan, make_plan
from hf_attn_plugin.parallel.shard import Shard

__all__ = [
    "Choice",
    "Layout",
    "Plan",
    "Shapes",
    "Shard",
    "Way",
    "choose",
    "choose_way",
    "make_plan",
    "padded_length",
    "sharded_attention",
    "suggested_length",
]
