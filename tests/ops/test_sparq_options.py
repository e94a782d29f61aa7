"""sparq_decode's options against the reference: coverage, rank by coverage, block means, copies."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_attn_plugin.ops.sparq import sparq_decode
from hf_attn_plugin.ops.sparq.key_copy import QuantizedBuffer, StridedComponents
from hf_attn_plugin.ops.sparq.sums import BlockSums
from tests.ops.sparq_reference import numpy_sparq, quantized_copy, rows_of
from tests.ops.test_sparq import SHAPES, component_major, inputs, left_padded

BASE = {"rank": 6, "top_k": 20, "local_window": 3}
GROUP = 8
OPTIONS = {
    "coverage": {"coverage": 0.6},
    "little coverage": {"coverage": 0.01},
    "coverage that top_k bounds": {"coverage": 0.999},
    "rank coverage": {"rank_coverage": 0.3},
    "little rank coverage": {"rank_coverage": 0.001},
    "rank coverage that rank bounds": {"rank_coverage": 1.0},
    "both": {"coverage": 0.5, "rank_coverage": 0.25},
    "block means": {"mean_block": 5},
    "block of one": {"mean_block": 1},
    "block of all": {"mean_block": 100},
    "everything": {"coverage": 0.5, "rank_coverage": 0.25, "mean_block": 7},
}
MASKS = {
    "all visible": None,
    "left padding": left_padded(2, 41),
    "right padding": left_padded(2, 41).flip(-1),
    "holes": (torch.arange(41)[None] * 7 + torch.tensor([[0], [3]])) % 5 > 1,
    "a row sees nothing": left_padded(2, 41, padding=(2, 41)),
    "a row sees two": left_padded(2, 41, padding=(0, 39)),
}


def compare(tensors, options, mask, components=None, copied=None, **extra):
    """Ours against the reference; returns our bytes, and (r, k) of every row by the reference."""
    used = []
    reallocate = "mean_block" in options
    expected = numpy_sparq(
        *tensors, **BASE, **options, reallocate=reallocate, visible=mask, copied=copied, used=used,
        **extra,
    )  # fmt: skip
    output, reads = sparq_decode(
        *tensors, **BASE, **options, mean_value_reallocation=reallocate, visible=mask,
        components=components, **extra,
    )  # fmt: skip
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    return reads, used


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES)
def test_options_equal_the_reference(shape, options, mask):
    tensors = inputs(shape)
    compare(tensors, options, mask)
    compare(tensors, options, mask, component_major(tensors[1]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_with_softcap_and_scaling(options):
    tensors = inputs()
    compare(tensors, options, MASKS["left padding"], softcap=2.0, scaling=0.4)


@pytest.mark.parametrize("name", ["coverage", "rank coverage", "both"])
def test_coverage_with_sinks(name):
    """The share is one of the keys' mass; what the sinks take does not count."""
    sinks = torch.linspace(-2, 3, 6, dtype=torch.float64)
    compare(inputs(), OPTIONS[name], MASKS["left padding"], sinks=sinks)


