"""``longformer``: a window, and global tokens that see and are seen by all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.config import LongformerConfig
from hf_attn_plugin.methods.call import AttentionCall, once, read_call, sparsify
from hf_attn_plugin.methods.window_cache import attend_in_window, mask_of_kept
from hf_attn_plugin.ops.window_state import KeptKeys, kept_keys
from hf_attn_plugin.patterns import PatternMask


def longformer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Local and global attention (arXiv 2004.05150), within what the model lets attend.

    Args:
        module: The attention module; its config holds the `LongformerConfig`.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments, and ``global_attention_mask`` ``[batch, tokens]``
            from the model call: non-zero where a token is global besides the first ones.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.
    """
    kept = kept_keys(key)
    mask = mask_of_kept(attention_mask, kept)
    call = read_call("longformer", module, query, key, value, mask, **kwargs)
    parameters = call.parameters(LongformerConfig)
    pattern = sparsify(
        call,
        window=parameters.window,
        dilation=parameters.dilation,
        num_global_tokens=parameters.num_global_tokens,
        global_tokens=_global_tokens(call, kept),
    )
    return attend_in_window(call, pattern, kept, parameters.num_global_tokens)


def _global_tokens(call: AttentionCall, kept: KeptKeys | None) -> Tensor | None:
    mask = call.extra.get("global_attention_mask")
    if mask is None:
        return None
    if kept is not None and kept.start > 0:
        raise ValueError(
            "global_attention_mask may name tokens that the cache has dropped: it keeps what the "
            "window sees, unless every call since the first names global tokens. Do so, or pass "
            "past_key_values=DynamicCache(), which keeps all tokens."
        )
    if not isinstance(mask, Tensor):
        raise ValueError(f"global_attention_mask must be a tensor; got a {type(mask).__name__}.")
    if mask.ndim != 2 or mask.shape[1] != call.pattern.kv_len:
        raise ValueError(
            f"global_attention_mask must have shape [batch, {call.pattern.kv_len}] (one entry per "
            f"key, cached ones included); got {tuple(mask.shape)}."
        )
    return once(
        call.pattern,
        "global_attention_mask",
        (mask,),
        lambda: mask.to(call.query.device, torch.bool),
    )
