"""What the ranks send, counted where it is sent, and what of it hides behind computation."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Span = tuple[float, float]
"""Start and end in microseconds."""

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class Traffic(TorchDispatchMode):
    """Count the bytes that this rank hands to other ranks while the block lasts, backward included.

    Collectives are counted as what every rank must at least send: of an all-gather its own part to
    each of the others, of a reduce-scatter all but its own part, of an all-reduce both.

    Args:
        ranks: Processes of a group.

    Attributes:
        sent: Bytes so far.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent = ranks, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count, and run."""
        if any(not issubclass(kind, Tensor) or _wraps(kind) for kind in types):
            return NotImplemented  # DTensor: it comes back with what it is made of
        if func.namespace in _NAMESPACES:
            self.sent += bytes_of(func._opname, args, self.ranks)
        return func(*args, **(kwargs or {}))


def _wraps(kind: type) -> bool:
    """Whether a kind of tensor is made of others."""
    return kind is not Tensor and kind is not torch.nn.Parameter


def bytes_of(name: str, args: Sequence[Any], ranks: int) -> int:
    """Bytes that a rank sends in one call of an operator of torch.distributed.

    Args:
        name: The operator's, without namespace and overload.
        args: What it was called with.
        ranks: Processes of the group.

    Raises:
        ValueError: It is not known what the operator sends.
    """
    others = ranks - 1
    if name.startswith(("wait_tensor", "_wrap_tensor", "recv", "barrier", "monitored_barrier")):
        return 0
    if name == "send":
        return _size(args[0])
    if name in ("allgather_", "allgather_into_tensor_coalesced_", "_allgather_base_"):
        return _size(args[1]) * others
    if name in ("all_gather_into_tensor", "all_gather_into_tensor_coalesced"):
        return _size(args[0]) * others
    if name in ("reduce_scatter_", "_reduce_scatter_base_"):
        return _size(args[1]) // ranks * others
    if name.startswith("reduce_scatter_tensor"):
        return _size(args[0]) // ranks * others
    if name in ("alltoall_base_", "alltoall_"):
        return _size(args[1]) // ranks * others
    if name == "all_to_all_single":
        sizes = args[2]
        # Which of the parts stays here is not said; where the others differ, all are counted.
        whole = _size(args[0])
        return whole // ranks * others if len(set(sizes)) == 1 else whole
    if name.startswith(("allreduce_", "all_reduce")):
        return 2 * (_size(args[0]) // ranks * others)
    if name.startswith(("broadcast", "gather_")):
        return _size(args[0])
    raise ValueError(f"what {name} sends is not known to the benchmark")


def _size(thing: Any) -> int:
    """Bytes of a tensor, or of all tensors of lists of them."""
    if isinstance(thing, Tensor):
        return thing.numel() * thing.element_size()
    return sum(map(_size, thing))


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What one rank's device did, from the first computation or transfer on.

    Attributes:
        computing: When it computed; disjoint, ascending.
        moving: When transfers were under way, waiting for the other rank included.
    """

    computing: tuple[Span, ...]
    moving: tuple[Span, ...]

    @property
    def hidden(self) -> float | None:
        """The share of the transfers' time during which something was computed, too."""
        moved = length(self.moving)
        return overlap(self.computing, self.moving) / moved if moved else None

    @property
    def end(self) -> float:
        """When the last of all ended, in microseconds."""
        return max((spans[-1][1] for spans in (self.computing, self.moving) if spans), default=0.0)

    @property
    def busy(self) -> float:
        """The share of the time in which something was computed."""
        return length(self.computing) / self.end if self.end else 0.0


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The union of spans: disjoint, ascending."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)


def length(spans: Iterable[Span]) -> float:
    """Time in disjoint spans."""
    return sum(end - start for start, end in spans)


def overlap(left: Sequence[Span], right: Sequence[Span]) -> float:
    """Time that two ascending lists of disjoint spans share."""
    total = 0.0
    ends = [end for _, end in right]
    for start, end in left:
        for other in right[bisect.bisect_right(ends, start) :]:
            if other[0] >= end:
                break
            total += min(end, other[1]) - max(start, other[0])
    return total


def timeline_of(run: Callable[[], Any], device: torch.device) -> Timeline:
    """Run something under PyTorch's profiler.

    Args:
        run: What to look at; all ranks call this.
        device: Of a CUDA device its kernels are taken, of the CPU PyTorch's operators and gloo's
            transfers.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in profiler.events() or ()
        if event.device_type == wanted
    ]
    return reduce_events(found, on_gpu)


def reduce_events(events: Iterable[tuple[str, Span]], on_gpu: bool) -> Timeline:
    """A profiler's events as two lanes.

    Args:
        events: Names and times in microseconds.
        on_gpu: Whether they are a GPU's; NCCL's kernels move data there, and names such as
            ``nccl:send`` only mark sections. Without a GPU gloo moves data. What ends before the
            last all-reduce does, through which the ranks wait for each other, is not of interest.
    """
    events = list(events)
    aligned = max((span[1] for name, span in events if _is_all_reduce(name)), default=0.0)
    computing, moving = [], []
    for name, span in events:
        if span[0] < aligned:
            continue
        if on_gpu and name.startswith(("ncclDevKernel", "ncclKernel")):
            moving.append(span)
        elif on_gpu and name.startswith(("nccl:", "ProfilerStep", "c10d")):
            continue
        elif on_gpu or name.startswith("aten::"):
            computing.append(span)
        elif name.startswith("gloo:"):
            moving.append(span)
    first = min((start for start, _ in (*computing, *moving)), default=0.0)
    lanes = (
        merged((round(start - first, 1), round(end - first, 1)) for start, end in spans)
        for spans in (computing, moving)
    )
    return Timeline(*lanes)


def _is_all_reduce(name: str) -> bool:
    return name.startswith(("ncclDevKernel_AllReduce", "ncclKernel_AllReduce", "gloo:all_reduce"))
