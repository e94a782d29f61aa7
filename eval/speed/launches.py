"""A small set of launches of every kernel, for tools that watch each memory access.

    python -m eval.speed.launches [--overrun | --race | --ordered]

`eval/speed/sanitize.py` runs it under compute-sanitizer. Lengths are odd and small, patterns many:
every branch of the kernels is taken once. The options run a control instead, so that one can see
what a tool notices: a write outside a tensor, a race in shared memory, and the same kernel without
the race.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.linear import feature_map_named
from hf_attn_plugin.ops.linear_state import LinearState
from hf_attn_plugin.patterns import Pattern

TOKENS = 197
_HEADS, _KV_HEADS = 4, 2


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call.

    Attributes:
        name: What it tries.
        pattern: Which pairs attend.
        head_dim: Of queries and keys.
        value_dim: Of values.
        dtype: Of all.
        softcap: Cap of the scores.
        sinks: Whether there are attention sinks.
    """

    name: str
    pattern: Pattern
    head_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    softcap: float | None = None
    sinks: bool = False


def training_launches(device: torch.device) -> list[Launch]:
    """Forward and backward of attention."""

    def pattern(**terms: Any) -> Pattern:
        return Pattern(q_len=TOKENS, kv_len=TOKENS, **terms)

    documents = torch.arange(TOKENS, device=device)[None] // 61
    valid = torch.arange(TOKENS, device=device)[None] >= 37
    marked = torch.arange(TOKENS, device=device)[None] % 90 == 40
    packed = pattern(q_documents=documents, kv_documents=documents)
    near_and_global = pattern(window=33, num_global_tokens=5)
    long_column = Pattern(q_len=2500, kv_len=2500, window=17, num_global_tokens=5)
    return [
        Launch("causal", pattern()),
        Launch("bidirectional, head_dim 80", pattern(causal=False), head_dim=80, value_dim=80),
        Launch("window and sink tokens", pattern(window=33, num_sink_tokens=2)),
        Launch("window and global tokens", near_and_global),
        Launch("marked global tokens", pattern(causal=False, window=9, global_tokens=marked)),
        Launch("strided", pattern(window=17, stride=8)),
        Launch("dilated", pattern(window=9, dilation=3)),
        Launch("documents", packed),
        Launch("padding and a band", pattern(band=50, key_valid=valid)),
        Launch("softcap and sinks", pattern(), softcap=2.5, sinks=True),
        Launch("values of other width", pattern(window=70), head_dim=96, value_dim=64),
        Launch("float16, head_dim 128", pattern(), 128, 128, torch.float16),
        Launch("head_dim 128, window and global tokens", near_and_global, 128, 128),
        Launch("head_dim 128, documents", packed, 128, 128),
        Launch("head_dim 128, a column that is cut", long_column, 128, 128),
        Launch("float32, head_dim 32", pattern(window=40), 32, 32, torch.float32),
        Launch("fewer queries", Pattern(q_len=71, kv_len=TOKENS)),
    ]


def decoding_launches(device: torch.device) -> list[Launch]:
    """One or few queries over a longer cache."""
    valid = torch.arange(1031, device=device)[None] >= 100
    return [
        Launch("one query", Pattern(q_len=1, kv_len=1031)),
        Launch("three queries, window", Pattern(q_len=3, kv_len=1031, window=300)),
        Launch("padded, sinks", Pattern(q_len=1, kv_len=1031, key_valid=valid), sinks=True),
    ]


def _tensors(launch: Launch, device: torch.device, grads: bool) -> list[Tensor]:
    """Query, key and value, drawn on the host: watched kernels are slow."""
    q_len, kv_len = launch.pattern.q_len, launch.pattern.kv_len
    shapes = (
        (_HEADS, q_len, launch.head_dim),
        (_KV_HEADS, kv_len, launch.head_dim),
        (_KV_HEADS, kv_len, launch.value_dim),
    )
    return [
        torch.randn(1, *shape).to(device, launch.dtype).requires_grad_(grads) for shape in shapes
    ]


def run_all(device: torch.device) -> Iterator[str]:
    """Run every launch; yields what has been run."""
    from hf_attn_plugin.ops.triton.attention import triton_attention
    from hf_attn_plugin.ops.triton.decode import triton_decode
    from hf_attn_plugin.ops.triton.linear import triton_linear_attention

    torch.manual_seed(0)
    for launch in training_launches(device):
        leaves = _tensors(launch, device, grads=True)
        q, k, v = leaves
        sinks = torch.randn(_HEADS).to(device).requires_grad_() if launch.sinks else None
        output, lse = triton_attention(
            q,
            k,
            v,
            launch.pattern,
            scaling=launch.head_dim**-0.5,
            softcap=launch.softcap,
            sinks=sinks,
        )
        outputs, directions = [output], [torch.randn(output.shape).to(output)]
        if bool(lse.isfinite().all()):
            outputs.append(lse)
            directions.append(torch.randn(lse.shape).to(lse))
        wanted = leaves if sinks is None else [*leaves, sinks]
        grads = torch.autograd.grad(outputs, wanted, directions)
        _finite(launch.name, output, *grads)
        yield f"attention: {launch.name}"
    for launch in decoding_launches(device):
        q, k, v = _tensors(launch, device, grads=False)
        sinks = torch.randn(_HEADS).to(device) if launch.sinks else None
        output, _ = triton_decode(
            q, k, v, launch.pattern, scaling=launch.head_dim**-0.5, sinks=sinks
        )
        _finite(launch.name, output)
        yield f"decoding: {launch.name}"
    for name in ("elu", "favor"):
        launch = Launch(name, Pattern(q_len=TOKENS, kv_len=TOKENS))
        leaves = _tensors(launch, device, grads=True)
        features = feature_map_named(name)
        width = features.width(launch.head_dim)
        state = LinearState(
            torch.zeros(1, _KV_HEADS, width, launch.value_dim + 1, device=device),
            torch.full((1, _KV_HEADS), float("-inf"), device=device),
            features,
        )
        q, k, v = leaves
        output, _ = triton_linear_attention(
            q, k, v, launch.pattern, state, scaling=launch.head_dim**-0.5
        )
        grads = torch.autograd.grad(output, leaves, torch.randn(output.shape).to(output))
        _finite(launch.name, output, *grads)
        yield f"linear: {launch.name}"


def _finite(name: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if not bool(tensor.isfinite().all().cpu()):
            raise SystemExit(f"{name}: something is not finite")


def main() -> None:
    """Run the launches, or a control."""
    device = torch.device("cuda")
    if "--overrun" in sys.argv:
        from .overrun import overrun

        overrun(device)
    elif "--race" in sys.argv or "--ordered" in sys.argv:
        from .races import hand_over

        hand_over(device, "--ordered" in sys.argv)
    else:
        for line in run_all(device):
            print(line, flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
