"""Linear attention against its quadratic definition, its states, and its features."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_plugin.ops.linear import linear_attention, reference_linear_attention
from hf_attn_plugin.ops.linear_state import LinearState
from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.ops.torch.linear_features import EluFeatures, FavorFeatures, FeatureMap
from hf_attn_plugin.patterns import Pattern

MAPS: dict[str, FeatureMap] = {"elu": EluFeatures(), "favor": FavorFeatures(num_features=11)}
maps = pytest.mark.parametrize("feature_map", MAPS.values(), ids=MAPS)


def inputs(
    q_len: int, kv_len: int, heads: int = 4, kv_heads: int = 2, dtype: Any = torch.float64
) -> list[Tensor]:
    torch.manual_seed(q_len + 100 * kv_len)
    shapes = [(2, heads, q_len, 6), (2, kv_heads, kv_len, 6), (2, kv_heads, kv_len, 5)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def documents(borders: list[list[int]], length: int) -> Tensor:
    """The document of each token; a new one starts at each border."""
    numbers = torch.zeros(2, length, dtype=torch.int64)
    for row, starts in enumerate(borders):
        for start in starts:
            numbers[row, start:] += 1
    return numbers


def padding(left: int, right: int, length: int) -> Tensor:
    """The first row lacks tokens on the left, the second on the right."""
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, :left] = False
    valid[1, length - right :] = False
    return valid


def assert_equals_definition(
    tensors: list[Tensor], pattern: Pattern, feature_map: FeatureMap, chunk: int
) -> Tensor:
    output, _ = linear_attention(*tensors, pattern, feature_map=feature_map, chunk=chunk)
    expected = reference_linear_attention(*tensors, pattern, feature_map=feature_map)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    seed = torch.randn(output.shape, dtype=output.dtype)
    found = torch.autograd.grad(output, tensors, seed)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, tensors, seed), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)
    return output


@maps
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 37])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_chunked_equals_quadratic(
    feature_map: FeatureMap, length: int, kv_heads: int, causal: bool
) -> None:
    pattern = Pattern(q_len=length, kv_len=length, causal=causal)
    tensors = inputs(length, length, kv_heads=kv_heads)
    assert_equals_definition(tensors, pattern, feature_map, chunk=8)


@maps
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_len, kv_len", [(5, 23), (1, 17), (23, 5), (8, 16)])
def test_queries_and_keys_of_other_number(
    feature_map: FeatureMap, causal: bool, q_len: int, kv_len: int
) -> None:
    """Cross-attention; and queries at the last keys, some of them before any key."""
    pattern = Pattern(q_len=q_len, kv_len=kv_len, causal=causal)
    output = assert_equals_definition(inputs(q_len, kv_len), pattern, feature_map, chunk=8)
    if causal and q_len > kv_len:
        assert (output[:, :, : q_len - kv_len] == 0).all()


@maps
@pytest.mark.parametrize("q_offset, kv_offset", [(3, 0), (0, 0), (20, 0), (9, 7), (4, 9)])
def test_offsets(feature_map: FeatureMap, q_offset: int, kv_offset: int) -> None:
    """A static cache's keys beyond the queries; keys that start later or end earlier."""
    pattern = Pattern(q_len=6, kv_len=13, q_offset=q_offset, kv_offset=kv_offset)
    assert_equals_definition(inputs(6, 13), pattern, feature_map, chunk=4)


@maps
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "borders",
    [[[8], [16]], [[7, 9], [15]], [[1, 2, 3], [28]], [[5, 6, 20], []], [[8, 16, 24], [4, 12]]],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_documents_at_and_off_chunk_borders(
    feature_map: FeatureMap, causal: bool, borders: list[list[int]], padded: bool
) -> None:
    numbers = documents(borders, 29)
    pattern = Pattern(
        q_len=29,
        kv_len=29,
        causal=causal,
        q_documents=numbers,
        kv_documents=numbers,
        key_valid=padding(3, 4, 29) if padded else None,
    )
    tensors = inputs(29, 29)
    output = assert_equals_definition(tensors, pattern, feature_map, chunk=8)
    mixed, _ = linear_attention(
        *tensors, Pattern(q_len=29, kv_len=29, causal=causal), feature_map=feature_map
    )
    assert (output - mixed).abs().max() > 1e-2  # the control: documents matter


