"""The processes of ``hf-attn bench ring``, one per GPU: started, met, timed together."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .timing import Clock, CudaClock, Times

# A rank that waits longer for the others gives up, and with it the whole run.
_TIMEOUT = datetime.timedelta(seconds=180)


@dataclasses.dataclass(frozen=True)
class Team:
    """This process among all of them.

    Attributes:
        rank: Its number.
        size: How many there are.
        device: Where its tensors live.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes what is reported."""
        return self.rank == 0

    def align(self) -> None:
        """Make the devices wait for each other; the host goes on where the device has a queue."""
        dist.all_reduce(torch.zeros(1, device=self.device))

    def barrier(self) -> None:
        """Wait until all processes are here and their devices idle."""
        self.align()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Element by element, the largest of all ranks."""
        told = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return told.tolist()

    def gathered(self, thing: Any) -> list[Any]:
        """What every rank passed, by rank; things must be picklable."""
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def from_leader(self, thing: Any) -> Any:
        """What rank 0 passed."""
        things = [thing]
        dist.broadcast_object_list(things, src=0, device=self.device)
        return things[0]

    def all_parts(self, local: Tensor) -> list[Tensor]:
        """The tensor of every rank, by rank; all have one shape."""
        local = local.detach().contiguous()
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local)
        return parts

    def attempt(self, action: Callable[[], Any]) -> tuple[Any, str | None]:
        """Run something on every rank; what went wrong on any of them is known to all.

        Returns:
            What ``action`` returned here, and None; or None and the first error by rank.
        """
        result, wrong = None, None
        try:
            result = action()
        except Exception as error:  # whatever a peer does must not stop the others
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            text = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
            wrong = f"{type(error).__name__}: {text[:300]}"
        errors = self.gathered(wrong)
        for rank, text in enumerate(errors):
            if text is not None:
                alike = all(other == text for other in errors)
                return None, text if alike else f"rank {rank}: {text}"
        return result, None


class WallClock:
    """The host's clock, for a device without a queue; memory is not counted."""

    def flush(self) -> None:
        """Nothing: there is no time worth that."""

    def mark(self) -> float:
        """Now, in seconds."""
        return time.perf_counter()

    def elapsed_ms(self, start: float, end: float) -> float:
        """Milliseconds between two marks."""
        return (end - start) * 1e3

    def reset_peak(self) -> int:
        """0."""
        return 0

    def peak_bytes(self) -> int:
        """0."""
        return 0


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


def by_torchrun() -> bool:
    """Whether torchrun (or ``accelerate launch``) started this process."""
    return dist.is_torchelastic_launched()


def check_ranks(ranks: int | None, device: str) -> int:
    """How many processes to run.

    Args:
        ranks: As asked for; None for one per GPU, of ``cpu`` 2.
        device: ``cuda`` or ``cpu``.

    Raises:
        ValueError: There are too few GPUs, or torchrun started another number.
    """
    if by_torchrun():
        import os

        started = int(os.environ["WORLD_SIZE"])  # torchrun's own way of telling
        if ranks not in (None, started):
            raise ValueError(
                f"--ranks {ranks}, but torchrun started {started} processes: leave --ranks out"
            )
        if started < 2:
            raise ValueError(
                "hf-attn bench ring needs two processes or more: torchrun --nproc_per_node 2"
            )
        return started
    if ranks is not None and ranks < 2:
        raise ValueError(f"--ranks must be at least 2, got {ranks}: one GPU has no one to send to")
    if device == "cpu":
        return ranks or 2
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < (ranks or 2):
        raise ValueError(
            f"hf-attn bench ring runs a process per GPU and needs {ranks or 'two or more'} of "
            f"them; torch {torch.__version__} finds {gpus} here. (--device cpu tries the command "
            "with a few tokens and gloo; hf-attn bench measures one GPU.)"
        )
    return ranks or gpus


def start(target: Callable[..., None], ranks: int, *args: Any) -> int:
    """Run ``target(rank, ranks, meeting, *args)`` in as many processes, or here under torchrun.

    Args:
        target: A function of a module that a new process can import; ends with SystemExit where
            its exit status is not 0.
        ranks: How many.
        args: Plain values for it.

    Returns:
        The exit status.

    Raises:
        torch.multiprocessing.ProcessRaisedException: One broke; the others are ended.
    """
    if by_torchrun():
        target(None, ranks, None, *args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        try:
            torch.multiprocessing.spawn(target, (ranks, meeting, *args), nprocs=ranks)
        except torch.multiprocessing.ProcessExitedException as error:
            if error.signal_name is not None:
                raise
            return error.exit_code
    return 0


@contextlib.contextmanager
def joined(rank: int | None, ranks: int, meeting: str | None, device_type: str) -> Iterator[Team]:
    """The process group, for as long as the block lasts.

    Args:
        rank: This process's; None where torchrun knows it.
        ranks: How many processes.
        meeting: The file through which they find each other; None where torchrun says.
        device_type: ``cuda`` (over NCCL) or ``cpu`` (over gloo).
    """
    import os

    local = int(os.environ["LOCAL_RANK"]) if rank is None else rank
    device = torch.device(device_type, local) if device_type == "cuda" else torch.device("cpu")
    options: dict[str, Any] = {"timeout": _TIMEOUT}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    else:
        torch.set_num_threads(1)
    if rank is not None:
        options |= {"init_method": f"file://{meeting}", "rank": rank, "world_size": ranks}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def timed(
    team: Team | None,
    clock: Clock,
    stages: Sequence[Callable[[Any], Any]],
    *,
    seconds: float = 0.2,
    most: int = 20,
    loaded: bool = False,
) -> Times:
    """As `timing.time_stages`, of stages in which all ranks take part: the slowest rank counts.

    Args:
        team: This process among the others, which call this too; None where it does it alone.
        clock: This device's.
        stages: Called in turn, each with what the one before it returned; the first with None.
        seconds: How long to measure, roughly.
        most: Most repeats.
        loaded: Whether the stages have been run before.
    """

    def run() -> list[float]:
        if team is not None:
            team.align()
        clock.flush()
        marks = [clock.mark()]
        result: Any = None
        for stage in stages:
            result = stage(result)
            marks.append(clock.mark())
        pairs = [*itertools.pairwise(marks), (marks[0], marks[-1])]
        times = [clock.elapsed_ms(start, end) for start, end in pairs]
        return times if team is None else team.largest(times)

    if not loaded:
        run()  # kernels are loaded and memory is reserved here
    held = clock.reset_peak()
    runs = [run()]
    extra = clock.peak_bytes() - held
    if team is not None:
        extra = int(team.largest([extra])[0])
    repeats = max(1, min(most, int(seconds * 1e3 / max(runs[0][-1], 1e-3))))
    runs += [run() for _ in range(repeats - 1)]
    *stages_ms, total = (statistics.median(times) for times in zip(*runs, strict=True))
    return Times(tuple(stages_ms), total, extra, repeats)
