"""``sparq``: dense prefill, then decoding steps that read only part of the KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.config import SparQConfig
from hf_attn_plugin.methods.call import AttentionCall, attend, read_call
from hf_attn_plugin.methods.counting import record
from hf_attn_plugin.ops.sparq import sparq_decode
from hf_attn_plugin.ops.sparq_state import sparq_state
from hf_attn_plugin.patterns import PatternMask


def sparq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SparQ Attention (arXiv 2312.04985) where it applies, exact attention elsewhere.

    It applies to one query per sequence over earlier keys. Exact are: prefill and training, the
    checking of several guessed tokens at once (assisted generation, prompt lookup), encoders and
    cross-attention, layers with a window or chunks of their own, and masks that differ from head
    to head.

    Args:
        module: The attention module; its config holds the `SparQConfig`.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``; the cache has left its state on it.
            Without one, all keys are read to find those that matter.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.
    """
    call = read_call("sparq", module, query, key, value, attention_mask, **kwargs)
    parameters = call.parameters(SparQConfig)
    if not _applies(call):
        return attend(call, call.pattern)
    rank = parameters.resolve_rank(query.shape[-1])
    # The cached tensors as they are: autocast's copies of them would have to be made every step.
    state = sparq_state(key)
    visible = _visible_to_last(call)
    mean, mean_bytes = None, 0
    if state is not None and parameters.mean_value_reallocation:
        # After prefill too, where the values have just been read anyway.
        mean, mean_bytes = state.mean(value, visible)
    if not call.is_decoding:
        return attend(call, call.pattern)
    output, reads = sparq_decode(
        call.query,
        key,
        value,
        rank=rank,
        top_k=parameters.top_k,
        local_window=parameters.resolve_local_window(),
        mean_value_reallocation=parameters.mean_value_reallocation,
        scaling=call.scaling,
        keys_t=None if state is None else state.keys_t,
        value_mean=mean,
        visible=visible,
        softcap=call.softcap,
        sinks=call.sinks,
    )
    record(module, "sparq", read=reads.total + mean_bytes, dense=reads.dense)
    return output.transpose(1, 2).contiguous(), None


def _applies(call: AttentionCall) -> bool:
    """Whether the layer decodes over all that was said before, which is what SparQ thins out."""
    pattern = call.pattern
    per_head = pattern.dense is not None and pattern.dense.shape[1] > 1
    return call.is_causal and pattern.band is None and pattern.q_documents is None and not per_head


def _visible_to_last(call: AttentionCall) -> Tensor | None:
    """The keys that the last query sees, bool ``[batch or 1, kv_len]``; None is all of them."""
    pattern, device = call.pattern, call.query.device

    def make() -> Tensor | None:
        seen = pattern.visible(device, q_start=pattern.q_len - 1)[:, 0, 0]
        if not torch.compiler.is_compiling() and bool(seen.all()):
            return None
        return seen

    return pattern.derive(("visible to last", str(device)), make)
