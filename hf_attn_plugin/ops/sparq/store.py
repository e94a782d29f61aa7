"""Whether a kernel stores new tokens in SparQ's cache, where PyTorch takes a launch per tensor."""

from __future__ import annotations

from torch import Tensor

from hf_attn_plugin.ops.backend import capability_of, installed_packages
from hf_attn_plugin.ops.triton.support_sparq import DTYPES

_INSTALLED = installed_packages()
_SMALLEST_CAPABILITY = (8, 0)
_WIDEST_HEAD = 1024


def stored_by_kernel(keys: Tensor, values: Tensor) -> bool:
    """Whether `ops.triton.sparq_append` stores single tokens in such a cache.

    Args:
        keys: [B, Hkv, S, D].
        values: [B, Hkv, S, Dv].
    """
    capability = capability_of(keys.device)
    return (
        capability is not None
        and capability >= _SMALLEST_CAPABILITY
        and "triton" in _INSTALLED
        and keys.dtype in DTYPES
        and values.dtype in DTYPES
        and max(keys.shape[-1], values.shape[-1]) <= _WIDEST_HEAD
    )
