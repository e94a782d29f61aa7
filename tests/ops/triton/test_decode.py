"""The decoding kernel against attention written out pair by pair.

On a GPU as it is; without one through Triton's interpreter, which must be chosen before Triton is
imported: `test_through_the_interpreter` runs this file again, in a process of its own.
"""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_attn_plugin.ops.call import Call
from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.ops.triton.decode_plan import Tile, choose_splits, choose_tile, make_plan
from hf_attn_plugin.ops.triton.support_decode import decode_refuses
from hf_attn_plugin.patterns import Pattern
from tests.ops.test_attention_property import random_spec, random_strides, to_pattern, within_budget
from tests.oracle import oracle_attention, oracle_mask

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_kernel = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="run by test_through_the_interpreter"
)
# Head and value dims, dtype: one compiled family of kernels each.
KINDS = [
    (16, 16, torch.float32),
    (128, 128, torch.float16),
    (80, 80, torch.float32),
    (12, 6, torch.float16),
]
if CUDA:  # the interpreter's bfloat16 products are wrong
    KINDS += [(128, 128, torch.bfloat16), (64, 64, torch.bfloat16), (192, 128, torch.bfloat16)]
    KINDS += [(256, 256, torch.bfloat16), (256, 256, torch.float32), (576, 512, torch.bfloat16)]
CASES = 100 if CUDA else 7


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests below run here")
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def decode(*inputs, **options):
    from hf_attn_plugin.ops.triton.decode import triton_decode

    return triton_decode(*inputs, **options)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def assert_right(query, key, value, pattern: Pattern, **options) -> tuple[torch.Tensor, ...]:
    """Within the budget of the reference; returns what the kernel computed."""
    options = {"scaling": query.shape[-1] ** -0.5, **options}
    got, lse = decode(query, key, value, pattern, **options)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    inputs = (query, key, value)
    want, want_lse = reference_attention(*(t.double() for t in inputs), pattern, **exact)
    plain, plain_lse = reference_attention(*inputs, pattern, **options)
    assert got.shape == want.shape
    assert lse.dtype == torch.float32
    within_budget("output", got, want, plain, query.dtype, pattern)
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    within_budget("log-sum-exp", lse, want_lse, plain_lse, query.dtype, pattern)
    return got, lse


@in_kernel
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_random_calls(kind: int) -> None:
    head_dim, value_dim, dtype = KINDS[kind]
    rng = random.Random(kind)
    torch.manual_seed(kind)
    for case in range(CASES):
        batch = rng.choice([1, 2])
        kv_len = rng.choice([1, 15, 64, 65, 129, 200 if INTERPRETED else 1000])
        q_len = min(kv_len, rng.choice([1, 1, 2, 5, 16]))
        spec = random_spec(rng, batch, q_len, kv_len)
        kv_heads, groups = rng.choice([(1, 1), (2, 1), (1, 3), (2, 4), (1, 20)])
        softcap = rng.choice([None, None, 2.5])
        query = random_strides(rng, (batch, kv_heads * groups, q_len, head_dim), dtype)
        key = random_strides(rng, (batch, kv_heads, kv_len, head_dim), dtype)
        value = random_strides(rng, (batch, kv_heads, kv_len, value_dim), dtype)
        sinks = normal(kv_heads * groups, dtype=dtype) if rng.random() < 0.25 else None
        pattern = to_pattern(spec, q_len, kv_len).to(DEVICE)
        if "q_offset" in spec and rng.random() < 0.5:
            pattern = pattern.replace(q_offset=torch.tensor(spec["q_offset"], device=DEVICE))
        mask = oracle_mask(batch, q_len, kv_len, spec).to(DEVICE)
        scaling = head_dim**-0.5
        got, lse = decode(query, key, value, pattern, scaling=scaling, softcap=softcap, sinks=sinks)

        def oracle(as_dtype, inputs=(query, key, value), sinks=sinks, mask=mask, softcap=softcap):
            q, k, v = (tensor.to(as_dtype) for tensor in inputs)
            s = None if sinks is None else sinks.to(as_dtype)
            return oracle_attention(q, k, v, mask, q.shape[-1] ** -0.5, softcap, s)

        want, want_lse = oracle(torch.float64)
        plain, plain_lse = oracle(dtype)
        context = (case, batch, kv_heads, groups, q_len, kv_len, softcap, sinks is not None, spec)
        assert not got.isnan().any(), context
        within_budget("output", got, want, plain, dtype, context)
        assert torch.equal(lse.isneginf(), want_lse.isneginf()), context
        within_budget("log-sum-exp", lse, want_lse, plain_lse, dtype, context)


