"""``lm_infinite``: dense prefill, then decoding over the first tokens and the last ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.config import LMInfiniteConfig
from hf_attn_plugin.methods.call import attend, read_call
from hf_attn_plugin.methods.counting import record
from hf_attn_plugin.methods.decoding import decodes_over_the_past, visible_to_last
from hf_attn_plugin.ops.baselines import attend_to
from hf_attn_plugin.ops.choice import most_recent
from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.patterns import PatternMask


def lm_infinite_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Sink tokens and a window in decoding (arXiv 2309.17453, arXiv 2308.16137), exact elsewhere.

    "First" and "last" count the tokens that the query may see: padding does not count. Unlike
    `sliding_window`, which trains and prefills under its window too, the prompt is read densely.

    The distances that rotary embeddings tell stay what they are, which is right within the length
    the model was trained at. StreamingLLM's numbering of positions inside the shortened cache and
    LM-Infinite's upper limit on distances, which serve texts beyond that length, are not done.

    Args:
        module: The attention module; its config holds the `LMInfiniteConfig`.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.
    """
    call = read_call("lm_infinite", module, query, key, value, attention_mask, **kwargs)
    parameters = call.parameters(LMInfiniteConfig)
    if not call.is_decoding or not decodes_over_the_past(call):
        return attend(call, call.pattern)
    visible = visible_to_last(call)
    if visible is None:
        visible = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
    # The same for all layers of a forward pass.
    index, kept = call.pattern.derive(
        ("lm_infinite", parameters, str(key.device)), lambda: _ends(visible, parameters)
    )
    output, read = attend_to(
        call.query,
        key,
        value,
        index,
        kept=kept,
        scaling=call.scaling,
        softcap=call.softcap,
        sinks=call.sinks,
    )
    record(module, "lm_infinite", read=read, dense=nbytes(key, value))
    return output.transpose(1, 2).contiguous(), None


def _ends(visible: Tensor, parameters: LMInfiniteConfig) -> tuple[Tensor, Tensor]:
    """The first and last ``visible`` positions [B or 1, S]: int64 and bool, both [B or 1, 1, m]."""
    first = visible & (visible.cumsum(-1) <= parameters.num_sink_tokens)
    ends = first | most_recent(visible, parameters.window)
    count = min(visible.shape[-1], parameters.num_sink_tokens + parameters.window)
    kept, index = ends.to(torch.int32).topk(count)
    return index[:, None], kept[:, None].bool()
