"""Patterns of attention: what may attend, which blocks that needs, and how it looks."""

from hf_attn_plugin.patterns.mask import PatternMask
from hf_attn_plugin.patterns.pattern import Pattern
from hf_attn_plugin.patterns.schedule import Schedule, build_schedule

__all__ = ["Pattern", "PatternMask", "Schedule", "build_schedule"]
