"""The schedule misses no visible pair, calls no block full that is not, and stays small."""

import random

import pytest
import torch

from hf_attn_plugin.patterns import Pattern, build_schedule
from tests.ops.test_attention_property import random_spec, to_pattern


def visited(pattern: Pattern, block_q: int, block_kv: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that the schedule visits, and those in blocks that it calls full."""
    schedule = build_schedule(pattern, block_q, block_kv)
    seen = torch.zeros(pattern.q_len, pattern.kv_len, dtype=torch.bool)
    full = torch.zeros_like(seen)
    for row in range(len(schedule.rows) - 1):
        cols = schedule.cols[schedule.rows[row] : schedule.rows[row + 1]].tolist()
        assert cols == sorted(set(cols))
        for entry, col in enumerate(cols, int(schedule.rows[row])):
            cut = (
                slice(row * block_q, (row + 1) * block_q),
                slice(col * block_kv, (col + 1) * block_kv),
            )
            seen[cut] = True
            full[cut] = bool(schedule.full[entry])
    return seen, full


@pytest.mark.parametrize("seed", range(10))
def test_random_patterns(seed: int) -> None:
    rng = random.Random(1000 + seed)
    for _ in range(100):
        kv_len = rng.choice([1, 7, 40, 100])
        q_len = min(kv_len, rng.choice([1, 8, 33, 100]))
        pattern = to_pattern(random_spec(rng, 2, q_len, kv_len), q_len, kv_len)
        mask = pattern.visible("cpu")
        seen, full = visited(pattern, rng.choice([1, 8, 16]), rng.choice([1, 4, 16]))
        assert not (mask.any(0)[0] & ~seen).any(), pattern
        assert not (full & ~mask.all(0)[0]).any(), pattern


def test_cost_grows_with_the_window_and_not_with_the_square() -> None:
    small, large = (
        build_schedule(Pattern(q_len=n, kv_len=n, window=1024), 128, 128).num_visited
        for n in (2**15, 2**20)
    )
    assert small <= 2**15 // 128 * 9
    assert large <= 32 * small * 1.1


def test_global_tokens_add_one_column_and_one_row() -> None:
    length, block = 4096, 64
    blocks = length // block
    plain = build_schedule(
        Pattern(q_len=length, kv_len=length, causal=False, window=64), block, block
    )
    with_global = build_schedule(
        Pattern(q_len=length, kv_len=length, causal=False, window=64, num_global_tokens=1),
        block,
        block,
    )
    assert with_global.num_visited - plain.num_visited <= 2 * blocks


def test_packed_documents_visit_only_their_own_blocks() -> None:
    documents = torch.arange(16).repeat_interleave(256)[None]
    packed = Pattern(q_len=4096, kv_len=4096, q_documents=documents, kv_documents=documents)
    assert build_schedule(packed, 64, 64).num_visited == 16 * (4 * 5 // 2)


def test_paged_layout_visits_only_its_own_sequence() -> None:
    documents = torch.arange(8).repeat_interleave(64)[None]
    positions = torch.arange(64).repeat(8)[None]
    pattern = Pattern(
        q_len=8,
        kv_len=512,
        q_documents=torch.arange(8)[None],
        kv_documents=documents,
        q_positions=torch.full((1, 8), 63),
        kv_positions=positions,
    )
    assert build_schedule(pattern, 1, 64).num_visited == 8
