"""What the warp-specialised kernel of the keys' gradients goes through, and its small helpers.

The kernel itself needs a Hopper GPU (test_hopper_gpu.py); its work items are data, and its helpers
go through Triton's interpreter in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_attn_plugin.ops.triton.hopper_work import PairWork, pair_work
from hf_attn_plugin.ops.triton.plan import Plan
from hf_attn_plugin.ops.triton.work import BLOCK, SLOT, Split
from hf_attn_plugin.patterns import Pattern

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_kernel = pytest.mark.skipif(not INTERPRETED, reason="run by test_through_the_interpreter")


@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="runs here, or on the GPU as part of calls"
)
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def documents(length: int, *ends: int) -> torch.Tensor:
    return (torch.arange(length)[None] >= torch.tensor(ends)[:, None]).sum(0)[None]


def padding(length: int) -> torch.Tensor:
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, :150], valid[1, 400:] = False, False
    return valid


PACKED = documents(600, 17, 300, 301)
PATTERNS = {
    "causal": Pattern(q_len=500, kv_len=500),
    "cache": Pattern(q_len=100, kv_len=777),
    "window": Pattern(q_len=700, kv_len=700, window=90),
    "sinks": Pattern(q_len=700, kv_len=700, window=200, num_sink_tokens=4),
    "globals": Pattern(q_len=700, kv_len=700, window=100, num_global_tokens=70),
    "a cut column": Pattern(q_len=3000, kv_len=3000, window=64, num_global_tokens=64),
    "cut, bidirectional": Pattern(
        q_len=3000, kv_len=3000, window=64, num_global_tokens=3, causal=False
    ),
    "documents": Pattern(q_len=600, kv_len=600, q_documents=PACKED, kv_documents=PACKED),
    "padding": Pattern(q_len=600, kv_len=600, key_valid=padding(600), window=128),
}


def counted(work: PairWork, tokens: int, seen: np.ndarray, row: int) -> np.ndarray:
    """How often each block of keys takes each block of queries, as the kernel goes about it."""
    items, parts = work.items.numpy()[row % len(work.items)], work.parts.numpy()[row]
    counts = np.zeros((len(parts), -(-len(seen) // tokens)), int)
    for *blocks, _, _, begin, end, first_count, first_base, second_base, in_turns in items:
        for turn in range(begin, end):
            visit = turn + (first_base if turn < first_count else second_base)
            for part, block in enumerate(blocks):
                first, stop, full, full_stop = parts[block].reshape(2, 4).T
                mine = bool(((first <= visit) & (visit < stop)).any())
                if not mine or (in_turns and turn % 2 != part):
                    continue
                counts[block, visit] += 1
                if ((full <= visit) & (visit < full_stop)).any():
                    tile = seen[visit * tokens :, block * 64 : (block + 1) * 64][:tokens]
                    assert len(tile) == tokens and tile.all()
    assert not counts[-1].any()
    return counts[:-1]


@pytest.mark.parametrize("every", [False, True], ids=["heavy in slices", "all in slices"])
@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pair_is_visited_once(name: str, tokens: int, every: bool) -> None:
    pattern = PATTERNS[name]
    step = Plan(pattern, torch.device("cpu")).passes[0]
    work = pair_work(step, tokens, Split(16, 8, every))
    assert pair_work(step, tokens, Split(16, 8, every)) is work
    assert (work.num_splits > 0) == ("cut" in name or every)
    seen = pattern.visible("cpu", 0, pattern.q_len, 0, pattern.kv_len).numpy()
    seen = seen.reshape(-1, pattern.q_len, pattern.kv_len)
    for row, mask in enumerate(seen):
        counts = counted(work, tokens, mask, row)
        heads, keys = np.arange(0, len(mask), tokens), np.arange(0, mask.shape[1], 64)
        needed = np.add.reduceat(np.add.reduceat(mask.astype(int), heads, 0), keys, 1).T > 0
        assert counts.max() == 1
        assert (counts[needed] == 1).all()
        slots = work.items.numpy()[row % len(work.items), :, 2:4]
        slots = slots[slots >= 0]
        assert sorted(slots) == list(range(len(slots))) and len(slots) <= work.num_slots
        if work.num_splits:
            blocks, firsts, stops = work.splits.numpy()[row % len(work.splits)].T
            assert (stops - firsts).sum() == len(slots)
            if every:
                assert sorted(blocks) == list(range(len(counts)))
                of_slot = {
                    s: b
                    for b, *ends in zip(blocks, firsts, stops, strict=True)
                    for s in range(*ends)
                }
                for *own, first, second in work.items.numpy()[row % len(work.items), :, :4]:
                    assert [of_slot.get(s, len(counts)) for s in (first, second)] == own


@pytest.mark.parametrize("name", PATTERNS)
def test_all_blocks_of_queries_can_be_slices(name: str) -> None:
    step = Plan(PATTERNS[name], torch.device("cpu")).passes[0]
    whole, sliced = (
        step.work(32, 64, of_keys=False, split=Split(16, 8, every)) for every in (False, True)
    )
    for row, items in enumerate(sliced.items.numpy()):
        held = whole.items.numpy()[row]
        assert sorted(map(tuple, np.delete(items, SLOT, 1))) == sorted(
            map(tuple, np.delete(held, SLOT, 1))
        )
        items = items[items[:, BLOCK] < -(-PATTERNS[name].q_len // 32)]
        assert sorted(items[:, SLOT]) == list(range(sliced.num_slots))
        for block, first, stop in sliced.splits.numpy()[row]:
            own = items[(items[:, SLOT] >= first) & (items[:, SLOT] < stop)]
            assert (own[:, BLOCK] == block).all()
            assert len(own) == (items[:, BLOCK] == block).sum()


@in_kernel
@pytest.mark.parametrize(("rows", "at_once"), [(4, 16), (32, 2)])
def test_slices_are_added(rows: int, at_once: int) -> None:
    from hf_attn_plugin.ops.triton.hopper_rows import merge_blocks_kernel

    torch.manual_seed(0)
    batch, heads, length, dim, slots = 2, 3, 100, 64, 21
    partial = torch.randn(slots, batch, heads, 64, dim)
    # The second batch row has one block less to merge: a block beyond the last stands for it.
    splits = torch.tensor([[[1, 0, 18], [0, 18, 21]], [[1, 0, 5], [2, 0, 0]]], dtype=torch.int32)
    got = torch.full((batch, length, heads, dim), 7.0).transpose(1, 2)
    want = got.clone()
    want[0, :, 64:] = partial[:18, 0].sum(0)[:, :36]
    want[0, :, :64] = partial[18:, 0].sum(0)
    want[1, :, 64:] = partial[:5, 1].sum(0)[:, :36]
    numbers = (*got.stride()[:3], batch * heads, heads, length, 2)
    programs = (2 * batch * heads * (64 // rows),)
    merge_blocks_kernel[programs](partial, got, splits, *numbers, 64, rows, at_once, dim)
    torch.testing.assert_close(got, want)


@in_kernel
def test_rows_are_padded() -> None:
    from hf_attn_plugin.ops.triton.hopper_rows import pad_rows_kernel

    rows, padded = torch.randn(6, 197), torch.full((6, 200), float("nan"))
    pad_rows_kernel[(6 * 4,)](rows, padded, 197, 200, 64)
    assert torch.equal(padded[:, :197], rows)
    assert padded[:, 197:].isnan().all()
