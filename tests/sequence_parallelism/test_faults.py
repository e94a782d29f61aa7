"""Processes that die, fail or leave while the others wait for them."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from hf_attn_plugin.sequence_parallelism.faults import watch_processes
from tests.parallel.processes import PRELOADED


def _child(rank: int, folder: Path, kind: str, which: int) -> None:
    import torch.distributed as dist

    with (folder / f"{rank}.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=3,
        timeout=datetime.timedelta(seconds=60),
    )
    with contextlib.nullcontext() if kind == "unwatched" else watch_processes(grace_s=0.5):
        dist.barrier()
        if rank != which:
            # As in a collective of NCCL: nothing tells this process that it waits in vain.
            time.sleep(2 if kind == "leaves" else 30)
        elif kind in ("dies", "unwatched"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "fails":
            raise ValueError("no such batch")
    os.write(1, f"left {rank}".encode())


def run(kind: str, which: int, folder: Path, limit_s: float) -> tuple[list[int | None], list[str]]:
    """Exit statuses (None: there at the limit after one has ended) and what processes wrote."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = [
        context.Process(target=_child, args=(rank, folder, kind, which), daemon=True)
        for rank in range(3)
    ]
    try:
        for process in started:
            process.start()
        started[which].join(60)
        assert started[which].exitcode is not None
        deadline = time.monotonic() + limit_s
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()
    return statuses, [(folder / f"{rank}.log").read_text() for rank in range(3)]


@pytest.mark.parametrize("which", [0, 2])
def test_the_others_end_when_one_is_killed(which: int, tmp_path: Path) -> None:
    statuses, logs = run("dies", which, tmp_path, limit_s=20)
    for rank in {0, 1, 2} - {which}:
        assert statuses[rank] == 1
        assert f"process {which} (" in logs[rank] and "is gone: it was killed" in logs[rank]
    assert statuses[which] == -signal.SIGKILL


def test_the_others_end_when_one_fails(tmp_path: Path) -> None:
    statuses, logs = run("fails", 1, tmp_path, limit_s=20)
    assert statuses == [1, 1, 1]
    for rank in (0, 2):
        assert "failed with ValueError: no such batch" in logs[rank]
        assert "process 1 (" in logs[rank]


def test_one_that_leaves_first_is_no_fault(tmp_path: Path) -> None:
    statuses, logs = run("leaves", 0, tmp_path, limit_s=30)
    assert statuses == [0, 0, 0]
    assert [f"left {rank}" for rank in range(3)] == logs


def test_without_the_watch_they_would_wait(tmp_path: Path) -> None:
    statuses, _ = run("unwatched", 2, tmp_path, limit_s=3)
    assert statuses == [None, None, -signal.SIGKILL]