@maps
@pytest.mark.parametrize("causal", [True, False])
def test_padding_contributes_nothing(feature_map: FeatureMap, causal: bool) -> None:
    valid = padding(9, 5, 19)
    pattern = Pattern(q_len=19, kv_len=19, causal=causal, key_valid=valid)
    tensors = inputs(19, 19)
    output = assert_equals_definition(tensors, pattern, feature_map, chunk=8)
    if causal:
        assert (output[0, :, :9] == 0).all(), "queries that see nothing return 0"
    alone, _ = linear_attention(
        *(t[:1, :, 9:] for t in tensors),
        Pattern(q_len=10, kv_len=10, causal=causal),
        feature_map=feature_map,
    )
    torch.testing.assert_close(output[:1, :, 9:], alone)


@maps
def test_a_row_of_padding_alone_has_no_gradient(feature_map: FeatureMap) -> None:
    tensors = inputs(9, 9)
    valid = torch.tensor([[False] * 9, [True] * 9])
    pattern = Pattern(q_len=9, kv_len=9, key_valid=valid)
    output, state = linear_attention(*tensors, pattern, feature_map=feature_map, chunk=4)
    output.sum().backward()
    assert (output[0] == 0).all()
    assert all((t.grad[0] == 0).all() and t.grad.isfinite().all() for t in tensors)
    assert state is not None
    assert (state.sums[0] == 0).all() and state.log_scale[0].isneginf().all()


@maps
def test_gradcheck(feature_map: FeatureMap) -> None:
    tensors = inputs(7, 7)
    numbers = documents([[2, 5], [4]], 7)
    pattern = Pattern(
        q_len=7, kv_len=7, q_documents=numbers, kv_documents=numbers, key_valid=padding(1, 2, 7)
    )

    def output(*tensors: Tensor) -> Tensor:
        return linear_attention(*tensors, pattern, feature_map=feature_map, chunk=3)[0]

    assert torch.autograd.gradcheck(output, tensors, fast_mode=True)


# -- states ------------------------------------------------------------------------------------


def in_pieces(
    tensors: list[Tensor], lengths: list[int], feature_map: FeatureMap, valid: Tensor | None = None
) -> Tensor:
    """One call after another, each from the state of the one before."""
    state, parts, start = None, [], 0
    for length in lengths:
        rows = slice(start, start + length)
        part, state = linear_attention(
            *(t[:, :, rows] for t in tensors),
            Pattern(
                q_len=length, kv_len=length, key_valid=None if valid is None else valid[:, rows]
            ),
            feature_map=feature_map,
            state=state,
            chunk=4,
        )
        parts.append(part)
        start += length
    return torch.cat(parts, 2)


@maps
@pytest.mark.parametrize("lengths", [[1] * 13, [13], [5, 1, 7], [4, 4, 5]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_states_carry_on_with_their_gradient(
    feature_map: FeatureMap, lengths: list[int], padded: bool
) -> None:
    tensors = inputs(13, 13)
    valid = padding(3, 2, 13) if padded else None
    output = in_pieces(tensors, lengths, feature_map, valid)
    pattern = Pattern(q_len=13, kv_len=13, key_valid=valid)
    expected = reference_linear_attention(*tensors, pattern, feature_map=feature_map)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    seed = torch.randn(output.shape, dtype=output.dtype)
    found = torch.autograd.grad(output, tensors, seed)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, tensors, seed), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)


@maps
def test_the_state_after_documents_is_that_of_the_last(feature_map: FeatureMap) -> None:
    tensors = inputs(12, 12)
    numbers = documents([[7], [2, 9]], 12)
    pattern = Pattern(q_len=12, kv_len=12, q_documents=numbers, kv_documents=numbers)
    _, state = linear_attention(*tensors, pattern, feature_map=feature_map, chunk=5)
    assert state is not None
    for row, start in ((0, 7), (1, 9)):
        part = [t[row : row + 1, :, start:] for t in tensors]
        _, alone = linear_attention(
            *part, Pattern(q_len=12 - start, kv_len=12 - start), feature_map=feature_map
        )
        assert alone is not None
        ours, theirs = (
            s.sums[i] * s.log_scale[i].exp()[:, None, None] for s, i in ((state, row), (alone, 0))
        )
        torch.testing.assert_close(ours, theirs)


@maps
def test_the_size_of_a_state_is_that_of_one_token(feature_map: FeatureMap) -> None:
    sizes = set()
    for length in (1, 40):
        tensors = inputs(length, length)
        _, state = linear_attention(
            *tensors, Pattern(q_len=length, kv_len=length), feature_map=feature_map
        )
        assert state is not None
        sizes.add(state.nbytes)
    assert len(sizes) == 1


