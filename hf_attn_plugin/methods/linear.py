"""``linear``: a product of features in place of softmax, and a state in place of the KV cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_attn_plugin.config import LinearConfig
from hf_attn_plugin.methods.call import AttentionCall, attend, chunk_size, read_call
from hf_attn_plugin.methods.counting import record
from hf_attn_plugin.ops.linear import linear_attention
from hf_attn_plugin.ops.linear_state import LinearState, attached_slot
from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.ops.torch.linear_features import EluFeatures, FavorFeatures, FeatureMap
from hf_attn_plugin.patterns import PatternMask

_USE = "Use attn_implementation='flash'."


def linear_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Linear attention (arXiv 2006.16236, 2009.14794), causal or not.

    Layers with a window or chunks of their own stay exact softmax attention: they are linear in
    the length already, and nothing that adds up all earlier keys can honour them.

    Args:
        module: The attention module; its config holds the `LinearConfig`.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``. With a slot of the cache on it these are the
            new keys only, and the slot's state stands for the earlier ones.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.
    """
    call = read_call("linear", module, query, key, value, attention_mask, **kwargs)
    slot = attached_slot(key)
    if _has_own_window(call):
        if slot is not None:
            raise ValueError(
                f"attn_implementation='linear': {type(module).__name__} attends within a window "
                "that its config does not tell, so the cache has not kept the keys in it. " + _USE
            )
        return attend(call, call.pattern)
    _refuse(call)
    feature_map = _feature_map(call)
    pattern = call.pattern
    if call.rows is not None:
        return call.rows.attend_linear(call, pattern, feature_map)
    start, state = 0, None
    if slot is not None:
        start = slot[1]
        state = slot[0].read(start)
        if start and pattern.q_documents is not None:
            raise ValueError(
                "position_ids start again inside the new tokens while earlier ones are cached: "
                "packed documents cannot be continued from a cache. Pass each document as a batch "
                "row of its own."
            )
    elif pattern.kv_offset:
        raise ValueError(
            f"attn_implementation='linear': {type(module).__name__} changes its keys after they "
            "went into the cache (as multi-head latent attention does, or heads that are repeated "
            "for experts), and the cache holds a state. " + _USE
        )
    output, after = linear_attention(
        call.query,
        call.key,
        call.value,
        pattern,
        feature_map=feature_map,
        scaling=call.scaling,
        state=state,
    )
    if slot is not None and after is not None:
        slot[0].write(after, start + pattern.kv_len)
    _count(call, start, state)
    return output.transpose(1, 2).contiguous(), None


def _has_own_window(call: AttentionCall) -> bool:
    """Whether the model restricts this layer to a window or to chunks."""
    return chunk_size(call.module) is not None or call.pattern.band is not None


def _refuse(call: AttentionCall) -> None:
    refused = {
        "caps its scores (softcap)": call.softcap is not None,
        "has attention sinks": call.sinks is not None,
        "numbers queries and keys apart (cu_seq_lens_q other than cu_seq_lens_k)": (
            call.pattern.q_positions is not None
        ),
    }
    for what, present in refused.items():
        if present:
            raise ValueError(
                f"attn_implementation='linear' has no softmax to change, and "
                f"{type(call.module).__name__} {what}. {_USE}"
            )
    if call.pattern.dense is not None:
        raise ValueError(
            "attn_implementation='linear' adds up all earlier keys once for all queries, which a "
            "mask of its own for each query does not allow: a 4D attention_mask, a mask function "
            "that is not known, or torch.compile, under which every mask is one. Pass a 2D "
            f"attention_mask (and position_ids for packed documents), do not compile. {_USE}"
        )


def _feature_map(call: AttentionCall) -> FeatureMap:
    parameters = call.parameters(LinearConfig)
    if parameters.feature_map == EluFeatures.name:
        return EluFeatures()
    layer = getattr(call.module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ValueError(
            "attn_implementation='linear' with feature_map='favor' draws other features for every "
            f"layer, and {type(call.module).__name__} does not know its layer_idx. Use "
            "LinearConfig(feature_map='elu')."
        )
    return FavorFeatures(
        num_features=parameters.num_features,
        seed=parameters.seed,
        redraw=parameters.redraw,
        layer=layer,
    )


def _count(call: AttentionCall, start: int, state: LinearState | None) -> None:
    """Report a decoding step: with a state, that is all it reads beside the new token."""
    tokens = start + call.key.shape[2]
    if call.query.shape[2] != 1 or tokens == 1:
        record(call.module, "linear")
        return
    new = nbytes(call.key, call.value)
    dense = new // call.key.shape[2] * tokens
    read = new if state is None else new + state.nbytes
    record(call.module, "linear", read=read, dense=dense)
