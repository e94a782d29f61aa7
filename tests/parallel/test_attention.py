"""Attention over a sequence spread over processes is what one process computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.parallel.plan import make_plan
from tests.parallel.processes import run_processes
from tests.parallel.sharding import Case, differences, sharded

_DOCUMENTS = [[0] * 5 + [1] * 9 + [2] * 3 + [3] * 15, [0] * 13 + [1] * 19]
_BOTH_SIDES = [[False] * 3 + [True] * 25 + [False] * 4, [True] * 32]

CASES = [
    Case("causal"),
    Case("causal, contiguous", chunks=1),
    Case("window", {"window": 5}, chunks=1),
    Case("model's window", {"band": 6}, chunks=1),
    Case("window and sink tokens", {"window": 5, "num_sink_tokens": 2}, chunks=1),
    Case("global tokens", {"window": 5, "num_global_tokens": 2}, chunks=1),
    Case("stride", {"window": 3, "stride": 7}),
    Case("packed documents", {"kv_documents": _DOCUMENTS}),
    Case("packed documents, contiguous", {"kv_documents": _DOCUMENTS}, chunks=1),
    Case("padding on both sides", {"key_valid": _BOTH_SIDES}),
    Case("padding and documents", {"key_valid": _BOTH_SIDES, "kv_documents": _DOCUMENTS}, chunks=1),
    Case("bidirectional", {"causal": False}),
    Case("bidirectional window", {"causal": False, "window": 4}, chunks=1),
    Case("softcap", softcap=2.0),
    Case("sinks", sinks=True),
    Case("a rank of padding", {"key_valid": [[True] * 6 + [False] * 26]}, chunks=1, batch=1),
    Case("other size of values", value_dim=4, kv_heads=4),
    Case("four chunks", {"kv_documents": _DOCUMENTS}, chunks=4),
]

# What the cases run under, by number of ranks: schedule, ulysses, KV heads, groups of heads.
WAYS = {
    2: [
        ("gather", 1, 2, 2),
        ("ring", 1, 2, None),
        ("ulysses", 1, 2, None),
        ("ulysses", 1, 1, None),
        (None, 1, 2, None),
    ],
    4: [
        ("gather", 1, 4, 4),
        ("ulysses", 1, 4, None),
        ("ulysses", 1, 2, None),
        ("gather", 2, 4, 2),
        ("gather", 2, 1, None),
        ("ring", 2, 2, None),
        (None, 2, 2, None),
    ],
}


def many(rank: int, cases: list[Case], ranks: int) -> list[dict[str, Any]]:
    return [sharded(rank, case, ranks) for case in cases]


def assert_equal(cases: list[Case], by_rank: list[list[dict[str, Any]]], bound: float) -> None:
    """To within ``bound`` units of the last place."""
    for number, case in enumerate(cases):
        found = differences(case, [results[number] for results in by_rank])
        most = bound * torch.finfo(case.dtype).eps
        assert all(value < most for value in found.values()), (case, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks: int, dtype: torch.dtype) -> None:
    cases = [dataclasses.replace(case, dtype=dtype, schedule="gather") for case in CASES]
    assert_equal(cases, run_processes(many, ranks, cases, ranks), 32)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_schedule_computes_the_same(ranks: int) -> None:
    cases = [
        dataclasses.replace(
            case, schedule=schedule, ulysses=ulysses, kv_heads=kv_heads, head_groups=groups
        )
        for case in CASES
        for schedule, ulysses, kv_heads, groups in WAYS[ranks]
    ]
    assert_equal(cases, run_processes(many, ranks, cases, ranks), 32)


LONG = [
    Case("causal", length=1024),
    Case("halo", {"window": 100}, chunks=1, length=1024),
    Case("halo of several ranks", {"band": 600}, chunks=1, length=1024),
    Case("halo and sink tokens", {"window": 100, "num_sink_tokens": 4}, chunks=1, length=1024),
    Case("halo in zigzag", {"window": 100}, length=1024),
    Case("documents", {"kv_documents": [[i // 300 for i in range(1024)]]}, length=1024),
    Case(
        "documents of one rank",
        {"kv_documents": [[i // 256 for i in range(1024)]]},
        chunks=1,
        length=1024,
    ),
]


def counted(case: Case, ranks: int) -> list[tuple[int, int]]:
    """Bytes that each rank sends, forward and backward, token by token of the plan."""
    plan = make_plan(case.pattern(), Layout(case.length, ranks, case.chunks))
    size = case.batch * case.kv_heads * (case.head_dim + case.value_dim)
    itemsize = case.dtype.itemsize

    calls = [each for rank in range(ranks) for each in plan.reached(rank)]

    def width(token: int) -> int:
        """Of a gradient that travels: what others add to is not rounded before."""
        several = sum(any(token in run for run in each.runs) for each in calls) > 1
        return max(itemsize, 4) if several else itemsize

    return [
        (
            sum(len(move.tokens) for move in plan.sends(rank)) * size * itemsize,
            sum(width(t) for move in plan.receives(rank) for t in move.tokens) * size,
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_sent_is_what_the_plan_says(ranks: int) -> None:
    cases = [
        dataclasses.replace(case, schedule="gather", batch=1, dtype=dtype, heads=2)
        for dtype in (torch.float32, torch.bfloat16)
        for case in LONG
    ]
    by_rank = run_processes(many, ranks, cases, ranks)
    assert_equal(cases[: len(LONG)], by_rank, 64)
    for number, case in enumerate(cases):
        sent = [results[number]["bytes"] for results in by_rank]
        assert sent == counted(case, ranks), case.name
    whole = [results[0]["bytes"][0] for results in by_rank]
    halo = [results[1]["bytes"][0] for results in by_rank]
    assert 0 < sum(halo) < sum(whole) / 2
    assert sum(results[-1]["bytes"][0] for results in by_rank) == 0
    assert cases[-1].name == "documents of one rank"
