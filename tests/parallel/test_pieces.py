"""Pieces of a softmax, forward and backward, without processes."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch

from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.parallel.merge import RunningSoftmax, RunningSum
from hf_attn_plugin.parallel.pieces import PieceKernel, Pieces, choose_pieces
from hf_attn_plugin.parallel.plan import make_plan
from hf_attn_plugin.parallel.ring import ring_steps
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.part import part
from tests.ops.test_attention_property import within_budget

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL = PieceKernel.TRITON if INTERPRETED else PieceKernel.BLOCKED
LENGTH = 48


@pytest.mark.skipif(INTERPRETED, reason="runs here")
def test_triton_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def documents(*ends: int) -> dict[str, torch.Tensor]:
    numbers = (torch.arange(LENGTH)[None] >= torch.tensor(ends)[:, None]).sum(0)[None]
    return {"q_documents": numbers, "kv_documents": numbers}


PATTERNS = {
    "causal": Pattern(q_len=LENGTH, kv_len=LENGTH),
    "window and sink tokens": Pattern(q_len=LENGTH, kv_len=LENGTH, window=20, num_sink_tokens=2),
    "documents": Pattern(q_len=LENGTH, kv_len=LENGTH, **documents(9, 30, 31)),
    "bidirectional, padded": Pattern(
        q_len=LENGTH, kv_len=LENGTH, causal=False, key_valid=torch.arange(LENGTH)[None] < 37
    ),
}


def made(dtype: torch.dtype, length: int = LENGTH) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1 if length == LENGTH else 2, length, heads, 16) for heads in (2, 1, 1, 2)]
    rows = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [row.transpose(1, 2).to(dtype) for row in rows]


def by_pieces(
    pattern: Pattern, layout: Layout, pieces: Pieces, dtype: torch.dtype
) -> list[torch.Tensor]:
    """What all ranks compute, one piece after another: output and gradients, not rounded."""
    query, key, value, grad = made(dtype, layout.length)
    plan = make_plan(pattern, layout)
    steps = [step for rank in range(layout.ranks) for step in ring_steps(plan, rank)]
    todo = [(piece.rows, piece.cols) for step in steps for piece in step.pieces]
    softmax = RunningSoftmax(layout.length)
    d_query, d_key, d_value = (RunningSum(layout.length) for _ in range(3))
    for direction in ("forward", "backward"):
        for rows, cols in todo:
            q, k = slice(rows.start, rows.stop), slice(cols.start, cols.stop)
            inputs = (query[:, :, q], key[:, :, k], value[:, :, k], part(pattern, rows, cols))
            if direction == "forward":
                softmax.add(q, *pieces.forward(*inputs))
                continue
            output, lse = softmax.output.to(dtype), softmax.lse
            given = (output[:, :, q], lse[:, :, q], grad[:, :, q])
            grads = pieces.backward(*inputs, *given)
            for total, rows_of, d in zip((d_query, d_key, d_value), (q, k, k), grads, strict=True):
                assert d.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                total.add(rows_of, d)
    return [softmax.output, d_query.total, d_key.total, d_value.total]


def whole(
    pattern: Pattern, given: torch.dtype, dtype: torch.dtype, softcap: float | None
) -> list[torch.Tensor]:
    """Output and gradients by the specification, of inputs in another dtype."""
    *inputs, grad = [t.to(dtype) for t in made(given, pattern.q_len)]
    leaves = [t.requires_grad_() for t in inputs]
    output, _ = reference_attention(*leaves, pattern, scaling=0.3, softcap=softcap)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


_IN_32_BITS = ("causal", "window and sink tokens")
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float64]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_make_the_whole(
    name: str, chunks: int, dtype: torch.dtype, softcap: float | None
) -> None:
    half, capped = dtype == torch.float16, softcap is not None
    if INTERPRETED and (
        chunks == 1 or half == (name in _IN_32_BITS) or capped != (name == "causal")
    ):
        pytest.skip("the interpreter is slow")
    pattern = PATTERNS[name]
    found = by_pieces(pattern, Layout(LENGTH, 2, chunks), Pieces(KERNEL, 0.3, softcap), dtype)
    exact, plain = (whole(pattern, dtype, t, softcap) for t in (torch.float64, dtype))
    names = ("output", "d_query", "d_key", "d_value")
    for kind, ours, want, other in zip(names, found, exact, plain, strict=True):
        within_budget(kind, ours, want, other, dtype, name)


def random_pattern(rng: random.Random, length: int) -> Pattern:
    terms: dict[str, Any] = {"causal": rng.random() < 0.7}
    if rng.random() < 0.3:
        terms["band"] = rng.randint(1, length)
    if rng.random() < 0.4:
        terms |= {"window": rng.randint(1, length), "dilation": rng.choice([1, 1, 2])}
    if rng.random() < 0.2:
        terms["stride"] = rng.randint(1, length)
    for name in ("num_sink_tokens", "num_global_tokens"):
        if rng.random() < 0.3:
            terms[name] = rng.randint(1, 3)
    if rng.random() < 0.2:
        terms["global_tokens"] = torch.rand(2, length) < 0.1
    if rng.random() < 0.3:
        terms["key_valid"] = torch.rand(2, length) < 0.8
    if rng.random() < 0.4:
        numbers = (torch.rand(rng.choice([1, 2]), length) < 0.1).long().cumsum(1)
        terms |= {"q_documents": numbers, "kv_documents": numbers}
    return Pattern(q_len=length, kv_len=length, **terms)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is slow")
@pytest.mark.parametrize("seed", range(30))
def test_random_patterns(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layout = Layout(0, rng.choice([2, 3, 4]), rng.choice([1, 2, 4]))
    length = layout.ranks * layout.chunks * rng.choice([1, 2, 5, 33])
    pattern, layout = random_pattern(rng, length), dataclasses.replace(layout, length=length)
    if not bool(pattern.visible("cpu").any()):
        return
    found = by_pieces(pattern, layout, Pieces(KERNEL, 0.3, None), torch.float64)
    for ours, want in zip(found, whole(pattern, torch.float64, torch.float64, None), strict=True):
        torch.testing.assert_close(ours, want, atol=1e-11, rtol=0)


def test_results_are_not_rounded_to_16_bits() -> None:
    dtype = torch.float16
    query, key, value, grad = made(dtype)
    pieces = Pieces(KERNEL, 0.3, None)
    output, lse = pieces.forward(query, key, value, PATTERNS["causal"])
    given = (output.to(dtype), lse, grad)
    results = [output, *pieces.backward(query, key, value, PATTERNS["causal"], *given)]
    for result in results:
        assert result.dtype == torch.float32
        assert not torch.equal(result, result.to(dtype).float())


def test_a_piece_alone_has_other_gradients() -> None:
    """Its own log-sum-exp in place of that over all keys is noticed."""
    pattern, dtype = PATTERNS["causal"], torch.float32
    query, key, value, grad = made(dtype)
    pieces = Pieces(KERNEL, 0.3, None)
    half = LENGTH // 2
    inner = part(pattern, range(LENGTH), range(half))
    output, lse = pieces.forward(query, key[:, :, :half], value[:, :, :half], inner)
    own = pieces.backward(query, key[:, :, :half], value[:, :, :half], inner, output, lse, grad)
    wanted = whole(pattern, dtype, torch.float64, None)[2][:, :, :half]
    assert (own[1] - wanted).abs().max() > 0.1 * wanted.abs().max()


@pytest.mark.skipif(INTERPRETED, reason="nothing of it is interpreted")
def test_what_computes_pieces() -> None:
    query, key, value, _ = made(torch.float32)
    chosen = choose_pieces(query, key, value, PATTERNS["causal"], 0.3, 5.0)
    assert chosen == Pieces(PieceKernel.BLOCKED, 0.3, 5.0)
