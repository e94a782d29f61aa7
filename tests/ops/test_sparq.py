"""sparq_decode against the paper's equations written out in numpy, head by head."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from hf_attn_plugin.ops.sparq import CacheReads, sparq_decode
from hf_attn_plugin.ops.sparq.key_copy import FullComponents
from hf_attn_plugin.ops.sparq.sums import BlockSums
from tests.ops.sparq_reference import numpy_sparq

SHAPES = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}


def numpy_dense(query, keys, values, **kwargs):
    """Dense attention is SparQ with everything kept."""
    length, d = keys.shape[2:]
    return numpy_sparq(
        query, keys, values, rank=d, top_k=length, local_window=0, reallocate=False, **kwargs
    )


def inputs(shape="gqa", batch=2, length=41, d=16, dv=24, dtype=torch.float64, seed=0):
    heads, kv_heads = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    query = 2 * make(batch, heads, 1, d)
    keys, values = make(batch, kv_heads, length, d), make(batch, kv_heads, length, dv) + 0.5
    return query.to(dtype), keys.to(dtype), values.to(dtype)


def component_major(keys):
    return FullComponents(keys.transpose(2, 3).contiguous())


def left_padded(batch, length, padding=(0, 9)):
    positions = torch.arange(length)
    return torch.stack([positions >= padding[i] for i in range(batch)])


PARAMETERS = {
    "usual": {"rank": 4, "top_k": 10, "local_window": 3},
    "rank 1": {"rank": 1, "top_k": 10, "local_window": 3},
    "rank all": {"rank": 16, "top_k": 10, "local_window": 3},
    "one key": {"rank": 4, "top_k": 1, "local_window": 0},
    "no local": {"rank": 4, "top_k": 10, "local_window": 0},
    "only local": {"rank": 4, "top_k": 10, "local_window": 10},
    "all but one": {"rank": 4, "top_k": 40, "local_window": 3},
}


@pytest.mark.parametrize("masked", [False, True], ids=["all visible", "padded"])
@pytest.mark.parametrize("reallocate", [False, True], ids=["top-k", "mean value"])
@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS.keys())
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_paper(shape, parameters, reallocate, masked):
    query, keys, values = inputs(shape)
    visible = left_padded(2, 41) if masked else None
    expected = numpy_sparq(
        query, keys, values, **parameters, reallocate=reallocate, visible=visible
    )
    for components in (None, component_major(keys)):
        output, _ = sparq_decode(
            query, keys, values, **parameters, mean_value_reallocation=reallocate,
            components=components, visible=visible,
        )  # fmt: skip
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_the_reference_tells_the_parameters_apart():
    query, keys, values = inputs()
    outputs = [
        numpy_sparq(query, keys, values, **parameters, reallocate=reallocate)
        for parameters in PARAMETERS.values()
        for reallocate in (False, True)
    ]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    "extra",
    [
        {"scaling": 1.0},
        {"scaling": 0.1},
        {"softcap": 1.5},
        {"scaling": 0.7, "softcap": 3.0},
        {"sinks": torch.linspace(-2, 3, 6, dtype=torch.float64)},
    ],
    ids=["scaling 1", "scaling 0.1", "softcap", "scaling and softcap", "sinks"],
)
@pytest.mark.parametrize("top_k", [10, 41], ids=["top-k", "dense"])
def test_scaling_softcap_and_sinks(extra, top_k):
    query, keys, values = inputs()
    visible = left_padded(2, 41)
    parameters = {"rank": 4, "top_k": top_k, "local_window": 3}
    expected = numpy_sparq(
        query, keys, values, **parameters, reallocate=False, visible=visible, **extra
    )
    output, _ = sparq_decode(
        query, keys, values, **parameters, mean_value_reallocation=False,
        components=component_major(keys), visible=visible, **extra,
    )  # fmt: skip
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    plain, _ = sparq_decode(
        query, keys, values, **parameters, mean_value_reallocation=False, visible=visible
    )
    assert (output - plain).abs().max() > 1e-3


@pytest.mark.parametrize("top_k", [41, 1000])
@pytest.mark.parametrize("reallocate", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_every_key_is_dense_attention(shape, reallocate, top_k):
    query, keys, values = inputs(shape)
    visible = left_padded(2, 41)
    output, reads = sparq_decode(
        query, keys, values, rank=2, top_k=top_k, local_window=5,
        mean_value_reallocation=reallocate, visible=visible,
    )  # fmt: skip
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible[:, None, None], enable_gqa=True
    )
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        output, numpy_dense(query, keys, values, visible=visible), rtol=1e-12, atol=1e-12
    )
    assert reads.total == reads.dense


@pytest.mark.parametrize("reallocate", [False, True])
def test_more_keys_than_a_padded_row_has(reallocate):
    """k = 36 of 41, but the second row sees only 32: for that row this is dense attention."""
    query, keys, values = inputs()
    visible = left_padded(2, 41)
    output, _ = sparq_decode(
        query, keys, values, rank=3, top_k=36, local_window=35,
        mean_value_reallocation=reallocate, visible=visible,
    )  # fmt: skip
    dense = numpy_dense(query, keys, values, visible=visible)
    torch.testing.assert_close(output[1], dense[1], rtol=1e-12, atol=1e-12)
    assert (output[0] - dense[0]).abs().max() > 1e-4


def test_padding_changes_nothing_and_is_never_read_into_the_result():
    query, keys, values = inputs()
    visible = left_padded(2, 41)
    parameters = {"rank": 4, "top_k": 10, "local_window": 3, "mean_value_reallocation": True}
    padded, _ = sparq_decode(query, keys, values, visible=visible, **parameters)
    alone, _ = sparq_decode(query[1:], keys[1:, :, 9:], values[1:, :, 9:], **parameters)
    torch.testing.assert_close(padded[1:], alone, rtol=1e-12, atol=1e-12)
    keys[1, :, :9], values[1, :, :9] = 1e6, -1e6
    poisoned, _ = sparq_decode(query, keys, values, visible=visible, **parameters)
    torch.testing.assert_close(poisoned, padded, rtol=0, atol=0)


def test_visible_may_have_holes_and_one_row_for_all():
    query, keys, values = inputs()
    visible = torch.arange(41)[None] % 3 != 1
    parameters = {"rank": 4, "top_k": 8, "local_window": 3}
    output, _ = sparq_decode(
        query, keys, values, **parameters, mean_value_reallocation=True, visible=visible
    )
    expected = numpy_sparq(
        query, keys, values, **parameters, reallocate=True, visible=visible.expand(2, -1)
    )
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", [10, 41])
@pytest.mark.parametrize("reallocate", [False, True])
def test_a_row_that_sees_nothing_gives_zero(top_k, reallocate):
    query, keys, values = inputs()
    visible = left_padded(2, 41, padding=(0, 41))
    output, _ = sparq_decode(
        query, keys, values, rank=4, top_k=top_k, local_window=3,
        mean_value_reallocation=reallocate, visible=visible,
    )  # fmt: skip
    assert output[1].abs().max() == 0
    assert output[0].abs().max() > 0


@pytest.mark.parametrize("heads", [1, 3], ids=["one head of the group", "whole group"])
def test_zero_queries_attend_evenly(heads):
    """‖q‖₁ = 0 must not divide by zero."""
    query, keys, values = inputs()
    query[:, :heads] = 0
    output, _ = sparq_decode(
        query, keys, values, rank=4, top_k=41 - 1, local_window=40, mean_value_reallocation=False
    )
    torch.testing.assert_close(output[:, 0, 0], values[:, 0, 1:].mean(dim=1))
    assert output.isfinite().all()


def test_visible_keys_come_before_padding_even_when_their_score_underflows():
    """One key takes all the approximate mass, while exactly all keys score 0."""
    query = torch.tensor([10.0, 9.0]).view(1, 1, 1, 2)
    keys, values = torch.zeros(1, 1, 20, 2), torch.zeros(1, 1, 20, 1)
    keys[..., 10, :] = torch.tensor([90.0, -100.0])
    values[..., 10, :] = 3.0
    output, _ = sparq_decode(
        query, keys, values, rank=1, top_k=3, local_window=1, mean_value_reallocation=False,
        visible=torch.arange(20)[None] >= 9, scaling=1.0,
    )  # fmt: skip
    torch.testing.assert_close(output, torch.ones(1, 1, 1, 1))  # a third of 3


@pytest.mark.parametrize("reallocate", [False, True])
@pytest.mark.parametrize("top_k", [12, 60, 3000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
    ids=str,
)
def test_dtypes(dtype, tolerance, top_k, reallocate):
    """One rounding of the output: everything before it is float32 (3000 spans several blocks)."""
    query, keys, values = inputs(length=3000 if top_k == 3000 else 60, dtype=dtype)
    parameters = {"rank": 5, "top_k": top_k, "local_window": 3}
    expected = numpy_sparq(query, keys, values, **parameters, reallocate=reallocate)
    for components in (None, component_major(keys)):
        output, _ = sparq_decode(
            query, keys, values, **parameters, mean_value_reallocation=reallocate,
            components=components,
        )  # fmt: skip
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def test_views_into_larger_buffers():
    query, keys, values = inputs()
    buffers = [torch.full((2, 2, 64, t.shape[-1]), math.nan).double() for t in (keys, values)]
    for buffer, tensor in zip(buffers, (keys, values), strict=True):
        buffer[:, :, :41] = tensor
    components = torch.full((2, 2, 16, 64), math.nan).double()
    components[..., :41] = keys.transpose(2, 3)
    parameters = {"rank": 4, "top_k": 10, "local_window": 3, "mean_value_reallocation": True}
    expected, _ = sparq_decode(query, keys, values, **parameters)
    output, _ = sparq_decode(
        query, buffers[0][:, :, :41], buffers[1][:, :, :41],
        components=FullComponents(components[..., :41]), **parameters,
    )  # fmt: skip
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_a_given_mean_is_used():
    query, keys, values = inputs()
    parameters = {"rank": 4, "top_k": 10, "local_window": 3, "mean_value_reallocation": True}
    expected, _ = sparq_decode(query, keys, values, **parameters)
    sums = BlockSums.of(values, None, None)
    given, _ = sparq_decode(query, keys, values, sums=sums, **parameters)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    zero, _ = sparq_decode(query, keys, values, sums=sums.map(torch.zeros_like), **parameters)
    assert (zero - expected).abs().max() > 1e-2


# B = 2, Hkv = 3, S = 100, D = 8, Dv = 4, float16 (2 bytes), r = 2, k = 10:
#   components 2*3*2*100*2 = 2400, keys 2*3*10*8*2 = 960, values 2*3*10*4*2 = 480,
#   all keys 2*3*100*8*2 = 9600, all values 2*3*100*4*2 = 4800, float32 mean 2*3*4*4 = 96.
BYTES = {
    "component-major": ({}, CacheReads(960, 480, 2400, 0, 14400)),
    "without the copy": ({"components": None}, CacheReads(960, 480, 9600, 0, 14400)),
    "rank all": ({"rank": 8}, CacheReads(960, 480, 9600, 0, 14400)),
    "mean kept": (
        {
            "mean_value_reallocation": True,
            "sums": BlockSums.empty(torch.zeros(2, 3, 9, 4), 1, None),
        },
        CacheReads(960, 480, 2400, 96, 14400),
    ),
    "mean computed": (
        {"mean_value_reallocation": True},
        CacheReads(960, 480, 2400, 4800, 14400),
    ),
    "k is S": ({"top_k": 100}, CacheReads(9600, 4800, 0, 0, 14400)),
    "k is S, mean": (
        {"top_k": 100, "mean_value_reallocation": True},
        CacheReads(9600, 4800, 0, 0, 14400),
    ),
}


@pytest.mark.parametrize(("change", "expected"), BYTES.values(), ids=BYTES.keys())
def test_bytes_are_those_of_the_gathered_tensors(change, expected):
    query = torch.randn(2, 6, 1, 8, dtype=torch.float16)
    keys = torch.randn(2, 3, 100, 8, dtype=torch.float16)
    values = torch.randn(2, 3, 100, 4, dtype=torch.float16)
    arguments = {
        "rank": 2, "top_k": 10, "local_window": 3, "mean_value_reallocation": False,
        "components": component_major(keys),
    }  # fmt: skip
    _, reads = sparq_decode(query, keys, values, **(arguments | change))
    assert reads == expected
    parts = dataclasses.asdict(expected)
    assert reads.total == sum(parts.values()) - parts["dense"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"top_k": 0, "local_window": 0}, "top_k must be at least 1"),
        ({"local_window": 11}, r"local_window must be 0 to top_k \(10\)"),
        ({"local_window": -1}, "local_window must be 0"),
        ({"query": torch.zeros(2, 6, 2, 16)}, "one query per sequence"),
        ({"query": torch.zeros(2, 5, 1, 16)}, "do not fit the query"),
        ({"query": torch.zeros(2, 6, 1, 8)}, "do not fit the query"),
        ({"values": torch.zeros(2, 2, 40, 24)}, "do not fit keys"),
        ({"components": FullComponents(torch.zeros(2, 2, 16, 40))}, "do not belong to keys"),
        ({"sinks": torch.zeros(6), "mean_value_reallocation": True}, "attention sinks"),
    ],
)
def test_wrong_calls_are_refused(change, message):
    query, keys, values = inputs(dtype=torch.float32)
    arguments = {
        "query": query, "keys": keys, "values": values, "rank": 4, "top_k": 10, "local_window": 3,
        "mean_value_reallocation": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sparq_decode(**(arguments | change))
