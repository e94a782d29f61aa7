"""What the methods that act in decoding only have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_plugin.methods.call import AttentionCall


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

    def make() -> Tensor | None:
        seen = pattern.visible(device, q_start=pattern.q_len - 1)[:, 0, 0]
        if not torch.compiler.is_compiling() and bool(seen.all()):
            return None
        return seen

    return pattern.derive(("visible to last", str(device)), make)
