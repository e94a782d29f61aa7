"""``sliding_window``: each query sees the last tokens, and sink tokens if wanted."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_attn_plugin.config import SlidingWindowConfig
from hf_attn_plugin.methods.call import read_call, sparsify
from hf_attn_plugin.methods.window_cache import attend_in_window, mask_of_kept
from hf_attn_plugin.ops.window_state import kept_keys
from hf_attn_plugin.patterns import PatternMask


def sliding_window_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention to the last keys and to sink tokens, within what the model lets attend.

    The window is that of arXiv 2004.05150, the sink tokens those of arXiv 2309.17453.

    Args:
        module: The attention module; its config holds the `SlidingWindowConfig`.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.
    """
    kept = kept_keys(key)
    mask = mask_of_kept(attention_mask, kept)
    call = read_call("sliding_window", module, query, key, value, mask, **kwargs)
    parameters = call.parameters(SlidingWindowConfig)
    window = parameters.window
    if window is None:
        window = getattr(getattr(module, "config", None), "sliding_window", None)
        if window is not None and not call.is_causal:
            window += 1  # in encoders, configs give the largest distance
    pattern = sparsify(
        call,
        window=window or SlidingWindowConfig.DEFAULT_WINDOW,
        num_sink_tokens=parameters.num_sink_tokens,
    )
    return attend_in_window(call, pattern, kept, parameters.num_sink_tokens)
