"""``exact_topk``: dense prefill, then decoding over the keys with the largest exact scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_attn_plugin.config import ExactTopKConfig
from hf_attn_plugin.methods.call import attend, read_call
from hf_attn_plugin.methods.counting import record
from hf_attn_plugin.methods.decoding import decodes_over_the_past, visible_to_last
from hf_attn_plugin.ops.baselines import exact_topk_decode
from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.patterns import PatternMask


def exact_topk_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Top-k attention by exact scores (FlexGen, arXiv 2303.06865) in decoding, exact elsewhere.

    It reads all keys and the values of those chosen, so at best half of the cache: what any method
    that guesses the scores is measured against.

    Args:
        module: The attention module; its config holds the `ExactTopKConfig`.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.
    """
    call = read_call("exact_topk", module, query, key, value, attention_mask, **kwargs)
    parameters = call.parameters(ExactTopKConfig)
    if not call.is_decoding or not decodes_over_the_past(call):
        return attend(call, call.pattern)
    output, read = exact_topk_decode(
        call.query,
        key,
        value,
        top_k=parameters.top_k,
        local_window=parameters.local_window,
        scaling=call.scaling,
        visible=visible_to_last(call),
        softcap=call.softcap,
        sinks=call.sinks,
    )
    record(module, "exact_topk", read=read, dense=nbytes(key, value))
    return output.transpose(1, 2).contiguous(), None
