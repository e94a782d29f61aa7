"""``flash``: exact attention, by the fastest kernel that honours the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_attn_plugin.methods.call import attend, read_call
from hf_attn_plugin.patterns import PatternMask


def flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Exact attention over whatever the model's mask lets attend.

    Args:
        module: The attention module.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.
    """
    call = read_call("flash", module, query, key, value, attention_mask, **kwargs)
    return attend(call, call.pattern)
