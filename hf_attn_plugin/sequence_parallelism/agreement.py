"""Ranks tell each other what they are about to do, before any of them waits for another's tensors.

A collective that the others do not join, or join with other shapes, hangs or computes nonsense. So
every rank first says what it has, or why it cannot, in a few hundred bytes through the store in
which the group's processes met. Then all go on, or all raise the same error.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
_WHO = "sequence_parallel"


def agree(
    group: ProcessGroup | None,
    make: Callable[[], tuple[T, Mapping[str, Any]]],
    timeout: datetime.timedelta,
) -> T:
    """What ``make`` returns on this rank, if it returns on all and they say the same.

    Args:
        group: The ranks; None for one process.
        make: Returns a value and what must be the same on every rank, by name, in values that JSON
            knows.
        timeout: How long to wait for the others.

    Raises:
        ValueError: ``make`` raised one on some rank, or what the ranks said differs; the same text
            on every rank, with the rank's number in it.
        TimeoutError: Some rank said nothing in time; they are named.
    """
    failure: Exception | None = None
    said: dict[str, Any] = {}
    try:
        value, statement = make()
        said["statement"] = dict(statement)
    except Exception as error:
        failure = error
        said["error"] = str(error) if isinstance(error, ValueError) else repr(error)
    if group is None:
        if failure is not None:
            raise failure
        return value
    gone = json.dumps({"error": f"it waited {timeout.total_seconds():g} s and gave up."})
    answers = [json.loads(text) for text in exchange(group, json.dumps(said), gone, timeout)]
    refused = [rank for rank, answer in enumerate(answers) if "error" in answer]
    if refused:
        reason = answers[refused[0]]["error"]
        everywhere = len(refused) == len(answers)
        ranks = "every rank" if everywhere else f"rank {', '.join(map(str, refused))}"
        raise ValueError(f"{_WHO}: refused on {ranks} of {len(answers)}: {reason}") from failure
    _compare([answer["statement"] for answer in answers])
    return value


def least(group: ProcessGroup | None, number: int, timeout: datetime.timedelta) -> int:
    """The smallest of the ranks' numbers, on every rank.

    Raises:
        TimeoutError: See `exchange`.
    """
    if group is None:
        return number
    return min(map(int, exchange(group, str(number), str(number), timeout)))


def _compare(statements: list[dict[str, Any]]) -> None:
    first = statements[0]
    for rank, other in enumerate(statements):
        for name in [*first, *(n for n in other if n not in first)]:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{_WHO}: the ranks of one sequence must all be given the same whole batch and "
                    f"the same settings, and {name} is {first.get(name)} on rank 0 and "
                    f"{other.get(name)} on rank {rank} of {len(statements)}."
                )


def exchange(
    group: ProcessGroup, message: str, gone: str, timeout: datetime.timedelta
) -> list[str]:
    """Every rank's message, by rank. No tensors travel, and no device waits.

    Args:
        group: The ranks.
        message: This one's.
        gone: What a rank that comes too late finds in its place.
        timeout: How long to wait for the others.

    Raises:
        TimeoutError: Some ranks said nothing in time; they are named.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    rank, count = dist.get_rank(group), dist.get_world_size(group)
    store = distributed_c10d._get_process_group_store(group)
    # Counted by the store, so that no state of ours can get out of step with it.
    turn = store.add(f"hf_attn/turn/{rank}", 1)
    keys = [f"hf_attn/{turn}/{other}" for other in range(count)]
    store.set(keys[rank], message)
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        if not missing:
            raise
        store.set(keys[rank], gone)
        raise TimeoutError(
            f"{_WHO}: rank {', '.join(missing)} of {count} did not get here within "
            f"{timeout.total_seconds():g} s. It has ended, or does something else; see its output."
        ) from error
    answers = [store.get(key).decode() for key in keys]
    # All are here, so all have read what was said the last time.
    store.delete_key(f"hf_attn/{turn - 1}/{rank}")
    return answers


def join_all(group: ProcessGroup | None, device: torch.device) -> None:
    """One collective in which all ranks take part.

    NCCL makes a group's communicator in its first operation, and that may not be between two.
    """
    import torch.distributed as dist

    if group is not None and "nccl" in dist.get_backend(group):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
