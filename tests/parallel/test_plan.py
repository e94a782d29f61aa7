"""Plans against the mask of the whole sequence, pair by pair."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_attn_plugin.parallel import plan as plan_module
from hf_attn_plugin.parallel import reach
from hf_attn_plugin.parallel.layout import Layout, padded_length
from hf_attn_plugin.parallel.plan import Plan, make_plan
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.intervals import query_intervals
from tests.patterns.test_part import random_whole

BLOCK = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few tokens, so that short sequences have several."""
    monkeypatch.setattr(plan_module, "BLOCK", BLOCK)
    monkeypatch.setattr(reach, "BLOCK", BLOCK)


def random_case(rng: random.Random) -> tuple[Pattern, Layout]:
    ranks, chunks = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 2, 4])
    length = padded_length(rng.choice([20, 60, 130]), ranks, chunks, rng.choice([1, 5, 8]))
    return random_whole(rng, 2, length, length), Layout(length, ranks, chunks)


def flags(runs: list[range] | tuple[range, ...], length: int) -> torch.Tensor:
    marked = torch.zeros(length, dtype=torch.bool)
    for run in runs:
        assert len(run) > 0
        assert not marked[run.start : run.stop].any()  # no token twice
        marked[run.start : run.stop] = True
    return marked


def in_blocks(needed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``needed`` with every block of which some token is needed, by a loop."""
    wide = needed.clone()
    for token in needed.nonzero().flatten().tolist():
        chunk = token // layout.chunk * layout.chunk
        first = chunk + (token - chunk) // BLOCK * BLOCK
        wide[first : min(first + BLOCK, chunk + layout.chunk)] = True
    return wide


def missing(mask: torch.Tensor, plan: Plan) -> int:
    """Keys that a rank's queries see and that it neither holds nor gets."""
    layout, count = plan.layout, 0
    for rank in range(layout.ranks):
        held = flags(layout.runs(rank), layout.length)
        got = flags([t.tokens for t in plan.receives(rank)], layout.length)
        count += int((mask[held].any(0) & ~(held | got)).sum())
    return count


@pytest.mark.parametrize("seed", range(8))
def test_what_is_sent_is_what_is_needed(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    exact = 0
    for _ in range(60):
        pattern, layout = random_case(rng)
        plan = make_plan(pattern, layout)
        mask = pattern.visible("cpu").flatten(0, 1).any(0)
        has_runs = query_intervals(pattern, "cpu") is not None
        assert missing(mask, plan) == 0, (pattern, layout)
        for rank in range(layout.ranks):
            held = flags(layout.runs(rank), layout.length)
            got = flags([t.tokens for t in plan.receives(rank)], layout.length)
            assert not bool((got & held).any())
            if has_runs:  # to the block
                assert torch.equal(got, in_blocks(mask[held].any(0), layout) & ~held)
                exact += int(got.any())
            for transfer in plan.receives(rank):
                layout.local(transfer.source, transfer.tokens)  # the source holds them, in a run
                assert transfer in plan.sends(transfer.source)
            for reached in plan.reached(rank):
                rows = slice(reached.rows.start, reached.rows.stop)
                seen = flags(reached.runs, layout.length)
                assert not bool((mask[rows].any(0) & ~seen).any())
                assert not bool((seen & ~(held | got)).any())
                if has_runs:
                    assert torch.equal(seen, in_blocks(mask[rows].any(0), layout))
    assert exact > 10


def test_a_transfer_less_is_seen() -> None:
    pattern = Pattern(q_len=64, kv_len=64, band=9)
    plan = make_plan(pattern, Layout.contiguous(64, 4))
    mask = pattern.visible("cpu")[0, 0]
    assert missing(mask, plan) == 0
    plan.transfers = plan.transfers[1:]
    assert missing(mask, plan) == 8


@pytest.mark.parametrize("seed", range(8))
def test_pieces_hold_every_pair_once(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        pattern, layout = random_case(rng)
        plan = make_plan(pattern, layout)
        mask = pattern.visible("cpu").flatten(0, 1).any(0)
        has_runs = query_intervals(pattern, "cpu") is not None
        count = torch.zeros(layout.length, layout.length, dtype=torch.int64)
        for rank in range(layout.ranks):
            for source in range(layout.ranks):
                sent = [t.tokens for t in plan.receives(rank) if t.source == source]
                for piece in plan.pieces(rank, source):
                    layout.local(rank, piece.rows)
                    layout.local(source, piece.cols)
                    rows = slice(piece.rows.start, piece.rows.stop)
                    cols = slice(piece.cols.start, piece.cols.stop)
                    count[rows, cols] += 1
                    if source != rank:
                        assert any(t.start <= cols.start and cols.stop <= t.stop for t in sent), (
                            pattern,
                            layout,
                        )
                    if has_runs:
                        seen = mask[rows, cols]
                        assert bool(seen[:BLOCK].any())  # trimmed on all sides
                        assert bool(seen[-BLOCK:].any())
                        assert bool(seen[:, :BLOCK].any())
                        assert bool(seen[:, -BLOCK:].any())
        assert int(count.max()) <= 1
        assert not bool((mask & (count == 0)).any()), (pattern, layout)


def test_nothing_is_sent_that_no_query_reaches() -> None:
    documents = torch.arange(64)[None] // 16
    alone = Pattern(q_len=64, kv_len=64, q_documents=documents, kv_documents=documents)
    assert make_plan(alone, Layout.contiguous(64, 4)).transfers == ()
    assert len(make_plan(alone, Layout.contiguous(64, 8)).transfers) == 4
    apart = alone.replace(kv_documents=documents + 4)
    plan = make_plan(apart, Layout.contiguous(64, 4))
    assert plan.transfers == ()
    assert plan.visited(0) == 0


def test_a_window_is_a_halo() -> None:
    pattern = Pattern(q_len=96, kv_len=96, band=12, causal=True)
    plan = make_plan(pattern, Layout.contiguous(96, 3))
    assert [(t.source, t.target, t.tokens) for t in plan.transfers] == [
        (0, 1, range(16, 32)),
        (1, 2, range(48, 64)),
    ]
    assert [piece.rows for piece in plan.pieces(1, 0)] == [range(32, 48)]
    assert plan.pieces(0, 1) == plan.pieces(2, 0) == ()
    sinks = make_plan(
        Pattern(q_len=96, kv_len=96, window=12, num_sink_tokens=1), Layout.contiguous(96, 3)
    )
    assert [t.tokens for t in sinks.receives(2)] == [range(8), range(48, 64)]
    assert [piece.cols for piece in sinks.pieces(2, 0)] == [range(8)]


def test_work_is_counted_in_blocks() -> None:
    causal = Pattern(q_len=64, kv_len=64)
    plan = make_plan(causal, Layout.contiguous(64, 2))
    assert [plan.visited(rank) for rank in range(2)] == [64 * 10, 64 * 26]
    assert [plan.visited(1, source) for source in range(2)] == [64 * 16, 64 * 10]
    assert plan.balance == pytest.approx(18 / 26)
    assert make_plan(causal, Layout.zigzag(64, 2)).balance == 1.0
    assert make_plan(Pattern(q_len=0, kv_len=0), Layout(0, 2)).balance == 1.0


def test_a_plan_in_words() -> None:
    pattern = Pattern(q_len=64, kv_len=64)
    text = make_plan(pattern, Layout.contiguous(64, 2)).describe(token_bytes=2**18)
    assert text.splitlines() == [
        "64 tokens over 2 ranks (contiguous), balance 69.2 %",
        "rank 0: tokens 0..32; 640 pairs in blocks (27.8 %)",
        "rank 1: tokens 32..64; 1664 pairs in blocks (72.2 %)",
        "  from rank 0: 32 tokens (8.0 MiB): 0..32",
    ]


def test_a_pattern_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="the pattern has 12 queries, the layout 16"):
        make_plan(Pattern(q_len=12, kv_len=16), Layout(16, 2))


def test_runs_that_overlap_or_touch_are_merged() -> None:
    start, stop = reach.merged(np.array([9, 0, 2, 4, 20]), np.array([12, 3, 4, 8, 21]))
    assert list(zip(start.tolist(), stop.tolist(), strict=True)) == [(0, 8), (9, 12), (20, 21)]
