"""Parts of patterns, against the same rectangle of the whole."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from hf_attn_plugin.ops import attention
from hf_attn_plugin.patterns import Pattern, build_schedule
from hf_attn_plugin.patterns.intervals import key_intervals, query_intervals
from hf_attn_plugin.patterns.part import part
from tests.ops.test_attention_property import random_spec, to_pattern

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def random_whole(rng: random.Random, batch: int, q_len: int, kv_len: int) -> Pattern:
    """A pattern of any kind: every term, masks of the caller's own, explicit positions."""
    pattern = to_pattern(random_spec(rng, batch, q_len, kv_len), q_len, kv_len)
    if rng.random() < 0.1:
        shape = (rng.choice([1, batch]), 1, q_len, kv_len)
        pattern = pattern.replace(dense=torch.rand(shape) < 0.6)
    if rng.random() < 0.1 and pattern.global_tokens is None and pattern.kv_offset == 0:
        pattern = pattern.replace(
            q_offset=None,
            q_positions=torch.arange(q_len)[None] + rng.randint(0, kv_len - q_len),
            kv_positions=torch.arange(kv_len)[None],
        )
    elif rng.random() < 0.1:
        pattern = pattern.replace(q_offset=torch.tensor(pattern.first_query))
    return pattern


def random_range(rng: random.Random, length: int) -> range:
    start = rng.randint(0, length)
    return range(start, rng.randint(start, length))


def rectangle(pattern: Pattern, rows: range, cols: range) -> torch.Tensor:
    return pattern.to("cpu").visible("cpu")[:, :, rows.start : rows.stop, cols.start : cols.stop]


def disagreements(whole: Pattern, rows: range, cols: range, piece: Pattern) -> int:
    own, wanted = torch.broadcast_tensors(piece.visible("cpu"), rectangle(whole, rows, cols))
    return int((own != wanted).sum())


