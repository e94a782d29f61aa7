"""Into how many groups heads are split: plain numbers, no processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_attn_plugin.parallel import Layout, Shapes, choose_way, make_plan
from hf_attn_plugin.parallel.estimates import exchange_groups, gather_groups
from hf_attn_plugin.parallel.grouping import Load, count_groups, groups_of, some_heads
from hf_attn_plugin.patterns import Pattern

SHAPES = Shapes(heads=32, kv_heads=8, head_dim=128)
# 131,072 causal tokens, 32/8 heads of 128, on two H200s.
LONG = Load(travel=4.8e-3, work=0.437, calls=1, batches=4, queries=16 * 131072)


def test_what_is_hidden_is_set_against_further_calls() -> None:
    assert count_groups(4, LONG) == 2
    # A fourth of the tokens: a fourth of the transfers, and the other costs are not a fourth.
    short = dataclasses.replace(LONG, travel=1.2e-3, work=LONG.work / 16, queries=16 * 32768)
    assert count_groups(4, short) == 1
    assert count_groups(4, dataclasses.replace(short, calls=0, batches=0)) == 4
    assert count_groups(4, dataclasses.replace(LONG, calls=2)) == 1
    assert count_groups(4, dataclasses.replace(LONG, travel=0.0)) == 1


def test_slow_links_make_more_groups() -> None:
    counts = [count_groups(8, dataclasses.replace(LONG, travel=t)) for t in (0.005, 0.02, 0.1)]
    assert counts == [2, 4, 8]


@pytest.mark.parametrize("travel", [0.001, 0.3, 1.0])
def test_transfers_longer_than_attention_are_not_hidden(travel: float) -> None:
    load = dataclasses.replace(LONG, travel=travel)
    assert load.exposed(1) == travel
    assert load.exposed(4) >= max(travel / 4, travel - load.work)
    assert load.exposed(10**6) == pytest.approx(max(0.0, travel - load.work), abs=1e-5)
    assert load.extra(1) == 0


def test_groups_divide_the_heads() -> None:
    wanted = [count_groups(8, LONG, wanted) for wanted in (0, 1, 2, 3, 8, 100)]
    assert wanted == [1, 1, 2, 2, 8, 8]
    assert count_groups(1, dataclasses.replace(LONG, travel=1.0)) == 1
    assert count_groups(3, dataclasses.replace(LONG, travel=0.05), 2) == 1
    assert groups_of(6, 3) == (range(2), range(2, 4), range(4, 6))
    assert groups_of(5, 1) == (range(5),)


def test_nothing_to_compute_is_no_division_by_zero() -> None:
    assert count_groups(4, Load(travel=0.0, work=0.0, calls=0, batches=2, queries=0)) == 1


def test_every_rank_comes_to_the_same_number() -> None:
    """What the choice tells is what is done, and no rank enters."""
    for pattern in (Pattern(q_len=131072, kv_len=131072), Pattern(q_len=8192, kv_len=8192, band=9)):
        layout = Layout(pattern.q_len, 2)
        way = choose_way(pattern, layout, SHAPES, schedule="ulysses")
        assert exchange_groups(pattern, layout, SHAPES, 2) == way.groups
        plan = make_plan(pattern, layout)
        way = choose_way(pattern, layout, SHAPES, schedule="gather")
        assert gather_groups(plan, SHAPES) == way.groups
    assert exchange_groups(pattern, layout, SHAPES, 2, wanted=4) == 4
    # Of eight ranks' one KV head each, and before another schedule.
    assert exchange_groups(pattern, Layout(8192, 8), SHAPES, 8, wanted=4) == 1
    long = Pattern(q_len=131072, kv_len=131072)
    assert exchange_groups(long, Layout(131072, 4, 2), SHAPES, 2) == 1
    assert exchange_groups(long, Layout(131072, 4, 2), SHAPES, 2, wanted=4) == 4


def test_gathering_by_nvlink_is_in_one_group() -> None:
    """Measured: 33.2 ms in one group, 33.7 in two, 34.7 in four."""
    plan = make_plan(Pattern(q_len=32768, kv_len=32768), Layout(32768, 2, 2))
    assert gather_groups(plan, SHAPES) == 1
    assert gather_groups(plan, SHAPES, wanted=4) == 4


def test_a_mask_of_ones_own_is_cut_by_heads() -> None:
    dense = torch.rand(1, 4, 8, 8) > 0.5
    pattern = Pattern(q_len=8, kv_len=8, causal=False, dense=dense)
    own = some_heads(pattern, range(1, 3))
    assert own.dense is not None
    assert torch.equal(own.dense, dense[:, 1:3])
    assert some_heads(pattern, range(1, 3)) is own
    shared = pattern.replace(dense=dense[:, :1])
    assert some_heads(shared, range(1, 3)) is shared
