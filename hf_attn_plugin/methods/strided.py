"""``strided``: a window, and every key at a multiple of the stride."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_attn_plugin.config import StridedConfig
from hf_attn_plugin.methods.call import attend, read_call, sparsify
from hf_attn_plugin.patterns import PatternMask


def strided_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The strided pattern of arXiv 1904.10509, within what the model lets attend.

    Args:
        module: The attention module; its config holds the `StridedConfig`.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.
    """
    call = read_call("strided", module, query, key, value, attention_mask, **kwargs)
    parameters = call.parameters(StridedConfig)
    return attend(call, sparsify(call, window=parameters.window, stride=parameters.stride))