@in_kernel
@pytest.mark.parametrize("padded", [False, True])
def test_offset_of_each_row(padded: bool) -> None:
    """Batch rows of a static cache that have come to different lengths."""
    query, key, value = normal(3, 4, 2, 16), normal(3, 2, 200, 16), normal(3, 2, 200, 16)
    offsets = torch.tensor([0, 70, 198], device=DEVICE)
    index = torch.arange(200, device=DEVICE)[None]
    terms = {"window": 50, "num_sink_tokens": 0 if padded else 3}
    if padded:
        terms["key_valid"] = (index >= torch.tensor([[0], [30], [5]], device=DEVICE)).contiguous()
    pattern = Pattern(q_len=2, kv_len=200, q_offset=offsets, **terms)
    got, lse = decode(query, key, value, pattern, scaling=0.25)
    for row, offset in enumerate(offsets.tolist()):
        own = {k: v[row, None] if isinstance(v, torch.Tensor) else v for k, v in terms.items()}
        alone = Pattern(q_len=2, kv_len=200, q_offset=offset, **own)
        one = (tensor[row, None] for tensor in (query, key, value))
        want, want_lse = reference_attention(*one, alone, scaling=0.25)
        assert (got[row] - want[0]).abs().max() < 1e-5
        assert torch.equal(lse[row].isneginf(), want_lse[0].isneginf())


@in_kernel
def test_numbered_apart_and_dense() -> None:
    """Paged caches number queries and keys apart; a mask of the caller's own, per head."""
    torch.manual_seed(0)
    query, key, value = normal(1, 4, 3, 16), normal(1, 2, 90, 16), normal(1, 2, 90, 16)
    documents = torch.arange(90, device=DEVICE)[None] // 30
    paged = Pattern(
        q_len=3,
        kv_len=90,
        q_documents=torch.arange(3, device=DEVICE)[None],
        kv_documents=documents,
        q_positions=torch.tensor([[12, 29, 5]], device=DEVICE),
        kv_positions=torch.arange(90, device=DEVICE)[None] % 30,
        window=10,
        num_sink_tokens=2,
    )
    assert_right(query, key, value, paged, sinks=normal(4))
    for shape in ((1, 1, 3, 90), (1, 4, 3, 90)):
        dense = torch.rand(shape, device=DEVICE) < 0.3
        assert_right(query, key, value, Pattern(q_len=3, kv_len=90, causal=False, dense=dense))
        assert_right(query, key, value, Pattern(q_len=3, kv_len=90, window=40, dense=dense))


@in_kernel
def test_strides_of_caches() -> None:
    """Views of larger buffers, any order of dimensions, rows that no vector load can start at."""
    query = normal(2, 4, 1, 16)
    buffer = normal(2, 2, 150, 16)
    fused = normal(2, 99, 2, 35)
    pattern = Pattern(q_len=1, kv_len=99)
    layouts = {
        "part of a static buffer": buffer[:, :, 20:119],
        "tokens before heads": normal(2, 99, 2, 16).transpose(1, 2),
        "dimensions before tokens": normal(2, 2, 16, 99).transpose(2, 3),
        "odd rows": fused[..., 3:19].transpose(1, 2),
        "one head for the whole batch": normal(1, 2, 99, 16).expand(2, -1, -1, -1),
    }
    for key in layouts.values():
        for value in layouts.values():
            assert_right(query, key, value, pattern)
    assert_right(
        query.transpose(2, 3).contiguous().transpose(2, 3), buffer[:, :, :99], key, pattern
    )


@in_kernel
@pytest.mark.parametrize(
    ("terms", "visited"),
    [
        ({}, [(0, 301)]),  # the slots of a static cache behind the query
        ({"window": 20, "num_sink_tokens": 4}, [(0, 4), (281, 301)]),
        ({"band": 33}, [(268, 301)]),
        ({"window": 20, "num_global_tokens": 2, "band": 290}, [(11, 11), (281, 301)]),
        ({"causal": False, "window": 5}, [(296, 305)]),
    ],
)
@pytest.mark.parametrize("on_device", [False, True])
def test_only_visible_keys_are_read(terms, visited, on_device: bool) -> None:
    """What lies outside may hold anything, NaN here."""
    torch.manual_seed(1)
    query, key, value = normal(1, 2, 1, 16), normal(1, 1, 400, 16), normal(1, 1, 400, 16)
    offset = torch.tensor([300], device=DEVICE) if on_device else 300
    pattern = Pattern(q_len=1, kv_len=400, q_offset=offset, **terms)
    want, want_lse = reference_attention(query, key, value, pattern, scaling=0.25)
    seen = torch.zeros(400, dtype=torch.bool, device=DEVICE)
    for start, stop in visited:
        seen[start:stop] = True
    hidden = ~seen[:, None]
    poisoned = [tensor.masked_fill(hidden, float("nan")) for tensor in (key, value)]
    got, lse = decode(query, *poisoned, pattern, scaling=0.25)
    assert (got - want).abs().max() < 1e-5
    assert (lse - want_lse).abs().max() < 1e-5
    poisoned[1][:, :, visited[-1][1] - 1] = float("nan")  # the control: this one is read
    assert decode(query, *poisoned, pattern, scaling=0.25)[0].isnan().all()


