"""What SparQ's kernels promise on a GPU alone: real sizes, graphs, growing caches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_attn_plugin.ops.sparq.key_copy import FullComponents
from tests.ops.test_attention_property import within_budget
from tests.ops.triton.sparq_steps import Step, assert_right, expected, make_step, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIONS = {"rank": 32, "top_k": 128, "local_window": 32, "mean_value_reallocation": True}


def real_step(kv_heads: int, copy: str = "full", dtype=torch.bfloat16, **changes) -> Step:
    """32 query heads of 128, lengths that fill no block."""
    sizes = {"batch": 2, "length": 20011, "lengths": [(0, 20011), (777, 15000)], **changes}
    return make_step(
        kv_heads=kv_heads, groups=32 // kv_heads, dims=(128, 128), copy=copy, dtype=dtype, **sizes
    )


@pytest.mark.parametrize("copy", ["full", "int8", "int4", "none"])
@pytest.mark.parametrize("kv_heads", [32, 8, 1])
def test_long_caches(kv_heads: int, copy: str) -> None:
    """Every group size and copy, padding, against float64."""
    torch.manual_seed(0)
    dtype = torch.float16 if kv_heads == 8 else torch.bfloat16
    step = real_step(kv_heads, copy, dtype)
    assert_right(step, **OPTIONS)
    assert_right(step, **{**OPTIONS, "top_k": 300, "coverage": 0.2, "softcap": 5.0})


@pytest.mark.parametrize("kv_heads", [32, 8])
def test_masks_and_sinks(kv_heads: int) -> None:
    torch.manual_seed(1)
    step = real_step(kv_heads, mask=True)
    sinks = torch.randn(32, device="cuda", dtype=torch.bfloat16)
    assert_right(step, **{**OPTIONS, "mean_value_reallocation": False, "sinks": sinks})


def test_long_contexts() -> None:
    """As many positions as a program chooses among: 2**20, and the most keys."""
    torch.manual_seed(0)
    step = real_step(32, batch=1, length=2**20, lengths=[(5, 2**20 - 3)])
    step = Step(
        step.query[:, :2],
        step.keys[:, :2],
        step.values[:, :2],
        FullComponents(step.components.keys_t[:, :2]),
        step.first,
        step.stop,
    )
    assert_right(step, **{**OPTIONS, "top_k": 1024})


def test_offsets_beyond_32_bits() -> None:
    """Caches of more than 2**31 elements: the last sequence is right."""
    torch.manual_seed(0)
    batch, length = 17, 2**18
    shape = (batch, 8, length, 64)
    keys = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    values = torch.zeros_like(keys)
    keys_t = torch.zeros(batch, 8, 64, length, device="cuda", dtype=torch.bfloat16)
    assert keys.numel() > 2**31
    for tensor in (keys, values):
        tensor[-1] = torch.randn(shape[1:], device="cuda", dtype=torch.bfloat16)
    keys_t[-1] = keys[-1].transpose(1, 2)
    query = torch.randn(batch, 16, 1, 64, device="cuda", dtype=torch.bfloat16)
    lengths = torch.zeros(batch, device="cuda", dtype=torch.int32)
    step = Step(query, keys, values, FullComponents(keys_t), lengths, lengths + length)
    options = {**OPTIONS, "mean_value_reallocation": False}
    got = run(step, **options)[-1:]
    last = dataclasses.replace(
        step,
        query=query[-1:],
        keys=keys[-1:],
        values=values[-1:],
        components=FullComponents(keys_t[-1:]),
        first=step.first[-1:],
        stop=step.stop[-1:],
    )
    want = expected(last, torch.float64, **options)
    within_budget(
        "output", got, want, expected(last, torch.bfloat16, **options), torch.bfloat16, ""
    )


@pytest.mark.parametrize("copy", ["full", "int8"])
@pytest.mark.parametrize("kv_heads", [32, 8])
def test_in_a_cuda_graph(kv_heads: int, copy: str) -> None:
    """One captured step goes on as the cache fills up."""
    torch.manual_seed(0)
    step = real_step(kv_heads, copy, lengths=[(0, 20011), (0, 20011)])
    options = {**OPTIONS, "mean_value_reallocation": False}

    def at(length: int) -> None:
        step.stop.copy_(torch.tensor([length, max(length - 50, 0)]))

    at(1000)
    run(step, **options)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = run(step, **options)
    for length in (1000, 1001, 0, 9999, 20011, 17):
        at(length)
        graph.replay()
        torch.testing.assert_close(output, run(step, **options), rtol=0, atol=0)
        if length == 9999:
            assert_right(step, **options)


@pytest.mark.parametrize("kv_heads", [32, 8])
def test_equal_bits(kv_heads: int) -> None:
    torch.manual_seed(0)
    step = real_step(kv_heads)
    once = run(step, **OPTIONS)
    assert all(torch.equal(run(step, **OPTIONS), once) for _ in range(20))


def test_nothing_compiles_as_a_cache_grows() -> None:
    from hf_attn_plugin.ops.triton import sparq_attend, sparq_scores
    from hf_attn_plugin.ops.triton.sparq_launch import _compiled

    kernels = (sparq_scores.score_kernel, sparq_scores.sum_kernel, sparq_attend.attend_kernel)

    def compiled() -> list[int]:
        """By our count, and Triton's own of each kernel."""
        own = [sum(len(kept[0]) for kept in k.device_caches.values()) for k in kernels]
        return [_compiled.cache_info().currsize, *own]

    torch.manual_seed(0)
    step = real_step(8)
    run(step, **OPTIONS)
    before = compiled()
    assert all(before)
    for length in range(19000, 19300, 50):  # no multiple of what alignment is told by, among others
        shorter = dataclasses.replace(
            step,
            keys=step.keys[:, :, :length],
            values=step.values[:, :, :length],
            components=FullComponents(step.components.keys_t[..., :length]),
            stop=step.stop.clamp(max=length),  # which may lie at another alignment
        )
        run(shorter, **OPTIONS)
    assert compiled() == before
    run(step, **{**OPTIONS, "top_k": 100})  # the control: other kernels
    assert compiled() != before


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_by_inductor(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    step = real_step(8)
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for length in (20011, 18000):
        step.stop.copy_(torch.tensor([length, 900]))
        torch.testing.assert_close(compiled(step, **OPTIONS), run(step, **OPTIONS))