@maps
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
def test_extreme_inputs_in_float32(feature_map: FeatureMap, scale: float) -> None:
    """Keys of very different lengths, and queries against theirs: nothing over- or underflows.

    Features of such tokens differ by more than float32 spans, so any scale that were shared between
    tokens (a maximum over the keys of a chunk, an epsilon) would show here.
    """
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 50, 16) * s for s in (scale, scale, 1.0))
    key[:, :, :20] *= 3
    key[:, :, 30] = 0.01
    query[:, :, :5] = -key[:, :, :5]
    pattern = Pattern(q_len=50, kv_len=50)
    exact = reference_linear_attention(
        query.double(), key.double(), value.double(), pattern, feature_map=feature_map
    )
    plain = reference_linear_attention(query, key, value, pattern, feature_map=feature_map)
    budget = 2 * (plain - exact).norm() + 8 * torch.finfo(torch.float32).eps * exact.norm()
    whole, _ = linear_attention(query, key, value, pattern, feature_map=feature_map, chunk=16)
    recurrent = in_pieces([query, key, value], [1] * 50, feature_map)
    assert (whole - exact).norm() <= budget
    assert (recurrent - exact).norm() <= budget


@maps
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(feature_map: FeatureMap, dtype: Any) -> None:
    tensors = inputs(40, 40, dtype=dtype)
    pattern = Pattern(q_len=40, kv_len=40)
    output, state = linear_attention(*tensors, pattern, feature_map=feature_map, chunk=16)
    assert state is not None
    assert output.dtype == dtype and state.sums.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = reference_linear_attention(*wide, pattern, feature_map=feature_map)
    torch.testing.assert_close(output.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    seed = torch.randn_like(exact).to(dtype)
    found = torch.autograd.grad(output, tensors, seed)
    wanted = torch.autograd.grad(exact, wide, seed.double())
    for gradient, truth in zip(found, wanted, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - truth).norm() < torch.finfo(dtype).eps * truth.norm()


def test_autocast_does_not_round_the_sums() -> None:
    tensors = inputs(300, 300, dtype=torch.float32)
    pattern = Pattern(q_len=300, kv_len=300)
    plain, _ = linear_attention(*tensors, pattern, feature_map="elu")
    grads = torch.autograd.grad(plain.sum(), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = linear_attention(*tensors, pattern, feature_map="elu")
        found = torch.autograd.grad(output.sum(), tensors)
    assert torch.equal(output, plain)
    assert all(map(torch.equal, grads, found))


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """What the backward pass keeps beside inputs and output: a state for every few chunks."""
    kept: dict[int, int] = {}
    for length in (512, 1024):
        tensors = inputs(length, length, dtype=torch.float32)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            linear_attention(*tensors, Pattern(q_len=length, kv_len=length), chunk=64)
        kept[length] = sum(sizes)
    assert kept[1024] < 2.1 * kept[512]
    assert kept[1024] < 1024 * 1024


# -- features ----------------------------------------------------------------------------------


def projection(feature_map: FavorFeatures, head_dim: int = 16) -> Tensor:
    return feature_map.projection(head_dim, torch.device("cpu"), torch.float64)


def test_favor_comes_closer_to_softmax_with_more_features() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 64, 16, dtype=torch.float64) for _ in range(3))
    query, key = query / 2, key / 2  # the variance grows with exp of the squared lengths
    for scaling in (0.25, 0.1):
        for pattern in (
            Pattern(q_len=64, kv_len=64),
            Pattern(q_len=64, kv_len=64, causal=False),
        ):
            softmax, _ = reference_attention(query, key, value, pattern, scaling=scaling)
            errors = []
            for number in (16, 128, 1024, 8192):
                output, _ = linear_attention(
                    query, key, value, pattern, feature_map=FavorFeatures(number), scaling=scaling
                )
                errors.append(float((output - softmax).norm() / softmax.norm()))
            assert errors == sorted(errors, reverse=True)
            # Monte Carlo: 64 times the features, about an eighth of the error.
            assert errors[-1] < errors[1] / 4 < 0.1
    unscaled, _ = linear_attention(
        query, key, value, pattern, feature_map=FavorFeatures(8192), scaling=0.5
    )
    gap = float((unscaled - softmax).norm() / softmax.norm())
    assert gap > 4 * errors[-1], "the scaling is part of the kernel"


def test_random_features_are_orthogonal_and_as_long_as_gaussian_vectors() -> None:
    weights = projection(FavorFeatures(num_features=640))
    first = weights[:16]
    products = first @ first.t()
    torch.testing.assert_close(products, products.diagonal().diag())
    assert abs(float(weights.square().sum(1).mean()) - 16) < 1
    # All directions alike: no component is preferred, and signs are even.
    assert float((weights.square().mean(0) - 1).abs().max()) < 0.3
    assert float(weights.mean(0).abs().max()) < 0.2