@pytest.mark.parametrize("seed", range(8))
def test_a_part_shows_what_the_whole_shows_there(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sparse = 0
    for _ in range(150):
        kv_len = rng.choice([1, 2, 9, 40, 90])
        q_len = rng.choice([kv_len, rng.randint(1, kv_len)])
        whole = random_whole(rng, 2, q_len, kv_len)
        rows, cols = random_range(rng, q_len), random_range(rng, kv_len)
        piece = part(whole, rows, cols)
        assert disagreements(whole, rows, cols, piece) == 0, (whole, rows, cols)
        within = (random_range(rng, len(rows)), random_range(rng, len(cols)))
        again = part(piece, *within)
        of_whole = [
            range(a[b.start : b.stop].start, a[b.start : b.stop].stop)
            for a, b in zip((rows, cols), within, strict=True)
        ]
        assert disagreements(whole, *of_whole, again) == 0, (whole, of_whole)
        sparse += piece.is_sparse and bool(rectangle(whole, rows, cols).any())
    assert sparse > 20


@pytest.mark.parametrize("seed", range(4))
def test_runs_and_schedules_of_parts(seed: int) -> None:
    rng, found = random.Random(seed), 0
    torch.manual_seed(seed)
    for _ in range(80):
        kv_len = rng.choice([9, 40, 90])
        whole = random_whole(rng, 2, kv_len, kv_len)
        rows, cols = random_range(rng, kv_len), random_range(rng, kv_len)
        piece, mask = part(whole, rows, cols), rectangle(whole, rows, cols)[:, 0]
        if not len(rows) or not len(cols):
            continue
        queries, keys = query_intervals(piece, "cpu"), key_intervals(piece, "cpu")
        if queries is not None and keys is not None:
            found += 1
            assert bool((queries.visible(len(cols)) == mask).all()), (whole, rows, cols)
            assert bool((keys.visible(len(rows)).mT == mask).all()), (whole, rows, cols)
        schedule = build_schedule(piece, 8, 4)
        visited = torch.zeros(-(-len(rows) // 8), -(-len(cols) // 4), dtype=torch.bool)
        for block in range(len(visited)):
            visited[block, schedule.cols[schedule.rows[block] : schedule.rows[block + 1]]] = True
        pairs = visited.repeat_interleave(8, 0).repeat_interleave(4, 1)[: len(rows), : len(cols)]
        assert not bool((mask & ~pairs).any()), (whole, rows, cols)
    assert found > 15


def test_global_queries_outside_of_the_keys_shown() -> None:
    whole = Pattern(q_len=12, kv_len=12, causal=False, window=2, num_global_tokens=2)
    piece = part(whole, range(4), range(6, 12))  # the queries' own keys are not among them
    assert bool(piece.visible("cpu")[0, 0, :2].all())
    assert not bool(piece.visible("cpu")[0, 0, 2:].any())
    # A part that forgot which queries are global would be seen here.
    forgotten = piece.replace(global_queries=None)
    assert disagreements(whole, range(4), range(6, 12), forgotten) == 12


def test_what_bites_nowhere_is_left_out() -> None:
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    valid = torch.tensor([[False, True, True, True, True, True, True, True]])
    whole = Pattern(
        q_len=8,
        kv_len=8,
        window=2,
        num_sink_tokens=1,
        key_valid=valid,
        q_documents=documents,
        kv_documents=documents,
    )
    inside = part(whole, range(6, 8), range(5, 8))
    assert (inside.tensors(), inside.num_sink_tokens) == ({}, 0)
    across = part(whole, range(3, 6), range(6))
    assert {*across.tensors()} == {"key_valid", "q_documents", "kv_documents", "kv_ranks"}
    assert part(whole, range(0), range(0)).q_len == 0


def test_without_a_window_sink_tokens_still_restrict() -> None:
    whole = Pattern(q_len=8, kv_len=8, num_sink_tokens=2)
    assert not bool(part(whole, range(4, 8), range(2, 8)).visible("cpu").any())


@pytest.mark.parametrize("wrong", [range(9), range(-1, 4), range(0, 8, 2), range(5, 2)])
def test_what_is_no_part_is_refused(wrong: range) -> None:
    whole = Pattern(q_len=8, kv_len=8)
    with pytest.raises(ValueError, match=r"rows must be a range within 0\.\.8"):
        part(whole, wrong, range(8))
    with pytest.raises(ValueError, match="cols must be a range"):
        part(whole, range(8), wrong)


def attended(function, pattern: Pattern, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    output, lse = function(*leaves, pattern, scaling=0.3)
    seen = torch.where(lse.isneginf(), 0.0, lse)
    return [output, seen, *torch.autograd.grad(output.square().sum() + seen.sum(), leaves)]


def assert_rows_of_the_whole(function, rng: random.Random, length: int, dtype: torch.dtype) -> None:
    """Attention of queries over all keys they see, cut into parts, is the whole's."""
    whole = random_whole(rng, 2, length, length).to(DEVICE)
    tokens = (2, 2, length, 16), (2, 1, length, 16), (2, 1, length, 16)
    inputs = [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in tokens]
    want = attended(function, whole, inputs)
    cut = rng.randint(1, length - 1)
    pieces = []
    for rows in (range(cut), range(cut, length)):
        reached = rectangle(whole, rows, range(length)).flatten(0, 2).any(0).nonzero()
        first, last = (int(reached.min()), int(reached.max())) if len(reached) else (0, 0)
        cols = range(first, last + 1)
        queries, keys, values = inputs
        own = [queries[:, :, rows.start : rows.stop]]
        own += [t[:, :, cols.start : cols.stop] for t in (keys, values)]
        pieces.append((cols, attended(function, part(whole, rows, cols), own)))
    for index in (0, 1, 2):
        got = torch.cat([result[index] for _, result in pieces], 2)
        torch.testing.assert_close(got, want[index], rtol=1e-5, atol=1e-5)
    for index in (3, 4):
        total = torch.zeros_like(want[index])
        for cols, result in pieces:
            total[:, :, cols.start : cols.stop] += result[index]
        torch.testing.assert_close(total, want[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(25))
def test_attention_over_parts(seed: int) -> None:
    torch.manual_seed(seed)
    assert_rows_of_the_whole(attention, random.Random(seed), 50, torch.float64)


@pytest.mark.skipif(INTERPRETED or CUDA, reason="runs here, or on the GPU as it is")
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-k", "kernels"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.mark.skipif(not (CUDA or INTERPRETED), reason="run by test_through_the_interpreter")
@pytest.mark.parametrize("seed", range(8))
def test_kernels_over_parts(seed: int) -> None:
    from hf_attn_plugin.ops.triton.attention import triton_attention

    torch.manual_seed(seed)
    assert_rows_of_the_whole(triton_attention, random.Random(seed), 20, torch.float32)


@pytest.mark.skipif(not (CUDA or INTERPRETED), reason="run by test_through_the_interpreter")
def test_kernels_get_parts_whole_as_operators() -> None:
    from hf_attn_plugin.ops.triton.attention import _decode, _encode

    whole = Pattern(q_len=12, kv_len=12, causal=False, window=2, num_global_tokens=2)
    rows, cols = range(4), range(6, 12)
    tensors, numbers = _encode(part(whole, rows, cols))
    assert len(tensors) == 1
    assert disagreements(whole, rows, cols, _decode(4, 6, tensors, numbers)) == 0
