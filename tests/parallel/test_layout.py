"""Which rank holds which tokens."""

import pytest
import torch

from hf_attn_plugin.parallel.layout import Layout, padded_length

LAYOUTS = [
    Layout(ranks * chunks * 3, ranks, chunks)
    for ranks in (1, 2, 3, 4, 8)
    for chunks in (1, 2, 4, 6)
]


def test_chunks_in_order() -> None:
    def owners(layout: Layout) -> list[int]:
        return [layout.owner(chunk) for chunk in range(layout.ranks * layout.chunks)]

    assert owners(Layout.contiguous(8, 4)) == [0, 1, 2, 3]
    assert owners(Layout.zigzag(8, 4)) == [0, 1, 2, 3, 3, 2, 1, 0]
    assert owners(Layout.zigzag(16, 4, 4)) == [0, 1, 2, 3, 3, 2, 1, 0] * 2
    assert Layout.zigzag(16, 2).segments(0) == (range(4), range(12, 16))
    assert Layout.zigzag(16, 2).segments(1) == (range(4, 8), range(8, 12))
    assert Layout.zigzag(16, 2).runs(1) == (range(4, 12),)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_token_has_one_place(layout: Layout) -> None:
    tokens = torch.arange(layout.length)
    parts = []
    for rank in range(layout.ranks):
        segments = layout.segments(rank)
        assert {len(segment) for segment in segments} == {layout.chunk}
        assert len(segments) == layout.chunks
        held = [token for segment in segments for token in segment]
        assert held == sorted(held)
        assert held == [token for run in layout.runs(rank) for token in run]
        parts.append(layout.take(tokens, rank, dim=0))
        assert parts[-1].tolist() == held
        for run in layout.runs(rank):
            local = layout.local(rank, run)
            assert parts[-1][local.start : local.stop].tolist() == list(run)
    assert torch.equal(layout.join(parts, dim=0), tokens)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_of_ranks_hold_what_their_ranks_hold(layout: Layout) -> None:
    tokens = torch.arange(layout.length)
    for size in range(1, layout.ranks + 1):
        if layout.ranks % size:
            continue
        outer, inner = layout.grouped(size), layout.within(size)
        for group in range(outer.ranks):
            own = [layout.take(tokens, group * size + i, dim=0) for i in range(size)]
            held = inner.join(own, dim=0)
            assert torch.equal(held, outer.take(tokens, group, dim=0))
            for i in range(size):
                assert torch.equal(inner.take(held, i, dim=0), own[i])


def test_other_dimensions_and_views() -> None:
    tensor = torch.randn(2, 3, 16, 5)
    layout = Layout.contiguous(16, 4)
    part = layout.take(tensor, 2, dim=2)
    assert part.data_ptr() == tensor[:, :, 8:].data_ptr()
    layout = Layout.zigzag(16, 4)
    parts = [layout.take(tensor, rank, dim=-2) for rank in range(4)]
    assert torch.equal(layout.join(parts, dim=-2), tensor)
    assert not torch.equal(torch.cat(parts, 2), tensor)


def test_lengths_are_padded_to_equal_chunks() -> None:
    assert padded_length(100, 4, 2) == 104
    assert padded_length(104, 4, 2) == 104
    assert padded_length(100, 4, 2, multiple=16) == 128
    assert padded_length(0, 4, 2) == 0
    with pytest.raises(ValueError, match=r"length of 100 does not divide .*pad it to 104"):
        Layout.zigzag(100, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(12, 0), "ranks must be >= 1, got 0"),
        (lambda: Layout(12, 2, 3), "chunks must be 1 .* or even .* got 3"),
        (lambda: Layout(12, 2, 0), "chunks must be 1"),
        (lambda: Layout(12, 2).segments(2), "no rank 2 among 2"),
        (lambda: Layout(12, 2).local(0, range(4, 8)), "rank 0 does not hold"),
        (lambda: Layout(12, 2).take(torch.zeros(1, 11), 0), "must have 12 tokens"),
        (lambda: Layout(12, 2).join([torch.zeros(1, 6)]), "1 parts for 2 ranks"),
        (lambda: Layout(12, 2).join([torch.zeros(1, 6), torch.zeros(1, 5)]), "must have 6 tokens"),
        (lambda: Layout(12, 4).grouped(3), "groups of 3 ranks do not divide 4"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