def test_every_field_draws_other_features() -> None:
    drawn = [
        projection(FavorFeatures(32, seed=seed, redraw=redraw, layer=layer))
        for seed, redraw, layer in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 10))
    ]
    for i, one in enumerate(drawn):
        assert all((one - other).abs().max() > 0.5 for other in drawn[:i])
    assert torch.equal(drawn[0], projection(FavorFeatures(32)))


def test_features_are_the_same_in_another_process() -> None:
    code = (
        "import torch; from hf_attn_plugin.ops.torch.linear_features import FavorFeatures;"
        "torch.manual_seed(5); torch.rand(3);"
        "w = FavorFeatures(40, 7, 2, 3).projection(16, torch.device('cpu'), torch.float64);"
        "print(repr(w.sum().item()), repr(w[33, 5].item()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    state = torch.random.get_rng_state()
    weights = projection(FavorFeatures(40, 7, 2, 3))
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are kept"
    expected = [float(word) for word in done.stdout.split()]
    assert expected == pytest.approx([weights.sum().item(), weights[33, 5].item()], abs=1e-12)


def test_features_drawn_in_inference_mode_can_be_trained_with() -> None:
    feature_map = FavorFeatures(num_features=13, seed=99)
    tensors = inputs(5, 5)
    with torch.inference_mode():
        linear_attention(*tensors, Pattern(q_len=5, kv_len=5), feature_map=feature_map)
    output, _ = linear_attention(*tensors, Pattern(q_len=5, kv_len=5), feature_map=feature_map)
    output.sum().backward()


def test_elu_is_the_formula() -> None:
    query, key, value = (t.detach() for t in inputs(9, 9, kv_heads=4))
    phi_q, phi_k = (torch.nn.functional.elu(t) + 1 for t in (query, key))
    weights = (phi_q @ phi_k.transpose(-1, -2)).tril()
    expected = weights @ value / weights.sum(-1, keepdim=True)
    output, _ = linear_attention(query, key, value, Pattern(q_len=9, kv_len=9))
    torch.testing.assert_close(output, expected)


def test_the_number_of_features() -> None:
    assert EluFeatures().width(24) == 24
    assert FavorFeatures().width(64) == round(64 * math.log(64))
    assert FavorFeatures().width(2) == 2
    assert FavorFeatures(5).width(64) == 5


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"window": 3}, "a window"),
        ({"band": 3}, "a window"),
        ({"num_sink_tokens": 1, "window": 2}, "a window"),
        ({"dense": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, "a dense mask"),
        (
            {
                "q_positions": torch.arange(4)[None],
                "kv_positions": torch.arange(4)[None],
            },
            "positions of its own",
        ),
        (
            {
                "q_documents": torch.tensor([[0, 1, 0, 0]]),
                "kv_documents": torch.tensor([[0, 1, 0, 0]]),
            },
            "ascending",
        ),
        ({"key_valid": torch.ones(3, 4, dtype=torch.bool)}, "batch of 3"),
    ],
)
def test_patterns_that_sums_cannot_honour(pattern: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(*inputs(4, 4), Pattern(q_len=4, kv_len=4, **pattern))


def test_misuse_is_named() -> None:
    query, key, value = inputs(4, 4)
    pattern = Pattern(q_len=4, kv_len=4)
    with pytest.raises(ValueError, match="'elu' or 'favor'; got 'relu'"):
        linear_attention(query, key, value, pattern, feature_map="relu")
    with pytest.raises(ValueError, match="scaling > 0"):
        linear_attention(query, key, value, pattern, feature_map="favor", scaling=-1.0)
    with pytest.raises(ValueError, match="one head_dim"):
        linear_attention(query, key[..., :4], value, pattern)
    with pytest.raises(ValueError, match="share a float dtype"):
        linear_attention(query.float(), key, value, pattern)
    with pytest.raises(ValueError, match="batch, KV heads and keys"):
        linear_attention(query, key, value[:, :, 1:], pattern)
    with pytest.raises(ValueError, match="4 queries and 4"):
        linear_attention(query[:, :, 1:], key, value, pattern)
    with pytest.raises(ValueError, match="at least 1 token"):
        linear_attention(query, key, value, pattern, chunk=0)
    with pytest.raises(ValueError, match=r"\[batch, heads, tokens, dim\]"):
        linear_attention(query[0], key, value, pattern)
    _, state = linear_attention(query, key, value, pattern)
    with pytest.raises(ValueError, match="start a new cache"):
        linear_attention(query, key, value, pattern, feature_map="favor", state=state)
    assert isinstance(state, LinearState)
    with pytest.raises(ValueError, match="the call needs"):
        linear_attention(query, key, value[..., :2], pattern, state=state)
