"""The page of SparQ's decoding step: every speed beside what it costs in quality."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from .quality import Errors, Scores
from .report import OK, markdown_table, text_table
from .sparq_decoding import ONE_COPY_REACH, SHAPES, SparQRow, best_dense
from .sparq_numerics import TOLERANCE, Setting

PAGE, RESULTS = "sparq.md", "sparq.json"
TIME_PICTURE, QUALITY_PICTURE = "sparq_time.png", "sparq_quality.png"
TABLE, CROSSOVER, SETTINGS, DATA = "table", "crossover", "settings", "data: "
"""Groups of rows; those of other data begin with the last."""

FAST = "sparq triton"
_LIMITS = {shape.title: shape for shape in SHAPES}

Table = tuple[list[str], list[list[str]]]


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Where SparQ begins to pay.

    Attributes:
        setting: SparQ's.
        batch: Sequences.
        kv_heads: Key/value heads.
        length: Keys from which on it is faster than every dense kernel; None if nowhere.
        longest: The most keys that were measured.
    """

    setting: str
    batch: int
    kv_heads: int
    length: float | None
    longest: int

    @property
    def nbytes(self) -> float | None:
        """Of the keys and values there, of heads of 128 in 16 bits."""
        return None if self.length is None else self.batch * self.kv_heads * self.length * 512


def crossovers(rows: Sequence[SparQRow]) -> list[Crossover]:
    """One per setting, batch size and KV heads, between the lengths that were measured."""
    found = []
    kinds = {(row.setting, row.batch, row.kv_heads): None for row in rows if not row.dense}
    for setting, batch, kv_heads in sorted(kinds, key=lambda kind: (len(kind[0]), *kind)):
        own = [row for row in rows if (row.batch, row.kv_heads) == (batch, kv_heads)]
        points = []
        for row in sorted(own, key=lambda row: row.length):
            dense = best_dense(own, row)
            fast = row.contender == FAST and row.setting == setting
            if fast and row.ms and dense is not None and dense.ms:
                points.append((row.length, dense.ms / row.ms))
        if not points:
            continue
        length: float | None = None
        for at, (keys, speedup) in reversed(list(enumerate(points))):
            if speedup <= 1:
                if at + 1 < len(points):
                    length = _where_equal(points[at], points[at + 1])
                break
            length = float(keys)
        found.append(Crossover(setting, batch, kv_heads, length, points[-1][0]))
    return found


def _where_equal(slower: tuple[int, float], faster: tuple[int, float]) -> float:
    """The length at which a line through both, on logarithmic axes, has a speed-up of 1."""
    (x0, y0), (x1, y1) = ((math.log(x), math.log(y)) for x, y in (slower, faster))
    return math.exp(x0 + (x1 - x0) * -y0 / (y1 - y0))


