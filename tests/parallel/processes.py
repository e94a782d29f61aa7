"""A function in several processes that meet in one gloo group, with time limits and errors."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

# Imported once, by the process from which all others are forked: checkpoints import Dynamo, Trainer
# half of transformers.
PRELOADED = [
    "torch.distributed",
    "torch._dynamo",
    "accelerate",
    "hf_attn_plugin.parallel.attention",
    "hf_attn_plugin.sequence_parallelism.trainer",
    "tests.parallel.processes",
]
# How long the others may take to report once one has failed.
GRACE_S = 1.0


class ChildError(AssertionError):
    """A process failed, died or hung; the message names its rank and carries its traceback."""


def run_processes(
    function: Callable[..., Any], count: int, *args: Any, limit_s: float = 60.0
) -> list[Any]:
    """What ``function(rank, *args)`` returns in each of ``count`` processes of one gloo group.

    Args:
        function: Of a module (it is pickled by name). The group is there when it is called.
        count: Number of processes.
        args: Pickled; the same for all.
        limit_s: After this, processes that have not finished are killed.

    Returns:
        One result per rank.

    Raises:
        ChildError: A process raised, ended without a result, or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        pipes, processes = [], []
        for rank in range(count):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(sender, meeting, rank, count, limit_s, function, args),
                daemon=True,
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            results, errors = _collect(pipes, time.monotonic() + limit_s)
            if not errors:
                for process in processes:
                    process.join(GRACE_S)
        finally:
            for process in processes:
                process.kill()
                process.join()
    if errors:
        raise ChildError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))
    sizes = {size for size, _ in results.values()}
    assert len(results) == count and sizes == {count}, f"{len(results)} processes, sizes {sizes}"
    return [results[rank][1] for rank in range(count)]


def _collect(
    pipes: list[Connection], deadline: float
) -> tuple[dict[int, tuple[int, Any]], dict[int, str]]:
    """(group's size, result) of the ranks that returned, and what is wrong with the others."""
    results: dict[int, tuple[int, Any]] = {}
    errors: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            hung = "did not end in time" if not errors else "was still waiting for the others"
            errors |= dict.fromkeys(waiting, hung)
            break
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                written = io.BytesIO(waiting.pop(rank).recv_bytes())
                kind, *what = torch.load(written, weights_only=False)
            except EOFError:
                kind, what = "error", ["ended without a result"]
            if kind == "result":
                results[rank] = (what[0], what[1])
            else:
                errors[rank] = what[0]
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return results, errors


def _child(
    pipe: Connection,
    meeting: str,
    rank: int,
    count: int,
    limit_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=count,
            timeout=datetime.timedelta(seconds=limit_s),
        )
        message: tuple[Any, ...] = ("result", dist.get_world_size(), function(rank, *args))
    except BaseException:
        message = ("error", traceback.format_exc())
    written = io.BytesIO()
    torch.save(message, written)
    pipe.send_bytes(written.getvalue())
    pipe.close()
    if message[0] == "result":
        dist.barrier()
        dist.destroy_process_group()
