"""What linear attention's kernels promise on a GPU alone."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_plugin.ops.attention import SlowAttentionWarning
from hf_attn_plugin.ops.linear import linear_attention
from hf_attn_plugin.ops.linear_backend import LinearBackend
from hf_attn_plugin.ops.torch.linear_features import EluFeatures, FavorFeatures, FeatureMap
from hf_attn_plugin.patterns import Pattern
from tests.ops.triton.test_linear import assert_as_good_as_plain, with_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The definition in float64 takes some GiB for 256 features; the kernels' chunks are 128 tokens.
LENGTH = 300


def inputs(
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (64, 64),
    batch: int = 1,
    requires_grad: bool = True,
) -> list[Tensor]:
    shapes = [
        (batch, length, heads[0], dims[0]),
        (batch, length, heads[1], dims[0]),
        (batch, length, heads[1], dims[1]),
    ]
    return [
        torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_(requires_grad)
        for shape in shapes
    ]


def masks(length: int) -> dict[str, Tensor]:
    """Padding left and right, and documents; two rows of 300 tokens or more."""
    valid = torch.ones(2, length, dtype=torch.bool, device="cuda")
    valid[0, : length // 5] = False
    valid[1, -length // 7 :] = False
    numbers = torch.zeros(2, length, dtype=torch.int64, device="cuda")
    for row, starts in enumerate([[3, 64, 200, 290], [128, 129, 260]]):
        for start in starts:
            numbers[row, start:] += 1
    return {"key_valid": valid, "q_documents": numbers, "kv_documents": numbers}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (80, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("kind", ["causal", "masks", "bidirectional"])
def test_elu_in_every_width(dtype: torch.dtype, dims: tuple[int, int], kind: str) -> None:
    torch.manual_seed(sum(dims))
    more: dict[str, Any] = masks(LENGTH) if kind == "masks" else {"causal": kind == "causal"}
    pattern = Pattern(q_len=LENGTH, kv_len=LENGTH, **more)
    tensors = inputs(LENGTH, dtype, dims=dims, batch=2)
    found = with_gradients(linear_attention(*tensors, pattern)[0], tensors)
    assert_as_good_as_plain(found, tensors, pattern, EluFeatures())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, number", [(64, None), (128, 48), (128, 700), (256, 256)])
def test_favor_in_every_width(dtype: torch.dtype, dim: int, number: int | None) -> None:
    torch.manual_seed(dim)
    pattern = Pattern(q_len=LENGTH, kv_len=LENGTH, **masks(LENGTH))
    tensors = inputs(LENGTH, dtype, dims=(dim, 64), batch=2)
    feature_map: FeatureMap = FavorFeatures(number)
    output, _ = linear_attention(*tensors, pattern, feature_map=feature_map)
    assert_as_good_as_plain(with_gradients(output, tensors), tensors, pattern, feature_map)


@pytest.mark.parametrize("feature_map", [EluFeatures(), FavorFeatures(100)], ids=str)
def test_backward_is_deterministic(feature_map: FeatureMap) -> None:
    tensors = inputs(5000, heads=(8, 2))
    pattern = Pattern(q_len=5000, kv_len=5000)
    results = [
        with_gradients(linear_attention(*tensors, pattern, feature_map=feature_map)[0], tensors)
        for _ in range(3)
    ]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def compiled_kernels() -> int:
    """Variants of the kernels that this process has compiled or loaded."""
    from hf_attn_plugin.ops.triton import linear_backward_kernels as backward
    from hf_attn_plugin.ops.triton import linear_features as features
    from hf_attn_plugin.ops.triton import linear_kernels as forward

    kernels = (
        features.elu_features,
        *(getattr(forward, name) for name in ("chunk_states", "scan_states", "read_states")),
        backward.output_deltas,
        backward.query_gradients,
        backward.key_gradients,
        backward.value_gradients,
    )
    return sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())


def test_a_new_length_or_layout_of_documents_compiles_nothing() -> None:
    def run(length: int, **offsets: int) -> None:
        numbers = torch.arange(length, device="cuda")[None] // (length // 3 + 1)
        pattern = Pattern(
            q_len=length, kv_len=length, q_documents=numbers, kv_documents=numbers, **offsets
        )
        tensors = inputs(length, dims=(128, 128))
        output, state = linear_attention(*tensors, pattern)
        assert state is not None
        (output.float().sum() + state.sums.sum()).backward()

    run(300)
    before = compiled_kernels()
    assert before >= 8
    for length in (301, 512, 1024, 4097):
        run(length)
    run(300, q_offset=7)
    assert compiled_kernels() == before


def test_triton_is_the_default_and_says_nothing() -> None:
    tensors = inputs(300)
    pattern = Pattern(q_len=300, kv_len=300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, _ = linear_attention(*tensors, pattern)
    named, _ = linear_attention(*tensors, pattern, backend=LinearBackend.TRITON)
    other, _ = linear_attention(*tensors, pattern, backend=LinearBackend.TORCH)
    assert torch.equal(output, named) and not torch.equal(output, other)
    wide = inputs(30, dims=(320, 32))
    with pytest.warns(SlowAttentionWarning, match="head_dim up to 256"):
        linear_attention(*wide, Pattern(q_len=30, kv_len=30))


def test_memory_grows_with_the_length() -> None:
    extra = []
    for length in (16384, 32768):
        tensors = inputs(length, heads=(8, 2), dims=(128, 128))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output, _ = linear_attention(*tensors, Pattern(q_len=length, kv_len=length))
        torch.autograd.grad(output, tensors, output)
        extra.append(torch.cuda.max_memory_allocated() - before)
    assert extra[1] < 2.1 * extra[0]
    assert extra[1] < 32768**2  # one byte for each pair of one head


def test_torch_compile_traces_through() -> None:
    def layer(*tensors: Tensor) -> Tensor:
        length = tensors[0].shape[2]
        return linear_attention(*tensors, Pattern(q_len=length, kv_len=length))[0]

    tensors = inputs(300)
    found = with_gradients(torch.compile(layer, fullgraph=True)(*tensors), tensors)
    assert all(map(torch.equal, found, with_gradients(layer(*tensors), tensors)))


def test_offsets_beyond_32_bits() -> None:
    """The last tokens of a sequence whose tensors have more than 2**31 elements."""
    length, heads, dim = (1 << 22) + 77, 16, 32
    torch.manual_seed(0)
    tensors = inputs(length, heads=(heads, heads), dims=(dim, dim), requires_grad=False)
    assert tensors[0].numel() > 1 << 31
    output, _ = linear_attention(*tensors, Pattern(q_len=length, kv_len=length))
    query, key, value = (t[0, -1] for t in tensors)  # the last head
    sums = torch.zeros(dim, dim + 1, dtype=torch.float64, device="cuda")
    for start in range(0, length, 1 << 18):
        phi, v = (t[start : start + (1 << 18)].double() for t in (key, value))
        sums += (torch.nn.functional.elu(phi) + 1).t() @ torch.cat(
            [v, torch.ones_like(v[:, :1])], 1
        )
    read = (torch.nn.functional.elu(query[-1].double()) + 1) @ sums
    exact = read[:-1] / read[-1]
    # Each of 4 million values counts for little: bfloat16 sums would be off by more than they are.
    assert (output[0, -1, -1].double() - exact).norm() < 0.05 * exact.norm()
