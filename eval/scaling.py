"""Time and memory of exact windowed attention on a CPU, over the sequence length.

    python eval/scaling.py --window 1024 --lengths 4096,8192,16384,32768

Every length runs in a process of its own: forward and backward of one head of 64 in float32.
Before anything is timed, the output and gradients of a short case are checked against the float64
reference. "Extra memory" is the rise of the process's peak above inputs, output and gradients.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from hf_attn_plugin import Pattern, attention
from hf_attn_plugin.ops import reference_attention

HEAD_DIM = 64


def forward_backward(length: int, window: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """One head's output and gradients on random inputs."""
    torch.manual_seed(length)
    query, key, value = (
        torch.randn(1, 1, length, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    pattern = Pattern(q_len=length, kv_len=length, window=window)
    output, lse = attention(query, key, value, pattern)
    assert lse is not None
    (output.sum() + lse.sum()).backward()
    grads = [t.grad for t in (query, key, value) if t.grad is not None]
    return [output.detach(), *grads]


def check(window: int) -> float:
    """Largest error against the float64 reference on 3 windows' length; refuses a failing case."""
    length = min(3 * window + 17, 4096)
    torch.manual_seed(length)
    inputs = [torch.randn(1, 1, length, HEAD_DIM) for _ in range(3)]
    q, k, v = (t.double().requires_grad_() for t in inputs)
    pattern = Pattern(q_len=length, kv_len=length, window=window)
    output, lse = reference_attention(q, k, v, pattern)
    want = [output.detach(), *torch.autograd.grad(output.sum() + lse.sum(), (q, k, v))]
    got = forward_backward(length, window, torch.float32)
    error = max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True))
    if error > 1e-4:
        raise SystemExit(f"refused: error {error:.1e} against the float64 reference")
    return error


def measure(length: int, window: int) -> dict[str, float]:
    """Seconds (best of 3) and extra memory of one length, in this process."""
    forward_backward(min(length, 512), window, torch.float32)  # libraries loaded, threads started
    held = 7 * length * HEAD_DIM * 4  # inputs, output and gradients
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = peak_bytes()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        forward_backward(length, window, torch.float32)
        seconds.append(time.perf_counter() - start)
    extra = peak_bytes() - before - held
    return {"length": length, "seconds": min(seconds), "extra_mb": extra / 1e6}


def peak_bytes() -> int:
    """The process's highest resident memory since it was last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Print the table, a row per length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--json", action="store_true", help="rows as JSON lines")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps(measure(args.only, args.window)))
        return
    error = check(args.window)
    lengths = [int(part) for part in args.lengths.split(",")]
    if not args.json:
        print(f"window {args.window}, one head of {HEAD_DIM}, float32, forward + backward,")
        print(f"{torch.get_num_threads()} threads; error against float64 {error:.1e}\n")
        print("| tokens | seconds | µs per token | extra memory, MB |\n|---|---|---|---|")
    for length in lengths:
        command = [sys.executable, __file__, "--only", str(length), "--window", str(args.window)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        if args.json:
            print(json.dumps(row))
        else:
            per_token = row["seconds"] / length * 1e6
            print(f"| {length} | {row['seconds']:.2f} | {per_token:.1f} | {row['extra_mb']:.0f} |")


if __name__ == "__main__":
    main()