@in_kernel
@pytest.mark.parametrize("window", [None, 30])
def test_left_padding_is_not_read(window: int | None) -> None:
    torch.manual_seed(2)
    query, key, value = normal(2, 2, 2, 16), normal(2, 1, 200, 16), normal(2, 1, 200, 16)
    index = torch.arange(200, device=DEVICE)[None]
    valid = index >= torch.tensor([[130], [185]], device=DEVICE)
    pattern = Pattern(q_len=2, kv_len=200, key_valid=valid, window=window)
    want, _ = reference_attention(query, key, value, pattern, scaling=0.25)
    poisoned = [t.masked_fill(~valid[:, None, :, None], float("nan")) for t in (key, value)]
    got, _ = decode(query, *poisoned, pattern, scaling=0.25)
    assert (got - want).abs().max() < 1e-5
    poisoned[1][1, :, 185] = float("nan")  # the control: this one is read
    assert decode(query, *poisoned, pattern, scaling=0.25)[0][1].isnan().any()


@in_kernel
def test_blocks_without_pairs_are_not_read() -> None:
    """Packed documents with first tokens, in two batch rows: lists of blocks."""
    block = choose_tile(2, 16, 16, 4).keys
    length = 5 * block + 7
    query, key, value = normal(2, 2, 1, 16), normal(2, 1, length, 16), normal(2, 1, length, 16)
    documents = torch.zeros(2, length, dtype=torch.int64, device=DEVICE)
    documents[0, 2 * block + 3 :] = 1
    documents[1, 4 * block + 1 :] = 1
    pattern = Pattern(
        q_len=1,
        kv_len=length,
        window=4,
        num_sink_tokens=2,
        q_documents=torch.ones(2, 1, dtype=torch.int64, device=DEVICE),
        kv_documents=documents,
    )
    want, _ = reference_attention(query, key, value, pattern, scaling=0.25)
    for tensor in (key, value):
        tensor[0, :, : 2 * block] = float("nan")
        tensor[0, :, 3 * block : 5 * block] = float("nan")
        tensor[1, :, : 4 * block] = float("nan")
    got, _ = decode(query, key, value, pattern, scaling=0.25)
    assert (got - want).abs().max() < 1e-5


@in_kernel
@pytest.mark.parametrize(
    "terms",
    [dict(stride=4), dict(window=3), dict(window=3, num_sink_tokens=1, num_global_tokens=3)],
    ids=str,
)
def test_keys_before_the_first_position(terms: dict[str, int]) -> None:
    """They are first tokens where there are such, and nothing else."""
    pattern = Pattern(q_len=2, kv_len=17, kv_offset=-2, **terms)
    assert_right(normal(1, 2, 2, 16), normal(1, 1, 17, 16), normal(1, 1, 17, 16), pattern)


@in_kernel
@pytest.mark.parametrize("sink_tokens", [0, 2])  # a mask, a list of blocks
def test_masks_that_grow_in_place(sink_tokens: int) -> None:
    """The mask of a static cache: the same tensor, the same pattern."""
    query, key, value = normal(1, 2, 1, 16), normal(1, 1, 90, 16), normal(1, 1, 90, 16)
    valid = torch.zeros(1, 90, dtype=torch.bool, device=DEVICE)
    valid[:, 80:] = True
    pattern = Pattern(q_len=1, kv_len=90, key_valid=valid, num_sink_tokens=sink_tokens, window=70)
    before, _ = assert_right(query, key, value, pattern)
    valid[:, 40:] = True
    after, _ = assert_right(query, key, value, pattern)
    assert (after - before).abs().max() > 1e-3
    again = decode(query, key, value, pattern, scaling=0.25)
    assert torch.equal(again[0], after)


