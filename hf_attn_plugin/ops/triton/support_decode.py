"""Which calls the Triton decoding kernel honours. Imports no Triton."""

from __future__ import annotations

import torch

from hf_attn_plugin.ops.call import Call
from hf_attn_plugin.patterns import Pattern

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_QUERIES = 16
# Key indices are 32-bit numbers in the kernel; offsets into tensors are 64-bit.
MAX_KEYS = 2**30


def decode_refuses(pattern: Pattern, call: Call) -> str | None:
    """Why the decoding kernel cannot honour a call, or None if it can.

    Args:
        pattern: Which pairs attend.
        call: Its dtype, device and shapes.
    """
    if call.device_type != "cuda":
        return f"Triton kernels run on CUDA devices, not on {call.device_type}"
    if call.needs_grad:
        return "the decoding kernel has no backward pass"
    shapes = refuses_shapes(call.dtype, call.head_dim, call.value_dim)
    return shapes or refuses_pattern(pattern)


def refuses_shapes(dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why the kernel cannot compute with these sizes; None if it can."""
    if dtype not in DTYPES:
        return f"Triton kernels compute float16, bfloat16 and float32, not {dtype}"
    # Latent attention (DeepSeek's 576 and 512) fits into shared memory in half precision only.
    most = (256, 256) if dtype == torch.float32 else (576, 512)
    for name, size, limit in (
        ("head_dim", head_dim, most[0]),
        ("value_dim", value_dim, most[1]),
    ):
        if size > limit:
            return f"the decoding kernel takes a {name} of up to {limit} in {dtype}, not {size}"
    return None


def refuses_pattern(pattern: Pattern) -> str | None:
    """Why the kernel cannot honour a pattern; None if it can."""
    if pattern.q_len > MAX_QUERIES:
        return f"the decoding kernel takes up to {MAX_QUERIES} queries, not {pattern.q_len}"
    if pattern.kv_len + abs(pattern.kv_offset) > MAX_KEYS:
        return f"the decoding kernel takes up to {MAX_KEYS} keys, not {pattern.kv_len}"
    if _is_far(pattern):
        return f"the decoding kernel takes positions below {MAX_KEYS}; number sequences from 0"
    offset = pattern.q_offset
    if isinstance(offset, torch.Tensor) and offset.numel() > 1 and needs_pairs(pattern):
        return (
            "the decoding kernel takes a q_offset per row only where padding, a dense mask and "
            "numbers make up the pattern; give q_positions and kv_positions instead"
        )
    return None


def _is_far(pattern: Pattern) -> bool:
    """Whether ``q_offset`` does not fit; unknown, and taken to fit, where the device has it."""
    offset = pattern.q_offset
    if needs_pairs(pattern) or offset is None:
        return False
    if isinstance(offset, torch.Tensor):
        if offset.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return bool((offset.to(torch.int64).abs() + pattern.q_len > MAX_KEYS).any())
    return abs(offset) + pattern.q_len > MAX_KEYS


def needs_pairs(pattern: Pattern) -> bool:
    """Whether the pairs must be written out, since numbers and one mask do not describe them."""
    named = pattern.tensors().keys() - {"q_offset"}
    if not named:
        return False
    first_tokens = pattern.num_sink_tokens > 0 or pattern.num_global_tokens > 0
    return not (named == {"dense"} or (named == {"key_valid"} and not first_tokens))
