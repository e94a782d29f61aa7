"""``hf-attn bench linear``: linear attention's kernels beside PyTorch's path and softmax attention.

Outputs and gradients of every dtype are compared with the float64 definition first (`check`); if
bfloat16, which is timed, is not within its budget, nothing is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_attn_plugin.ops.linear import linear_attention, reference_linear_attention
from hf_attn_plugin.ops.linear_backend import LinearBackend
from hf_attn_plugin.ops.torch.linear_features import EluFeatures, FeatureMap
from hf_attn_plugin.patterns import Pattern

from .report import machine_line, markdown_table, text_table
from .table import free
from .timing import Clock, CudaClock, time_stages

PAGE = "linear.md"
LENGTHS, QUICK_LENGTHS = (4096, 16384, 32768, 65536, 131072), (4096, 16384)
_TORCH_UP_TO = 16384
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 32, 128
_HEADER = ["tokens", "what", "fwd ms", "bwd ms", "fwd+bwd ms", "extra GiB"]

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
# What plain PyTorch would round its features, weights and sums to, several times over.
BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def run(out: Path, *, command: str, quick: bool = False) -> int:
    """Check, measure, print a table and write it.

    Args:
        out: Folder for `PAGE`.
        command: The command line, for the page's first line.
        quick: `QUICK_LENGTHS` only.

    Returns:
        The exit status: 1 where a dtype is not within its budget.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    errors = {dtype: check(EluFeatures(), _HEAD_DIM, dtype) for dtype in BUDGET}
    good = {dtype: errors[dtype] <= budget for dtype, budget in BUDGET.items()}
    lines = [
        f"{dtype}: relative error {errors[dtype]:.1e} against float64, allowed {BUDGET[dtype]:.1e}"
        f"{'' if good[dtype] else ': FAILED numerics'}"
        for dtype in BUDGET
    ]
    print("\n".join(lines), flush=True)
    if not good[torch.bfloat16]:
        print("nothing is timed: bfloat16 is not within its budget")
        return 1
    clock = CudaClock(device)
    rows = [row for length in (QUICK_LENGTHS if quick else LENGTHS) for row in timed(length, clock)]
    print(text_table(_HEADER, rows))
    parts = [
        f"<!-- Made by: {command} -->",
        "# Linear attention (elu), forward and backward",
        f"{machine_line()}\n\n{_MEANING}",
        markdown_table(_HEADER, rows),
        "\n".join(f"- {line}" for line in lines),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(out / PAGE)
    return 0 if all(good.values()) else 1


def timed(length: int, clock: Clock) -> list[list[str]]:
    """The cells of one length, a row per contender."""
    leaves = inputs(length, _HEADS, _KV_HEADS, _HEAD_DIM, torch.bfloat16)
    query, key, value = leaves
    pattern, grad = Pattern(q_len=length, kv_len=length), torch.randn_like(query)
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "linear, Triton": linear(EluFeatures(), LinearBackend.TRITON, pattern),
        "softmax, SDPA flash": softmax,
    }
    if length <= _TORCH_UP_TO:
        calls["linear, PyTorch"] = linear(EluFeatures(), LinearBackend.TORCH, pattern)
    rows = []
    for name, call in calls.items():

        def forward(_: None, call: Callable[..., Tensor] = call) -> Tensor:
            return call(query, key, value)

        times = time_stages(
            clock, [forward, lambda output: torch.autograd.grad(output, leaves, grad)]
        )
        numbers = (*times.stages_ms, times.total_ms, times.extra_bytes / 2**30)
        rows.append([str(length), name, *(f"{number:.2f}" for number in numbers)])
        free(query.device)
    return rows


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


_MEANING = (
    f"Batch 1, {_HEADS} heads of {_HEAD_DIM}, bfloat16, causal, random inputs, medians of CUDA "
    "events with the L2 cache cleared. Extra memory is above the inputs: output, gradients and "
    "what the kernels need besides."
)