@in_kernel
def test_threads_that_share_a_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas of a model on one GPU: whoever compiles last, both kernels are kept once."""
    module = importlib.import_module("hf_attn_plugin.ops.triton.decode")
    started = threading.Barrier(4, timeout=30)

    class Compiled:
        def __getitem__(self, grid: object):
            return lambda *arguments: None

    class Slow:
        def __getitem__(self, grid: object):
            def run(*arguments: object, **options: object) -> Compiled:
                started.wait()  # all four are in their first call
                return Compiled()

            return run

    for name in ("split_kernel", "merge_kernel"):
        monkeypatch.setattr(module, name, Slow())
    query, key, pattern = normal(1, 1, 1, 16), normal(1, 1, 64, 16), Pattern(q_len=1, kv_len=64)

    def steps(_: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                decode(query, key, key, pattern, scaling=0.25)

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(steps, range(4)))) == 4


@in_kernel
@pytest.mark.parametrize(
    "offset", [2**31 + 3, torch.tensor(2**32 + 4), torch.tensor([5, -(2**30)])]
)
def test_positions_that_would_wrap_are_refused(offset: int | torch.Tensor) -> None:
    query, key = normal(2, 1, 1, 16), normal(2, 1, 20, 16)
    pattern = Pattern(q_len=1, kv_len=20, q_offset=offset, window=5)
    with pytest.raises(ValueError, match=f"positions below {2**30}"):
        decode(query, key, key, pattern, scaling=0.25)
    assert "positions below" in (decode_refuses(pattern, call(batch=2)) or "")


@in_kernel
def test_rows_that_see_nothing() -> None:
    valid = torch.zeros(2, 70, dtype=torch.bool, device=DEVICE)
    valid[1, 3] = True
    query, key, value = normal(2, 2, 1, 16), normal(2, 1, 70, 16), normal(2, 1, 70, 16)
    pattern = Pattern(q_len=1, kv_len=70, key_valid=valid)
    got, lse = decode(query, key, value, pattern, scaling=1.0)
    assert (got[0] == 0).all()
    assert lse[0].isneginf().all()
    assert (got[1] - value[1, :, 3]).abs().max() < 1e-6
    sinks = normal(2)
    got, lse = decode(query, key, value, pattern, scaling=1.0, sinks=sinks)
    assert (got[0] == 0).all()
    assert (lse[0, :, 0] - sinks).abs().max() < 1e-6
    none = decode(query, key[:, :, :0], value[:, :, :0], Pattern(q_len=1, kv_len=0), scaling=1.0)
    assert (none[0] == 0).all()
    assert none[1].isneginf().all()


@in_kernel
def test_custom_op() -> None:
    """Traceable: fakes agree with what is computed, at several ranks of every optional input."""
    from hf_attn_plugin.ops.triton.decode import _decode_op

    for batch, q_len, kv_len, sinks, padded, sink_tokens in (
        (1, 1, 20, None, False, 0),
        (2, 3, 37, normal(2), True, 2),  # a list of blocks
    ):
        valid = torch.rand(batch, kv_len, device=DEVICE) < 0.8
        pattern = Pattern(
            q_len=q_len,
            kv_len=kv_len,
            q_offset=torch.tensor(kv_len - q_len, device=DEVICE),
            num_sink_tokens=sink_tokens,
            key_valid=valid if padded else None,
        )
        plan = make_plan(pattern, torch.device(DEVICE), 64)
        arguments = (normal(batch, 2, q_len, 16), normal(batch, 1, kv_len, 16))
        arguments += (normal(batch, 1, kv_len, 24), sinks, plan.mask, plan.blocks, plan.counts)
        arguments += (
            plan.offset,
            plan.starts,
            list(plan.numbers),
            plan.sparse,
            plan.steps,
            plan.keys,
        )
        torch.library.opcheck(_decode_op, (*arguments, 0.25, None))


@in_kernel
@pytest.mark.parametrize("sink_tokens", [0, 2])  # a mask, a list of blocks
def test_compiles(sink_tokens: int) -> None:
    """One graph for lengths that grow; the offset is no reason to compile again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    terms = {"window": 30, "num_sink_tokens": sink_tokens}

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(query, key, value, offset, valid):
        pattern = Pattern(q_len=1, kv_len=key.shape[2], q_offset=offset, key_valid=valid, **terms)
        return decode(query, key, value, pattern, scaling=0.25)

    query = normal(2, 4, 1, 16)
    for length, at in ((64, 50), (80, 79), (81, 3)):
        key, value = normal(2, 2, length, 16), normal(2, 2, length, 16)
        valid = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
        valid[0, :2] = False
        got, _ = step(query, key, value, torch.tensor(at, device=DEVICE), valid)
        pattern = Pattern(q_len=1, kv_len=length, q_offset=at, key_valid=valid, **terms)
        want, _ = reference_attention(query, key, value, pattern, scaling=0.25)
        assert (got - want).abs().max() < 1e-5
    assert counter.frame_count == 1


