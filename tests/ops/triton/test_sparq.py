"""SparQ's kernels against its definition, `ops.sparq.decode`, in float64.

On a GPU as they are; without one through Triton's interpreter, which must be chosen before Triton
is imported: `test_through_the_interpreter` runs this file again, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_attn_plugin.ops.sparq.key_copy import (
    FullComponents,
)
from hf_attn_plugin.ops.triton import support_sparq
from hf_attn_plugin.ops.triton.support_sparq import sparq_refuses
from tests.ops.test_attention_property import within_budget
from tests.ops.triton.sparq_steps import (
    DEVICE,
    assert_right,
    expected,
    make_step,
    options_for,
    run,
    triton_sparq,
)
from tests.test_structure import imported

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_kernel = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="run by test_through_the_interpreter"
)
COPIES = ["full", "int8", "int4", "none"]
CASES = 5


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests below run here")
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@in_kernel
@pytest.mark.parametrize("copy", COPIES)
def test_random_calls(copy: str) -> None:
    """Shapes, lengths, masks, options; float32, so that the kernels choose what the oracle does."""
    rng = random.Random(COPIES.index(copy))
    torch.manual_seed(COPIES.index(copy))
    for case in range(CASES):
        batch, kv_heads = rng.choice([(1, 1), (2, 1), (1, 2)])
        groups = rng.choice([1, 2, 3, 5])
        length = rng.choice([40, 129, 256, 300])
        starts = [rng.randrange(0, length // 3) for _ in range(batch)]
        lengths = [(start, rng.randrange(start + 2, length + 1)) for start in starts]
        dims = rng.choice([(32, 32), (24, 40)])
        step = make_step(
            batch, kv_heads, groups, length, dims, copy, lengths=lengths, mask=case % 3 == 2
        )
        top_k = rng.choice([1, 7, 24, 40])
        sinks = torch.randn(groups * kv_heads, device=DEVICE) if rng.random() < 0.4 else None
        assert_right(
            step,
            rank=rng.choice([1, 6, 16]),
            top_k=top_k,
            local_window=rng.choice([0, 1, top_k // 2, top_k]),
            mean_value_reallocation=sinks is None and rng.random() < 0.7,
            coverage=rng.choice([None, 0.3, 0.9]),
            rank_coverage=rng.choice([None, 0.5]),
            softcap=rng.choice([None, 3.0]),
            scaling=rng.choice([None, 0.3]),
            sinks=sinks,
        )


@in_kernel
@pytest.mark.parametrize("copy", ["full", "none"])
@pytest.mark.parametrize("groups", [1, 2])
def test_half_precision(copy: str, groups: int) -> None:
    torch.manual_seed(1)  # no two components tie, which half precision's often do
    step = make_step(1, 2, groups, 200, (64, 64), copy, torch.float16)
    assert_right(step, **options_for(rank=16))


@in_kernel
@pytest.mark.parametrize("copy", ["full", "none"])
def test_in_one_kernel(copy: str) -> None:
    """One query head per KV head: the scores, the choice and the attention by one program."""
    from hf_attn_plugin.ops.triton.sparq_launch import Tiles

    torch.manual_seed(0)
    step = make_step(2, 2, 1, 300, copy=copy, lengths=[(0, 300), (20, 50)], mask=copy == "full")
    tiles = Tiles(128, 4, 2, copy == "none", 0, 1, whole=True, run=8, chunk=16)
    for options in (options_for(), options_for(coverage=0.7, rank_coverage=0.6)):
        torch.testing.assert_close(run(step, tiles=tiles, **options), assert_right(step, **options))


@in_kernel
def test_a_wrong_choice_is_seen() -> None:
    """The control: what `assert_right` judges by tells one key more from one less."""
    torch.manual_seed(0)
    step = make_step(1, 1, 2, 200)
    want = expected(step, torch.float64, **options_for())
    for change in ({"top_k": 23}, {"local_window": 0}, {"rank": 7}):
        got = run(step, **options_for(**change))
        with pytest.raises(AssertionError):
            within_budget("output", got, want, want, torch.float32, change)


@in_kernel
@pytest.mark.parametrize("groups", [1, 2])
def test_ties_go_to_the_first_keys(groups: int) -> None:
    """All scores are equal: the local window, and then the lowest indices."""
    step = make_step(1, 1, groups, 140, (16, 256), lengths=[(3, 130)])
    step.query.zero_()
    step.values[:] = torch.eye(256, device=DEVICE)[:140]
    got = run(step, **options_for(top_k=9, local_window=4, mean_value_reallocation=False))
    chosen = [3, 4, 5, 6, 7, 126, 127, 128, 129]
    want = torch.zeros(256, device=DEVICE)
    want[chosen] = 1 / 9
    torch.testing.assert_close(got[0], want.expand(groups, 1, -1))


@in_kernel
@pytest.mark.parametrize("groups", [1, 3])
def test_what_is_visible_fits(groups: int) -> None:
    """k at or above the visible keys is dense attention; without any, the output is 0."""
    torch.manual_seed(0)
    step = make_step(3, 1, groups, 140, lengths=[(5, 25), (0, 0), (100, 140)])
    got = assert_right(step, **options_for(top_k=40))
    assert got[1].eq(0).all()
    dense = torch.nn.functional.scaled_dot_product_attention(
        step.query[:1], step.keys[:1, :, 5:25], step.values[:1, :, 5:25], enable_gqa=True
    )
    torch.testing.assert_close(got[:1], dense)
    sinks = torch.full((groups,), 30.0, device=DEVICE)  # which take nearly everything
    options = options_for(mean_value_reallocation=False, sinks=sinks, coverage=0.5)
    assert_right(step, **options)


@in_kernel
@pytest.mark.parametrize("copy", ["full", "int4", "none"])
def test_strides_of_caches(copy: str) -> None:
    """Tokens before heads in memory, lengths that no block fits, an odd number of elements."""
    torch.manual_seed(0)
    step = make_step(2, 2, 2, 199, (32, 48), copy)
    want = run(step, **options_for())
    apart = dataclasses.replace(
        step,
        query=torch.cat([step.query.transpose(1, 2)] * 3, -1)[..., 32:64].transpose(1, 2),
        keys=torch.cat([step.keys] * 2, 1).transpose(1, 2).contiguous().transpose(1, 2)[:, 1:3],
        values=torch.cat([step.values, step.values[..., :3]], -1)[..., :48],
    )
    apart.keys = apart.keys.roll(1, 1).transpose(1, 2).contiguous().transpose(1, 2)
    if isinstance(step.components, FullComponents):
        keys_t = torch.cat([step.components.keys_t, step.components.keys_t[..., :2]], -1)
        apart.components = FullComponents(keys_t[..., :199])
    assert not apart.keys.is_contiguous()
    assert torch.equal(apart.keys, step.keys)
    torch.testing.assert_close(run(apart, **options_for()), want)


@in_kernel
@pytest.mark.parametrize("bits", [8, 4])
def test_tail_of_a_static_cache(bits: int) -> None:
    """Where the tail begins is known to the device; codes of the same positions are rubbish."""
    torch.manual_seed(0)
    step = make_step(1, 2, 2, 256, copy=f"int{bits}", lengths=[(0, 200)])
    whole = step.components
    tail = torch.zeros(1, 2, 32, 128, device=DEVICE)
    tail[..., :72] = step.keys[:, :, 128:200].transpose(2, 3)
    tail[..., 72:] = float("nan")
    static = dataclasses.replace(
        whole, tail=tail, tail_at=torch.tensor(128, device=DEVICE), length=256
    )
    got = run(dataclasses.replace(step, components=static), **options_for())
    dynamic = dataclasses.replace(
        whole,
        codes=whole.codes[:, :, :, :1],
        scale=whole.scale[..., :1],
        offset=whole.offset[..., :1],
        tail=tail[..., :72],
    )
    shorter = dataclasses.replace(step, components=dynamic)
    shorter.keys, shorter.values = step.keys[:, :, :200], step.values[:, :, :200]
    torch.testing.assert_close(got, assert_right(shorter, **options_for()))


@in_kernel
@pytest.mark.parametrize("whole", [False, True])
def test_coverage_of_equal_keys(whole: bool) -> None:
    """Of keys that have the same mass, the first ones are needed; the window comes before them."""
    from hf_attn_plugin.ops.triton.sparq_launch import Tiles

    step = make_step(1, 1, 1, 64, (32, 64))
    step.query.zero_()
    step.values[:] = torch.eye(64, device=DEVICE)
    tiles = Tiles(64, 4, 2, False, 64, 1, whole=whole, run=8, chunk=16)
    for share, wanted in ((0.25, [*range(12), *range(60, 64)]), (0.01, [*range(60, 64)])):
        got = run(
            step,
            tiles=tiles,
            rank=8,
            top_k=40,
            local_window=4,
            coverage=share,
            mean_value_reallocation=False,
        )
        assert got[0, 0, 0].nonzero().flatten().tolist() == wanted


@in_kernel
def test_coverage_beside_sinks() -> None:
    """Shares are of what the keys have: a sink that takes most leaves the choice as it is."""
    torch.manual_seed(0)
    step = make_step(1, 1, 2, 60)
    step.query.mul_(0.5)
    kept = []
    for sink in (None, 6.0):
        sinks = None if sink is None else torch.full((2,), sink, device=DEVICE)
        step.values[..., :32] = torch.eye(60, device=DEVICE)[:, :32]
        options = options_for(coverage=0.6, sinks=sinks, mean_value_reallocation=False, top_k=50)
        kept.append(assert_right(step, **options)[0, 0, 0] > 0)
    assert torch.equal(*kept)
    assert 0 < kept[0].sum() < 32


@in_kernel
def test_lengths_of_any_integer_type() -> None:
    torch.manual_seed(0)
    step = make_step(2, 1, 1, 150)
    want = run(step, **options_for(mean_value_reallocation=False))
    inputs = (step.query, step.keys, step.values)
    options = options_for(mean_value_reallocation=False, components=step.components)
    assert torch.equal(triton_sparq(*inputs, **options), want)
    stop = torch.tensor(150, device=DEVICE)
    assert torch.equal(triton_sparq(*inputs, stop=stop, **options), want)
    stop = torch.tensor([150, 149], device=DEVICE)
    got = triton_sparq(*inputs, stop=stop, **options)
    assert torch.equal(got[0], want[0])
    assert not torch.equal(got[1], want[1])


@in_kernel
def test_compiles() -> None:
    torch.manual_seed(0)
    step = make_step(2, 1, 2, 150, lengths=[(0, 150), (3, 100)])
    want = run(step, **options_for())
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(step, **options_for()), want)


@in_kernel
def test_custom_op() -> None:
    torch.manual_seed(0)
    step = make_step(1, 1, 2, 140)
    copy = (step.components.keys_t, *(None,) * 5)
    arguments = (None, None, step.first, step.stop, None, None, None, 8, 24, 6, 0)
    import hf_attn_plugin.ops.triton.sparq  # noqa: F401 - registers the operator

    torch.library.opcheck(
        torch.ops.hf_attn_plugin.sparq.default,
        (step.query, step.keys, step.values, *copy, *arguments, None, None, 0.2, None),
    )


@in_kernel
def test_refused_calls_raise() -> None:
    step = make_step(1, 1, 2, 40)
    inputs = (step.query, step.keys, step.values)
    options = options_for(mean_value_reallocation=False)
    for changes, message in (
        ({"local_window": 25}, "local_window 0 to top_k"),
        ({"rank": 0}, "at least 1"),
        ({"mean_value_reallocation": True}, "needs value_sum"),
        ({"visible": torch.ones(1, 40, dtype=torch.bool)}, "go together"),
        ({"components": object()}, "cannot read a object"),
        ({"components": FullComponents(step.keys.transpose(2, 3))}, "contiguous along"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_sparq(*inputs, **{**options, **changes})
    for wrong, message in (
        ((step.query.expand(1, 2, 2, 32), *inputs[1:]), "one query"),
        ((inputs[0].half(), *inputs[1:]), "share a dtype"),
        ((*inputs[:2], step.values[:, :, :7]), "must agree"),
        ((inputs[0], step.keys.transpose(2, 3), step.values), "must agree"),
        (tuple(t.double() for t in inputs), "not torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_sparq(*wrong, **options)


@in_kernel
@pytest.mark.parametrize("kv_heads", [32, 8])
def test_kernels_compile_at_powers_of_two(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cache grows nothing is compiled between one power of two and the next."""
    from hf_attn_plugin.ops.triton import sparq_launch
    from hf_attn_plugin.ops.triton.sparq_launch import Layout, Settings

    monkeypatch.setattr(sparq_launch, "_sm_count", lambda device: 132)
    settings = Settings(32, 128, 32, 0, None, None, 0.1, None)
    bfloat16 = torch.bfloat16

    def kernels(length: int) -> int:
        room = -(-length // 4096) * 4096
        rows = Layout((1, kv_heads, length, 128), (0, room * 128, 128, 1), bfloat16, True)
        told = {
            "query": Layout((1, 32, 1, 128), (4096, 128, 128, 1), bfloat16, True),
            "keys": rows,
            "values": rows,
            "keys_t": Layout((1, kv_heads, 128, length), (0, room * 128, room, 1), bfloat16, True),
            "stop": Layout((1,), (1,), torch.int64, True),
        }
        sparq_launch._prepare(torch.device(DEVICE), tuple(told.items()), settings, None)
        return sparq_launch._compiled.cache_info().currsize

    for power in range(9, 17):
        first = kernels(2**power + 1)
        lengths = random.Random(power).sample(range(2**power + 1, 2 ** (power + 1)), 40)
        assert {kernels(length) for length in lengths} == {first}
    assert kernels(2**17 + 1) > first


@in_kernel
def test_when_keys_are_read_once() -> None:
    """By the kernel for Hopper GPUs, of what it takes; `test_sparq_hopper_gpu` runs it."""
    from hf_attn_plugin.ops.triton.sparq_launch import Layout, Settings, choose_tiles

    strides = (32 * 4224 * 128, 4224 * 128, 128, 1)
    rows = Layout((64, 32, 4096, 128), strides, torch.bfloat16, True)
    told = {
        "query": Layout((64, 32, 1, 128), (4096, 128, 128, 1), torch.bfloat16, True),
        "keys": rows,
        "values": rows,
    }
    settings = Settings(32, 128, 32, 0, None, None, 0.1, None)

    def once(hopper: bool = True, settings: Settings = settings, **changes: Layout) -> bool:
        return choose_tiles({**told, **changes}, settings, 132, hopper=hopper).once

    def keys(*shape: int, stride: tuple[int, ...] = strides, aligned: bool = True) -> Layout:
        return Layout(shape, stride, torch.bfloat16, aligned)

    assert once()
    assert once(settings=dataclasses.replace(settings, rank_coverage=0.9, softcap=3.0))
    assert once(keys=keys(64, 32, 4096, 128, stride=(4096 * 4096, 128, 4096, 1)))
    assert not once(hopper=False)
    assert not once(settings=dataclasses.replace(settings, coverage=0.9))
    assert not once(settings=dataclasses.replace(settings, bits=8))
    assert not once(keys_t=rows)
    assert not once(keys=keys(64, 32, 4096, 128, aligned=False))
    assert not once(keys=keys(64, 32, 4096, 128, stride=(0, 4224 * 128, 128, 1)))
    assert not once(keys=keys(64, 32, 4096, 128, stride=(32 * 4096 * 132, 4096 * 132, 132, 1)))
    assert not once(keys=keys(64, 16, 4096, 128), values=keys(64, 16, 4096, 128))
    for length in (300, 5000):
        rows = keys(64, 32, length, 128)
        assert not once(keys=rows, values=rows)
    assert not once(values=keys(64, 32, 4096, 96))
    # Too few programs to keep the memory busy while some of them choose.
    few = {"query": Layout((4, 32, 1, 128), (4096, 128, 128, 1), torch.bfloat16, True)}
    assert not once(**few, keys=keys(4, 32, 4096, 128), values=keys(4, 32, 4096, 128))


def test_what_is_refused() -> None:
    call = {
        "device_type": "cuda",
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "value_dim": 128,
        "groups": 4,
        "length": 131072,
        "top_k": 128,
    }
    assert sparq_refuses(**call) is None
    for change, reason in (
        ({"device_type": "cpu"}, "not on cpu"),
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 512}, "head_dim of up to 256"),
        ({"value_dim": 257}, "value_dim of up to 256"),
        ({"groups": 128}, "query heads per KV head"),
        ({"top_k": 2000}, "up to 1024 keys"),
        ({"length": 2**21}, "keys, not 2097152"),
        ({"mean_block": 64}, "mean_block"),
        ({"needs_grad": True}, "no backward"),
    ):
        refused = sparq_refuses(**{**call, **change})
        assert refused is not None
        assert reason in refused
    assert sparq_refuses(**{**call, "top_k": 2000, "length": 1000}) is None


def test_refusing_imports_no_triton() -> None:
    assert "triton" not in imported(Path(support_sparq.__file__))
