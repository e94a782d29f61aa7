"""The kernels that keep SparQ's cache: one token at a time, against PyTorch.

On a GPU as they are; without one through Triton's interpreter, which must be chosen before Triton
is imported: `test_through_the_interpreter` runs this file again, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hf_attn_plugin.ops.sparq.key_copy import GROUP, quantize, restore
from hf_attn_plugin.ops.sparq.static_copy import StaticQuantizedCopy
from hf_attn_plugin.ops.sparq.sums import BlockSums, RunningSums, StaticRunningSums

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_kernel = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="run by test_through_the_interpreter"
)
B, HKV, D, DV, ROOM = 2, 3, 24, 20, 160


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests below run here")
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def states(length, dtype=torch.float32):
    """Keys and values of so many tokens, as a model passes them: transposed views."""
    generator = torch.Generator().manual_seed(length)
    return (
        torch.randn(B, length, HKV, dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for dim in (D, DV)
    )


@in_kernel
@pytest.mark.parametrize("with_copy", [False, True])
def test_a_token_at_a_known_position(with_copy):
    from hf_attn_plugin.ops.triton.sparq_append import append_token

    new_keys, new_values = states(3, torch.float16)
    keys, values = (torch.zeros(B, HKV, ROOM, dim, device=DEVICE).half() for dim in (D, DV))
    column = torch.zeros(B, HKV, D, 50, device=DEVICE).half() if with_copy else None
    for i, (position, place) in enumerate([(0, 49), (7, 0), (ROOM - 1, 20)]):
        append_token(
            new_keys[:, :, i : i + 1], new_values[:, :, i : i + 1], keys, values, column,
            position, place,
        )  # fmt: skip
        assert torch.equal(keys[:, :, position], new_keys[:, :, i])
        assert torch.equal(values[:, :, position], new_values[:, :, i])
        if column is not None:
            assert torch.equal(column[..., place], new_keys[:, :, i])
    assert (keys != 0).any(-1).sum() == (values != 0).any(-1).sum() == 3 * B * HKV
    assert column is None or (column != 0).any(2).sum() == 3 * B * HKV


@in_kernel
@pytest.mark.parametrize("kind", ["none", "full", 8, 4])
def test_tokens_at_positions_that_the_device_knows(kind):
    """Over the end of a group, which is then quantised as PyTorch does it."""
    from hf_attn_plugin.ops.triton.sparq_append import store_token_at

    start, stop = GROUP - 4, GROUP + 3
    new_keys, new_values = states(stop)
    keys = torch.zeros(B, HKV, ROOM, D, device=DEVICE)
    values = torch.zeros(B, HKV, ROOM, DV, device=DEVICE)
    keys[:, :, :start], values[:, :, :start] = new_keys[:, :, :start], new_values[:, :, :start]
    length = torch.tensor(start, device=DEVICE)
    copy, stored = None, (None,) * 5
    if kind == "full":
        stored = (torch.zeros(B, HKV, D, ROOM, device=DEVICE), *(None,) * 4)
    elif kind != "none":
        copy = StaticQuantizedCopy.allocate(keys, length, kind)
        copy.append(torch.arange(start, device=DEVICE), new_keys[:, :, :start], keys)
        stored = copy.stored()
        assert int(copy.components.tail_at) == 0
    for i in range(start, stop):
        length += 1
        store_token_at(
            new_keys[:, :, i : i + 1], new_values[:, :, i : i + 1], keys, values, *stored, length
        )
    assert torch.equal(keys[:, :, :stop], new_keys)
    assert torch.equal(values[:, :, :stop], new_values)
    assert keys[:, :, stop:].abs().sum() == values[:, :, stop:].abs().sum() == 0
    if kind == "full":
        assert torch.equal(stored[0][..., start:stop], new_keys[:, :, start:].mT)
        assert stored[0][..., stop:].abs().sum() == stored[0][..., :start].abs().sum() == 0
    if copy is not None:
        parts = copy.components
        expected = quantize(new_keys[:, :, :GROUP].mT.unflatten(-1, (1, GROUP)), kind)
        found = parts.codes[:, :, :, :1], parts.scale[..., :1], parts.offset[..., :1]
        assert torch.equal(found[2], expected[2])
        # On a GPU PyTorch divides by a number by multiplying with its inverse: rounded twice, the
        # scale, and an element that lies half way between two codes, may come out as a neighbour.
        torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)
        restored = [restore(*codes, kind, torch.float32) for codes in (found, expected)]
        steps = ((restored[0] - restored[1]) / expected[1]).abs().round()
        assert steps.max() <= 1
        assert steps.mean() < 1e-3
        assert int(parts.tail_at) == GROUP
        assert torch.equal(parts.tail[..., : stop - GROUP], new_keys[:, :, GROUP:].mT)


@in_kernel
def test_a_full_cache_is_not_written_past_its_end():
    from hf_attn_plugin.ops.triton.sparq_append import store_token_at

    key, value = states(1)
    wide = [torch.zeros(B, HKV, ROOM + 4, dim, device=DEVICE) for dim in (D, DV)]
    column = torch.zeros(B, HKV, D, ROOM + 4, device=DEVICE)
    keys, values = (tensor[:, :, :ROOM] for tensor in wide)
    length = torch.tensor(ROOM + 1, device=DEVICE)
    store_token_at(key, value, keys, values, column[..., :ROOM], None, None, None, None, length)
    assert wide[0].abs().sum() == column.abs().sum() == wide[1][:, :, ROOM:].abs().sum() == 0
    assert values[:, :, -1].isnan().all(), "it must not go unnoticed"
    assert values[:, :, :-1].abs().sum() == 0


@in_kernel
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("masked", [False, True])
def test_running_sums_follow_token_by_token(static, masked):
    """Also when the mask changes its mind, and after steps that did not ask."""
    _, everything = states(ROOM)
    length = torch.tensor(60, device=DEVICE)
    running = StaticRunningSums(length) if static else RunningSums()
    visible = None
    if masked:
        visible = torch.arange(ROOM, device=DEVICE) >= torch.tensor([[0], [5]], device=DEVICE)

    def held(stop):
        if static:
            return everything, None if visible is None else visible
        return everything[:, :, :stop], None if visible is None else visible[:, :stop]

    running.update(*held(60), None, new=60)
    for stop in (61, 62, 63, 70, 71, 72):
        length.fill_(stop)
        if masked and stop == 72:
            visible[0, 10:20] = False
        values, seen = held(stop)
        wanted = None if seen is None else seen[:, :stop].sum(-1)
        total, count = running.follow(values, seen, wanted)
        part = None if visible is None else visible[:, :stop]
        expected = BlockSums.of(everything[:, :, :stop], part, None)
        torch.testing.assert_close(total, expected.total[:, :, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(count, expected.seen[:, 0])
        assert int(running.counted) == stop
    # And on in PyTorch, where the kernel stopped.
    length.fill_(75)
    sums, _ = running.update(*held(75), None)
    part = None if visible is None else visible[:, :75]
    expected = BlockSums.of(everything[:, :, :75], part, None)
    torch.testing.assert_close(sums.total[:, :, 0], expected.total[:, :, 0], rtol=1e-5, atol=1e-5)


@in_kernel
@pytest.mark.parametrize("stop", [None, 1500, 3])
def test_where_the_local_window_begins(stop):
    from hf_attn_plugin.ops.triton.sparq_append import window_start

    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(4, 2600, generator=generator) < torch.tensor([[1.0], [0.5], [0.01], [0.0]])
    end = None if stop is None else torch.tensor(stop, device=DEVICE)
    for window in (0, 1, 2, 40, 1100, 5000):
        found = window_start(visible.to(DEVICE), end, window)
        for row, seen in zip(found.tolist(), visible, strict=True):
            places = seen[:stop].nonzero()[:, 0].tolist()
            wanted = places[-window:] if window else []
            length = len(seen[:stop])
            assert [place for place in places if place >= row] == wanted, (row, window)
            assert 0 <= row <= length
