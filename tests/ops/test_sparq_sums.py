"""The sums of values that SparQ's mean value is made of."""

from __future__ import annotations

import pytest
import torch

from hf_attn_plugin.ops.sparq.sums import BlockSums, RunningSums, StaticRunningSums

B, HKV, DV, ROOM = 3, 2, 5, 50
BLOCKS = [None, 1, 4, 7, 1000]


def values_of(length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(B, HKV, length, DV, generator=generator, dtype=torch.float64).to(dtype)


def by_loops(values, visible, block):
    """(sum, count) of every block, position by position."""
    length = values.shape[2]
    blocks = 1 if block is None else -(-length // block)
    total, seen = values.new_zeros(B, HKV, blocks, DV), torch.zeros(B, blocks, dtype=torch.int64)
    for b in range(B):
        for j in range(length):
            if visible is None or visible.expand(B, -1)[b, j]:
                at = 0 if block is None else j // block
                total[b, :, at] += values[b, :, j]
                seen[b, at] += 1
    return total, seen


def check(sums, values, visible, block):
    total, seen = by_loops(values, visible, block)
    blocks = seen.shape[1]
    torch.testing.assert_close(sums.total[:, :, :blocks], total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.seen[:, :blocks], seen)
    assert sums.total[:, :, blocks:].abs().sum() == 0
    assert sums.seen[:, blocks:].sum() == 0


def padded(length):
    return torch.arange(length) >= torch.tensor([[0], [3], [9]])


MASKS = {"all": lambda n: None, "one row": lambda n: torch.arange(n)[None] % 3 > 0, "rows": padded}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("pieces", [(30,), (1,) * 20, (3, 1, 12, 1, 9)], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_running_sums_are_those_of_all_values(pieces, block, mask, static):
    everything = values_of(ROOM)
    length = torch.tensor(0)
    running = StaticRunningSums(length) if static else RunningSums()
    at = 0
    for piece in pieces:
        at += piece
        length.fill_(at)
        values = everything if static else everything[:, :, :at]
        visible = mask(values.shape[2])
        if static and visible is not None:
            visible = visible & (torch.arange(ROOM) < at)
        sums, read = running.update(values, visible, block, new=piece)
        assert read == piece * B * HKV * DV * 8
        seen = mask(at)
        check(sums, everything[:, :, :at], seen, block)
        assert running.update(values, visible, block)[1] == 0
    values = everything[:, :, :at]
    check(BlockSums.of(values, mask(at), block), values, mask(at), block)


@pytest.mark.parametrize("block", BLOCKS)
def test_another_block_size_starts_anew(block):
    running, values = RunningSums(), values_of(20)
    running.update(values, None, 3)
    sums, read = running.update(values, None, block)
    assert read == values.numel() * 8
    check(sums, values, None, block)


@pytest.mark.parametrize(("block", "again"), [(None, 17), (4, 1), (7, 3), (1, 0), (1000, 17)])
def test_cropping_adds_again_only_what_shares_a_block(block, again):
    running, values = RunningSums(), values_of(30)
    running.update(values, padded(30), block)
    running.crop(30)
    running.crop(17)
    changed = torch.cat([values[:, :, :17], values_of(8)], dim=2)
    sums, read = running.update(changed, padded(25), block)
    assert read == (again + 8) * B * HKV * DV * 8
    check(sums, changed, padded(25), block)


def test_batch_changes_and_reset():
    order = torch.tensor([2, 2, 0])
    values, length = values_of(ROOM), torch.tensor(20)
    running = [RunningSums(), StaticRunningSums(length)]
    visible = [padded(20), padded(ROOM) & (torch.arange(ROOM) < 20)]
    for sums, mask in zip(running, visible, strict=True):
        sums.map_batch(lambda t: t[order])  # nothing there yet
        tensor = values[:, :, :20] if isinstance(sums, RunningSums) else values
        sums.update(tensor, mask, 6)
        sums.map_batch(lambda t: t[order])
        found, _ = sums.update(tensor[order], mask[order], 6)
        check(found, values[order][:, :, :20], padded(20)[order], 6)
    running[1].reset()
    length.fill_(4)
    found, _ = running[1].update(values, None, 6)
    check(found, values[:, :, :4], None, 6)


def test_halves_are_summed_in_float32():
    values = torch.ones(1, 1, 5000, 1, dtype=torch.bfloat16)
    sums = BlockSums.of(values, None, None)
    assert sums.total.dtype == torch.float32
    assert sums.total.item() == 5000  # bfloat16 would stop at 256
    assert BlockSums.of(values, None, 1000).total.flatten().tolist() == [1000] * 5


def test_sums_made_in_inference_mode_go_on_outside():
    running, values = RunningSums(), values_of(20)
    with torch.inference_mode():
        running.update(values[:, :, :9], None, 4)
        running.update(values[:, :, :10], None, 4)
    sums, _ = running.update(values[:, :, :11], None, 4)
    check(sums, values[:, :, :11], None, 4)
    with torch.inference_mode():
        running.update(values[:, :, :12], None, 4)
    running.crop(6)
    sums, _ = running.update(values, None, 4)
    check(sums, values, None, 4)


def test_padding_that_is_not_a_number_is_left_out():
    values = values_of(12)
    values[2, :, :9] = torch.nan
    running = RunningSums()
    sums, _ = running.update(values, padded(12), 4)
    check(sums, values.nan_to_num(0), padded(12), 4)
