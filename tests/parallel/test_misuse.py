"""What does not fit is refused before anything is sent; what fits but is rare is computed."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch

from hf_attn_plugin.parallel import Layout, Shard, make_plan, sharded_attention
from hf_attn_plugin.patterns import Pattern
from tests.parallel.processes import run_processes
from tests.parallel.sharding import Case, differences, sharded


@pytest.mark.parametrize("schedule", ["gather", "ring", "ulysses", None])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query": (2, 5, 8, 4)}, "KV heads must divide query heads"),
        ({"value": (2, 2, 7, 4)}, "batch, KV heads and keys must agree"),
        ({"value": (1, 2, 8, 4)}, "batch, KV heads and keys must agree"),
        ({"key": (1, 2, 8, 4), "value": (1, 2, 8, 4)}, "batch, KV heads and keys must agree"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"sinks": torch.zeros(1)}, "one logit per query head, 4"),
        ({"dense": torch.ones(1, 3, 16, 16, dtype=torch.bool)}, "must have 1 or 4 heads"),
        ({"key_valid": torch.ones(3, 16, dtype=torch.bool)}, "key_valid is for a batch of 3"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_calls_that_do_not_fit(change: dict[str, Any], said: str, schedule: str | None) -> None:
    """Without a process group: whatever is sent would raise another error."""
    change = dict(change)
    shapes = {"query": (2, 4, 8, 4), "key": (2, 2, 8, 4), "value": (2, 2, 8, 4)}
    terms = {name: change.pop(name) for name in ("dense", "key_valid") if name in change}
    tensors = [torch.zeros(change.pop(name, shape)) for name, shape in shapes.items()]
    shard = Shard(Layout(16, 2), 0, schedule=schedule)
    with pytest.raises(ValueError, match=said):
        pattern = Pattern(q_len=16, kv_len=16, **terms)
        sharded_attention(*tensors, pattern, shard, scaling=1.0, **change)


def another_place(rank: int) -> list[str]:
    said = []
    for layout, place in ((Layout(16, 2), 1 - rank), (Layout(16, 4), rank)):
        try:
            Shard(layout, place)
        except ValueError as error:
            said.append(str(error))
    Shard(Layout(16, 2), rank)
    return said


def test_a_shard_of_another_process_is_refused() -> None:
    for rank, (of_rank, of_layout) in enumerate(run_processes(another_place, 2)):
        assert f"rank {1 - rank} of a layout of 2" in of_rank
        assert f"is ({rank}, 2)" in of_rank
        assert f"rank {rank} of a layout of 4" in of_layout


def under_autocast(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    """Forward and backward, of another dtype than the region's."""
    with torch.autocast("cpu", torch.bfloat16):
        return [sharded(rank, case, 2) for case in cases]


def test_autocast_changes_nothing() -> None:
    plain = Case("causal", {"window": 5}, dtype=torch.float16)
    cases = [dataclasses.replace(plain, schedule=each) for each in ("gather", "ring", "ulysses")]
    # More than 16 runs of keys for one rank: these travel packed.
    many = {"window": 2, "num_sink_tokens": 1, "kv_documents": [[i // 2 for i in range(512)]]}
    cases.append(dataclasses.replace(plain, terms=many, length=512, chunks=8, schedule="gather"))
    cases.append(dataclasses.replace(plain, chunks=4, kv_heads=1, schedule="ulysses"))
    by_rank = run_processes(under_autocast, 2, cases)
    for number, case in enumerate(cases):
        found = differences(case, [results[number] for results in by_rank])
        assert max(found.values()) < 4 * torch.finfo(torch.float16).eps, (case, found)


def test_a_plan_does_not_keep_its_pattern_alive() -> None:
    """Without the garbage collector: plans and kernels' tables would wait for it on a GPU."""
    pattern = Pattern(q_len=64, kv_len=64)
    make_plan(pattern, Layout(64, 2))
    known = weakref.ref(pattern)
    gc.disable()
    try:
        del pattern
        assert known() is None
    finally:
        gc.enable()