def test_the_options_are_told_apart():
    tensors = inputs()
    outputs = [
        numpy_sparq(*tensors, **BASE, **options, reallocate="mean_block" in options)
        for name, options in OPTIONS.items()
        if "bounds" not in name
    ]
    for one, other in itertools.combinations(outputs, 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_only_what_is_chosen_is_read_and_counted(mask):
    """D = 16, Dv = 24, S = 41, float64: the reference says which r and k every row used."""
    tensors = inputs()
    reads, used = compare(tensors, OPTIONS["both"], mask, component_major(tensors[1]))
    assert len({k for _, k in used}) > 1
    assert reads.keys == sum(k for _, k in used) * 16 * 8
    assert reads.values == sum(k for _, k in used) * 24 * 8
    # A row that sees nothing still has a query, and components.
    assert reads.components >= sum(r for r, _ in used) * 41 * 8
    if len(used) == 4:
        assert reads.components == sum(r for r, _ in used) * 41 * 8


def test_coverage_applies_where_everything_would_fit():
    """top_k >= S is dense attention without coverage; with it, fewer keys may do."""
    tensors = inputs()
    arguments = {"rank": 16, "top_k": 500, "local_window": 2, "mean_value_reallocation": False}
    dense, whole = sparq_decode(*tensors, **arguments)
    few, part = sparq_decode(*tensors, **arguments, coverage=0.5)
    assert part.keys < whole.keys / 2
    assert (few - dense).abs().max() > 1e-3
    almost, _ = sparq_decode(*tensors, **arguments, coverage=1.0)
    torch.testing.assert_close(almost, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [3, 17, 31, 32])
def test_with_coverage_the_whole_local_window_is_used_where_there_are_fewer_keys(length):
    tensors = inputs(length=length)
    arguments = {"rank": 4, "top_k": 128, "local_window": 32, "mean_value_reallocation": False}
    dense, whole = sparq_decode(*tensors, **arguments)
    everything = torch.ones(1, length, dtype=torch.bool)
    for visible in (None, everything):
        output, reads = sparq_decode(*tensors, **arguments, coverage=0.3, visible=visible)
        assert reads.keys == whole.keys
        torch.testing.assert_close(output, dense, rtol=1e-6, atol=1e-6)


def test_more_coverage_is_never_worse_and_reads_more():
    tensors = inputs(length=200)
    arguments = {"rank": 16, "top_k": 200, "local_window": 1, "mean_value_reallocation": False}
    dense, _ = sparq_decode(*tensors, **arguments)
    errors, sizes = [], []
    for coverage in (0.1, 0.5, 0.9, 0.99, 0.9999):
        output, reads = sparq_decode(*tensors, **arguments, coverage=coverage)
        errors.append(float((output - dense).norm()))
        sizes.append(reads.keys)
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_block_means_come_nearer_to_dense_attention_where_values_drift():
    query, keys, values = inputs(length=256)
    values = values + torch.linspace(0, 8, 256, dtype=torch.float64)[:, None]
    # Exact scores: only the values of the keys left out are approximated, in blocks of one nothing.
    arguments = {"rank": 16, "top_k": 16, "local_window": 8, "mean_value_reallocation": True}
    dense, _ = sparq_decode(query, keys, values, rank=16, top_k=256, local_window=8,
                            mean_value_reallocation=False)  # fmt: skip
    errors = [
        float((sparq_decode(query, keys, values, **arguments, mean_block=b)[0] - dense).norm())
        for b in (None, 64, 8, 1)
    ]
    assert errors[0] > 1.2 * errors[1] > 1.2**2 * errors[2]
    assert errors[3] < 1e-10


def test_given_block_sums_are_used_and_counted():
    query, keys, values = inputs()
    visible = left_padded(2, 41)
    arguments = {**BASE, "mean_value_reallocation": True, "mean_block": 5, "visible": visible}
    expected, computed = sparq_decode(query, keys, values, **arguments)
    sums = BlockSums.of(values, visible, 5)
    output, reads = sparq_decode(query, keys, values, sums=sums, **arguments)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert computed.mean == values.numel() * 8
    assert reads.mean == 2 * 2 * 9 * 24 * 8  # nine blocks of five positions


def quantized(keys, bits, lengths):
    """The copy of ``keys`` after they came in pieces of these lengths."""
    buffer = QuantizedBuffer.allocate(keys, 64, bits)
    at = 0
    for length in lengths:
        buffer.append(at, keys[:, :, at : at + length])
        at += length
    assert at == keys.shape[2]
    return buffer.components(at)


@pytest.mark.parametrize("mask", [None, MASKS["left padding"]], ids=["all visible", "padded"])
@pytest.mark.parametrize("options", [{}, OPTIONS["everything"]], ids=["none", "everything"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_copies_equal_the_reference(shape, bits, options, mask, monkeypatch):
    monkeypatch.setattr("hf_attn_plugin.ops.sparq.key_copy.GROUP", GROUP)
    tensors = inputs(shape)
    copied = quantized_copy(tensors[1], bits, GROUP)
    assert 0 < (copied - tensors[1]).abs().max() < 6 / 2**bits
    components = quantized(tensors[1], bits, (41,))
    compare(tensors, options, mask, components, copied)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantised_rows_are_within_half_a_step(bits, dtype, monkeypatch):
    monkeypatch.setattr("hf_attn_plugin.ops.sparq.key_copy.GROUP", GROUP)
    _, keys, _ = inputs(dtype=dtype)
    components = quantized(keys, bits, (30, 11))
    everything = torch.arange(16).expand(2, 2, 16)
    rows, _ = rows_of(components, everything, torch.float32)
    blocks = keys.float().transpose(2, 3)[..., :40].unflatten(-1, (-1, GROUP))
    step = (blocks.amax(-1) - blocks.amin(-1)) / (2**bits - 1)
    # The scale is rounded to the keys' dtype, which shifts up to 2^bits steps by its precision.
    slack = 0.5 + 2**bits * torch.finfo(dtype).eps
    error = (rows[..., :40].unflatten(-1, (-1, GROUP)) - blocks).abs()
    assert (error <= slack * step[..., None] + 1e-6).all()
    torch.testing.assert_close(rows[..., 40], keys.float().transpose(2, 3)[..., 40])


@pytest.mark.parametrize(
    ("bits", "dtype", "share"),
    [(8, torch.bfloat16, 0.516), (4, torch.bfloat16, 0.266),
     (8, torch.float32, 0.266), (4, torch.float32, 0.141)],
    ids=["int8 of bf16", "int4 of bf16", "int8 of fp32", "int4 of fp32"],
)  # fmt: skip
def test_what_a_quantised_copy_takes_beside_the_keys(bits, dtype, share):
    keys = torch.zeros(1, 1, 8192, 128, dtype=dtype)
    buffer = QuantizedBuffer.allocate(keys, 8192, bits)
    buffer.append(0, keys)
    tail = buffer.tail.numel() * buffer.tail.element_size()
    assert (buffer.nbytes - tail) / (keys.numel() * keys.element_size()) == pytest.approx(
        share, abs=1e-3
    )
    components = buffer.components(8192)
    rows, read = rows_of(components, torch.arange(32).expand(1, 1, 32), torch.float32)
    assert rows.shape == (1, 1, 32, 8192)
    assert read == (buffer.nbytes - tail) * 32 // 128


@pytest.mark.parametrize("head_dim", [8, 16, 20, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_without_a_copy_cache_lines_are_counted(head_dim, dtype):
    """By hand: every address of every chosen component, and the lines they lie in."""
    buffer = torch.randn(2, 2, 50, head_dim).to(dtype)
    keys = buffer[:, :, 3:44]
    index = torch.stack([torch.randperm(head_dim)[:3] for _ in range(4)]).view(2, 2, 3)
    lines = set()
    for b, h, s, i in itertools.product(range(2), range(2), range(41), range(3)):
        element = keys[b, h, s, index[b, h, i]]
        lines.add((b, h, element.data_ptr() // 64))
    rows, read = rows_of(StridedComponents(keys), index)
    # 41 keys are no whole number of periods: that, and the rounding of each row, may differ.
    assert abs(read - len(lines) * 64) <= 0.03 * len(lines) * 64 + 4 * 64
    expected = torch.stack([keys[b, h][:, index[b, h]].T for b in (0, 1) for h in (0, 1)])
    torch.testing.assert_close(rows, expected.view(2, 2, 3, 41).double(), rtol=0, atol=0)


def test_without_a_copy_the_result_is_the_same():
    tensors = inputs()
    for options in ({}, OPTIONS["everything"]):
        compare(tensors, options, None, StridedComponents(tensors[1]))


def test_without_a_copy_few_components_of_wide_heads_read_less_than_the_keys():
    query, keys, values = inputs(d=128)
    arguments = {**BASE, "rank": 2, "mean_value_reallocation": False}
    _, reads = sparq_decode(query, keys, values, components=StridedComponents(keys), **arguments)
    line, row = 64, 128 * 8
    assert 2 * 2 * 41 * line <= reads.components <= 2 * 2 * (41 * 2 + 2) * line
    assert reads.components < 2 * 2 * 41 * row / 4
    _, uncounted = sparq_decode(
        query, keys, values, components=StridedComponents(keys, counted=False), **arguments
    )
    assert uncounted.components == 0
