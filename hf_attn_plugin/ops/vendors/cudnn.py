"""cuDNN's attention, called through PyTorch's `scaled_dot_product_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_attn_plugin.ops.call import Call
from hf_attn_plugin.ops.vendors.built_in import BuiltIn
from hf_attn_plugin.patterns import Pattern

# On one H200, bf16, causal, 32 query and 8 KV heads of 128 (forward and backward, 16,384 tokens):
# cuDNN 14.1 ms, FlashAttention-2 23.7 ms, and PyTorch prefers the latter by default.
# cuDNN builds a plan for every new length, 40 ms for each direction. From this many pairs (over
# batch and heads) on, a step of a model with 32 layers repays that.
_MIN_PAIRS = 2**30
_HOPPER_DIMS = ((192, 128), (256, 256))
# Beyond it, offsets do not fit 32 bits.
_MAX_ELEMENTS = 2**31
# The others run where an older cuDNN says no.
_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]


def refuses(pattern: Pattern, call: Call, mask: BuiltIn | str) -> str | None:
    """Why cuDNN cannot compute a call exactly, or would not be the fastest; None if it can.

    Args:
        pattern: Of the call.
        call: The rest of it.
        mask: The pattern in a kernel's own terms (`built_in`).
    """
    if call.device_type != "cuda" or call.capability is None:
        return "runs on NVIDIA GPUs"
    if call.capability[0] not in (9, 10):
        return "wins on compute capabilities 9 and 10 only"
    for asked, missing in (
        (call.softcap, "no softcap"),
        (call.sinks, "no attention sinks"),
        (call.need_lse, "PyTorch does not return its log-sum-exp"),
        (isinstance(mask, str), f"no {mask}"),
    ):
        if asked:
            return missing
    assert isinstance(mask, BuiltIn)
    if mask.window is not None:
        return "no window"
    if mask.documents:
        return "no packed documents"
    if mask.causal and pattern.q_len != pattern.kv_len:
        return "its causal mask starts at the first key, whatever the number of queries"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return "16-bit dtypes only"
    dims = (call.head_dim, call.value_dim)
    usual = dims[0] == dims[1] <= 128 and dims[0] % 8 == 0
    if not usual and (dims not in _HOPPER_DIMS or call.capability != (9, 0)):
        return "head_dim of 8, 16, … 128, on compute capability 9.0 also 256 or 192 with 128, only"
    if call.deterministic:
        return "not deterministic"
    if call.elements(pattern) > _MAX_ELEMENTS:
        return "more than 2^31 elements"
    if call.pairs(pattern) < _MIN_PAIRS:
        return "builds a plan for every new length, which so small a call does not repay"
    return None


def cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float
) -> Tensor:
    """Causal or full attention by cuDNN, differentiable.

    Args:
        query: ``[batch, heads, q_len, head_dim]``, float16 or bfloat16, on a GPU.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        causal: Whether a query sees only keys up to its own index; else it sees all.
        scaling: Factor on the scores.

    Returns:
        ``[batch, heads, q_len, value_dim]``.
    """
    with sdpa_kernel(_PRIORITY, set_priority=True):
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
