"""The attention kernels on a GPU: random calls, what compiles, heavy rows, far offsets.

Five thousand random calls: ``python -m tests.ops.triton.property --cases 5000 --seed 0``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest
import torch

from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.patterns import Pattern
from tests.ops.triton.property import GPU_KINDS, Kind, run_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("kind", GPU_KINDS[:4], ids=str)
def test_random_calls(kind: Kind) -> None:
    rng = random.Random(0)
    for _ in range(40):
        run_case(rng, kind, [1, 33, 129, 321], "cuda")


def inputs(length: int, heads: int = 8, kv_heads: int = 2, dim: int = 64, kv_len: int = 0):
    def make(number: int, tokens: int) -> torch.Tensor:
        x = torch.randn(1, tokens, number, dim, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_()

    kv_len = kv_len or length
    return [make(heads, length), make(kv_heads, kv_len), make(kv_heads, kv_len)]


def attend(leaves: list[torch.Tensor], function: Callable | None = None, **fields):
    from hf_attn_plugin.ops.triton.attention import triton_attention

    q, k, v = leaves
    pattern = Pattern(q_len=q.shape[2], kv_len=k.shape[2], **fields)
    output, _ = (function or triton_attention)(q, k, v, pattern, scaling=0.125)
    return output, *torch.autograd.grad(output.float().square().sum(), leaves)


@pytest.mark.parametrize(
    "fields",
    [
        dict(window=256, num_global_tokens=64),
        dict(window=256, num_global_tokens=64, causal=False),
        dict(window=100, stride=16),
        dict(window=100, stride=16, num_sink_tokens=4),
    ],
    ids=str,
)
def test_heavy_rows_and_columns(fields: dict) -> None:
    """Global rows and columns are split over programs, strides take two passes; bit-equal twice."""
    leaves = inputs(6001)
    got, again = attend(leaves, **fields), attend(leaves, **fields)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = attend(wide, reference_attention, **fields)
    plain = attend(leaves, reference_attention, **fields)
    for a, b, w, p in zip(got, again, want, plain, strict=True):
        assert torch.equal(a, b)
        allowed = 2 * (p - w).abs().max() + 4 * 2**-8 * (1 + w.abs().max())
        assert (a - w).abs().max() <= allowed


def compiled_kernels() -> int:
    """How many kernels of the package this process has compiled or read from a cache."""
    modules = [m for name, m in sys.modules.items() if name.startswith("hf_attn_plugin.ops.triton")]
    kernels = {id(f): f for m in modules for f in vars(m).values() if hasattr(f, "device_caches")}
    return sum(len(cache[0]) for f in kernels.values() for cache in f.device_caches.values())


@pytest.mark.parametrize("dim", [64, 80])
def test_lengths_and_documents_compile_nothing(dim: int) -> None:
    def documents(length: int, size: int) -> dict[str, torch.Tensor]:
        numbers = (torch.arange(length, device="cuda") // size)[None]
        return {"q_documents": numbers, "kv_documents": numbers}

    # No multiple of 4: on Hopper a kernel of its own pads rows then.
    attend(inputs(641, dim=dim), **documents(641, 100))
    before = compiled_kernels()
    assert before >= 3
    for length, size in ((640, 64), (1000, 7), (1, 1), (17, 16), (2047, 333)):
        attend(inputs(length, dim=dim), **documents(length, size))
    assert compiled_kernels() == before
    # From 2048 keys on Hopper's kernels take larger tiles: one more set, whatever the length.
    attend(inputs(2048, dim=dim), **documents(2048, 333))
    before = compiled_kernels()
    for length, size in ((2049, 300), (5000, 77), (16384, 16384)):
        attend(inputs(length, dim=dim), **documents(length, size))
    assert compiled_kernels() == before


def test_offsets_beyond_32_bits() -> None:
    """The last tokens of tensors with more than 2**31 elements."""
    length, window = 2**20 + 3, 64
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    leaves = inputs(length, heads=32, kv_heads=1, dim=128)
    got = attend(leaves, window=window)
    tail = [t.detach()[:, :, -256:].clone().requires_grad_() for t in leaves]
    want = attend(tail, window=window)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g[:, :, -128:], w[:, :, -128:], rtol=2e-2, atol=2e-2)
