"""Keys' gradients in float32 of inputs of 16 bits.

Triton's kernels run on a GPU, or through Triton's interpreter, which must be chosen before Triton
is imported: `test_triton_through_the_interpreter` runs this file again in another process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_attn_plugin.ops import attention
from hf_attn_plugin.ops.torch.blocked import blocked_attention
from hf_attn_plugin.parallel.pieces import PieceKernel
from hf_attn_plugin.parallel.wide import wide_attention, wide_kernel
from hf_attn_plugin.patterns import Pattern

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KERNEL = PieceKernel.TRITON if INTERPRETED or DEVICE == "cuda" else PieceKernel.BLOCKED
# The interpreter's bfloat16 products are wrong.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
PATTERNS = {
    "causal": Pattern(q_len=48, kv_len=80),
    "window and stride": Pattern(q_len=48, kv_len=80, window=20, stride=7),
}
if INTERPRETED:  # which is slow; a stride takes every kernel
    del PATTERNS["causal"]


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="runs here")
def test_triton_through_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout


def error(found: Tensor, exact: Tensor) -> float:
    exact = exact.detach()
    return float((found.detach().double() - exact).norm() / exact.norm())


def made(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tensor.to(DEVICE, DTYPE).transpose(1, 2)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_gradients_of_keys_are_not_rounded(pattern: Pattern) -> None:
    inputs = [made(2, 48, 4, 16, seed=0), made(2, 80, 2, 16, seed=1), made(2, 80, 2, 16, seed=2)]
    grad, sinks = made(2, 48, 4, 16, seed=3), torch.tensor([0.5, -1.0, 0.0, 2.0], device=DEVICE)

    def leaves(dtype: torch.dtype) -> list[Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        given = [*(tensor.to(dtype) for tensor in inputs), sinks.to(wide)]
        return [tensor.detach().clone().requires_grad_() for tensor in given]

    how = {"scaling": 0.3, "softcap": 4.0}
    exact = leaves(torch.float64)
    wanted, _ = attention(*exact[:3], pattern, **how, sinks=exact[3])
    wanted.backward(grad.double())
    rounded = leaves(DTYPE)
    plain()(*rounded[:3], pattern, **how, sinks=rounded[3])[0].backward(grad)
    wide = leaves(DTYPE)
    kept: list[Tensor] = []
    output = wide_attention(
        *wide[:3], pattern, KERNEL, lambda *grads: kept.extend(grads), **how, sinks=wide[3]
    )
    output.backward(grad)
    assert wide[1].grad is None
    assert wide[2].grad is None
    assert error(output, wanted) < torch.finfo(DTYPE).eps / 2
    assert error(wide[3].grad, exact[3].grad) < torch.finfo(DTYPE).eps / 2
    assert error(wide[0].grad, exact[0].grad) < 1.05 * error(rounded[0].grad, exact[0].grad)
    for found, before, target in zip(kept, rounded[1:], exact[1:], strict=False):
        assert found.dtype == torch.float32
        assert error(found, target.grad) < 0.9 * error(before.grad, target.grad)


def plain() -> Callable[..., tuple[Tensor, Tensor]]:
    """The same kernel, as autograd has it."""
    if KERNEL is PieceKernel.BLOCKED:
        return blocked_attention
    from hf_attn_plugin.ops.triton.attention import triton_attention

    return triton_attention


@pytest.mark.skipif(INTERPRETED, reason="nothing of it is interpreted")
def test_only_where_something_would_be_rounded() -> None:
    pattern, flags = PATTERNS["causal"], {"softcap": False, "sinks": False}
    query, key = made(1, 48, 4, 16, seed=0), made(1, 80, 2, 16, seed=1).requires_grad_()
    assert wide_kernel(query, key, key, pattern, **flags) is KERNEL
    with torch.no_grad():
        assert wide_kernel(query, key, key, pattern, **flags) is None
    assert wide_kernel(query, key.detach(), key.detach(), pattern, **flags) is None
    wide = (query.float(), key.float(), key.float())
    assert wide_kernel(*wide, pattern, **flags) is None
