"""A kernel that writes outside its tensor: what compute-sanitizer must find."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _write(target, size: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(target + size + tl.arange(0, size), 1.0)


def overrun(device: torch.device) -> None:
    """Write 1024 numbers behind the end of a tensor."""
    target = torch.empty(1024, device=device)
    _write[(1,)](target, 1024)