class Report:
    """All tables of the page.

    Args:
        rows: What was measured.
        scores: The sweep's.
        errors: Of the attention on a model's keys, None where they were not measured.
        copy_rate: Bytes per second that a large copy reads and writes in the same process.
    """

    def __init__(
        self,
        rows: Sequence[SparQRow],
        scores: Scores,
        errors: Errors | None,
        copy_rate: float | None,
    ) -> None:
        self.rows, self.scores, self.errors, self.copy_rate = rows, scores, errors, copy_rate

    def group(self, name: str) -> list[SparQRow]:
        """The rows that were measured for one table."""
        return [row for row in self.rows if row.group == name]

    def _quality_header(self) -> list[str]:
        return ["error on text", *self.scores.titles.values()]

    def _quality(self, title: str) -> list[str]:
        """Cells on a setting."""
        error = None if self.errors is None else self.errors.errors.get(title)
        kept = self.scores.of(setting_of(title))
        shares = ["-" if share is None else f"{share:.1%}" for share in kept.values()]
        return ["-" if error is None else f"{error:.1%}", *shares]

    def speedups(self, group: str) -> Table:
        """SparQ beside the fastest dense kernel, and what its settings keep."""
        header = ["shape", "SparQ", "ms", "fastest dense", "its ms", "speed-up", "to reach"]
        header += [self._bound_header(), *self._quality_header()]
        rows = self.group(group)
        cells = []
        for row in rows:
            dense = best_dense(rows, row)
            if row.contender != FAST or row.ms is None or dense is None or dense.ms is None:
                continue
            cells.append(
                [
                    row.title,
                    row.setting,
                    f"{row.ms:.3f}",
                    dense.contender,
                    f"{dense.ms:.3f}",
                    f"{dense.ms / row.ms:.2f}x",
                    _reach(row, dense.ms / row.ms),
                    self._bound(row),
                    *self._quality(row.setting),
                ]
            )
        return header, cells

    def slow_copies(self) -> str:
        """Where quantised copies of the keys take longer than full ones, though they read less."""
        rows = {(row.title, row.setting): row for row in self.group(TABLE) if row.contender == FAST}
        shapes = []
        for title in dict.fromkeys(title for title, _ in rows):
            full = rows.get((title, Setting().title))
            if full is None or full.ms is None:
                continue
            others = {
                kind: rows.get((title, Setting(key_copy=kind).title)) for kind in ("int8", "int4")
            }
            slow = [
                f"{kind} {row.ms / full.ms:.1f}"
                for kind, row in others.items()
                if row is not None and row.ms is not None and row.ms > full.ms
            ]
            if slow:
                shapes.append(f"{title}: {', '.join(slow)}")
        if not shapes:
            return ""
        return (
            "Quantised copies of the keys save memory rather than time: restoring their codes "
            "takes longer than reading a full copy. Times as long as with a full copy: "
            f"{'; '.join(shapes)}."
        )

    def _bound_header(self) -> str:
        rate = self.copy_rate
        return "bytes bound ms" + ("" if rate is None else f" at {rate / 1e12:.2f} TB/s")

    def _bound(self, row: SparQRow) -> str:
        if self.copy_rate is None or row.nbytes is None:
            return "-"
        return f"{row.nbytes / self.copy_rate * 1e3:.3f}"

    def everything(self, group: str) -> Table:
        """All contenders."""
        header = ["shape", "", "SparQ", "ms", "host us", "GB read", "TB/s", "error/allowed"]
        header += ["exchanged keys"]
        cells = []
        for row in self.group(group):
            if row.ms is None:
                continue
            read = row.nbytes or 0
            cells.append(
                [
                    row.title,
                    row.contender,
                    row.setting or "-",
                    f"{row.ms:.3f}",
                    f"{row.host_us:.0f}",
                    f"{read / 1e9:.3f}",
                    f"{read / row.ms / 1e9:.2f}",
                    f"{row.share:.2f}",
                    "-" if row.exchanged is None else f"{row.exchanged:.1f}",
                ]
            )
        return header, cells

    def crossover(self) -> Table:
        """Where SparQ begins to pay."""
        header = ["SparQ", "batch", "KV heads", "faster from S =", "MB of keys and values there"]
        cells = []
        for found in crossovers(self.group(CROSSOVER)):
            nowhere = f"nowhere up to {found.longest}"
            cells.append(
                [
                    found.setting,
                    str(found.batch),
                    str(found.kv_heads),
                    nowhere if found.length is None else f"{found.length:.0f}",
                    "-" if found.nbytes is None else f"{found.nbytes / 1e6:.1f}",
                ]
            )
        return header, cells

    def by_length(self) -> Table:
        """The times that the crossover comes from."""
        rows = self.group(CROSSOVER)
        header = ["batch", "KV heads", "S", "fastest dense", "its ms", "SparQ", "ms", "speed-up"]
        header += ["host us"]
        cells = []
        for row in sorted(rows, key=lambda row: (row.batch, row.kv_heads, row.length)):
            dense = best_dense(rows, row)
            if row.contender != FAST or row.ms is None or dense is None or dense.ms is None:
                continue
            cells.append(
                [
                    str(row.batch),
                    str(row.kv_heads),
                    str(row.length),
                    dense.contender,
                    f"{dense.ms:.4f}",
                    row.setting,
                    f"{row.ms:.4f}",
                    f"{dense.ms / row.ms:.2f}x",
                    f"{row.host_us:.0f}",
                ]
            )
        return header, cells

    def by_data(self) -> Table:
        """How much what the cache holds changes the time."""
        header = ["shape", "SparQ", "keys", "ms"]
        rows = [row for row in self.rows if row.group.startswith(DATA) and row.ms is not None]
        rows = [row for row in rows if row.contender == FAST]
        return header, [
            [row.title, row.setting, row.group.removeprefix(DATA), f"{row.ms:.3f}"] for row in rows
        ]

    def notes(self) -> list[str]:
        """A line for everything without numbers; what holds for many shapes once."""
        reasons: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            if row.status != OK:
                why = row.detail if row.detail.startswith(row.status) else None
                why = why or f"{row.status}: {row.detail}"
                where = f"{row.contender} {row.setting}".strip()
                titles = reasons.setdefault((row.group, where, why), [])
                titles.append(row.title)
        return [
            f"{group}: {where}: {why} ({len(titles)} shapes, such as {titles[0]})"
            for (group, where, why), titles in reasons.items()
        ]

    def text(self, groups: Sequence[str]) -> str:
        """The tables of some groups, for a terminal."""
        tables = []
        for name in groups:
            tables += [self.speedups(name)] if name in (TABLE, SETTINGS) else []
            tables += [self.crossover()] if name == CROSSOVER else []
            tables += [self.by_data()] if name == DATA else []
        shown = [text_table(*table) for table in tables if table[1]]
        return "\n\n".join([*shown, "\n".join(self.notes())])

    def markdown(self, command: str, about: str, folder: Path) -> str:
        """The page."""
        parts = [f"<!-- Made by: {command} -->", "# SparQ's decoding step beside dense attention"]
        parts += [about, _MEANING, self._about_quality()]
        for title, text, (header, cells) in (
            ("Speed-up and quality", self.slow_copies(), self.speedups(TABLE)),
            ("Other settings", _SETTINGS, self.speedups(SETTINGS)),
            ("Where it begins to pay", _CROSSOVER, self.crossover()),
            ("Does what the cache holds change the time?", _DATA, self.by_data()),
            ("Times by length", "", self.by_length()),
            ("All contenders", _EVERYTHING, self.everything(TABLE)),
        ):
            if cells:
                parts += [f"## {title}", text, markdown_table(header, cells)]
        for picture in (TIME_PICTURE, QUALITY_PICTURE):
            if (folder / picture).is_file():
                parts.append(f"![{picture.removesuffix('.png').replace('_', ': ')}]({picture})")
        parts.append("\n".join(f"- {line}" for line in self.notes()))
        return "\n\n".join(part for part in parts if part) + "\n"

    def _about_quality(self) -> str:
        lines = [
            f"Scores: `{self.scores.path}` (`hf-attn sweep`; the model of eval/lab.py, heads of "
            "64, at the same share of components and as many keys, at the lengths of its tasks, "
            "which are far below those timed here): the share of dense attention's quality that is "
            "kept, or, of a task that the model cannot do at all, of dense attention's own answers."
        ]
        if self.errors is None:
            lines.append(
                "Errors on text: not measured (`hf-attn bench decode errors --model DIR`)."
            )
        else:
            lines.append(
                "Error on text: of the attention's output against dense, root of the mean square "
                f"over heads, in {self.errors.steps} steps over up to {self.errors.keys} keys of "
                f"the same model's ({self.errors.model}) layers, on the same shares of components."
            )
            if self.errors.weights != self.scores.model:
                lines.append("**The scores are of other weights than these errors.**")
        return " ".join(lines)


