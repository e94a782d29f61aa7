"""Heads exchanged in groups: what is computed, the order of transfers, what stays in flight."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_attn_plugin.ops import attention
from hf_attn_plugin.parallel import attention as sharded_module
from hf_attn_plugin.parallel import sharded_attention, ulysses, wide
from hf_attn_plugin.parallel.exchange import Exchange, start_exchange
from tests.parallel.processes import run_processes
from tests.parallel.sharding import (
    Case,
    differences,
    errors_by_one_process,
    joined,
    make_shard,
    sharded,
)

BASE = Case("causal", schedule="ulysses", heads=8, kv_heads=4, dtype=torch.float32)
_DENSE = (torch.rand(1, 8, 32, 32, generator=torch.Generator().manual_seed(2)) > 0.4).tolist()

CASES = [
    BASE,
    dataclasses.replace(BASE, name="softcap and sinks", sinks=True, softcap=2.0),
    dataclasses.replace(BASE, name="sizes", value_dim=4, chunks=1, batch=1),
    dataclasses.replace(BASE, name="own mask", terms={"dense": _DENSE, "causal": False}),
    dataclasses.replace(BASE, name="padding", terms={"key_valid": [[True] * 6 + [False] * 26] * 2}),
]
# By number of ranks: schedule, ulysses, KV heads.
WAYS = {
    2: [("ulysses", 1, 4), ("ulysses", 1, 8), ("ulysses", 1, 1)],
    4: [("ulysses", 1, 8), ("ulysses", 1, 2), ("gather", 2, 4), ("ring", 2, 4), ("gather", 2, 1)],
}


def in_groups(rank: int, cases: list[Case], ranks: int) -> list[list[dict[str, Any]]]:
    """Each case in one group of heads and in several."""
    counts = (1, 2, 4)
    return [
        [sharded(rank, dataclasses.replace(case, head_groups=count), ranks) for count in counts]
        for case in cases
    ]


@pytest.mark.parametrize("ranks", [2, 4])
def test_groups_change_no_bit_and_send_as_much(ranks: int) -> None:
    cases = [
        dataclasses.replace(case, schedule=schedule, ulysses=ulysses, kv_heads=kv_heads)
        for case in CASES
        for schedule, ulysses, kv_heads in WAYS[ranks]
    ]
    results = run_processes(in_groups, ranks, cases, ranks)
    for number, case in enumerate(cases):
        found = differences(case, [result[number][1] for result in results])
        assert max(found.values()) < 64 * torch.finfo(case.dtype).eps, (case, found)
        for result in results:
            once, *more = result[number]
            for other in more:
                assert other.pop("bytes") == once["bytes"], case
                if case.sinks:  # a sum over all queries, whose order is free
                    torch.testing.assert_close(other.pop("sinks"), once["sinks"])
                for name, tensor in other.items():
                    assert torch.equal(tensor, once[name]), (case, name)


def swapped(rank: int, ranks: int) -> dict[str, Any]:
    """The groups' results come home in each other's place."""
    home = ulysses._Call.home

    def crossed(self: Any, order: Any, heads: Any) -> list[Tensor]:
        return home(self, order, list(reversed(heads)))

    ulysses._Call.home = crossed  # type: ignore[method-assign]
    return sharded(rank, dataclasses.replace(BASE, head_groups=2), ranks)


def test_groups_in_each_others_place_are_seen() -> None:
    found = differences(BASE, run_processes(swapped, 2, 2))
    assert min(found.values()) > 0.1


# -- the order of transfers ------------------------------------------------------------------------


@dataclasses.dataclass
class Log:
    """What is done in which order, and what of it is not finished."""

    lines: list[str] = dataclasses.field(default_factory=list)
    flying: list[Exchange] = dataclasses.field(default_factory=list)

    def listen(self) -> None:
        log = self

        class Logged(Exchange):
            def wait(self) -> None:
                log.lines.append(f"wait {log.flying.index(self)}")
                super().wait()

        def start(*args: Any) -> Exchange:
            exchange = Logged(**vars(start_exchange(*args)))
            log.lines.append(f"start {len(log.flying)}")
            log.flying.append(exchange)
            return exchange

        def attend(*args: Any, **how: Any) -> tuple[Tensor, Tensor | None]:
            log.lines.append("attend")
            output, lse = attention(*args, **how)
            if output.requires_grad:
                output.register_hook(lambda grad: log.lines.append("backward"))
            return output, lse

        ulysses.start_exchange, wide.attention = start, attend  # type: ignore[attr-defined]

    @property
    def unfinished(self) -> int:
        return sum(bool(exchange._works) for exchange in self.flying)


def in_order(rank: int, groups: int) -> tuple[list[str], int]:
    log = Log()
    log.listen()
    sharded(rank, dataclasses.replace(BASE, head_groups=groups), 2)
    return log.lines, log.unfinished


def test_groups_travel_beside_each_others_attention() -> None:
    forward = "start 0, start 1, wait 0, attend, start 2, wait 1, attend, start 3, wait 2, wait 3"
    gradients = "start 4, start 5, wait 4, backward, start 6, wait 5, backward, start 7"
    wanted = f"{forward}, {gradients}, wait 6, wait 7".split(", ")
    assert run_processes(in_order, 2, 2) == [(wanted, 0)] * 2
    alone = "start 0, wait 0, attend, start 1, wait 1, start 2, wait 2, backward, start 3, wait 3"
    assert run_processes(in_order, 2, 1) == [(alone.split(", "), 0)] * 2


# -- checkpoints -----------------------------------------------------------------------------------


def finish(ctx: Any, call: Any, *leaving: Tensor) -> Tensor:
    """Saves nothing, so that what is computed again ends before it."""
    ctx.call = call
    return call.home(range(len(leaving)), [[heads.query] for heads in call.groups])[0]


def checkpointed(rank: int, ranks: int, save: bool) -> dict[str, Any]:
    """Attention alone is computed again, as far as it must be."""
    log = Log()
    log.listen()
    if not save:
        ulysses._Finish.forward = staticmethod(finish)  # type: ignore[method-assign]
    case = dataclasses.replace(BASE, head_groups=2)
    shard = make_shard(case, rank, ranks)
    tensors = {n: shard.layout.take(t, rank, dim=2) for n, t in case.tensors().items()}
    grad, pattern = tensors.pop("grad"), case.pattern()
    found: dict[str, Any] = {}
    for how in (False, True):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}

        def attend(*parts: Tensor) -> Tensor:
            return sharded_attention(*parts, pattern, shard, scaling=0.3)

        output = checkpoint(attend, *leaves.values(), use_reentrant=how)
        output.backward(grad)
        found |= {"output": output.detach(), **{n: t.grad for n, t in leaves.items()}}
    return {**found, "unfinished": log.unfinished, "lines": log.lines}


def test_what_is_computed_again_leaves_nothing_on_its_way() -> None:
    results = run_processes(checkpointed, 2, 2, True)
    assert [result["unfinished"] for result in results] == [0, 0]
    assert results[0]["lines"] == results[1]["lines"]
    found = differences(BASE, results)
    assert max(found.values()) < 64 * torch.finfo(BASE.dtype).eps
    control = run_processes(checkpointed, 2, 2, False)
    assert [result["unfinished"] for result in control] == [1, 1]


# -- which gradients are wanted --------------------------------------------------------------------


def some_gradients(rank: int, ranks: int) -> dict[str, Any]:
    case = dataclasses.replace(BASE, head_groups=2)
    shard = make_shard(case, rank, ranks)
    tensors = {n: shard.layout.take(t, rank, dim=2) for n, t in case.tensors().items()}
    grad = tensors.pop("grad")
    found: dict[str, Any] = {}
    for wanted in ("query", "key", "value"):
        leaves = {n: t.detach().requires_grad_(n == wanted) for n, t in tensors.items()}
        before = shard.bytes_sent
        output = sharded_attention(*leaves.values(), case.pattern(), shard, scaling=0.3)
        there = shard.bytes_sent
        output.backward(grad, retain_graph=True)
        back = shard.bytes_sent
        output.backward(grad)
        found[wanted] = leaves[wanted].grad / 2
        found[f"{wanted}'s bytes"] = (there - before, back - there)
    with torch.no_grad():
        found["output"] = sharded_attention(*tensors.values(), case.pattern(), shard, scaling=0.3)
    return found


def test_gradients_of_one_tensor_alone_and_twice() -> None:
    results = run_processes(some_gradients, 2, 2)
    assert joined(BASE, results).keys() == {"output", "query", "key", "value"}
    assert max(differences(BASE, results).values()) < 64 * torch.finfo(BASE.dtype).eps
    # 8 query heads, 4 of keys, 4 of values, and 8 of the output.
    for name, heads in (("query", 8), ("key", 4), ("value", 4)):
        there, back = results[0][f"{name}'s bytes"]
        assert back * 24 == there * (8 + heads)


# -- rounding --------------------------------------------------------------------------------------


def rounded_by_schedule(rank: int, case: Case, ranks: int) -> dict[str, Any]:
    """A schedule's sums are rounded before they are added to those of other ranks."""
    for name, run in list(sharded_module._SCHEDULES.items()):

        def forgetful(*args: Any, run: Any = run, keep: Any = None, **how: Any) -> Tensor:
            return run(*args, **how)

        sharded_module._SCHEDULES[name] = forgetful
    return sharded(rank, case, ranks)


@pytest.mark.parametrize("schedule", ["gather", "ring"])
def test_a_kv_head_of_several_ranks_is_rounded_once(schedule: str) -> None:
    case = Case(
        "bf16",
        length=256,
        kv_heads=1,
        head_dim=16,
        value_dim=16,
        dtype=torch.bfloat16,
        schedule=schedule,
        ulysses=2,
    )
    ratios = errors_by_one_process(case, run_processes(sharded, 4, case, 4))
    assert max(ratios.values()) < 1.01, ratios
    control = errors_by_one_process(case, run_processes(rounded_by_schedule, 4, case, 4))
    assert min(control["key"], control["value"]) > 1.1, control
