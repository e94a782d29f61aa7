"""Batches of sends and receives: order, sizes, dtypes, many small ones packed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_attn_plugin.parallel.exchange import start_exchange
from tests.parallel.processes import run_processes

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def pieces(source: int, target: int, count: int) -> list[Tensor]:
    """What one rank sends another: all different, some empty, of several dtypes."""
    return [
        torch.full((number % 4, 3), 100 * source + 10 * target + number / 8).to(DTYPES[number % 3])
        for number in range(count)
    ]


def all_to_all(rank: int, count: int) -> tuple[int, int]:
    """Everybody sends to everybody; number of messages, bytes."""
    ranks = dist.get_world_size()
    others = [other for other in range(ranks) if other != rank]
    sends = [(other, piece) for other in others for piece in pieces(rank, other, count)]
    expected = [(other, piece) for other in others for piece in pieces(other, rank, count)]
    receives = [(other, torch.zeros_like(piece)) for other, piece in expected]
    exchange = start_exchange(None, sends, receives)
    works = len(exchange._works)
    exchange.wait()
    exchange.wait()  # once more does nothing
    for (_, found), (_, want) in zip(receives, expected, strict=True):
        assert torch.equal(found, want)
    assert exchange.bytes_sent == sum(piece.numel() * piece.element_size() for _, piece in sends)
    return works, exchange.bytes_sent


@pytest.mark.parametrize(("count", "messages"), [(9, 2 * 6), (90, 2 * 3)])
def test_everything_arrives_where_it_belongs(count: int, messages: int) -> None:
    """Of nine pieces six are not empty; of each dtype of ninety more than 16 are not."""
    for works, _ in run_processes(all_to_all, 3, count):
        assert works == 2 * messages


def test_nothing_to_send_needs_no_group() -> None:
    start_exchange(None, [], []).wait()
