"""Time and memory of linear attention on a GPU, forward and backward, over the sequence length.

    python eval/speed/linear.py

One row per length: our Triton kernels, our PyTorch path (up to ``--torch-up-to`` tokens) and, for
comparison, causal softmax attention through PyTorch's SDPA (flash). Before anything is timed, every
dtype's output and gradients are compared with the float64 definition at a small size, and a case
that fails is not timed. Median over CUDA events; random inputs; memory is what the call takes
beside inputs, output and gradients.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_attn_plugin.ops.linear import linear_attention, reference_linear_attention
from hf_attn_plugin.ops.linear_backend import LinearBackend
from hf_attn_plugin.ops.torch.linear_features import EluFeatures, FavorFeatures, FeatureMap
from hf_attn_plugin.ops.triton import linear as kernels
from hf_attn_plugin.patterns import Pattern

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
# What plain PyTorch would round its features, weights and sums to, several times over.
BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def inputs(
    length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """Random query, key and value ``[1, heads, length, head_dim]`` laid out as models do."""
    return [
        torch.randn(1, length, h, head_dim, device="cuda", dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def check(feature_map: FeatureMap, head_dim: int, dtype: torch.dtype) -> float:
    """Largest relative error of output and gradients, of several hundred tokens; grouped heads."""
    torch.manual_seed(head_dim)
    worst = 0.0
    for causal in (True, False):
        tensors = inputs(777, 4, 2, head_dim, dtype)
        pattern = Pattern(q_len=777, kv_len=777, causal=causal)
        output = linear(feature_map, LinearBackend.TRITON, pattern)(*tensors)
        grad = torch.randn_like(output)
        found = [output, *torch.autograd.grad(output, tensors, grad)]
        wide = [t.detach().double().requires_grad_() for t in tensors]
        q, k, v = wide
        exact = reference_linear_attention(q, k, v, pattern, feature_map=feature_map)
        wanted = [exact, *torch.autograd.grad(exact, wide, grad.double())]
        for one, other in zip(found, wanted, strict=True):
            error = float(((one.double() - other).norm() / other.norm()).detach())
            worst = max(worst, error if error == error else float("inf"))
    return worst


def milliseconds(
    call: Call, tensors: Sequence[Tensor], seconds: float = 0.3
) -> tuple[float, float, float]:
    """Medians of forward and backward, and the memory in GiB that both take on top of results."""
    query, key, value = tensors
    times: list[list[float]] = [[], []]
    spent = 0.0
    grad = torch.randn_like(query)
    results = 2 * query.nbytes + key.nbytes + value.nbytes
    extra = 0
    while len(times[0]) < 4 or (spent < seconds * 1e3 and len(times[0]) < 30):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        marks[0].record()
        output = call(query, key, value)
        marks[1].record()
        grads = torch.autograd.grad(output, (query, key, value), grad)
        marks[2].record()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - results
        for i in range(2):
            times[i].append(marks[i].elapsed_time(marks[i + 1]))
        spent += times[0][-1] + times[1][-1]
        del output, grads
    forward, backward = (statistics.median(t[1:]) for t in times)
    return forward, backward, extra / 2**30


def linear(feature_map: FeatureMap, backend: LinearBackend, pattern: Pattern) -> Call:
    """Linear attention by one backend."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return linear_attention(
            query, key, value, pattern, feature_map=feature_map, backend=backend
        )[0]

    return call


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention by SDPA's flash kernel."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )


def table(args: argparse.Namespace, feature_map: FeatureMap) -> None:
    """A row per length and contender."""
    print("| tokens | what | forward ms | backward ms | extra memory, GiB |")
    print("|---|---|---|---|---|")
    for length in (int(part) for part in args.lengths.split(",")):
        tensors = inputs(length, args.heads, args.kv_heads, args.head_dim, torch.bfloat16)
        pattern = Pattern(q_len=length, kv_len=length)
        contenders: dict[str, Call] = {
            "linear, Triton": linear(feature_map, LinearBackend.TRITON, pattern)
        }
        if length <= args.torch_up_to:
            contenders["linear, PyTorch"] = linear(feature_map, LinearBackend.TORCH, pattern)
        contenders["softmax, SDPA flash"] = softmax
        for name, call in contenders.items():
            forward, backward, extra = milliseconds(call, tensors)
            print(
                f"| {length} | {name} | {forward:.2f} | {backward:.2f} | {extra:.2f} |", flush=True
            )


