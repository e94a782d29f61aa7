"""The runs of tokens that a pattern comes down to, against the pattern's own mask."""

import random

import pytest
import torch

from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.intervals import Intervals, key_intervals, query_intervals
from tests.ops.test_attention_property import random_spec, to_pattern


def disagreements(pattern: Pattern, queries: Intervals, keys: Intervals) -> int:
    mask = pattern.visible("cpu")[:, 0]
    by_query, by_key = queries.visible(pattern.kv_len), keys.visible(pattern.q_len).mT
    return int((by_query != mask).sum() + (by_key != mask).sum())


@pytest.mark.parametrize("seed", range(10))
def test_runs_are_the_mask(seed: int) -> None:
    rng, found, two = random.Random(seed), 0, 0
    torch.manual_seed(seed)
    for _ in range(150):
        kv_len = rng.choice([1, 7, 40, 90])
        q_len = rng.randint(1, kv_len)
        pattern = to_pattern(random_spec(rng, 2, q_len, kv_len), q_len, kv_len)
        queries, keys = query_intervals(pattern, "cpu"), key_intervals(pattern, "cpu")
        if queries is None or keys is None:
            continue
        found += 1
        two += queries.start2 is not None
        assert disagreements(pattern, queries, keys) == 0, pattern
    assert found > 30
    assert two > 5


def test_a_run_that_is_one_off_is_seen() -> None:
    pattern = Pattern(q_len=9, kv_len=9, window=3)
    queries, keys = query_intervals(pattern, "cpu"), key_intervals(pattern, "cpu")
    assert queries is not None
    assert keys is not None
    assert disagreements(pattern, queries, keys) == 0
    longer = Intervals(queries.start, queries.length + (torch.arange(9) == 4).int())
    assert disagreements(pattern, longer, keys) == 1


@pytest.mark.parametrize(
    "terms",
    [
        dict(stride=4, window=2),
        dict(window=4, dilation=2),
        dict(key_valid=torch.tensor([[True, False, True, True, True, True, True, True]])),
        dict(
            q_documents=torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]]),
            kv_documents=torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]]),
        ),
        dict(dense=torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        dict(window=2, global_tokens=torch.tensor([[True, False] * 4])),
    ],
    ids=["stride", "dilation", "gaps", "interleaved documents", "own mask", "scattered globals"],
)
def test_other_patterns_have_none(terms: dict) -> None:
    pattern = Pattern(q_len=8, kv_len=8, **terms)
    assert query_intervals(pattern, "cpu") is None


def test_common_patterns_have_them() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0]])
    padding = torch.tensor([[False, True, True, True, True, True, True, True], [True] * 8])
    for terms in (
        {},
        dict(causal=False),
        dict(window=3, num_sink_tokens=1),
        dict(window=3, num_global_tokens=2),
        dict(window=3, num_global_tokens=2, causal=False),
        dict(q_documents=documents, kv_documents=documents, window=2, num_sink_tokens=1),
        dict(key_valid=padding, band=4),
        dict(key_valid=padding, window=3, num_sink_tokens=2),
    ):
        pattern = Pattern(q_len=8, kv_len=8, **terms)
        queries, keys = query_intervals(pattern, "cpu"), key_intervals(pattern, "cpu")
        assert queries is not None, terms
        assert keys is not None, terms
        assert disagreements(pattern, queries, keys) == 0, terms
