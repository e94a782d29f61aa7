"""Which implementation computes a call of linear attention, and why."""

from __future__ import annotations

import dataclasses
import enum
import functools

import torch

_WIDEST_HEAD = 256
_SMALLEST_CAPABILITY = (8, 0)  # the first with bfloat16 and TF32 products


class LinearBackend(enum.Enum):
    """The implementations behind `hf_attn_plugin.ops.linear.linear_attention`."""

    TRITON = "Triton, chunks in parallel"
    TORCH = "PyTorch, chunk after chunk"


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """What the choice may depend on.

    Attributes:
        dtype: Of query, key and value.
        device_type: ``"cpu"``, ``"cuda"``, ...
        capability: CUDA compute capability of an NVIDIA GPU, else None.
        installed: As `hf_attn_plugin.ops.backend.installed_packages` finds it.
        head_dim: Width of queries and keys.
        value_dim: Width of values.
        empty: Whether there is no batch row, no query or no key.
    """

    dtype: torch.dtype
    device_type: str
    capability: tuple[int, int] | None
    installed: frozenset[str]
    head_dim: int
    value_dim: int
    empty: bool = False


@dataclasses.dataclass(frozen=True)
class LinearChoice:
    """A backend and the reason for it.

    Attributes:
        backend: What computes the call.
        reason: Why, in words.
        falls_back: Whether something much faster would be used if it could.
    """

    backend: LinearBackend
    reason: str
    falls_back: bool = False


def choose_linear_backend(call: LinearCall) -> LinearChoice:
    """The fastest implementation that honours this call."""
    torch_backend = functools.partial(LinearChoice, LinearBackend.TORCH)
    if call.device_type != "cuda":
        return torch_backend(f"Triton's kernels are for GPUs, and this is {call.device_type}")
    refused = triton_refuses(call)
    if refused is not None:
        # Nobody expects speed of float64, nor of nothing.
        return torch_backend(refused, falls_back=call.dtype != torch.float64 and not call.empty)
    return LinearChoice(LinearBackend.TRITON, "computes all chunks at once")


def triton_refuses(call: LinearCall) -> str | None:
    """Why Triton cannot honour a call, or None."""
    if call.empty:
        return "nothing to attend to"
    if "triton" not in call.installed:
        return "Triton is not installed (pip install triton)"
    if call.device_type == "cuda" and call.capability is None:
        return "Triton's kernels are launched for NVIDIA GPUs"
    if call.capability is not None and call.capability < _SMALLEST_CAPABILITY:
        return "Triton's kernels run on compute capability 8.0 and newer"
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"Triton computes in float32, and the inputs are {call.dtype}"
    for name in ("head_dim", "value_dim"):
        width = getattr(call, name)
        if width > _WIDEST_HEAD:
            return f"Triton's tiles take a {name} up to {_WIDEST_HEAD}, this is {width}"
    return None