# Chunk, tile, warps, stages, registers of `kernels.lay_out`.
VARIANTS = [
    (chunk, tile, *launch)
    for chunk in (128, 256)
    for tile, *launch in (
        (64, 4, 1, None),
        (64, 4, 1, 168),
        (64, 4, 2, None),
        (64, 4, 2, 168),
        (64, 8, 1, 128),
        (64, 8, 2, 128),
        (128, 8, 1, None),
    )
]


def tiles(args: argparse.Namespace, feature_map: FeatureMap) -> None:
    """Triton alone with other chunks, tiles and launches than `kernels.lay_out` chooses."""
    length = int(args.lengths.split(",")[-1])
    chosen = range(len(VARIANTS)) if args.variant is None else [args.variant]
    if args.variant is None:  # compile all at once, into the cache on disk
        command = [sys.executable, *sys.argv, "--lengths", "256", "--variant"]
        null = subprocess.DEVNULL
        running = [subprocess.Popen([*command, str(i)], stdout=null, stderr=null) for i in chosen]
        for process in running:
            process.wait()
    tensors = inputs(length, args.heads, args.kv_heads, args.head_dim, torch.bfloat16)
    pattern = Pattern(q_len=length, kv_len=length)
    lay_out: Any = kernels.lay_out
    print("| chunk, tile, warps, stages, registers | forward ms | backward ms | kernels ms |")
    print("|---|---|---|---|")
    for chunk, tile, warps, stages, registers in (VARIANTS[i] for i in chosen):
        options = {"tile": tile, "warps": warps, "stages": stages, "registers": registers}

        def other(*sizes: Any, chunk: int = chunk, options: Any = options) -> Any:
            return lay_out(*sizes[:6], chunk, **options)

        with mock.patch.object(kernels, "lay_out", other):
            call = linear(feature_map, LinearBackend.TRITON, pattern)
            name = f"{chunk}, {tile}, {warps}, {stages}, {registers}"
            try:
                forward, backward, _ = milliseconds(call, tensors, seconds=0.1)
                each = by_kernel(call, tensors)
            except Exception as error:  # a tile that does not fit is a row of the table
                print(f"| {name} | {type(error).__name__}: {str(error)[:80]} |")
                continue
        print(f"| {name} | {forward:.2f} | {backward:.2f} | {each} |", flush=True)


def by_kernel(call: Call, tensors: Sequence[Tensor]) -> str:
    """Milliseconds of each kernel in one forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        output = call(*tensors)
        torch.autograd.grad(output, tensors, output)
        torch.cuda.synchronize()
    rows = [e for e in profile.key_averages() if e.device_time_total > 100]
    return ", ".join(f"{e.key[:28]} {e.device_time_total / 1e3:.2f}" for e in rows)


def main() -> None:
    """Check, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lengths", default="4096,16384,32768,65536,131072")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--num-features", type=int, help="favor with so many, in place of elu")
    parser.add_argument("--torch-up-to", type=int, default=16384)
    parser.add_argument("--tiles", action="store_true", help="try chunks, tiles and launches")
    parser.add_argument("--variant", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU")
    feature_map: FeatureMap = (
        EluFeatures() if args.num_features is None else FavorFeatures(args.num_features)
    )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {feature_map}, bfloat16,")
    print(f"{args.heads}/{args.kv_heads} heads of {args.head_dim}, causal, batch 1")
    failed = []
    for dtype, budget in ({} if args.tiles else BUDGET).items():
        error = check(feature_map, args.head_dim, dtype)
        print(f"{dtype}: relative error {error:.1e} against float64 (budget {budget:.1e})")
        if not error <= budget:
            failed.append(dtype)
    if torch.bfloat16 in failed:
        raise SystemExit("refused: bfloat16 is not within its budget, so nothing is timed")
    (tiles if args.tiles else table)(args, feature_map)
    if failed:
        raise SystemExit(f"not within budget: {failed}")


if __name__ == "__main__":
    main()
