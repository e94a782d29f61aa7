"""Which calls the Triton kernels honour. Imports no Triton."""

from __future__ import annotations

import torch

from hf_attn_plugin.ops.call import Call
from hf_attn_plugin.patterns import Pattern

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
# Token indices and positions are 32-bit numbers in the kernels; offsets into tensors are 64-bit.
MAX_POSITION = 2**30


def refuses(pattern: Pattern, call: Call) -> str | None:
    """Why the kernels cannot honour a call, or None if they can."""
    if call.device_type != "cuda":
        return f"Triton kernels run on CUDA devices, not on {call.device_type}"
    if call.dtype not in DTYPES:
        return f"Triton kernels compute float16, bfloat16 and float32, not {call.dtype}"
    for name in ("head_dim", "value_dim"):
        size = getattr(call, name, None)
        if size is not None and size > MAX_HEAD_DIM:
            return f"Triton kernels take a {name} of up to {MAX_HEAD_DIM}, not {size}"
    return refuses_pattern(pattern)


def refuses_pattern(pattern: Pattern) -> str | None:
    """Why the kernels cannot honour a pattern, whatever the call; None if they can."""
    offset = pattern.q_offset
    if isinstance(offset, torch.Tensor):
        if offset.numel() != 1 and pattern.has_globals:
            return "global tokens need one q_offset for all rows"
        first = 0
    else:
        first = abs(pattern.first_query)
    if max(first + pattern.q_len, abs(pattern.kv_offset) + pattern.kv_len) > MAX_POSITION:
        return f"positions must stay below {MAX_POSITION}"
    return None
