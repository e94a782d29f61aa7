"""``sparq``: dense prefill, then decoding steps that read only part of the KV cache."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.config import SparQConfig
from hf_attn_plugin.methods.call import AttentionCall, attend, read_call
from hf_attn_plugin.methods.counting import COUNTER_ATTRIBUTE, record
from hf_attn_plugin.methods.decoding import decodes_over_the_past, visible_to_last
from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.ops.sparq import sparq_decode
from hf_attn_plugin.ops.sparq.key_copy import Components, StridedComponents
from hf_attn_plugin.ops.sparq.state import SparQState, sparq_state
from hf_attn_plugin.ops.sparq.sums import BlockSums
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
            Without one, all keys are read to find those that matter, and a warning says so once.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.
    """
    call = read_call("sparq", module, query, key, value, attention_mask, **kwargs)
    parameters = call.parameters(SparQConfig)
    if not decodes_over_the_past(call):
        return attend(call, call.pattern)
    rank = parameters.resolve_rank(query.shape[-1])
    # The cached tensors as they are: autocast's copies of them would have to be made every step.
    state = sparq_state(key)
    _check_state(call, parameters, state)
    visible = visible_to_last(call)
    sums, sums_bytes = None, 0
    own_mask = call.pattern.dense is not None and not torch.compiler.is_compiling()
    if state is not None and parameters.mean_value_reallocation and own_mask:
        # What its last query sees tells nothing of what later ones will.
        if call.is_decoding:
            sums = BlockSums.of(value, visible, parameters.mean_block)
            sums_bytes = nbytes(value)
    elif state is not None and parameters.mean_value_reallocation:
        # After prefill too, where the values have just been read anyway.
        sums, sums_bytes = state.sums.update(
            value, visible, parameters.mean_block, new=query.shape[2]
        )
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
        coverage=parameters.coverage,
        rank_coverage=parameters.rank_coverage,
        mean_block=parameters.mean_block,
        scaling=call.scaling,
        components=_components(call, parameters, key, state),
        sums=sums,
        visible=visible,
        softcap=call.softcap,
        sinks=call.sinks,
    )
    record(module, "sparq", read=reads.total + sums_bytes, dense=reads.dense)
    return output.transpose(1, 2).contiguous(), None


def _check_state(call: AttentionCall, parameters: SparQConfig, state: SparQState | None) -> None:
    """Refuse a cache made for other parameters; warn where there is no state to read less by."""
    if state is not None and state.key_copy != parameters.key_copy:
        raise ValueError(
            f"sparq: this cache was made with key_copy={state.key_copy!r} and the model now has "
            f"key_copy={parameters.key_copy!r}. Start with a new cache."
        )
    missing = state is None and (
        parameters.key_copy != "none" or parameters.mean_value_reallocation
    )
    if missing and call.is_decoding and not torch.compiler.is_compiling():
        warnings.warn(
            f"sparq: {type(call.module).__name__} decodes from a cache that keeps no second copy "
            "of the keys, so every key is read to find those that matter. Where the cache was made "
            "as DynamicCache(), make it as DynamicCache(config=model.config), and decode under "
            "torch.no_grad(). Models that cache latents in place of keys (multi-head latent "
            "attention), and layers that keep keys and a recurrent state together (Falcon-H1, "
            "Zamba2), always read them all.",
            stacklevel=2,
        )


def _components(
    call: AttentionCall, parameters: SparQConfig, key: Tensor, state: SparQState | None
) -> Components | None:
    """The keys by component."""
    if parameters.key_copy == "none":
        return StridedComponents(key, counted=hasattr(call.module, COUNTER_ATTRIBUTE))
    return None if state is None else state.components