@in_kernel
def test_refused_calls_raise() -> None:
    query, key, value = normal(1, 2, 1, 16), normal(1, 1, 40, 16), normal(1, 1, 40, 16)
    pattern = Pattern(q_len=1, kv_len=40)
    with pytest.raises(ValueError, match="no backward pass"):
        decode(query.requires_grad_(), key, value, pattern, scaling=1.0)
    with torch.no_grad():
        decode(query, key, value, pattern, scaling=1.0)
    double = [tensor.detach().double() for tensor in (query, key, value)]
    with pytest.raises(ValueError, match="float64"):
        decode(*double, pattern, scaling=1.0)
    with pytest.raises(ValueError, match="sinks must hold 2 logits"), torch.no_grad():
        decode(query, key, value, pattern, scaling=1.0, sinks=normal(3))
    masked = Pattern(q_len=1, kv_len=40, dense=torch.ones(1, 3, 1, 40, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"1 or 2 heads, .* got 3"), torch.no_grad():
        decode(query, key, value, masked, scaling=1.0)
    many = Pattern(q_len=17, kv_len=40)
    with pytest.raises(ValueError, match="up to 16 queries"):
        decode(normal(1, 2, 17, 16), key, value, many, scaling=1.0)


# -- without Triton --------------------------------------------------------------------------------


def call(**changes) -> Call:
    fields = {
        "batch": 1,
        "dtype": torch.bfloat16,
        "device_type": "cuda",
        "softcap": False,
        "sinks": False,
        "need_lse": True,
        "compiling": False,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "value_dim": 128,
        "needs_grad": False,
    }
    return Call(**{**fields, **changes})


def test_what_is_refused() -> None:
    pattern = Pattern(q_len=1, kv_len=1000)
    assert decode_refuses(pattern, call()) is None
    assert decode_refuses(pattern, call(head_dim=576, value_dim=512)) is None
    for changes, reason in (
        ({"device_type": "cpu"}, "CUDA devices, not on cpu"),
        ({"needs_grad": True}, "no backward"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"head_dim": 577}, "head_dim of up to 576"),
        ({"head_dim": 300, "dtype": torch.float32}, "head_dim of up to 256"),
        ({"value_dim": 513}, "value_dim of up to 512"),
    ):
        assert reason in (decode_refuses(pattern, call(**changes)) or ""), changes
    assert "16 queries" in (decode_refuses(Pattern(q_len=17, kv_len=99), call()) or "")
    offsets = torch.tensor([1, 2])
    rows = Pattern(q_len=1, kv_len=9, q_offset=offsets, window=3)
    assert decode_refuses(rows, call(batch=2)) is None
    documents = torch.zeros(2, 9, dtype=torch.int64)
    rows = rows.replace(q_documents=documents[:, :1], kv_documents=documents)
    assert "q_positions" in (decode_refuses(rows, call(batch=2)) or "")


def test_splits_fill_the_device() -> None:
    tile = Tile(rows=16, keys=64, warps=4, stages=3, per_sm=2)
    for batch, kv_heads, keys in ((1, 32, 131072), (1, 8, 131072), (8, 8, 32768), (1, 1, 2**20)):
        programs = batch * kv_heads
        used = programs * choose_splits(programs, keys, 132, tile)
        waves = -(-used // 264)
        assert used / (264 * waves) >= 0.9, (batch, kv_heads, used)
    assert choose_splits(8, 1, 132, tile) == 1  # nothing to split
    assert choose_splits(1, 1028, 132, tile) <= 9  # parts worth their merging
    assert choose_splits(4096, 10**6, 132, tile) == 1  # full without


def test_the_kernel_is_told_what_the_window_spans() -> None:
    pattern = Pattern(q_len=2, kv_len=10**6, window=1000, num_sink_tokens=4)
    assert make_plan(pattern, torch.device("cpu"), 64).keys == 1000 + 1 + 4
    offset = torch.tensor(5)
    assert make_plan(pattern.replace(q_offset=offset), torch.device("cpu"), 64).offset is not None
    assert make_plan(pattern.replace(window=None), torch.device("cpu"), 64).keys < 10
    assert make_plan(Pattern(q_len=1, kv_len=50, q_offset=9), torch.device("cpu"), 64).keys == 10
