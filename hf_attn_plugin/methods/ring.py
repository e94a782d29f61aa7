"""``ring``: exact attention over a sequence that is spread over ranks, and over nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_attn_plugin.methods.call import attend, read_call
from hf_attn_plugin.patterns import PatternMask


def ring_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``flash`` that insists on being inside `hf_attn_plugin.sequence_parallel`.

    Elsewhere ``flash`` takes what it gets for whole sequences; a training loop that has lost its
    context would go on with a part of each.

    Args:
        module: The attention module.
        query: ``[batch, heads, tokens of this rank, head_dim]``.
        key: ``[batch, kv_heads, tokens of this rank, head_dim]``.
        value: ``[batch, kv_heads, tokens of this rank, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, tokens of this rank, heads, value_dim]`` and None.

    Raises:
        ValueError: It is outside.
    """
    call = read_call("ring", module, query, key, value, attention_mask, **kwargs)
    if call.rows is None:
        raise ValueError(
            "attn_implementation='ring' computes sequences that are spread over several GPUs, and "
            "this call is outside of hf_attn_plugin.sequence_parallel(accelerator, model, batch): "
            "run forward and backward inside of it. For whole sequences on one GPU (evaluation, "
            "generation) call model.set_attn_implementation('flash'), which is the same attention."
        )
    return attend(call, call.pattern)
