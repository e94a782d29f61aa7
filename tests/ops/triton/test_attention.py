"""The attention kernels on small shapes.

On a GPU test_gpu_attention.py runs them; here they go through Triton's interpreter, which must be
chosen before Triton is imported: `test_through_the_interpreter` runs this file in another process.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from hf_attn_plugin.ops.triton.support import refuses, refuses_pattern
from hf_attn_plugin.ops.triton.tiles import Shape, Tile, Tiles, choose_tiles, shape_of
from hf_attn_plugin.patterns import Pattern
from tests.ops.triton.property import Kind, run_case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_kernel = pytest.mark.skipif(not INTERPRETED, reason="run by test_through_the_interpreter")
# The interpreter's bfloat16 products are wrong.
KINDS = [
    Kind(16, 16, torch.float32, 1, 2),
    Kind(20, 12, torch.float16, 2, 1),
    Kind(16, 16, torch.float16, 1, 3),
]
SMALL = [
    Tiles(Tile(32, 16, 4, 1, pack=2), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1, pack=2), split=1),
    Tiles(
        Tile(16, 32, 4, 1, two_loops=True),
        Tile(32, 16, 4, 1, pack=2, two_loops=True),
        Tile(16, 32, 4, 1, two_loops=True),
        split=2,
    ),
]


@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="runs here, or on the GPU in another file"
)
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.fixture(params=range(len(SMALL)), ids=["branch", "two loops"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a few tokens make several, and every row of three visits is split."""
    from hf_attn_plugin.ops.triton import attention

    monkeypatch.setattr(attention, "choose_tiles", lambda *_: SMALL[request.param])


@in_kernel
@pytest.mark.parametrize("seed", range(4))
def test_random_calls(small_tiles: None, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(5):
        run_case(rng, rng.choice(KINDS), [1, 2, 15, 33, 40], "cpu")


def attend(pattern: Pattern, inputs: list[torch.Tensor], **options) -> tuple[torch.Tensor, ...]:
    from hf_attn_plugin.ops.triton.attention import triton_attention

    leaves = [t.detach().requires_grad_() for t in inputs]
    output, lse = triton_attention(*leaves, pattern, **{"scaling": 0.25, **options})
    total = output.square().sum() + torch.where(lse.isneginf(), 0.0, lse).sum()
    return output.detach(), lse.detach(), *torch.autograd.grad(total, leaves)


def some_inputs(q_len: int, kv_len: int, heads: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, q_len, 16), *(torch.randn(1, 1, kv_len, 16) for _ in range(2))]


@in_kernel
@pytest.mark.parametrize(
    "fields",
    [
        dict(window=5, stride=2, num_sink_tokens=2),
        dict(window=4, stride=2, causal=False),
        dict(window=4, num_global_tokens=2, causal=False),
        dict(window=3, dilation=3),
        dict(band=9),
    ],
    ids=str,
)
def test_patterns(small_tiles: None, fields: dict) -> None:
    """What random cases rarely hold: strides in two passes, rows that are split."""
    from hf_attn_plugin.ops.reference import reference_attention

    pattern = Pattern(q_len=40, kv_len=40, **fields)
    inputs = some_inputs(40, 40)
    got = attend(pattern, inputs)
    leaves = [t.double().requires_grad_() for t in inputs]
    output, lse = reference_attention(*leaves, pattern, scaling=0.25)
    grads = torch.autograd.grad(output.square().sum() + lse.sum(), leaves)
    for ours, want in zip(got, (output, lse, *grads), strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)


@in_kernel
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("sinks", [False, True])
def test_nothing_to_attend_to(q_len: int, kv_len: int, sinks: bool) -> None:
    logits = torch.tensor([0.5, -1.0]) if sinks else None
    pattern = Pattern(q_len=q_len, kv_len=kv_len)
    output, lse, *grads = attend(pattern, some_inputs(q_len, kv_len), sinks=logits)
    assert torch.equal(output, torch.zeros(1, 2, q_len, 16))
    want = torch.full((1, 2, q_len), -torch.inf)
    if logits is not None:
        want = logits[None, :, None].expand(1, 2, q_len)
    torch.testing.assert_close(lse, want)
    assert all(not g.any() for g in grads)


@in_kernel
@pytest.mark.parametrize("scaling", [-0.3, 0.0])
def test_scaling_of_any_sign(scaling: float) -> None:
    from hf_attn_plugin.ops.reference import reference_attention

    inputs = some_inputs(20, 20)
    pattern = Pattern(q_len=20, kv_len=20)
    output, lse = reference_attention(*inputs, pattern, scaling=scaling)
    got = attend(pattern, inputs, scaling=scaling)
    torch.testing.assert_close(got[0], output)
    torch.testing.assert_close(got[1], lse)


@in_kernel
def test_an_offset_for_every_row() -> None:
    from hf_attn_plugin.ops.triton.attention import triton_attention

    q, k, v = (t.expand(2, -1, -1, -1) for t in some_inputs(3, 20))
    offsets = torch.tensor([17, 4])
    both, _ = triton_attention(
        q, k, v, Pattern(q_len=3, kv_len=20, window=6, q_offset=offsets), scaling=0.25
    )
    for row, offset in enumerate([17, 4]):
        pattern = Pattern(q_len=3, kv_len=20, window=6, q_offset=offset)
        alone, _ = triton_attention(q[:1], k[:1], v[:1], pattern, scaling=0.25)
        torch.testing.assert_close(both[row], alone[0])


