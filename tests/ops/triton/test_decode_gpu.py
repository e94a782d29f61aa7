"""What the decoding kernel promises on a GPU alone: nothing compiles as a cache grows, graphs."""

from __future__ import annotations

import pytest
import torch

from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.patterns import Pattern
from tests.ops.test_attention_property import within_budget

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SCALING = 128**-0.5


def decode(*inputs, **options):
    from hf_attn_plugin.ops.triton.decode import triton_decode

    return triton_decode(*inputs, **{"scaling": SCALING, **options})


def compiled_kernels() -> int:
    """Variants of the two kernels that this process has compiled or loaded."""
    from hf_attn_plugin.ops.triton.decode_kernels import merge_kernel, split_kernel

    kernels = (split_kernel, merge_kernel)
    return sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (20, 4), (128, 1), (14, 2)])
@pytest.mark.parametrize("terms", [{}, {"window": 1000, "num_sink_tokens": 4}, {"stride": 100}])
def test_long_caches(heads, terms) -> None:
    """Every group size, several queries, a length that fills no block, against float64."""
    torch.manual_seed(0)
    for q_len in (1, 7):
        query = normal(2, heads[0], q_len, 128)
        key, value = normal(2, heads[1], 20011, 128), normal(2, heads[1], 20011, 128)
        pattern = Pattern(q_len=q_len, kv_len=20011, **terms)
        got, lse = decode(query, key, value, pattern)
        for row in range(2):
            for kv_head in range(heads[1]):
                groups = heads[0] // heads[1]
                own = slice(kv_head * groups, (kv_head + 1) * groups)
                inputs = (
                    query[row, None, own],
                    key[row, None, kv_head, None],
                    value[row, None, kv_head, None],
                )
                want, want_lse = reference_attention(
                    *(tensor.double() for tensor in inputs), pattern, scaling=SCALING
                )
                plain, plain_lse = reference_attention(*inputs, pattern, scaling=SCALING)
                where = (heads, terms, q_len, row, kv_head)
                part = got[row, None, own]
                within_budget("output", part, want, plain, torch.bfloat16, where)
                part = lse[row, None, own]
                within_budget("lse", part, want_lse, plain_lse, torch.bfloat16, where)


def test_nothing_compiles_as_a_cache_grows() -> None:
    terms = ({}, {"window": 64, "num_sink_tokens": 4}, {"key_valid": True})

    def run(batch: int, kv_len: int, static: bool) -> None:
        buffer = normal(batch, 2, kv_len + 5, 64)
        key = buffer[:, :, :kv_len]
        for term in terms:
            if "key_valid" in term:
                term = {"key_valid": torch.ones(batch, kv_len, dtype=torch.bool, device="cuda")}
            pattern = Pattern(q_len=1, kv_len=kv_len, **term)
            if static:
                offset = torch.tensor(kv_len // 2, device="cuda")
                pattern = pattern.replace(q_offset=offset)
            decode(normal(batch, 8, 1, 64), key, key, pattern)

    for static in (False, True):
        run(1, 1000, static)
    before = compiled_kernels()
    for batch, kv_len in ((1, 1), (1, 16), (1, 1008), (2, 1023), (3, 4096), (1, 300_001)):
        for static in (False, True):
            run(batch, kv_len, static)
    assert compiled_kernels() == before
    decode(normal(1, 8, 1, 128), normal(1, 2, 9, 128), normal(1, 2, 9, 128), _plain(9))
    assert compiled_kernels() > before  # the control: another head_dim is another kernel


def _plain(kv_len: int) -> Pattern:
    return Pattern(q_len=1, kv_len=kv_len)


@pytest.mark.parametrize("padded", [False, True])
def test_in_a_cuda_graph(padded: bool) -> None:
    """A static cache: the offset moves on the device between replays, the launch stays."""
    query, key, value = normal(2, 8, 1, 128), normal(2, 2, 5000, 128), normal(2, 2, 5000, 128)
    offset = torch.tensor(10, device="cuda")
    terms: dict = {"window": 700, "num_sink_tokens": 4}
    if padded:  # first tokens under padding: a list of blocks, made on the device in every replay
        terms["num_global_tokens"] = 2
        terms["key_valid"] = torch.ones(2, 5000, dtype=torch.bool, device="cuda")
        terms["key_valid"][1, :100] = False
    pattern = Pattern(q_len=1, kv_len=5000, q_offset=offset, **terms)
    decode(query, key, value, pattern)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, lse = decode(query, key, value, pattern)
    for position in (10, 11, 0, 600, 3000, 4999):
        offset.fill_(position)
        query.normal_()
        graph.replay()
        now = pattern.replace(q_offset=position)
        exact = (tensor.double() for tensor in (query, key, value))
        want, want_lse = reference_attention(*exact, now, scaling=SCALING)
        plain, _ = reference_attention(query, key, value, now, scaling=SCALING)
        within_budget("output", got, want, plain, torch.bfloat16, position)
        assert torch.equal(lse.isneginf(), want_lse.isneginf())


def test_equal_bits() -> None:
    """Under one pattern, whose later calls launch what the first compiled, and under new ones."""
    query, key, value = normal(1, 32, 4, 128), normal(1, 8, 70001, 128), normal(1, 8, 70001, 128)
    pattern = Pattern(q_len=4, kv_len=70001)
    first = decode(query, key, value, pattern)
    for _ in range(20):
        for again in (pattern, pattern.replace()):
            got = decode(query, key, value, again)
            assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True))


