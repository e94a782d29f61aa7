"""What autograd, checkpointing and the order of transfers do to gathered keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_attn_plugin.ops import attention
from hf_attn_plugin.parallel import Layout, Shard, gather, sharded_attention, wide
from hf_attn_plugin.parallel.exchange import Exchange, start_exchange
from hf_attn_plugin.parallel.traffic import make_traffic
from hf_attn_plugin.patterns import Pattern
from tests.parallel.processes import run_processes
from tests.parallel.sharding import (
    Case,
    alone,
    differences,
    errors_by_one_process,
    joined,
    make_shard,
    sharded,
)

CAUSAL = Case("causal", schedule="gather")
WINDOW = Case("window", {"window": 20}, chunks=1, length=256, schedule="gather")
PADDED = {"key_valid": [[True] * 6 + [False] * 26]}


# -- a control: an error in the transfers is seen -------------------------------------------------


def not_sent_home(rank: int, case: Case, ranks: int) -> dict[str, Any]:
    """Gradients of keys that travelled stay where they were made."""

    def forgetful(*args: Any) -> Any:
        return dataclasses.replace(make_traffic(*args), leaving=(), returning=())

    gather.make_traffic = forgetful  # type: ignore[attr-defined]
    return sharded(rank, case, ranks)


@pytest.mark.parametrize("case", [CAUSAL, WINDOW], ids=lambda case: case.name)
def test_gradients_that_are_not_sent_home_are_seen(case: Case) -> None:
    found = differences(case, run_processes(not_sent_home, 2, case, 2))
    assert found["key"] > 0.01
    assert found["value"] > 0.01
    assert found["output"] < 1e-14
    assert found["query"] < 1e-14


# -- layers, checkpointed or not ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of attention, by one process (``ranks=1``) or several."""

    terms: dict[str, Any]
    ranks: int
    chunks: int = 1
    ulysses: int = 1
    schedule: str = "gather"
    layers: int = 2
    whole_layer: bool = True
    checkpointed: str | None = None
    dtype: torch.dtype = torch.float64

    def loss(self, rank: int) -> dict[str, Tensor]:
        case = Case("stack", self.terms, batch=1, chunks=self.chunks, ulysses=self.ulysses)
        case = dataclasses.replace(case, schedule=self.schedule, head_groups=2)
        pattern = case.pattern()
        shard = make_shard(case, rank, self.ranks) if self.ranks > 1 else None
        made = torch.Generator().manual_seed(1)
        like = {"generator": made, "dtype": torch.float64}
        hidden = torch.randn(1, case.length, 32, **like).to(self.dtype)
        weights = [
            (torch.randn(32, 64, **like) / 6).to(self.dtype).requires_grad_()
            for _ in range(self.layers)
        ]
        target = torch.randn(1, case.length, 32, **like).to(self.dtype)
        if shard is not None:
            hidden, target = (shard.layout.take(tensor, rank) for tensor in (hidden, target))
        hidden.requires_grad_()

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if shard is None:
                return attention(query, key, value, pattern, scaling=0.3)[0]
            return sharded_attention(query, key, value, pattern, shard, scaling=0.3)

        def layer(state: Tensor, weight: Tensor) -> Tensor:
            split = (state @ weight).unflatten(-1, (16, 4)).transpose(1, 2)
            parts = (split[:, :8], split[:, 8:12], split[:, 12:])
            if self.checkpointed is None or self.whole_layer:
                output = attend(*parts)
            else:
                output = run_again(attend, *parts)
            return state + output.transpose(1, 2).flatten(2)

        def run_again(function: Any, *args: Tensor) -> Tensor:
            return checkpoint(function, *args, use_reentrant=self.checkpointed == "reentrant")

        state = hidden
        for weight in weights:
            whole = self.checkpointed is not None and self.whole_layer
            state = run_again(layer, state, weight) if whole else layer(state, weight)
        (state * target).sum().backward()
        return {"hidden": hidden.grad, **{str(i): w.grad for i, w in enumerate(weights)}}


