"""SparQ's kernel that reads one copy of the keys once, on a Hopper GPU, against the definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_attn_plugin.ops.sparq.key_copy import StridedComponents
from tests.ops.test_attention_property import within_budget
from tests.ops.triton.sparq_steps import Step, assert_right, expected, make_step, run

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)

OPTIONS = {"rank": 32, "top_k": 128, "local_window": 32, "mean_value_reallocation": True}
RAGGED = [(0, 1000), (5, 25), (0, 0), (100, 999), (64, 128), (999, 1000)]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The calls of the kernel, of which each program goes through many KV heads."""
    from hf_attn_plugin.ops.triton import sparq_launch

    calls: list[Any] = []
    describe = sparq_launch.of_keys

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return describe(*arguments)

    monkeypatch.setattr(sparq_launch, "of_keys", spy)
    monkeypatch.setattr(sparq_launch, "_sm_count", lambda device: 3)
    sparq_launch._prepare.cache_clear()
    yield calls
    sparq_launch._prepare.cache_clear()


def one_copy(
    length: int = 4096,
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> Step:
    """Several KV heads with one query head each, in sequences of given lengths."""
    lengths = changes.pop("lengths", [(0, length), (length // 5, length - 7)])
    sizes = {"batch": len(lengths), "kv_heads": 11, **changes}
    return make_step(
        groups=1, length=length, dims=dims, copy="none", dtype=dtype, lengths=lengths, **sizes
    )


@pytest.mark.parametrize(
    ("dims", "dtype", "length"),
    [
        *(((128, 128), torch.bfloat16, length) for length in (4096, 4095, 1000, 512)),
        *((dims, torch.float16, 4095) for dims in ((128, 128), (64, 64), (64, 128), (128, 64))),
        *((dims, torch.bfloat16, 700) for dims in ((64, 64), (128, 64))),
    ],
)
def test_sizes(used: list[Any], dims: tuple[int, int], dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(length)
    assert_right(one_copy(length, dims, dtype), **OPTIONS)
    assert len(used) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 5.0, "scaling": 0.2},
        {"top_k": 1, "local_window": 0},
        {"top_k": 1, "local_window": 1},
        {"top_k": 40, "local_window": 40},
        {"top_k": 300},
        {"top_k": 1000},
        {"rank": 1},
        {"rank": 128},
        {"rank_coverage": 0.6},
        {"mean_value_reallocation": False},
    ],
    ids=str,
)
def test_options(used: list[Any], changes: dict[str, Any]) -> None:
    """With ragged lengths, sequences without any keys, and holes."""
    torch.manual_seed(0)
    step = one_copy(1000, lengths=RAGGED, mask=changes.get("top_k") != 300)
    assert_right(step, **{**OPTIONS, **changes})
    assert len(used) == 1


@pytest.mark.parametrize("sink", [-2.0, 30.0])
def test_sinks(used: list[Any], sink: float) -> None:
    torch.manual_seed(0)
    step = one_copy(1000, lengths=RAGGED, mask=True)
    sinks = torch.full((11,), sink, device="cuda", dtype=torch.bfloat16)
    assert_right(step, **{**OPTIONS, "mean_value_reallocation": False, "sinks": sinks})
    assert len(used) == 1


def test_ties_go_to_the_first_keys(used: list[Any]) -> None:
    step = one_copy(600, (64, 128), torch.float16, lengths=[(3, 130)])
    step.query.zero_()
    step.values[:] = torch.eye(600, 128, device="cuda")
    options = {"top_k": 9, "local_window": 4, "mean_value_reallocation": False}
    got = run(step, **{**OPTIONS, **options})
    want = torch.zeros(128, device="cuda", dtype=torch.float16)
    want[[3, 4, 5, 6, 7, 126, 127]] = 1 / 9  # and two beyond the values' size
    torch.testing.assert_close(got[0], want.expand(11, 1, -1))
    assert len(used) == 1


def test_a_wrong_choice_is_seen(used: list[Any]) -> None:
    """The control."""
    torch.manual_seed(0)
    step = one_copy(1000)
    want = expected(step, torch.float64, **OPTIONS)
    plain = expected(step, torch.bfloat16, **OPTIONS)
    for change in ({"top_k": 100}, {"local_window": 0}, {"rank": 24}):
        got = run(step, **{**OPTIONS, **change})
        with pytest.raises(AssertionError):
            within_budget("output", got, want, plain, torch.bfloat16, change)


def test_strides_of_caches(used: list[Any]) -> None:
    """Tokens before heads; and rows that TMA cannot address, which other kernels read."""
    torch.manual_seed(0)
    step = one_copy(777)
    want = run(step, **OPTIONS)
    swapped = step.keys.transpose(1, 2).contiguous().transpose(1, 2)
    parted = torch.cat([step.keys, step.keys[..., :4]], -1)[..., :128]
    for keys, calls in ((swapped, 2), (parted, 2)):
        assert torch.equal(keys.nan_to_num(0.0), step.keys.nan_to_num(0.0))
        other = dataclasses.replace(
            step, keys=keys, components=StridedComponents(keys, counted=False)
        )
        got = assert_right(other, **OPTIONS)
        assert len(used) == calls
        assert torch.equal(got, want) == (keys is swapped)


def test_offsets_beyond_32_bits(used: list[Any]) -> None:
    torch.manual_seed(0)
    shape = (130, 32, 4096, 128)
    keys = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    values = torch.zeros_like(keys)
    assert keys[:-1].numel() > 2**31
    for tensor in (keys, values):
        tensor[-1] = torch.randn(shape[1:], device="cuda", dtype=torch.bfloat16)
    query = torch.randn(130, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    lengths = torch.zeros(130, device="cuda", dtype=torch.int32)
    options = {**OPTIONS, "mean_value_reallocation": False}

    def of(rows: slice) -> Step:
        parts = (query[rows], keys[rows], values[rows])
        copy = StridedComponents(keys[rows], counted=False)
        return Step(*parts, copy, lengths[rows], lengths[rows] + 4096)

    got = run(of(slice(None)), **options)[-1:]
    last = of(slice(-1, None))
    plain = expected(last, torch.bfloat16, **options)
    within_budget(
        "output", got, expected(last, torch.float64, **options), plain, torch.bfloat16, ""
    )
    assert len(used) == 1


def test_in_a_cuda_graph(used: list[Any]) -> None:
    """One captured step goes on as the cache fills up, with equal bits."""
    torch.manual_seed(0)
    step = one_copy(4096, lengths=[(0, 4096), (0, 4096)])
    options = {**OPTIONS, "mean_value_reallocation": False}
    run(step, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(step, **options)
    for length in (1000, 1001, 0, 4096, 17):
        step.stop.copy_(torch.tensor([length, max(length - 50, 0)]))
        graph.replay()
        kept = output.clone()
        assert all(torch.equal(run(step, **options), kept) for _ in range(5))
        assert_right(step, **options)
    assert len(used) == 2 + 5 * 6


def test_equal_bits(used: list[Any]) -> None:
    """Warpgroups that meet in another order each time, as their KV heads' lengths differ."""
    torch.manual_seed(0)
    step = one_copy(2000, lengths=[(0, 2000), (5, 25), (0, 0), (100, 1999), (64, 128), (999, 1000)])
    once = assert_right(step, **OPTIONS)
    assert all(torch.equal(run(step, **OPTIONS), once) for _ in range(300))
    assert len(used) == 301
