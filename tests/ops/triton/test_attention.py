"""The attention kernels on small shapes.

On a GPU test_gpu_attention.py runs them; here they go through Triton's interpreter, which must be
chosen before Triton is imported: `test_through_the_interpreter` runs this file in another process.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_attn_plugin.ops.triton.support import refuses, refuses_pattern
from hf_attn_plugin.ops.triton.tiles import Shape, Tile, Tiles, choose_tiles, pieces, shape_of
from hf_attn_plugin.patterns import Pattern
from tests.ops.triton.property import Kind, run_case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_kernel = pytest.mark.skipif(not INTERPRETED, reason="run by test_through_the_interpreter")
# The interpreter's bfloat16 products are wrong.
KINDS = [
    Kind(16, 16, torch.float32, 1, 2),
    Kind(20, 12, torch.float16, 2, 1),
    Kind(40, 80, torch.float16, 1, 3),  # in two pieces: 32 + 16 and 64 + 16 columns
]
SMALL = [
    Tiles(Tile(32, 16, 4, 1, pack=2), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1, pack=2), split=1),
    Tiles(
        Tile(16, 32, 4, 1, two_loops=True),
        Tile(32, 16, 4, 1, pack=2, two_loops=True),
        Tile(16, 32, 4, 1, two_loops=True, apart=True),
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
@pytest.mark.parametrize("seed", range(2))
def test_random_calls(small_tiles: None, seed: int, request: pytest.FixtureRequest) -> None:
    rng = random.Random(request.node.name)  # other calls for every kind of tiles
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


SINKS = {
    "every second": lambda: torch.randn(4)[::2],
    "one for all": lambda: torch.randn(1).expand(2),
    "half": lambda: torch.randn(2).half(),
    "shaped": lambda: torch.randn(1, 2, 1, 1),
}


@in_kernel
@pytest.mark.parametrize("operator", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("name", SINKS)
def test_sinks_of_any_layout(name: str, operator: bool) -> None:
    from hf_attn_plugin.ops.reference import reference_attention
    from hf_attn_plugin.ops.triton import attention

    leaves = [*some_inputs(20, 20), SINKS[name]()]
    leaves = [t.detach().requires_grad_() for t in leaves]
    pattern = Pattern(q_len=20, kv_len=20, window=6)

    def results(function) -> list[torch.Tensor]:
        output, lse = function(*leaves[:3], pattern, scaling=0.25, sinks=leaves[3])
        grads = torch.autograd.grad(output.square().sum() + lse.sum(), leaves)
        return [output.detach(), lse.detach(), *grads]

    def through_operator(q, k, v, pattern, *, scaling, sinks):
        return attention._forward(q, k, v, sinks, *attention._encode(pattern), scaling, None)

    got = results(through_operator if operator else attention.triton_attention)
    for ours, want in zip(got, results(reference_attention), strict=True):
        tolerance = 1e-3 if ours.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance, check_dtype=False)
        assert ours.dtype == want.dtype or ours.dtype == torch.float32


@in_kernel
def test_misuse_is_named() -> None:
    pattern = Pattern(q_len=5, kv_len=5)
    with pytest.raises(ValueError, match="one sink for each of 2 heads"):
        attend(pattern, some_inputs(5, 5), sinks=torch.zeros(3))
    far = torch.arange(5)[None] + 2**31
    for fields in (dict(q_positions=far, kv_positions=far), dict(q_offset=torch.tensor(2**32))):
        with pytest.raises(ValueError, match="positions must stay below"):
            attend(pattern.replace(**fields), some_inputs(5, 5))


@in_kernel
@pytest.mark.parametrize("softcap", [1e-2, 3.0, 1e4, 1e6])
def test_caps_of_any_size(softcap: float) -> None:
    """One that hardly caps multiplies every error of a small hyperbolic tangent."""
    from hf_attn_plugin.ops.reference import reference_attention

    pattern = Pattern(q_len=20, kv_len=20)
    inputs = some_inputs(20, 20)
    got = attend(pattern, inputs, softcap=softcap)
    leaves = [t.double().requires_grad_() for t in inputs]
    output, lse = reference_attention(*leaves, pattern, scaling=0.25, softcap=softcap)
    grads = torch.autograd.grad(output.square().sum() + lse.sum(), leaves)
    for ours, want in zip(got, (output, lse, *grads), strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)


@in_kernel
@pytest.mark.parametrize("field", ["key_valid", "q_offset"])
def test_a_new_pattern_gets_a_new_plan(field: str) -> None:
    """Writes through numpy leave no trace in a tensor's version."""
    valid = np.ones((1, 20), dtype=bool)
    offset = np.zeros((), dtype=np.int64)
    tensor = torch.from_numpy({"key_valid": valid, "q_offset": offset}[field])
    inputs = some_inputs(8, 20)
    before = attend(Pattern(q_len=8, kv_len=20, **{field: tensor}), inputs)
    valid[:, :7], offset[...] = False, 9
    after = attend(Pattern(q_len=8, kv_len=20, **{field: tensor}), inputs)
    fresh = attend(Pattern(q_len=8, kv_len=20, **{field: tensor.clone()}), inputs)
    assert all(map(torch.equal, after, fresh))
    assert not torch.equal(before[0], after[0])


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


