"""What the methods that act in decoding only have in common."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hf_attn_plugin.methods.call import AttentionCall
from hf_attn_plugin.ops.triton.decode_plan import is_capturing
from hf_attn_plugin.patterns import Pattern


def decodes_over_the_past(call: AttentionCall) -> bool:
    """Whether the layer decodes over all that was said before, which is what can be thinned out.

    Not so in encoders and cross-attention, in layers with a window of their own, over packed
    documents, and under masks that differ from head to head.
    """
    pattern = call.pattern
    per_head = pattern.dense is not None and pattern.dense.shape[1] > 1
    return call.is_causal and pattern.band is None and pattern.q_documents is None and not per_head


def visible_to_last(call: AttentionCall) -> Tensor | None:
    """The keys that the last query sees, bool ``[batch or 1, kv_len]``; None is all of them."""
    pattern, device = call.pattern, call.query.device
    if _sees_all(pattern):
        return None

    def make() -> Tensor | None:
        seen = _seen_by_last(pattern, device)
        if not torch.compiler.is_compiling() and bool(seen.all()):
            return None
        return seen

    return pattern.derive(("visible to last", str(device)), make)


@dataclasses.dataclass(frozen=True, eq=False)
class VisibleKeys:
    """The keys that the last query sees, on the device and without a look at them.

    Attributes:
        stop: Integer, 0-dimensional or [1]: none at or after this one; None is the number of keys.
        seen: bool ``[batch or 1, kv_len]``, which of them; None is all before ``stop``.
    """

    stop: Tensor | None = None
    seen: Tensor | None = None


def visible_keys(call: AttentionCall, length: Tensor | None) -> VisibleKeys:
    """What `visible_to_last` tells, without waiting for the device.

    Args:
        call: The call.
        length: Positions in use of a cache with room for more, 0-dimensional, on the device; None
            where all keys are in use.
    """
    pattern, device = call.pattern, call.query.device

    def make() -> VisibleKeys:
        masked = pattern.key_valid is not None or pattern.dense is not None
        seen = _seen_by_last(pattern, device) if masked else None
        return VisibleKeys(_stop(pattern, length, device), seen)

    if not torch.compiler.is_compiling() and is_capturing(device):
        return make()  # a replay must evaluate the mask anew
    return pattern.derive(("keys of last", str(device)), make)


def _sees_all(pattern: Pattern) -> bool:
    """Whether the numbers alone say that the last query sees every key."""
    if pattern.tensors() or pattern.band is not None or pattern.is_sparse:
        return False
    last = pattern.first_query + pattern.q_len - 1
    return not pattern.causal or last >= pattern.kv_offset + pattern.kv_len - 1


def _seen_by_last(pattern: Pattern, device: torch.device) -> Tensor:
    return pattern.visible(device, q_start=pattern.q_len - 1)[:, 0, 0]


def _stop(pattern: Pattern, length: Tensor | None, device: torch.device) -> Tensor | None:
    """The end of the keys up to the last query's position, or a bound of it."""
    if length is not None:
        return length
    offset = pattern.q_offset
    if isinstance(offset, Tensor):
        return offset.to(device) - pattern.kv_offset + pattern.q_len
    if _sees_all(pattern):
        return None
    last = pattern.first_query + pattern.q_len - pattern.kv_offset
    return torch.full((1,), last, dtype=torch.int64, device=device)