def setting_of(title: str) -> Setting:
    """What `Setting.title` says.

    Raises:
        ValueError: It says something else.
    """
    values = dict(word.replace("≤", "=").split("=") for word in title.split())
    coverage = values.get("coverage")
    setting = Setting(
        int(values["r"]),
        int(values["k"]),
        values.get("copy", "full"),
        None if coverage is None else float(coverage),
    )
    if setting.title != title:
        raise ValueError(f"{title!r} is no setting.")
    return setting


def _reach(row: SparQRow, speedup: float) -> str:
    """The target of a shape, and whether it is met; only for the settings that have one."""
    shape = _LIMITS.get(row.title)
    if shape is None or shape.reach_ratio is None or row.ms is None:
        return "-"
    if row.setting == Setting().title:
        met = speedup >= shape.reach_ratio if shape.reach_ms is None else row.ms <= shape.reach_ms
        limit = "" if shape.reach_ms is None else f"{shape.reach_ms:g} ms, "
        return f"{limit}{shape.reach_ratio:g}x: {'yes' if met else 'no'}"
    if row.setting == Setting(key_copy="none").title and shape.reach_ms is None:
        return f"{ONE_COPY_REACH:g}x: {'yes' if speedup >= ONE_COPY_REACH else 'no'}"
    return "-"


_MEANING = (
    "One query per sequence, 32 query heads of 128, bfloat16, normal queries, keys and values; "
    "SparQ with `SparQConfig`'s defaults, so without mean-value reallocation; with a coverage the "
    "times are the worst: of such keys the most, k, are needed, where text needs few; "
    "medians of CUDA events, the L2 cache cleared before each step, which takes the device so long "
    "that the step's kernels are queued by then: as in a CUDA graph, what a step takes the host "
    "(“host us”) is not in its time; launched eagerly, a step takes the longer of both. “bytes "
    "bound” is what the step reads, at the rate at which a large copy in the same process reads "
    "and writes; what only reads may be some percent faster. Dense kernels were checked against "
    "softmax attention in float64, SparQ against its definition in float64, both with twice plain "
    "PyTorch's error and a rounding floor as the budget; keys whose approximate masses differ by "
    f"less than {TOLERANCE:.1%} may be exchanged for each other. What is wrong has no time."
)
_SETTINGS = "The settings of the sweep, timed, so that each speed-up has its scores."
_CROSSOVER = (
    "From which length on the step is faster than every dense kernel, at every longer length too; "
    "between two lengths by a line through both on logarithmic axes. Times are of the device: what "
    "launching takes the host is hidden."
)
_DATA = (
    "Random keys; all keys of a head equal, so that every mass is; and a hundred neighbouring keys "
    "that have nearly all of the mass."
)
_EVERYTHING = (
    "“exchanged keys”: how many of a head's keys were chosen otherwise than in float64. What takes "
    "the host longer than a millisecond or so, as SparQ in PyTorch does, is held up by it."
)
