"""Partial results put together are the results over all keys."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.parallel.merge import RunningSoftmax, RunningSum, sinks_gradient
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.part import part

LENGTH, HEADS, DIM = 24, 4, 8


def tensors(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    shapes = [(2, heads, LENGTH, DIM) for heads in (HEADS, 2, 2, HEADS)]
    return [torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) for shape in shapes]


def merged(
    pattern: Pattern, cuts: list[int], dtype: torch.dtype, rows: range = range(LENGTH)
) -> RunningSoftmax:
    """Attention key run by key run, the first runs for some of the queries only."""
    query, key, value, _ = tensors(dtype)
    softmax = RunningSoftmax(LENGTH)
    for start, stop in itertools.pairwise(cuts):
        cols = range(start, stop)
        of_rows = rows if start == cuts[0] else range(LENGTH)
        output, lse = reference_attention(
            query[:, :, of_rows.start : of_rows.stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            part(pattern, of_rows, cols),
        )
        softmax.add(slice(of_rows.start, of_rows.stop), output, lse)
    return softmax


PATTERNS = {
    "causal": Pattern(q_len=LENGTH, kv_len=LENGTH),
    "bidirectional": Pattern(q_len=LENGTH, kv_len=LENGTH, causal=False),
    "rows that see nothing": Pattern(
        q_len=LENGTH, kv_len=LENGTH, key_valid=torch.arange(LENGTH)[None] >= 7
    ),
}


@pytest.mark.parametrize("cuts", [[0, 24], [0, 5, 24], [0, 1, 9, 17, 24]], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_parts_make_the_whole(name: str, cuts: list[int]) -> None:
    pattern = PATTERNS[name]
    for dtype in (torch.float32, torch.float64):
        softmax = merged(pattern, cuts, dtype)
        output, lse = reference_attention(*tensors(dtype)[:3], pattern)
        assert softmax.output is not None and softmax.lse is not None
        assert softmax.output.dtype == dtype
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(softmax.output, output, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(softmax.lse, lse, atol=tolerance, rtol=tolerance)


def test_a_first_part_may_be_of_some_queries() -> None:
    """Those that it leaves out see none of its keys."""
    pattern = Pattern(q_len=LENGTH, kv_len=LENGTH, window=6)
    softmax = merged(pattern, [0, 3, 24], torch.float64, rows=range(8))
    output, _ = reference_attention(*tensors()[:3], pattern)
    torch.testing.assert_close(softmax.output, output)
    missed = merged(pattern, [0, 3, 24], torch.float64, rows=range(1, 8))
    assert not torch.allclose(missed.output[:, :, :1], output[:, :, :1])


def test_parts_in_16_bits_are_merged_in_32() -> None:
    softmax = RunningSoftmax(LENGTH)
    query, key, value, _ = tensors(torch.bfloat16)
    output, lse = reference_attention(query, key, value, PATTERNS["causal"])
    for _ in range(2):
        softmax.add(slice(0, LENGTH), output, lse.float())
    assert softmax.output.dtype == torch.float32
    torch.testing.assert_close(softmax.output, output.float())


@pytest.mark.parametrize("sink", [0.7, float("-inf")])
@pytest.mark.parametrize("name", PATTERNS)
def test_sinks_come_at_the_end(name: str, sink: float) -> None:
    pattern, sinks = PATTERNS[name], torch.tensor([sink, 30.0, -30.0, 0.0], dtype=torch.float64)
    softmax = merged(pattern, [0, 5, 24], torch.float64)
    softmax.add_sinks(sinks)
    inputs = [t.requires_grad_() for t in (*tensors()[:3], sinks)]
    output, lse = reference_attention(*inputs[:3], pattern, sinks=inputs[3])
    torch.testing.assert_close(softmax.output, output.detach())
    torch.testing.assert_close(softmax.lse, lse.detach())
    grad = tensors()[3]
    (wanted,) = torch.autograd.grad(output, inputs[3], grad)
    found = sinks_gradient(sinks.detach(), softmax.output, softmax.lse, grad)
    torch.testing.assert_close(found, wanted)


def test_gradients_are_added_in_float32() -> None:
    whole, first, second = (torch.randn(2, 3, 10, 4) for _ in range(3))
    for parts in ([(0, 10), (2, 5), (4, 10)], [(2, 5), (0, 10), (4, 10)]):
        total, expected = RunningSum(10), torch.zeros(2, 3, 10, 4)
        for (start, stop), part_ in zip(parts, (whole, first, second), strict=True):
            rounded = part_[:, :, start:stop].bfloat16()
            total.add(slice(start, stop), rounded)
            expected[:, :, start:stop] += rounded.float()
        assert total.total is not None and total.total.dtype == torch.float32
        torch.testing.assert_close(total.total, expected)
    assert RunningSum(3).total is None