def bits(pattern: Pattern, inputs: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """Results of launches as they come: the plan is new, so that nothing is recorded yet."""
    from hf_attn_plugin.ops.triton import attention

    attention._plans._kept.clear()
    return list(attend(pattern.replace(), inputs, **options))


REPEATED = {
    "two passes, cut rows": (dict(window=5, stride=2, num_sink_tokens=2), {}),
    "padding, softcap": (dict(key_valid=torch.arange(33)[None] > 2), dict(softcap=2.0)),
    "sinks": (dict(window=9), dict(sinks=torch.tensor([0.5, -1.0]))),
}


@in_kernel
@pytest.mark.parametrize("name", REPEATED)
def test_recorded_launches_are_repeated(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With other tensors of the same layout, and give the bits of launches that come."""
    from hf_attn_plugin.ops.triton import attention
    from hf_attn_plugin.ops.triton.recording import Recording

    monkeypatch.setattr(attention, "choose_tiles", lambda *_: SMALL[0])
    fields, options = REPEATED[name]
    pattern = Pattern(q_len=33, kv_len=33, **fields)
    one, other = some_inputs(33, 33), [t + 1 for t in some_inputs(33, 33)]
    want = bits(pattern, other, **options)
    attend(pattern, one, **options)
    repeated = []
    right = Recording.repeat
    monkeypatch.setattr(
        Recording, "repeat", lambda self, tensors: (repeated.append(1), right(self, tensors))
    )
    assert all(map(torch.equal, attend(pattern, other, **options), want))
    assert len(repeated) == 3


@in_kernel
def test_one_tensor_given_twice_is_two() -> None:
    from hf_attn_plugin.ops.triton.attention import triton_attention

    pattern = Pattern(q_len=20, kv_len=20)
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    want = bits(pattern, [q, k, v])
    triton_attention(q, q, q, pattern, scaling=0.25)
    assert torch.equal(triton_attention(q, k, v, pattern, scaling=0.25)[0], want[0])


@in_kernel
def test_nothing_of_a_call_is_kept() -> None:
    """A tensor that a recording was not told of would be read by all calls that follow."""
    from hf_attn_plugin.ops.triton.merge import merge_sums_kernel
    from hf_attn_plugin.ops.triton.recording import Recording

    output, foreign = torch.zeros(1, 1, 16, 16), torch.zeros(16, 16)
    numbers = dict.fromkeys(("out_batch", "out_head", "length", "split_batch"), 0)
    numbers |= dict(out_token=16, batch_packs=1, packs=1)
    splits = torch.zeros(1, 3, dtype=torch.int32)
    arguments = dict(partial=foreign, output=output, splits=splits, order=None, **numbers)
    fixed = dict(DIM=16, WIDTH=16, HEADS=1, TOKENS=16)
    Recording([output, foreign]).launch(merge_sums_kernel, 1, arguments, fixed)
    with pytest.raises(AssertionError):
        Recording([output]).launch(merge_sums_kernel, 1, arguments, fixed)


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


def packed(*lengths: int) -> Pattern:
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    total = sum(lengths)
    return Pattern(q_len=total, kv_len=total, q_documents=numbers, kv_documents=numbers)


def padded(*kept: int) -> Pattern:
    valid = torch.arange(kept[0])[None] >= kept[0] - torch.tensor(kept)[:, None]
    return Pattern(q_len=kept[0], kv_len=kept[0], key_valid=valid)


@in_kernel
@pytest.mark.parametrize(
    ("pattern", "batch"),
    [
        (packed(*[500] * 144, 59072), 1),  # most documents are short
        (padded(32768, *[6000] * 7), 8),  # one row is long
        (Pattern(q_len=131072, kv_len=131072, window=64, num_global_tokens=64), 1),
        (Pattern(q_len=131072, kv_len=131072), 1),
    ],
    ids=["documents", "padding", "globals", "causal"],
)
@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
def test_slices_need_little_memory(pattern: Pattern, batch: int, of_keys: bool) -> None:
    """Those of 128 rows in float32 take no more than the result in 16 bits."""
    from hf_attn_plugin.ops.triton.plan import Plan
    from hf_attn_plugin.ops.triton.work import Split

    for heads in (1, 8):
        step = Plan(pattern, torch.device("cpu")).passes[0]
        work = step.work(128, 128, of_keys=of_keys, split=Split(64, batch * heads))
        assert 4 * work.num_slots * 128 <= 2 * pattern.q_len
        if pattern.window is None and heads > 1:
            assert not work.num_slots


@in_kernel
def test_work_that_would_hold_up_the_rest_is_split() -> None:
    """A first token that all see keeps no program busy for as long as all others take."""
    from hf_attn_plugin.ops.triton.plan import Plan
    from hf_attn_plugin.ops.triton.work import BEGIN, END, Split

    pattern = Pattern(q_len=65536, kv_len=65536, window=64, num_global_tokens=1)
    step = Plan(pattern, torch.device("cpu")).passes[0]
    work = step.work(64, 64, of_keys=True, split=Split(16, 8))
    visits = work.items[0, :, END] - work.items[0, :, BEGIN]
    assert work.num_splits == 1 and 1024 // 70 <= work.num_slots <= 1024 // 16
    assert int(visits.max()) <= 70 and int(visits.sum()) > 2 * 1024


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
    """What is kept and in flight, in bytes, against what a program may have of an H100 or H200."""
    tiles = choose_tiles(*dims, dtype, shape)
    columns, value_columns = (sum(pieces(dim)) for dim in dims)
    both = columns + value_columns
    kept_and_moving = {
        "forward": (tiles.forward.rows * columns, tiles.forward.keys * both),
        "grad_query": (tiles.grad_query.rows * both, tiles.grad_query.keys * both),
        "grad_key": (tiles.grad_key.keys * both, tiles.grad_key.rows * both),
    }
    for name, (kept, moving) in kept_and_moving.items():
        tile = getattr(tiles, name)
        assert (kept + tile.stages * moving) * dtype.itemsize <= 227 * 1024
        assert tile.rows // tile.heads(8) >= 16
        assert tile.heads(3) == 1


def test_pieces_hold_all_columns() -> None:
    for dim in range(1, 257):
        main, tail = pieces(dim)
        assert main + tail >= dim > main * (tail > 0)
        assert all(size & (size - 1) == 0 for size in (main, tail))
        whole = max(16, 1 << (dim - 1).bit_length())
        assert main + tail <= whole and (tail == 0 or whole == 2 * main)


def test_usual_widths_waste_nothing() -> None:
    assert [pieces(dim) for dim in (64, 80, 96, 192)] == [(64, 0), (64, 16), (64, 32), (128, 64)]


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
