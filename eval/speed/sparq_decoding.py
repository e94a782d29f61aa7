"""SparQ's decoding step beside the dense kernels: times, bytes, errors.

Everything is checked before it is timed: dense kernels against softmax attention in float64, SparQ
against its definition (see `sparq_numerics`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.reads import CacheReads
from hf_attn_plugin.ops.sparq import sparq_decode
from hf_attn_plugin.ops.sparq.key_copy import Components, StridedComponents, allocate_copy

from .contenders import kernel_versions, source_hash
from .decoding import HEAD_DIM, HEADS, DecodeCase, check, contenders, host_microseconds
from .report import ERROR, MISSING, OK, WRONG, Results, machine
from .sparq_numerics import Setting, judge, part_ties, unrelated_rows
from .table import free
from .timing import time_limit, time_stages

DENSE = {
    "sdpa-flash": "sdpa-flash",
    "sdpa-cudnn": "sdpa-cudnn",
    "fa4": "fa4",
    "triton": "dense triton",
}
"""The dense contenders of `decoding`, by what they are called here."""

SPARQ = ("sparq torch", "sparq triton")
DOES_NOT_FIT = "does not fit"
_GROWTH = 128  # a copy has room for whole groups of positions
_SECONDS = 120.0

Inputs = tuple[Tensor, Tensor, Tensor]
Step = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoding step of 32 query heads of 128, bfloat16.

    Attributes:
        batch: Sequences.
        length: Keys of each.
        kv_heads: Key/value heads.
        reach_ms: The time to reach, or None.
        reach_ratio: The speed-up over the fastest dense kernel to reach, or None.
    """

    batch: int
    length: int
    kv_heads: int
    reach_ms: float | None = None
    reach_ratio: float | None = None

    @property
    def title(self) -> str:
        """In a few words."""
        return f"B={self.batch}, S={self.length}, {self.kv_heads} KV heads"

    @property
    def dense_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self.batch * self.length * self.kv_heads * HEAD_DIM * 2 * 2


SHAPES = (
    Shape(1, 131072, 32, 0.15, 3.2),
    Shape(8, 32768, 32, 0.23, 4.1),
    Shape(32, 16384, 32, 0.42, 4.6),
    Shape(64, 4096, 32, None, 3.5),
    Shape(8, 32768, 8, 0.09, 2.7),
    Shape(32, 16384, 8, 0.15, 3.2),
)
ONE_COPY_REACH = 1.8
"""The speed-up to reach without a second copy, at the paper's point."""

VARIANTS = (
    Setting(),
    Setting(key_copy="int8"),
    Setting(key_copy="int4"),
    Setting(key_copy="none"),
    Setting(top_k=512, coverage=0.9),
)


@dataclasses.dataclass(frozen=True)
class SparQRow:
    """One contender on one shape.

    Attributes:
        group: What it was measured for: a table or a picture.
        title: The shape's.
        batch: Sequences.
        length: Keys.
        kv_heads: Key/value heads.
        contender: Its name.
        setting: The setting's title; "" for dense attention.
        status: ok, FAILED numerics, missing or error.
        detail: What is wrong, where the status is not ok.
        stamp: Device and versions that the numbers hold for.
        ms: Median milliseconds on the device.
        host_us: Microseconds that a call takes the host.
        nbytes: Of the cache that the step reads: all of it, or what `CacheReads` counts.
        share: The worst error as a share of what is allowed.
        exchanged: Keys chosen otherwise than in float64, per key/value head.
    """

    group: str
    title: str
    batch: int
    length: int
    kv_heads: int
    contender: str
    setting: str
    status: str
    detail: str = ""
    stamp: str = ""
    ms: float | None = None
    host_us: float | None = None
    nbytes: int | None = None
    share: float | None = None
    exchanged: float | None = None

    @property
    def key(self) -> str:
        """What the row is kept under."""
        return f"{self.group}: {self.title}: {self.contender} {self.setting}"

    @property
    def dense(self) -> bool:
        """Whether it reads everything."""
        return not self.setting