@in_kernel
def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one key too many in each run, which only the kernels' masks look at."""
    from hf_attn_plugin.ops.triton import plan

    right = plan._run_info

    def one_too_many(intervals):
        info = right(intervals)
        info[:, 1] += 1
        return info

    monkeypatch.setattr(plan, "_run_info", one_too_many)
    kind = Kind(16, 16, torch.float32, 1, 1)
    with pytest.raises(AssertionError):
        for seed in range(3):
            run_case(random.Random(seed), kind, [33], "cpu")


@in_kernel
def test_plans_are_found_again() -> None:
    """By numbers and by the identity of tensors; not after a tensor has changed in place."""
    from hf_attn_plugin.ops.triton import attention

    def plan(pattern: Pattern) -> object:
        tensors, numbers = attention._encode(pattern)
        return attention._plans.find(8, 8, tensors, numbers, torch.device("cpu"))

    def fresh() -> Pattern:
        return Pattern(q_len=8, kv_len=8, window=3)

    assert plan(fresh()) is plan(fresh())
    assert plan(fresh()) is not plan(Pattern(q_len=8, kv_len=8, window=4))
    valid = torch.ones(1, 8, dtype=torch.bool)
    padded = Pattern(q_len=8, kv_len=8, key_valid=valid)
    first = plan(padded)
    assert plan(padded.replace()) is first
    valid[0, 0] = False
    assert plan(padded) is not first
    assert plan(padded.replace(key_valid=valid.clone())) is not plan(padded)


OPERATOR_CALLS = {
    "causal": (dict(), {}),
    "window, sinks": (dict(window=4, num_sink_tokens=1), dict(sinks=torch.zeros(2))),
    "padding, softcap": (dict(key_valid=torch.arange(12)[None] > 2), dict(softcap=2.0)),
    "dense": (dict(dense=torch.ones(1, 1, 12, 12, dtype=torch.bool)), {}),
}


@in_kernel
@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_the_operators_are_well_formed(name: str) -> None:
    from hf_attn_plugin.ops.triton import attention

    fields, options = OPERATOR_CALLS[name]
    tensors, numbers = attention._encode(Pattern(q_len=12, kv_len=12, **fields))
    inputs = [t.requires_grad_() for t in some_inputs(12, 12)]
    sinks = options.get("sinks")
    rest = (sinks, tensors, numbers, 0.25, options.get("softcap"))
    torch.library.opcheck(attention._forward, (*inputs, *rest))
    output, lse = attention._forward(*inputs, *rest)
    detached = [t.detach() for t in (output, lse, output, lse, *inputs)]
    torch.library.opcheck(attention._backward, (*detached, *rest))


@in_kernel
def test_compiled_functions_hold_the_operator() -> None:
    from hf_attn_plugin.ops.triton.attention import triton_attention

    def step(q, k, v, valid):
        pattern = Pattern(q_len=q.shape[2], kv_len=k.shape[2], window=4, key_valid=valid)
        return triton_attention(q, k, v, pattern, scaling=0.25)[0]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for length in (12, 17):
        inputs = [t.requires_grad_() for t in some_inputs(length, length)]
        valid = torch.arange(length)[None] > 2
        got, want = compiled(*inputs, valid), step(*inputs, valid)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(x.sum(), inputs) for x in (got, want)]
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        (dict(), Shape.LONG),
        (dict(window=9), Shape.SHORT),
        (dict(band=9), Shape.SHORT),
        (
            dict(q_documents=torch.zeros(1, 8).long(), kv_documents=torch.zeros(1, 8).long()),
            Shape.DOCUMENTS,
        ),
    ],
)
def test_shapes(fields: dict, shape: Shape) -> None:
    assert shape_of(Pattern(q_len=8, kv_len=8, **fields)) is shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dims", [(32, 32), (80, 80), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("shape", Shape)
def test_tiles_fit(dims: tuple[int, int], dtype: torch.dtype, shape: Shape) -> None:
    """The tiles in flight, in bytes, against what a program may have of an H100 or H200."""
    tiles = choose_tiles(*dims, dtype, shape)
    width, value_width = (max(16, 1 << (d - 1).bit_length()) for d in dims)
    for name in ("forward", "grad_query", "grad_key"):
        tile = getattr(tiles, name)
        moving, still = (tile.rows, tile.keys) if name == "grad_key" else (tile.keys, tile.rows)
        rows = still * (1 if name == "forward" else 2) + tile.stages * moving * 2
        assert rows * max(width, value_width) * dtype.itemsize <= 2 * 227 * 1024
        assert tile.rows // tile.heads(8) >= 16
        assert tile.heads(3) == 1


def test_refusals() -> None:
    class Call:
        device_type, dtype, head_dim, value_dim = "cuda", torch.bfloat16, 128, 128

    pattern = Pattern(q_len=8, kv_len=8)
    assert refuses(pattern, Call()) is None  # type: ignore[arg-type]
    for name, value in (("device_type", "cpu"), ("dtype", torch.float64), ("head_dim", 512)):
        call = Call()
        setattr(call, name, value)
        assert str(value) in (refuses(pattern, call) or "")  # type: ignore[arg-type]
    assert "positions" in (refuses_pattern(pattern.replace(q_offset=2**31)) or "")
    per_row = pattern.replace(q_offset=torch.tensor([0, 1]), num_global_tokens=1)
    assert "q_offset" in (refuses_pattern(per_row) or "")


def test_choosing_imports_no_triton() -> None:
    code = "import sys, hf_attn_plugin.ops.triton.support, hf_attn_plugin.ops.triton.tiles as t; "
    code += "assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
