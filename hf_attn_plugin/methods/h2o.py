"""``h2o``: dense prefill, then decoding over the keys that have drawn the most attention so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.config import H2OConfig
from hf_attn_plugin.methods.call import AttentionCall, attend, read_call
from hf_attn_plugin.methods.counting import record
from hf_attn_plugin.methods.decoding import decodes_over_the_past, visible_to_last
from hf_attn_plugin.ops.h2o import H2OState, h2o_state
from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.patterns import PatternMask


def h2o_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Heavy hitters and recent tokens in decoding (H2O, arXiv 2306.14048), exact elsewhere.

    The softmax weights that a key gets from all queries since the start, those of the prompt
    included, are added up per KV head. Before a decoding step attends, the cache is cut down to
    ``top_k`` keys, the new one among them: the most recent, and those with the largest sums. What
    was cut off never comes back, not in the next turn of a conversation either: its tokens see
    what is left, and each other.

    Adding up the weights takes a second pass over the scores of the prompt, in blocks of queries.
    That is compute, and is not counted as bytes read in decoding. The keys cut off are no longer
    read, but stay in memory: transformers tells positions by the length of its cache.

    Args:
        module: The attention module; its config holds the `H2OConfig`.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``; the cache has left its state on it.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.

    Raises:
        ValueError: A decoding step without the sums of all earlier ones: a cache of another kind, a
            prompt of packed documents, or a mask that differs from head to head.
    """
    call = read_call("h2o", module, query, key, value, attention_mask, **kwargs)
    parameters = call.parameters(H2OConfig)
    state = h2o_state(key)
    if not decodes_over_the_past(call):
        if state is not None and state.counted:
            raise ValueError(
                "attn_implementation='h2o' has dropped keys that this attention_mask asks for "
                "again, in its own way for every head or document. Pass a 2D attention_mask."
            )
        return attend(call, call.pattern)
    starts = call.pattern.q_len == call.pattern.kv_len
    if state is None and (call.is_decoding or not starts):
        raise ValueError(
            "attn_implementation='h2o' needs the cache that transformers makes for it, which adds "
            f"up the attention of every key, and {type(module).__name__} came without: a static "
            "cache, a DynamicCache() made without config=model.config, a model that caches "
            "something else than keys, or layers that keep keys and a recurrent state together "
            "(Falcon-H1, Zamba2). Use the default cache, or for such models another method, for "
            "example 'sparq'."
        )
    if state is None or (module.training and torch.is_grad_enabled() and starts):
        return attend(call, call.pattern)
    if state.counted + call.pattern.q_len != call.pattern.kv_len:
        raise ValueError(
            f"attn_implementation='h2o' has followed {state.counted} of the "
            f"{call.pattern.kv_len - call.pattern.q_len} tokens in the cache: the others were "
            "packed documents, a prefix put there ready-made, tokens of other layers that share "
            "this cache, or tokens read in training mode. Use another method, for example 'sparq'."
        )
    visible = visible_to_last(call)
    state.append(key, visible)
    if call.is_decoding:
        state.evict(parameters.top_k, parameters.resolve_local_window())
    elif not state.has_evicted:
        with torch.no_grad():
            _attend(call, key, None, state, visible)
        return attend(call, call.pattern)
    output, read = _attend(call, key, value, state, visible)
    assert output is not None
    if call.is_decoding:
        record(module, "h2o", read=read, dense=nbytes(key, value))
    else:
        record(module, "h2o")
    return output.transpose(1, 2).contiguous(), None


def _attend(
    call: AttentionCall, key: Tensor, value: Tensor | None, state: H2OState, visible: Tensor | None
) -> tuple[Tensor | None, int]:
    pattern, device = call.pattern, key.device
    return state.attend(
        call.query,
        key,
        value,
        seen=lambda start, stop: pattern.visible(device, q_start=start, q_stop=stop),
        counts=None if visible is None else visible[:, -pattern.q_len :],
        scaling=call.scaling,
        softcap=call.softcap,
        sinks=call.sinks,
    )
