"""Which layout and which schedule are chosen; numbers of two and of eight H200s."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from hf_attn_plugin.parallel.choice import choose, choose_way, suggested_length
from hf_attn_plugin.parallel.estimates import Shapes
from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.parallel.plan import make_plan
from hf_attn_plugin.patterns import Pattern

GROUPED = Shapes(heads=32, kv_heads=8, head_dim=128)
# Heads that cannot be exchanged among any number of ranks tested here.
ODD = Shapes(heads=33, kv_heads=11, head_dim=128)


def whole(length: int, **terms) -> Pattern:
    return Pattern(q_len=length, kv_len=length, **terms)


def packed(length: int, documents: int, seed: int = 0) -> Pattern:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, documents, (1, length), generator=generator).sort().values
    return whole(length, q_documents=numbers, kv_documents=numbers)


def test_long_causal_attention_exchanges_heads() -> None:
    choice = choose(whole(131072), 2, GROUPED)
    assert (choice.schedule, choice.ulysses, choice.layout.chunks) == ("ulysses", 2, 1)
    (way,) = choice.ways
    assert way.groups == 2
    assert way.exposed == pytest.approx(way.hidden, rel=0.1)
    assert way.exposed + way.hidden == pytest.approx(4.9e-3, rel=0.05)
    assert 0.40 < way.seconds < 0.46  # 900 ms on one GPU by cuDNN, forward and backward
    assert "4.71 ms (1.1 %) above perfect balance" in choice.reason
    assert "ulysses in 2 groups of heads: estimated 442" in choice.reason
    assert str(choice).startswith("contiguous over 2 ranks: ulysses in 2 groups of heads (")
    # A fourth of the transfers: not worth a further call.
    assert choose(whole(32768), 2, GROUPED).ways[0].groups == 1


def test_of_next_to_nothing_no_share_is_told() -> None:
    reason = choose(whole(256), 2, GROUPED).reason
    assert "%" not in reason
    assert " ms above perfect balance" in reason


def test_sums_in_float32_cost_all_of_a_call() -> None:
    """Half of what the second rank sees, the first one sees too: the whole call is slower."""
    contiguous = Layout.contiguous(65536, 2)
    way = choose_way(whole(65536), contiguous, GROUPED, schedule="gather")
    wide = dataclasses.replace(GROUPED, itemsize=4)
    plain = choose_way(whole(65536), contiguous, wide, schedule="gather")
    moved = 2 * (32768 * 8 * 256 * 2) / 280e9  # what float32 travels longer, at most
    backward = 2.5 / 550 / (1 / 600 + 2.5 / 550)
    assert way.seconds > plain.seconds * (1 + 0.2 * backward) - moved
    # As it is where several ranks have the same KV head.
    few = Shapes(heads=32, kv_heads=1, head_dim=128)
    shared, own = (
        choose_way(whole(65536), contiguous, shapes, schedule="ulysses").seconds
        for shapes in (few, dataclasses.replace(few, kv_heads=2))
    )
    assert shared > 1.1 * own


def test_sums_of_rounded_gradients_are_avoided() -> None:
    # Gathering alone would be faster, but adds gradients of most keys, which cost more in float32.
    choice = choose(whole(32768), 2, GROUPED)
    assert (choice.schedule, choice.ulysses) == ("ulysses", 2)
    gathered = choose(whole(32768), 2, GROUPED, schedule="gather")
    in_float32 = dataclasses.replace(GROUPED, itemsize=4)
    assert choose(whole(32768), 2, in_float32, schedule="gather").seconds < gathered.seconds


def test_a_window_fetches_a_halo() -> None:
    for ranks in (2, 8):
        choice = choose(whole(262144, band=4096), ranks, GROUPED)
        assert (choice.schedule, choice.ulysses, choice.layout.chunks) == ("gather", 1, 1)
        assert choice.ways[0].exposed < 0.3e-3
    exchanged = choose(whole(262144, band=4096), 2, GROUPED, schedule="ulysses")
    assert exchanged.seconds > 1.05 * choose(whole(262144, band=4096), 2, GROUPED).seconds


def test_causal_attention_without_exchange_is_head_tail() -> None:
    for ranks in (2, 8):
        choice = choose(whole(131072), ranks, ODD)
        assert (choice.schedule, choice.ulysses, choice.layout.chunks) == ("gather", 1, 2)
        assert choice.ways[0].balance == 1.0
    contiguous = choose(whole(131072), 2, ODD, layout=Layout.contiguous(131072, 2))
    assert contiguous.seconds > 1.4 * choose(whole(131072), 2, ODD).seconds
    assert choose(whole(131072, causal=False), 2, ODD).layout.chunks == 1


def test_packed_documents_are_balanced() -> None:
    many = choose(packed(262144, 64), 2, GROUPED)
    assert (many.schedule, many.layout.chunks) == ("gather", 1)
    # One long document and many short ones: the long one alone is what zigzag halves.
    long = torch.cat([torch.zeros(100000).long(), 1 + torch.arange(162144) // 2000])[None]
    skewed = whole(262144, q_documents=long, kv_documents=long)
    assert choose(skewed, 2, GROUPED).schedule == "ulysses"
    finer = choose(skewed, 2, ODD)
    assert finer.layout.chunks == 8
    balance = {c: make_plan(skewed, Layout(262144, 2, c)).balance for c in (1, 2, 4, 8)}
    assert balance[8] == max(balance.values()) > 0.9 > balance[1]


def test_one_layout_for_all_layers() -> None:
    full, window = whole(262144), whole(262144, band=1024)
    choice = choose([(full, 4), (window, 22)], 2, GROUPED)
    assert (choice.schedule, choice.ulysses, choice.layout.chunks) == (None, 1, 1)
    assert [way.schedule for way in choice.ways] == ["ulysses", "gather"]
    again = [choose_way(pattern, choice.layout, GROUPED) for pattern in (full, window)]
    assert tuple(again) == choice.ways
    assert choose([(full, 4), (window, 22)], 2, ODD).layout.chunks == 2


def test_keys_that_do_not_fit_go_round_the_ring() -> None:
    many_heads = Shapes(heads=33, kv_heads=33, head_dim=128, batch=4)
    assert choose(whole(2**16), 2, many_heads).schedule == "gather"
    choice = choose(whole(2**20), 2, many_heads)
    assert (choice.schedule, choice.layout.chunks) == ("ring", 2)
    assert choose(whole(2**20), 2, many_heads, memory=2e12).schedule == "gather"
    assert choose(whole(2**20, band=4096), 2, many_heads).schedule == "gather"
    assert choose(whole(2**20), 2, many_heads, schedule="gather").schedule == "gather"


def test_what_is_asked_for_is_taken() -> None:
    ring = choose(whole(65536), 4, GROUPED, schedule="ring")
    assert (ring.schedule, ring.ulysses, ring.layout.chunks) == ("ring", 1, 2)
    product = choose(whole(65536), 4, GROUPED, schedule="gather", ulysses=2)
    assert (product.schedule, product.ulysses) == ("gather", 2)
    assert product.ways[0].balance == 1.0
    assert choose(whole(65536), 4, GROUPED, ulysses=4).schedule == "ulysses"
    assert choose(whole(65536), 4, GROUPED, ulysses=1).schedule == "gather"
    assert choose(whole(65536), 1, GROUPED, schedule="gather").schedule == "gather"
    assert choose(whole(65537), 1, GROUPED).layout == Layout(65537, 1)


def test_heads_that_divide_in_part_are_exchanged_in_part() -> None:
    # 12 heads among 8 ranks: by 4 at most.
    shapes = Shapes(heads=12, kv_heads=12, head_dim=128)
    assert shapes.refuses(8) is not None
    found = choose(whole(65536), 8, shapes)
    assert found.ulysses in (1, 2, 4)
    assert choose(whole(65536), 8, shapes, schedule="ring", ulysses=4).layout.ranks == 8
    # Fewer KV heads than ranks are repeated.
    assert choose(whole(131072), 4, Shapes(32, 1, 128)).schedule == "ulysses"
    assert Shapes(32, 1, 128).exchanged(4) == Shapes(8, 1, 128)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((whole(64), 4, ODD), {"schedule": "ulysses"}, "33 heads do not divide among 4 ranks"),
        ((whole(64), 4, ODD), {"ulysses": 2}, "33 heads do not divide among 2 ranks"),
        ((whole(64), 4, Shapes(12, 3, 8)), {"ulysses": 4}, "3 KV heads neither divide"),
        ((whole(64), 4, GROUPED), {"schedule": "ulysses", "ulysses": 2}, "among all 4 ranks"),
        ((whole(64), 4, GROUPED), {"ulysses": 3}, "must divide the 4 ranks, got 3"),
        ((whole(64), 4, GROUPED), {"schedule": "rings"}, "one of gather, ring, ulysses"),
        ((whole(66), 4, GROUPED), {}, "pad it to 68"),
        (([], 4, GROUPED), {}, "no pattern"),
        ((whole(64), 4, GROUPED), {"layout": Layout(64, 2)}, "layout of 2 ranks .* for 4"),
    ],
)
def test_what_nothing_honours_is_refused(arguments, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(*arguments, **options)


def test_heads_that_are_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of kv_heads, got 32 and 6"):
        Shapes(32, 6, 128)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("length", [1, 100, 4999, 131000, 262144])
def test_suggested_lengths_divide_under_every_layout(length: int, ranks: int) -> None:
    padded = suggested_length(length, ranks)
    for chunks in (1, 2, 4, 8):
        assert Layout(padded, ranks, chunks).share * ranks == padded
    assert 0 <= padded - length < max(8 * ranks, length // 50 + 1)
    if length > 100000 and ranks <= 2:
        assert padded % (128 * 8 * ranks) == 0


@pytest.mark.parametrize(
    "terms", [{}, {"band": 4096}, {"causal": False}, {"window": 4096, "num_sink_tokens": 4}]
)
def test_a_million_tokens_are_planned_fast(terms: dict) -> None:
    pattern = whole(2**20, **terms)
    started = time.process_time()
    plan = make_plan(pattern, Layout.zigzag(2**20, 8))
    assert plan.transfers
    assert plan.balance > 0.99
    assert time.process_time() - started < 1.0
    assert make_plan(pattern, Layout.zigzag(2**20, 8)) is plan


def test_a_pattern_without_pairs() -> None:
    nothing = whole(64, key_valid=torch.zeros(1, 64, dtype=torch.bool))
    for schedule in ("gather", "ring", None):
        choice = choose(nothing, 2, GROUPED, schedule=schedule)
        assert choice.layout.chunks == 1
        assert choice.seconds < 1e-3