def random_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Normal query, keys and values, the same for equal shapes."""
    torch.manual_seed(shape.length + shape.batch)
    query = torch.randn(shape.batch, HEADS, 1, HEAD_DIM, device=device, dtype=torch.bfloat16)
    query = part_ties(query, shape.kv_heads)
    size = (shape.batch, shape.kv_heads, shape.length, HEAD_DIM)
    keys, values = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return query, keys, values


def make_copy(setting: Setting, keys: Tensor) -> Components | None:
    """The second copy of the keys, None where the keys themselves are read."""
    length = keys.shape[2]
    buffer = allocate_copy(setting.key_copy, keys, -(-length // _GROWTH) * _GROWTH)
    if buffer is None:
        return None
    buffer.append(0, keys)
    return buffer.components(length)


def torch_step(
    setting: Setting, inputs: Inputs, copy: Components | None
) -> tuple[Tensor, CacheReads]:
    """The step in PyTorch, and the bytes that it counts."""
    query, keys, values = inputs
    return sparq_decode(
        query,
        keys,
        values,
        rank=setting.rank,
        top_k=setting.top_k,
        local_window=setting.local_window,
        mean_value_reallocation=False,
        coverage=setting.coverage,
        components=StridedComponents(keys) if copy is None else copy,
    )


def triton_step(setting: Setting, inputs: Inputs, copy: Components | None) -> Step:
    """The step in our kernels.

    Raises:
        ImportError: There is no Triton.
    """
    from hf_attn_plugin.ops.triton.sparq import triton_sparq

    query, keys, values = inputs
    stop = torch.full((query.shape[0],), keys.shape[2], dtype=torch.int32, device=query.device)
    return functools.partial(
        triton_sparq,
        query,
        keys,
        values,
        rank=setting.rank,
        top_k=setting.top_k,
        local_window=setting.local_window,
        mean_value_reallocation=False,
        coverage=setting.coverage,
        scaling=HEAD_DIM**-0.5,
        components=copy,
        stop=stop,
    )


def best_dense(rows: Sequence[SparQRow], like: SparQRow) -> SparQRow | None:
    """The fastest dense contender on the row's shape."""
    dense = [row for row in rows if row.dense and row.ms is not None and row.title == like.title]
    return min(dense, key=lambda row: row.ms or 0.0, default=None)


class SparQBench:
    """Measures shapes, row by row.

    Args:
        clock: Of the device.
        device: Where.
        results: Keeps the rows.
        say: Receives progress, a line at a time.
        steps: Which of `SPARQ` take part.
        seconds: How long to time each contender, roughly.
    """

    def __init__(
        self,
        clock: Any,
        device: torch.device,
        results: Results[SparQRow],
        say: Callable[[str], None],
        steps: Sequence[str] = SPARQ,
        seconds: float = 0.2,
    ) -> None:
        self.clock, self.device, self.results, self.say = clock, device, results, say
        self.steps, self.seconds = steps, seconds
        self.stamp = stamp()

    def measure(
        self, group: str, shape: Shape, settings: Sequence[Setting], make: Any = random_inputs
    ) -> list[SparQRow]:
        """Every dense contender, and every setting of SparQ, on one shape.

        Args:
            group: What for; rows are kept apart by it.
            shape: The shape.
            settings: SparQ's.
            make: Makes the inputs from shape and device.
        """
        empty = SparQRow(
            group,
            shape.title,
            shape.batch,
            shape.length,
            shape.kv_heads,
            "",
            "",
            OK,
            "",
            self.stamp,
        )
        case = DecodeCase(shape.batch, shape.length, shape.kv_heads)
        rows, calls = [], {}
        for name, call in contenders(case, self.device).items():
            row = dataclasses.replace(empty, contender=DENSE.get(name, name))
            if name in DENSE and isinstance(call, str):
                status = MISSING if call.startswith(MISSING) else ERROR
                rows.append(self._keep(dataclasses.replace(row, status=status, detail=call)))
            elif name in DENSE and not isinstance(call, str):
                calls[row.contender] = call
        wanted = [dataclasses.replace(empty, contender=name) for name in calls]
        wanted += [
            dataclasses.replace(empty, contender=name, setting=setting.title)
            for setting in settings
            for name in self.steps
        ]
        kept = {row.key: self.results.get(row.key, row.stamp) for row in wanted}
        if all(kept.values()):
            self.say(f"{group}: {shape.title}: kept from an earlier run")
            return [*rows, *(row for row in kept.values() if row is not None)]
        try:
            inputs = make(shape, self.device)
        except torch.OutOfMemoryError:
            free(self.device)
            return [
                self._keep(dataclasses.replace(row, status=ERROR, detail=DOES_NOT_FIT))
                for row in wanted
            ]
        for row in wanted[: len(calls)]:
            again = kept[row.key] or self._dense_row(row, case, inputs, calls[row.contender])
            rows.append(self._keep(again))
        for setting in settings:
            own = [row for row in wanted if row.setting == setting.title]
            if any(kept[row.key] is None for row in own):
                made = self._sparq_rows(own, setting, inputs)
                rows += [self._keep(kept[row.key] or row) for row in made]
            else:
                rows += [done for row in own if (done := kept[row.key]) is not None]
        del inputs
        free(self.device)
        return rows

    def measure_alone(self, group: str, shape: Shape, setting: Setting, make: Any) -> SparQRow:
        """The time of our kernels alone, on other inputs than those that are checked.

        Where all masses are equal, any keys are a right choice, so there is nothing to compare.
        """
        name = SPARQ[-1]
        row = SparQRow(
            group,
            shape.title,
            shape.batch,
            shape.length,
            shape.kv_heads,
            name,
            setting.title,
            OK,
            stamp=self.stamp,
        )
        kept = self.results.get(row.key, row.stamp)
        if kept is not None:
            return kept
        inputs = make(shape, self.device)

        def measured() -> SparQRow:
            call = triton_step(setting, inputs, make_copy(setting, inputs[1]))
            if not bool(call().isfinite().all()):
                return dataclasses.replace(row, status=WRONG, detail="not finite")
            return dataclasses.replace(row, **self._times(call))

        return self._keep(_guarded(row, measured))

    def _keep(self, row: SparQRow) -> SparQRow:
        number = row.detail if row.ms is None else f"{row.ms:.4f} ms"
        self.say(f"{row.group}: {row.title}: {row.contender} {row.setting}: {row.status} {number}")
        self.results.add(row)
        return row

    def _dense_row(
        self, row: SparQRow, case: DecodeCase, inputs: Inputs, call: Callable[..., Tensor]
    ) -> SparQRow:
        def measured() -> SparQRow:
            call(*inputs)
            share = check(case, inputs, call(*inputs))
            if not share <= 1:
                return dataclasses.replace(row, status=WRONG, detail=_times(share), share=share)
            return dataclasses.replace(
                row, share=share, nbytes=case.nbytes, **self._times(lambda: call(*inputs))
            )

        return _guarded(row, measured)

    def _sparq_rows(
        self, rows: Sequence[SparQRow], setting: Setting, inputs: Inputs
    ) -> list[SparQRow]:
        """All steps of one setting, which share the copy and what is expected."""
        try:
            copy = make_copy(setting, inputs[1])
            plain, reads = torch_step(setting, inputs, copy)
        except torch.OutOfMemoryError:
            return [dataclasses.replace(row, status=ERROR, detail=DOES_NOT_FIT) for row in rows]
        query, keys, _ = inputs
        pairs = sorted(
            {(row, head) for row in (0, query.shape[0] - 1) for head in (0, keys.shape[1] - 1)}
        )

        def measured(row: SparQRow) -> SparQRow:
            if row.contender == "sparq torch":
                call: Step = lambda: torch_step(setting, inputs, copy)[0]  # noqa: E731
            else:
                call = triton_step(setting, inputs, copy)
            call()
            output = call()
            verdict = judge(setting, *inputs, copy, output, pairs)
            unrelated = unrelated_rows(output, plain)
            numbers: dict[str, Any] = {"share": verdict.share, "exchanged": verdict.exchanged}
            if not verdict.share <= 1:
                return dataclasses.replace(
                    row, status=WRONG, detail=_times(verdict.share), **numbers
                )
            if unrelated:
                text = f"{unrelated} heads have nothing to do with those of the step in PyTorch"
                return dataclasses.replace(row, status=WRONG, detail=text, **numbers)
            return dataclasses.replace(row, nbytes=reads.total, **numbers, **self._times(call))

        return [_guarded(row, functools.partial(measured, row)) for row in rows]

    def _times(self, call: Step) -> dict[str, Any]:
        ms = time_stages(self.clock, [lambda _: call()], seconds=self.seconds).total_ms
        return {"ms": ms, "host_us": host_microseconds(call)}


