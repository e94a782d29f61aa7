"""Which calls SparQ's Triton kernels honour. Imports no Triton."""

from __future__ import annotations

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_GROUPS = 64
# One program chooses the keys of a KV head: what it looks at lies in its registers.
MAX_TOP_K = 1024
MAX_KEYS = 2**20


def sparq_refuses(
    *,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    groups: int,
    length: int,
    top_k: int,
    mean_block: int | None = None,
    needs_grad: bool = False,
) -> str | None:
    """Why the kernels cannot honour a call, or None if they can.

    Args:
        device_type: Where the tensors are.
        dtype: Of queries, keys and values.
        head_dim: Of queries and keys.
        value_dim: Of values.
        groups: Query heads per KV head.
        length: Keys, visible or not.
        top_k: Keys to attend to.
        mean_block: Positions that share a mean value.
        needs_grad: Whether a gradient is wanted.
    """
    if device_type != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device_type}"
    if needs_grad:
        return "SparQ's kernels have no backward pass"
    if mean_block is not None:
        return "SparQ's kernels know one mean value, not one per mean_block"
    return refuses_sizes(dtype, head_dim, value_dim, groups, length, top_k)


def refuses_sizes(
    dtype: torch.dtype, head_dim: int, value_dim: int, groups: int, length: int, top_k: int
) -> str | None:
    """Why the kernels cannot compute with these sizes; None if they can."""
    if dtype not in DTYPES:
        return f"Triton kernels compute float16, bfloat16 and float32, not {dtype}"
    for name, size in (("head_dim", head_dim), ("value_dim", value_dim)):
        if size > MAX_HEAD_DIM:
            return f"SparQ's kernels take a {name} of up to {MAX_HEAD_DIM}, not {size}"
    if groups > MAX_GROUPS:
        return f"SparQ's kernels take up to {MAX_GROUPS} query heads per KV head, not {groups}"
    if min(top_k, length) > MAX_TOP_K:
        return f"SparQ's kernels choose up to {MAX_TOP_K} keys, not {top_k}"
    if length > MAX_KEYS:
        return f"SparQ's kernels take up to {MAX_KEYS} keys, not {length}"
    return None
