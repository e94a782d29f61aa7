"""Times in CUDA events, peak memory, and the limits of the card, measured rather than looked up."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Protocol

import torch

MATMUL_SIZE = 8192
# Written before every run: it clears the L2 cache, and takes the card long enough for the host to
# queue the run behind it, so that launching is not part of the time.
_FLUSH_BYTES = 2 * 1024**3
_LONG_MS = 100


class Clock(Protocol):
    """What timing needs of a device; tests have one that counts."""

    def flush(self) -> None:
        """Clear the caches before a run."""

    def mark(self) -> Any:
        """A point in the device's queue."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; waits for the second."""
        ...

    def reset_peak(self) -> int:
        """Start the peak of memory again from what is held now, in bytes."""
        ...

    def peak_bytes(self) -> int:
        """The most memory held since `reset_peak`, in bytes."""
        ...


class CudaClock:
    """CUDA events, and the allocator's statistics.

    Args:
        device: A CUDA device.
        flush_bytes: Size of the buffer that `flush` overwrites; of small devices less.
    """

    def __init__(self, device: torch.device, flush_bytes: int = _FLUSH_BYTES) -> None:
        total = torch.cuda.get_device_properties(device).total_memory
        size = min(flush_bytes, total // 16)
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.device = device

    def flush(self) -> None:
        """Overwrite a buffer many times as large as the L2 cache."""
        self.buffer.zero_()

    def mark(self) -> torch.cuda.Event:
        """An event in the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Milliseconds between two events."""
        end.synchronize()
        return start.elapsed_time(end)

    def reset_peak(self) -> int:
        """Bytes allocated now."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak_bytes(self) -> int:
        """Most bytes allocated since the reset."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


@dataclasses.dataclass(frozen=True)
class Times:
    """What a chain of stages took.

    Attributes:
        stages_ms: Median milliseconds of every stage.
        total_ms: Median milliseconds of all stages together.
        extra_bytes: Peak memory above what was held before, in bytes.
        repeats: Timed runs behind the medians.
    """

    stages_ms: tuple[float, ...]
    total_ms: float
    extra_bytes: int
    repeats: int


def time_stages(
    clock: Clock,
    stages: Sequence[Callable[[Any], Any]],
    *,
    seconds: float = 0.2,
    most: int = 50,
    least: int = 1,
    loaded: bool = False,
) -> Times:
    """Time stages that hand each other their results, such as a forward and its backward.

    Args:
        clock: The device's.
        stages: Called in turn, each with what the one before it returned; the first with None.
        seconds: How long to measure, roughly; as long again goes into warming up.
        most: Most repeats.
        least: Fewest repeats.
        loaded: Whether the stages have been run before.
    """

    def run() -> list[Any]:
        clock.flush()
        marks = [clock.mark()]
        result: Any = None
        for stage in stages:
            result = stage(result)
            marks.append(clock.mark())
        return marks

    if not loaded:
        run()  # kernels are loaded and memory is reserved here
    held = clock.reset_peak()
    marks = run()
    extra = clock.peak_bytes() - held
    once = clock.elapsed_ms(marks[0], marks[-1])
    repeats = max(least, min(most, int(seconds * 1e3 / max(once, 1e-3))))
    if once < _LONG_MS:  # the clocks of the card rise; what runs for long has warmed it up already
        for _ in range(repeats):
            run()
    runs = [run() for _ in range(repeats)]
    spans = [[clock.elapsed_ms(a, b) for a, b in itertools.pairwise(marks)] for marks in runs]
    total = statistics.median(clock.elapsed_ms(marks[0], marks[-1]) for marks in runs)
    stages_ms = tuple(statistics.median(span) for span in zip(*spans, strict=True))
    return Times(stages_ms, total, extra, repeats)


def matmul_tflops(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product of `MATMUL_SIZE` on random inputs: the roof."""
    left, right = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=device) for _ in range(2)
    )
    times = time_stages(clock, [lambda _: left @ right], seconds=0.5)
    return 2 * MATMUL_SIZE**3 / times.total_ms / 1e9


def copy_bytes_per_second(clock: Clock, device: torch.device, size: int = 4 * 1024**3) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes inside the device."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_stages(clock, [lambda _: target.copy_(source)], seconds=0.5)
    return 2 * size / times.total_ms * 1e3


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise ``TimeoutError`` in the block when it takes longer (in the main thread, on POSIX).

    Code that does not return to the interpreter is interrupted when it does.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{what} took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
