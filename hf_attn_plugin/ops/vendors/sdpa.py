"""PyTorch's `scaled_dot_product_attention`, kept away from the kernel that writes all scores out.

On GPUs only FlashAttention-2 knows groups of heads. Where it does not take a call, keys and values
are repeated for the memory-efficient kernel, since PyTorch itself would write the scores out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugin.ops.call import Call

_HALF = (torch.float16, torch.bfloat16)


def flash_takes(
    dtype: torch.dtype, head_dim: int, value_dim: int, *, masked: bool, old: bool
) -> bool:
    """Whether FlashAttention-2 computes a call on a GPU.

    Args:
        dtype: Of query, key and value.
        head_dim: Of queries and keys.
        value_dim: Of values.
        masked: Whether there is a dense mask.
        old: Whether it is an NVIDIA GPU of a compute capability below 8.0.
    """
    return not old and not masked and dtype in _HALF and head_dim == value_dim <= 256


def writes_scores(call: Call, *, masked: bool) -> str | None:
    """Why no kernel takes a call, so that PyTorch would write all scores out; None if one does."""
    if call.device_type != "cuda":
        return None
    old = call.capability is not None and call.capability < (8, 0)
    dims = (call.head_dim, call.value_dim)
    if flash_takes(call.dtype, *dims, masked=masked, old=old):
        return None
    if call.dtype not in (*_HALF, torch.float32) or (old and call.dtype == torch.bfloat16):
        return f"SDPA writes all scores out in {call.dtype}"
    unit = 4 if call.dtype == torch.float32 else 8
    if any(dim % unit for dim in dims):
        return f"SDPA writes all scores out unless head_dim and value_dim are multiples of {unit}"
    return None


def repeats_heads(call: Call, *, masked: bool) -> bool:
    """Whether `sdpa_attention` needs keys and values of its own for every query head."""
    if call.device_type != "cuda" or call.heads == call.kv_heads:
        return False
    old = call.capability is not None and call.capability < (8, 0)
    return not flash_takes(call.dtype, call.head_dim, call.value_dim, masked=masked, old=old)


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    causal: bool = False,
    mask: Tensor | None = None,
    repeat_heads: bool = False,
) -> Tensor:
    """Attention by whichever of PyTorch's kernels it prefers, differentiable.

    Args:
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        scaling: Factor on the scores.
        causal: Whether a query sees only keys up to its own index.
        mask: bool ``[batch or 1, heads or 1, q_len, kv_len]``, the pairs that attend.
        repeat_heads: Repeat keys and values per query head (`repeats_heads`): views of a single KV
            head, copies of several.

    Returns:
        ``[batch, heads, q_len, value_dim]``.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    if repeat_heads:
        groups = heads // kv_heads
        key, value = (
            tensor[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
            for tensor in (key, value)
        )
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=not repeat_heads and heads != kv_heads,
    )
