"""The ring: its steps, what it sends in which order, and what it computes."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any

import pytest
import torch

from hf_attn_plugin.parallel import ring
from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.parallel.plan import make_plan
from hf_attn_plugin.parallel.shard import Shard
from hf_attn_plugin.patterns import Pattern
from tests.parallel.processes import run_processes
from tests.parallel.sharding import Case, alone, differences, joined, sharded
from tests.parallel.test_attention import CASES, LONG

# -- steps: plain integers ------------------------------------------------------------------------

LENGTH = 2048


def steps_of(layout: Layout, **terms: Any) -> list[tuple[ring.Step, ...]]:
    plan = make_plan(Pattern(q_len=layout.length, kv_len=layout.length, **terms), layout)
    return [ring.ring_steps(plan, rank) for rank in range(layout.ranks)]


def tokens(runs: tuple[range, ...]) -> int:
    return sum(map(len, runs))


def test_a_causal_ring_by_hand() -> None:
    """Four ranks, two chunks each: 0 1 2 3 3 2 1 0, chunks of 256 tokens."""
    first, second, *_ = steps_of(Layout.zigzag(LENGTH, 4))
    assert [step.offset for step in first] == [0, 1, 2, 3]
    assert [(step.source, step.target) for step in second] == [(1, 1), (0, 2), (3, 3), (2, 0)]
    # Rank 1 has chunks 1 and 6. Both see rank 0's chunk 0; the other is later than both.
    assert second[1].received == (range(256),)
    assert [(p.rows, p.cols) for p in second[1].pieces] == [
        (range(256, 512), range(256)),
        (range(1536, 1792), range(256)),
    ]
    # Its chunk 6 sees both of rank 3's, which are neighbours.
    assert second[2].received == (range(768, 1280),)
    assert [(p.rows, p.cols) for p in second[2].pieces] == [(range(1536, 1792), range(768, 1280))]
    # Rank 0, which has the first and the last chunk, is told of its own chunks by nobody.
    assert first[0].received == first[0].sent == ()


@pytest.mark.parametrize(
    ("chunks", "terms", "offsets"),
    [
        (2, {}, [0, 1, 2, 3]),
        (1, {}, [0, 1, 2, 3]),
        (1, {"window": 100}, [0, 1]),
        (1, {"window": 512}, [0, 1]),
        (1, {"band": 600}, [0, 1, 2]),
        (1, {"window": 100, "causal": False}, [0, 1, 3]),
        (1, {"window": 100, "num_sink_tokens": 1}, [0, 1, 2, 3]),
        (1, {"kv_documents": [i // 512 for i in range(LENGTH)]}, [0]),
        (1, {"kv_documents": [i // 700 for i in range(LENGTH)]}, [0, 1]),
    ],
    ids=str,
)
def test_steps_that_no_key_reaches_are_left_out(
    chunks: int, terms: dict[str, Any], offsets: list[int]
) -> None:
    if "kv_documents" in terms:
        documents = torch.tensor(terms["kv_documents"])[None]
        terms = {"q_documents": documents, "kv_documents": documents}
    for steps in steps_of(Layout(LENGTH, 4, chunks), **terms):
        assert [step.offset for step in steps] == offsets


def test_a_window_sends_its_halo() -> None:
    for rank, steps in enumerate(steps_of(Layout.contiguous(LENGTH, 4), window=100)):
        received, sent = tokens(steps[-1].received), tokens(steps[-1].sent)
        assert received == (128 if rank > 0 else 0)
        assert sent == (128 if rank < 3 else 0)
        for piece in steps[-1].pieces:  # and computes with the queries that reach it
            assert len(piece.rows) == 128


PATTERNS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (4, {}),
    (1, {"window": 300}),
    (2, {"band": 300, "num_sink_tokens": 3, "window": 100}),
    (1, {"causal": False, "window": 50, "num_global_tokens": 2}),
    (2, {"causal": False}),
    (1, {"window": 40, "stride": 37}),
]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("chunks", "terms"), PATTERNS, ids=str)
def test_every_pair_is_in_one_piece(ranks: int, chunks: int, terms: dict[str, Any]) -> None:
    length = 96 * ranks * chunks
    by_rank = steps_of(Layout(length, ranks, chunks), **terms)
    counts = torch.zeros(length, length, dtype=torch.int64)
    for steps in by_rank:
        for step in steps:
            for piece in step.pieces:
                counts[piece.rows.start : piece.rows.stop, piece.cols.start : piece.cols.stop] += 1
    seen = Pattern(q_len=length, kv_len=length, **terms).visible("cpu")[0, 0]
    assert (counts[seen] == 1).all()
    assert counts.max() == 1


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("chunks", "terms"), PATTERNS, ids=str)
def test_what_one_sends_the_other_expects(ranks: int, chunks: int, terms: dict[str, Any]) -> None:
    layout = Layout(96 * ranks * chunks, ranks, chunks)
    by_rank = steps_of(layout, **terms)
    assert len({tuple(step.offset for step in steps) for steps in by_rank}) == 1
    for rank, steps in enumerate(by_rank):
        own = [token for run in layout.runs(rank) for token in run]
        for number, step in enumerate(steps[1:], 1):
            partner = by_rank[step.target][number]
            assert partner.source == rank and partner.received == step.sent
            assert {token for run in step.sent for token in run} <= set(own)
            for piece in step.pieces:
                assert any(set(piece.cols) <= set(run) for run in step.received)


# -- the order of transfers, without processes ----------------------------------------------------

Transfers = list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]


def recorded(rank: int, layout: Layout, monkeypatch: pytest.MonkeyPatch, **terms: Any) -> Transfers:
    """Per exchange of a forward and a backward pass, (peer, elements) sent and received."""
    made: Transfers = []

    def record(group: Any, sends: list[Any], receives: list[Any]) -> Any:
        for _, tensor in (*sends, *receives):
            assert tensor.is_contiguous()
        for _, tensor in receives:
            tensor.zero_()
        made.append(tuple([(peer, t.numel()) for peer, t in moves] for moves in (sends, receives)))
        return types.SimpleNamespace(bytes_sent=0, wait=lambda: None)

    monkeypatch.setattr(ring, "start_exchange", record)
    query, key, value = (
        torch.randn(1, heads, layout.share, 4, requires_grad=True) for heads in (2, 1, 1)
    )
    pattern = Pattern(q_len=layout.length, kv_len=layout.length, **terms)
    output = ring.ring_attention(query, key, value, pattern, Shard(layout, rank), scaling=1.0)
    output.sum().backward()
    return made


def finish(by_rank: list[Transfers]) -> bool:
    """Whether all transfers meet where every rank has one exchange under way at a time."""
    at = [0] * len(by_rank)
    pending = [collections.deque(transfers) for transfers in by_rank]
    under_way = [[list(moves) for moves in queue[0]] if queue else [[], []] for queue in pending]
    while any(at[rank] < len(transfers) for rank, transfers in enumerate(by_rank)):
        moved = False
        for rank, (sends, _) in enumerate(under_way):
            for peer, size in list(sends):
                expected = next((move for move in under_way[peer][1] if move[0] == rank), None)
                if expected is None:
                    continue
                if expected[1] != size:
                    return False
                sends.remove((peer, size))
                under_way[peer][1].remove(expected)
                moved = True
        for rank, transfers in enumerate(by_rank):
            while at[rank] < len(transfers) and under_way[rank] == [[], []]:
                at[rank] += 1
                moved = True
                if at[rank] < len(transfers):
                    under_way[rank] = [list(moves) for moves in transfers[at[rank]]]
        if not moved:
            return False
    return True


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(("chunks", "terms"), PATTERNS, ids=str)
def test_transfers_never_wait_in_a_circle(
    ranks: int, chunks: int, terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(24 * ranks * chunks, ranks, chunks)
    by_rank = [recorded(rank, layout, monkeypatch, **terms) for rank in range(ranks)]
    assert len(set(map(len, by_rank))) == 1
    assert finish(by_rank)


def test_a_rank_with_an_order_of_its_own_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.zigzag(96, 3)
    by_rank = [recorded(rank, layout, monkeypatch) for rank in range(3)]
    by_rank[1][0], by_rank[1][1] = by_rank[1][1], by_rank[1][0]
    assert not finish(by_rank)


# -- in processes ---------------------------------------------------------------------------------


def many(rank: int, cases: list[Case], ranks: int) -> list[dict[str, Any]]:
    return [sharded(rank, case, ranks) for case in cases]


def by_ring(cases: list[Case], **changes: Any) -> list[Case]:
    return [dataclasses.replace(case, schedule="ring", **changes) for case in cases]


@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks: int) -> None:
    kinds = [torch.float32, torch.float64]
    cases = [case for dtype in kinds for case in by_ring(CASES, dtype=dtype)]
    cases += by_ring(LONG, batch=1, dtype=torch.float32)
    by_rank = run_processes(many, ranks, cases, ranks)
    for number, case in enumerate(cases):
        found = differences(case, [results[number] for results in by_rank])
        bound = 64 if case.length > 32 else 32
        assert max(found.values()) < bound * torch.finfo(case.dtype).eps, (case, found)
        sent, returned = zip(*(results[number]["bytes"] for results in by_rank), strict=True)
        assert min(sum(sent), sum(returned)) > 0 or "of one rank" in case.name


def test_errors_in_16_bits_are_no_larger_than_those_of_one_process() -> None:
    """Keys' gradients travel in float32, and partial results are merged in float32."""
    cases = by_ring(
        [Case("causal", length=256), Case("bidirectional", {"causal": False}, length=256)],
        dtype=torch.bfloat16,
    )
    by_rank = run_processes(many, 4, cases, 4)
    for number, case in enumerate(cases):
        ours = joined(case, [results[number] for results in by_rank])
        rounded, exact = alone(case), alone(case, torch.float64)
        for name, want in exact.items():
            errors = [(t[name].double() - want).norm() for t in (ours, rounded)]
            assert errors[0] <= 1.02 * errors[1], (case.name, name, errors)
        forward, backward = zip(*(results[number]["bytes"] for results in by_rank), strict=True)
        assert sum(backward) == 3 * sum(forward)  # keys again, and gradients of twice their size