def _guarded(row: SparQRow, measured: Callable[[], SparQRow]) -> SparQRow:
    """The row as measured, or with what went wrong."""
    try:
        with time_limit(_SECONDS, f"{row.contender} on {row.title}"):
            return measured()
    except ImportError as error:
        return dataclasses.replace(row, status=MISSING, detail=str(error))
    except Exception as error:  # whatever a peer does must not stop the others
        first = (str(error).strip().splitlines() or [""])[0][:200]
        return dataclasses.replace(row, status=ERROR, detail=f"{type(error).__name__}: {first}")


def _times(share: float) -> str:
    return f"{share:.1f} times the error that is allowed"


def stamp() -> str:
    """Device and versions that times hold for."""
    about = machine()
    versions = f"torch {about['torch']}, triton {about.get('triton', 'none')}, {kernel_versions()}"
    return f"{about['device']}, {versions}, {source_hash()}"


def equal_keys(shape: Shape, device: torch.device) -> Inputs:
    """All keys of a head equal: every mass is, and nothing but the order tells which are chosen."""
    query, keys, values = random_inputs(shape, device)
    return query, keys[:, :, :1].expand_as(keys).contiguous(), values


def neighbouring_keys(shape: Shape, device: torch.device) -> Inputs:
    """The keys that matter lie side by side, and matter far more than the others."""
    query, keys, values = random_inputs(shape, device)
    grouped = query.unflatten(1, (shape.kv_heads, -1)).mean(2)  # [B, Hkv, 1, D]
    at = slice(shape.length // 2, shape.length // 2 + 96)
    keys[:, :, at] += grouped
    return query, keys, values
