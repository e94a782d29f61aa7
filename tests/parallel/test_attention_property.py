"""Random patterns over random layouts, by every schedule, against one process."""

from __future__ import annotations

import random

import pytest
import torch

from tests.ops.test_attention_property import random_spec
from tests.parallel.processes import run_processes
from tests.parallel.sharding import Case, differences
from tests.parallel.test_attention import many

CASES = 40


def random_case(rng: random.Random, number: int, ranks: int) -> Case:
    chunks = rng.choice([1, 2, 4])
    length = ranks * chunks * rng.choice([1, 2, 5, 16, 40])
    batch = rng.choice([1, 2])
    terms = random_spec(rng, batch, length, length)
    terms.pop("q_documents", None)
    kv_heads = rng.choice([1, 2, 4])
    heads = rng.choice([4, 8])
    if rng.random() < 0.3 and length <= 64:
        rows = torch.rand(rng.choice([1, batch]), rng.choice([1, heads]), length, length) < 0.7
        terms["dense"] = rows.tolist()
    schedule = rng.choice(["gather", "gather", "ring", "ulysses", None])
    return Case(
        f"{number}",
        {name: value for name, value in terms.items() if value is not None},
        length=length,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=rng.choice([4, 8]),
        value_dim=rng.choice([4, 8]),
        softcap=rng.choice([None, None, 3.0]),
        sinks=rng.random() < 0.3,
        chunks=chunks,
        ulysses=1 if schedule == "ulysses" else rng.choice([1, 2]),
        schedule=schedule,
        head_groups=rng.choice([None, 2, 4]),
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_random_patterns(ranks: int) -> None:
    torch.manual_seed(ranks)
    rng = random.Random(ranks)
    cases = [random_case(rng, number, ranks) for number in range(CASES)]
    by_rank = run_processes(many, ranks, cases, ranks)
    for number, case in enumerate(cases):
        found = differences(case, [results[number] for results in by_rank])
        bound = 128 * torch.finfo(case.dtype).eps
        assert all(value < bound for value in found.values()), (case, found)