def repeated(rank: int, case: Case) -> bool:
    first, second = sharded(rank, case, 2), sharded(rank, case, 2)
    return all(torch.equal(first[name], second[name]) for name in ("output", "query", "key"))


def test_results_are_equal_from_run_to_run() -> None:
    assert all(run_processes(repeated, 2, *by_ring(CASES[:1], dtype=torch.float32)))


def without_returning(rank: int, case: Case, ranks: int) -> dict[str, Any]:
    ring._Returning.finish = lambda self, own: self.exchange.wait()  # type: ignore[method-assign]
    return sharded(rank, case, ranks)


def with_wrong_keys(rank: int, case: Case, ranks: int) -> dict[str, Any]:
    ring._cut = (
        lambda keys, tokens: tuple(  # type: ignore[assignment]
            t[:, :, : len(tokens)] for t in next(iter(keys.values()))
        )
    )
    return sharded(rank, case, ranks)


def test_errors_are_seen() -> None:
    (case,) = by_ring([Case("causal")])
    found = differences(case, run_processes(without_returning, 2, case, 2))
    assert found["output"] < 1e-14 and found["query"] < 1e-14
    assert found["key"] > 0.1 and found["value"] > 0.1
    found = differences(case, run_processes(with_wrong_keys, 2, case, 2))
    assert min(found.values()) > 0.01
