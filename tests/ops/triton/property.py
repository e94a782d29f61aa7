"""Random calls of the Triton kernels against dense attention in float64.

    python -m tests.ops.triton.property --cases 5000 --seed 0

runs them on the GPU, in as many processes as there are processors (every process compiles what it
needs, so that compiling is spread), prints failures and the largest error as a share of what is
allowed, and exits with 1 if a case fails.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.patterns import Pattern
from tests.ops.test_attention_property import random_spec, to_pattern


@dataclasses.dataclass(frozen=True)
class Kind:
    """What kernels are compiled for: one per process keeps the compiling bounded.

    Attributes:
        dim: Of queries and keys.
        value_dim: Of values.
        dtype: Of the inputs.
        kv_heads: KV heads.
        groups: Query heads for each.
        softcap: Whether scores are capped; None: either.
        aligned: Whether rows start at multiples of 16 bytes; None: either.
        dense: Whether there may be masks of the caller's own.
    """

    dim: int
    value_dim: int
    dtype: torch.dtype
    kv_heads: int
    groups: int
    softcap: bool | None = None
    aligned: bool | None = None
    dense: bool = True


_SIZES = [
    ((128, 128), (2, 4)),
    ((64, 64), (1, 8)),
    ((80, 80), (2, 1)),
    ((192, 128), (1, 2)),
    ((96, 40), (2, 3)),
    ((36, 36), (1, 6)),
    ((256, 256), (1, 4)),
]
GPU_KINDS = [
    Kind(dim, value_dim, dtype, *heads)
    for dtype in (torch.bfloat16, torch.float16)
    for (dim, value_dim), heads in _SIZES
]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


def random_pattern(
    rng: random.Random, batch: int, heads: int, q_len: int, kv_len: int, dense: bool
) -> Pattern:
    """A pattern of any kind, dense masks, explicit positions and wide document ids included."""
    spec = random_spec(rng, batch, q_len, kv_len)
    pattern = to_pattern(spec, q_len, kv_len)
    if dense and rng.random() < 0.1:
        shape = (rng.choice([1, batch]), rng.choice([1, heads]), q_len, kv_len)
        pattern = pattern.replace(dense=torch.rand(shape) < 0.6)
    if rng.random() < 0.1 and pattern.global_tokens is None and pattern.kv_offset == 0:
        shift = torch.tensor([[rng.randint(0, kv_len - q_len)] for _ in range(batch)])
        pattern = pattern.replace(
            q_offset=None,
            q_positions=torch.arange(q_len)[None] + shift,
            kv_positions=torch.arange(kv_len)[None].expand(batch, -1),
        )
    if rng.random() < 0.1 and pattern.q_documents is not None:
        far = 2**40
        pattern = pattern.replace(
            q_documents=pattern.q_documents * far, kv_documents=pattern.kv_documents * far
        )
    return pattern


def random_layout(
    rng: random.Random, shape: tuple[int, ...], aligned: bool | None, device: str
) -> torch.Tensor:
    """float32 values in a layout that models pass, or one that no descriptor can describe."""
    batch, heads, length, dim = shape
    layout = rng.choice(["contiguous", "transposed", "fused", "odd"][: 3 if aligned else 4])
    if aligned is False:
        layout = "odd"
    randn = functools.partial(torch.randn, device=device)
    if layout == "contiguous":
        return randn(shape)
    if layout == "transposed":
        return randn(batch, length, heads, dim).transpose(1, 2)
    if layout == "fused":
        return randn(batch, length, 3, heads, dim)[:, :, 1].transpose(1, 2)
    return randn(batch, heads, length, dim + 1)[..., 1:]


def run_case(rng: random.Random, kind: Kind, lengths: list[int], device: str) -> float:
    """One random call, forward and backward.

    Returns:
        The largest error as a share of what is allowed.

    Raises:
        AssertionError: With what was called, if it is above 1, or something is not a number.
    """
    from hf_attn_plugin.ops.triton.attention import triton_attention

    batch = rng.choice([1, 2])
    kv_len = rng.choice(lengths)
    q_len = min(kv_len, rng.choice([1, kv_len, kv_len, rng.choice(lengths)]))
    heads = kind.kv_heads * kind.groups
    pattern = random_pattern(rng, batch, heads, q_len, kv_len, kind.dense)
    softcap = rng.choice([None, None, None, 2.5])
    if kind.softcap is not None:
        softcap = 2.5 if kind.softcap else None
    scaling = rng.choice([kind.dim**-0.5, 1.0 / kind.dim])
    torch.manual_seed(rng.randrange(2**31))
    inputs = [
        random_layout(rng, shape, kind.aligned, device).to(kind.dtype)
        for shape in (
            (batch, heads, q_len, kind.dim),
            (batch, kind.kv_heads, kv_len, kind.dim),
            (batch, kind.kv_heads, kv_len, kind.value_dim),
        )
    ]
    if rng.random() < 0.25:
        inputs.append(torch.randn(heads, device=device))
    pattern = pattern.to(device)
    shape = (batch, heads, q_len, kind.value_dim)
    direction = random_layout(rng, shape, kind.aligned, device).to(kind.dtype)
    lse_direction = torch.randn(batch, heads, q_len, device=device)
    context = (kind, batch, q_len, kv_len, softcap, len(inputs) == 4, pattern)

    def results(function: Callable[..., Any], dtype: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [t.detach() if dtype is None else t.detach().to(dtype) for t in inputs]
        leaves = [t.requires_grad_() for t in leaves]
        sinks = leaves[3] if len(leaves) == 4 else None
        out, lse = function(*leaves[:3], pattern, scaling=scaling, softcap=softcap, sinks=sinks)
        seen = torch.where(lse.isneginf(), 0.0, lse)
        total = (out * direction.to(out.dtype)).sum() + (seen * lse_direction.to(lse.dtype)).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]

    with poisoned():
        got = results(triton_attention, None)
        if rng.random() < 0.2:
            again = results(triton_attention, None)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), context
    want = results(reference_attention, torch.float64)
    plain = results(reference_attention, kind.dtype)
    assert torch.equal(got[1].isneginf(), want[1].isneginf()), context
    worst = 0.0
    names = ("output", "log-sum-exp", "query", "key", "value", "sinks")
    for name, g, w, p in zip(names, got, want, plain, strict=False):
        if not w.numel():
            continue
        g, w, p = (torch.where(t.isneginf(), 0.0, t.double()) for t in (g, w, p))
        assert g.isfinite().all(), (name, context)
        # Gradients of rows that see one key are differences of equal numbers, 0 in float64 and a
        # few roundings here.
        steps = 32 if kind.dtype == torch.float32 else 4
        floor = steps * torch.finfo(kind.dtype).eps * (1 + w.abs().max())
        share = float((g - w).abs().max() / (2 * (p - w).abs().max() + floor))
        assert share <= 1, (name, share, context)
        worst = max(worst, share)
    return worst


def run_cases(job: tuple[int, int, Kind]) -> tuple[int, float, list[str]]:
    """Cases of one kind in one process: how many, the worst share, and the failures."""
    seed, cases, kind = job
    rng = random.Random(seed)
    torch.set_num_threads(1)
    lengths = [1, 2, 33, 64, 127, 128, 129, 200, 259, 321]
    worst, failures = 0.0, []
    for case in range(cases):
        try:
            worst = max(worst, run_case(rng, kind, lengths, "cuda"))
        except Exception as error:
            failures.append(f"seed {seed}, case {case}: {type(error).__name__}: {error}"[:1500])
            if "CUDA error" in str(error):
                break  # the process' context is lost
    return cases, worst, failures


def jobs(seed: int, cases: int, workers: int) -> list[tuple[int, int, Kind]]:
    """What each process runs: one kind of kernels, and further options that turn with the seed."""
    made = []
    for worker in range(workers):
        turn = worker + seed
        kind = dataclasses.replace(
            GPU_KINDS[worker % len(GPU_KINDS)],
            softcap=turn % 4 == 3,
            aligned=turn % 5 != 4,
            dense=turn % 3 == 2,
        )
        made.append((1000 * seed + worker, cases // workers + (worker < cases % workers), kind))
    return made


def main() -> int:
    """Run the cases of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    options = parser.parse_args()
    workers = min(options.workers, options.cases)
    done, worst, failures, start = 0, 0.0, 0, time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        work = jobs(options.seed, options.cases, workers)
        for cases, share, lines in pool.imap_unordered(run_cases, work):
            done, worst, failures = done + cases, max(worst, share), failures + len(lines)
            for line in lines[:5]:
                print(line)
            print(f"{done} cases, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{done} cases, {failures} failed, largest error {worst:.2f} of the budget")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