def stacks(rank: int, stacks: list[Stack]) -> list[dict[str, Tensor]]:
    return [stack.loss(rank) for stack in stacks]


# With a window, the third and fourth of four ranks have padding alone and nothing to compute.
PATTERNS = {
    2: [({"window": 6}, 1, 1, "gather"), ({}, 2, 1, "gather"), ({}, 2, 1, "ulysses")],
    4: [
        ({**PADDED, "window": 6}, 1, 1, "gather"),
        ({**PADDED, "causal": False}, 1, 2, "gather"),
        ({**PADDED, "window": 6}, 1, 2, "ring"),
    ],
}
CHECKPOINTS = [("reentrant", True), ("not reentrant", True), ("not reentrant", False)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_checkpointed_layers(ranks: int) -> None:
    made = [
        Stack(terms, ranks, chunks, ulysses, schedule, whole_layer=whole, checkpointed=how)
        for terms, chunks, ulysses, schedule in PATTERNS[ranks]
        for how, whole in CHECKPOINTS
    ]
    by_rank = run_processes(stacks, ranks, made)
    for number, stack in enumerate(made):
        expected = dataclasses.replace(stack, ranks=1, checkpointed=None).loss(0)
        found = [results[number] for results in by_rank]
        layout = Layout(32, ranks, stack.chunks)
        hidden = layout.join([each["hidden"] for each in found])
        torch.testing.assert_close(hidden, expected.pop("hidden"), rtol=1e-12, atol=1e-12)
        for name, grad in expected.items():
            total = torch.stack([each[name] for each in found]).sum(0)
            torch.testing.assert_close(total, grad, rtol=1e-12, atol=1e-12)


def test_checkpoints_change_no_bit_where_gradients_stay_wide() -> None:
    # (A reentrant checkpoint's first pass is without gradients, and so by other kernels.)
    ways = [(None, True), *(way for way in CHECKPOINTS if way[0] != "reentrant")]
    made = [
        Stack({}, 2, 2, whole_layer=whole, checkpointed=how, dtype=torch.bfloat16)
        for how, whole in ways
    ]
    for results in run_processes(stacks, 2, made):
        for changed in results[1:]:
            for name, grad in results[0].items():
                assert torch.equal(changed[name], grad)


# -- transfers beside computation -----------------------------------------------------------------


def in_order(rank: int) -> list[str]:
    log: list[str] = []

    class Logged(Exchange):
        def wait(self) -> None:
            log.append("wait")
            super().wait()

    def start(*args: Any) -> Exchange:
        log.append("start")
        exchange = start_exchange(*args)
        return Logged(**vars(exchange))

    def attend(*args: Any, **how: Any) -> tuple[Tensor, Tensor | None]:
        log.append("attend")
        output, lse = attention(*args, **how)
        output.register_hook(lambda grad: log.append("attend backward"))
        return output, lse

    gather.start_exchange, wide.attention = start, attend  # type: ignore[attr-defined]
    sharded(rank, dataclasses.replace(CAUSAL, chunks=1, head_groups=2), 2)
    return log


def test_transfers_set_out_before_what_they_are_beside_and_are_waited_for_after() -> None:
    forward = ["start", "start", "wait", "attend", "wait", "attend"]
    backward = ["attend backward", "start", "attend backward", "start", "wait", "wait"]
    assert run_processes(in_order, 2) == [forward + backward] * 2


# -- which gradients are wanted -------------------------------------------------------------------


def some_gradients(rank: int, ranks: int) -> dict[str, Any]:
    case = CAUSAL
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
    expected = alone(CAUSAL)
    for name, whole in joined(CAUSAL, results).items():
        torch.testing.assert_close(whole, expected[name], rtol=1e-12, atol=1e-12)
    for name, share in (("query", 0), ("key", 1), ("value", 1)):
        there, back = (sum(result[f"{name}'s bytes"][way] for result in results) for way in (0, 1))
        assert 2 * back == share * there


# -- rounding --------------------------------------------------------------------------------------


def rounded_before(rank: int, case: Case, ranks: int) -> dict[str, Any]:
    """The same kernel, with keys' gradients rounded before they are added."""

    def blocked(*args: Any, **how: Any) -> tuple[Tensor, Tensor | None]:
        return attention(*args, **{**how, "need_lse": True})

    wide.wide_kernel = lambda *args, **flags: None  # type: ignore[assignment]
    wide.attention = blocked  # type: ignore[attr-defined]
    return sharded(rank, case, ranks)


def test_bfloat16_rounds_as_often_as_one_process() -> None:
    case = Case(
        "bf16", length=256, head_dim=16, value_dim=16, dtype=torch.bfloat16, schedule="gather"
    )
    for changed in (
        case,
        dataclasses.replace(case, sinks=True, softcap=3.0, head_groups=2),
        dataclasses.replace(case, schedule="ulysses", kv_heads=1),
    ):
        ratios = errors_by_one_process(changed, run_processes(sharded, 4, changed, 4))
        ratios.pop("sinks", None)  # four numbers, of which each rank rounds its share
        assert max(ratios.values()) < 1.01, ratios
        control = errors_by_one_process(changed, run_processes(rounded_before, 4, changed, 4))
        assert min(control["key"], control["value"]) > 1.1, control


# -- plain integers --------------------------------------------------------------------------------


def test_nothing_is_copied_where_nothing_is_received() -> None:
    documents = torch.arange(1024)[None] // 128
    pattern = Pattern(q_len=1024, kv_len=1024, q_documents=documents, kv_documents=documents)
    traffic = make_traffic(pattern, Layout(1024, 2, 4), 0)
    assert not traffic.sends
    assert not traffic.receives
    local = torch.randn(512, 1, 2, 8)
    assert gather._buffer(local, traffic).data_ptr() == local.data_ptr()


def test_far_apart_runs_of_queries_do_not_span_what_lies_between() -> None:
    pattern = Pattern(q_len=4096, kv_len=4096, window=100)
    traffic = make_traffic(pattern, Layout(4096, 4, 2), 0)
    assert traffic.length == 512 + 128 + 512  # head, halo, tail
    assert not traffic.gaps
    sinks = make_traffic(pattern.replace(num_sink_tokens=1), Layout(4096, 4, 2), 1)
    assert [len(gap) for gap in sinks.gaps] == [512 - 2 * 128, 3072 - 128 - 1024]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, "rank must be one of the layout's 4"),
        ({"ulysses": 3}, "ulysses must divide the 4 ranks"),
        ({"schedule": "star"}, "schedule must be one of gather, ring, ulysses or None"),
        ({"schedule": "ulysses", "ulysses": 2}, "say 'gather' or 'ring'"),
    ],
)
def test_shards_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shard(**{"layout": Layout(32, 4, 2), "rank": 0, **change})


def test_what_does_not_fit_is_refused_before_anything_is_sent() -> None:
    """There is no process group: whatever is sent would raise another error."""
    shard = Shard(Layout(32, 4, 2), 0)
    query, key = torch.randn(1, 6, 8, 4), torch.randn(1, 3, 8, 4)
    pattern = Pattern(q_len=32, kv_len=32)
    with pytest.raises(ValueError, match="pattern must be that of the whole sequence, 32"):
        sharded_attention(query, key, key, Pattern(q_len=8, kv_len=8), shard, scaling=1.0)
    with pytest.raises(ValueError, match="each of 4 ranks holds 8 of 32 tokens"):
        sharded_attention(query[:, :, :7], key, key, pattern, shard, scaling=1.0)
    with pytest.raises(ValueError, match="6 query heads and 3 KV heads cannot be shared by 4"):
        by_heads = Shard(Layout(32, 4, 2), 0, schedule="ulysses")
        sharded_attention(query, key, key, pattern, by_heads, scaling=1.0)