def test_one_pattern_for_other_tensors() -> None:
    """Other values, other addresses (some no wide load may start at), sinks of other dtypes."""
    pattern = Pattern(q_len=1, kv_len=500, window=300)
    for start in (0, 8, 1, 3, 0):
        query = normal(1, 8, 1, 64)
        key, value = (
            normal(2 * 512 * 64)[start:].as_strided((1, 2, 500, 64), (65536, 32768, 64, 1))
            for _ in range(2)
        )
        for sinks in (None, normal(8), normal(8, dtype=torch.float32), normal(16)[1::2]):
            got, lse = decode(query, key, value, pattern, sinks=sinks)
            s = None if sinks is None else sinks.double()
            want, want_lse = reference_attention(
                query.double(), key.double(), value.double(), pattern, scaling=SCALING, sinks=s
            )
            assert (got - want).abs().max() < 2e-2
            assert (lse - want_lse).abs().max() < 1e-4


def test_offsets_beyond_32_bits() -> None:
    """Keys that lie more than 2³¹ elements behind the first, in one head and from head to head."""
    tokens = 2**31 // 128 + 3000
    store = torch.empty(2, tokens, 128, device="cuda", dtype=torch.float16)
    store[:, -2000:].normal_()
    key = store[None]
    query = normal(1, 4, 1, 128, dtype=torch.float16)
    pattern = Pattern(q_len=1, kv_len=tokens, window=1500)
    got, _ = decode(query, key, key, pattern)
    near = key[:, :, -1500:]
    want, _ = reference_attention(
        query.double(), near.double(), near.double(), _plain(1500), scaling=SCALING
    )
    assert (got - want).abs().max() < 2e-3


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_by_inductor(dynamic: bool | None) -> None:
    @torch.compile(fullgraph=True, dynamic=dynamic)
    def step(query, key, value, offset, valid):
        pattern = Pattern(
            q_len=1,
            kv_len=key.shape[2],
            q_offset=offset,
            key_valid=valid,
            window=200,
            num_sink_tokens=4,
        )
        return decode(query * 1.0, key, value, pattern)

    query, key, value = normal(2, 8, 1, 128), normal(2, 2, 3000, 128), normal(2, 2, 3000, 128)
    valid = torch.ones(2, 3000, dtype=torch.bool, device="cuda")
    valid[0, :500] = False
    for position in (700, 2999):
        offset = torch.tensor(position, device="cuda")
        got, lse = step(query, key, value, offset, valid)
        pattern = Pattern(
            q_len=1,
            kv_len=3000,
            q_offset=position,
            key_valid=valid,
            window=200,
            num_sink_tokens=4,
        )
        want, want_lse = decode(query, key, value, pattern)
        assert torch.equal(got, want)
        assert torch.equal(lse, want_lse)


def test_latent_attention() -> None:
    """DeepSeek's absorbed form: one KV head of 576, whose first 512 are the values."""
    query, latent = normal(2, 16, 1, 576), normal(2, 1, 3001, 576)
    value = latent[..., :512]
    pattern = _plain(3001)
    got, _ = decode(query, latent, value, pattern)
    exact = (tensor.double() for tensor in (query, latent, value))
    want, _ = reference_attention(*exact, pattern, scaling=SCALING)
    plain, _ = reference_attention(query, latent, value, pattern, scaling=SCALING)
    within_budget("output", got, want, plain, torch.bfloat16, "latent")
