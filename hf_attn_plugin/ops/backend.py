"""Which implementation computes a call, and why: a pure function of the call."""

from __future__ import annotations

import dataclasses
import enum

import torch

from hf_attn_plugin.patterns import Pattern

# A boolean mask of this many pairs is cheaper than walking blocks in Python.
_MAX_DENSE_PAIRS = 2048 * 2048


class Backend(enum.Enum):
    """The implementations behind `hf_attn_plugin.ops.attention`."""

    SDPA_CAUSAL = "PyTorch SDPA, causal"
    SDPA_FULL = "PyTorch SDPA, every pair"
    SDPA_MASK = "PyTorch SDPA, dense mask"
    BLOCKED = "blocks of the schedule in PyTorch"
    DENSE = "dense and traceable"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend and the reason for it."""

    backend: Backend
    reason: str


@dataclasses.dataclass(frozen=True)
class Call:
    """What the choice may depend on, besides the pattern.

    Attributes:
        batch: Batch size.
        dtype: Of query, key and value.
        device_type: ``"cpu"``, ``"cuda"``, ...
        softcap: Whether scores are capped.
        sinks: Whether there are attention sinks.
        need_lse: Whether the caller wants the log-sum-exp.
        compiling: Whether ``torch.compile`` is tracing.
    """

    batch: int
    dtype: torch.dtype
    device_type: str
    softcap: bool
    sinks: bool
    need_lse: bool
    compiling: bool


def choose_backend(pattern: Pattern, call: Call) -> Choice:
    """The fastest implementation that computes exactly this call."""
    if call.compiling:
        return Choice(Backend.DENSE, "torch.compile is tracing, which the schedule cannot follow")
    if call.softcap:
        return Choice(Backend.BLOCKED, "SDPA has no softcap")
    if call.sinks:
        return Choice(Backend.BLOCKED, "SDPA has no attention sinks")
    if call.need_lse:
        return Choice(Backend.BLOCKED, "SDPA does not return the log-sum-exp")
    if 0 in (call.batch, pattern.q_len, pattern.kv_len):
        return Choice(Backend.BLOCKED, "nothing to attend to")
    if is_unrestricted(pattern):
        if not pattern.causal:
            return Choice(Backend.SDPA_FULL, "every pair is visible")
        if pattern.first_query >= pattern.kv_offset + pattern.kv_len - 1:
            return Choice(Backend.SDPA_FULL, "every key lies before the queries")
        if pattern.q_len == pattern.kv_len and pattern.first_query == pattern.kv_offset:
            return Choice(Backend.SDPA_CAUSAL, "plain causal attention")
    pairs = pattern.q_len * pattern.kv_len
    if pairs * (call.batch if pattern.tensors() else 1) <= _MAX_DENSE_PAIRS:
        return Choice(Backend.SDPA_MASK, f"{pairs} pairs are few enough for a mask")
    return Choice(Backend.BLOCKED, "visits only the blocks that the pattern needs")


def is_unrestricted(pattern: Pattern) -> bool:
    """Whether nothing but causality limits the pairs."""
    first = pattern.first_query - pattern.kv_offset
    farthest = first + pattern.q_len - 1
    if not pattern.causal:
        farthest = max(farthest, pattern.kv_len - 1 - first)
    span = farthest + 1
    if pattern.reach is not None and pattern.dilation == 1 and pattern.reach >= span:
        pattern = pattern.replace(
            window=None, stride=None, num_sink_tokens=0, num_global_tokens=0, global_tokens=None
        )
    band_bites = pattern.band is not None and pattern.band < span
    tensors = {name for name in pattern.tensors() if name != "q_offset"}
    return not band_bites and not pattern.is_sparse and not tensors
