"""The helper that runs functions in processes: results, errors and hangs are told by rank."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.processes import ChildError, run_processes


def total(rank: int, start: int) -> torch.Tensor:
    number = torch.tensor(float(start + rank))
    dist.all_reduce(number)
    return number


def failing(rank: int) -> None:
    if rank == 1:
        raise ValueError("of rank one")
    dist.barrier()


def dying(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def hanging(rank: int) -> None:
    time.sleep(30 * rank)


def test_results_come_by_rank_from_as_many_processes_as_asked() -> None:
    assert [float(result) for result in run_processes(total, 3, 10)] == [33.0] * 3


def test_errors_name_their_rank() -> None:
    with pytest.raises(ChildError, match=r"(?s)rank 1: Traceback.*ValueError: of rank one"):
        run_processes(failing, 2)


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(ChildError, match="rank 1: ended without a result"):
        run_processes(dying, 2)


def test_a_process_that_hangs_is_an_error() -> None:
    with pytest.raises(ChildError, match="rank 1: did not end in time"):
        run_processes(hanging, 2, limit_s=2)
