"""What follows from a sweep: Pareto fronts, the best setting at each budget, the table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from hf_attn_plugin.lm_eval.sweep import DENSE

BUDGETS = tuple(Fraction(1, part) for part in (2, 4, 8, 16, 32))

# Below that a model does not do a task: a share of 2 %, and one of whatever else is counted.
_HARDLY_ANY = 0.02


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One setting on one task.

    Attributes:
        label: The setting.
        group: What it belongs to in pictures.
        attn: The attention implementation.
        ratio: Bytes of KV cache read, of what dense attention reads in the same steps.
        quality: The task's metric.
        agreement: Share of dense attention's answers that is reproduced; None where there are none.
        scores: The metric per document.
        agreements: The agreement per document.
    """

    label: str
    group: str
    attn: str
    ratio: float
    quality: float
    agreement: float | None
    scores: tuple[float, ...]
    agreements: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class TaskSweep:
    """All that was measured on one task.

    Attributes:
        task: Its name.
        metric: The metric that counts.
        higher_is_better: Its direction.
        dense: Dense attention.
        points: All other settings.
    """

    task: str
    metric: str
    higher_is_better: bool
    dense: SweepPoint
    points: tuple[SweepPoint, ...]

    @property
    def doable(self) -> bool:
        """Whether the model, under dense attention, scores more than next to nothing."""
        if not self.higher_is_better:
            return True
        counted = max(self.dense.scores, default=0.0) > 1
        return self.dense.quality > (1 if counted else _HARDLY_ANY)

    def kept(self, point: SweepPoint) -> float:
        """How much of dense attention's quality is kept, 0 to 1.

        A ratio of the two metrics, the other way round where lower is better. What is better than
        dense counts as equal: over few documents that is luck. On a task that the model cannot
        do, the share of dense attention's answers that is reproduced.
        """
        if not self.doable:
            return 0.0 if point.agreement is None else point.agreement
        one, two = point.quality, self.dense.quality
        if not self.higher_is_better:
            one, two = two, one
        return min(1.0, one / two) if two > 0 else 1.0

    def goodness(self, point: SweepPoint) -> tuple[float, float]:
        """What settings are ranked by: the metric (or the agreement), then fewer bytes."""
        if not self.doable:
            return self.kept(point), -point.ratio
        return (point.quality if self.higher_is_better else -point.quality), -point.ratio

    def best(self, budget: float) -> SweepPoint | None:
        """The best setting that reads at most this share of dense attention's bytes."""
        return max(self.within(budget), key=self.goodness, default=None)

    def within(self, budget: float) -> list[SweepPoint]:
        """The settings that read at most this share of dense attention's bytes."""
        return [point for point in self.points if point.ratio <= budget]

    def not_told_apart(self, best: SweepPoint, budget: float) -> list[SweepPoint]:
        """Other settings within the budget that these documents do not tell from the best.

        The mean difference per document (of the agreement, on a task that the model cannot do) is
        below two of its standard errors.
        """

        def compared(point: SweepPoint) -> tuple[float, ...]:
            return point.scores if self.doable else point.agreements or ()

        return [
            point
            for point in self.within(budget)
            if point is not best and not _differ(compared(point), compared(best))
        ]

    def pareto_front(self) -> list[SweepPoint]:
        """The settings that none is better than at no more bytes, from few bytes to many."""
        front: list[SweepPoint] = []
        for point in sorted(self.points, key=lambda p: (p.ratio, -self.goodness(p)[0])):
            if not front or self.goodness(point)[0] > self.goodness(front[-1])[0]:
                front.append(point)
        return front


def read_sweep(content: Mapping[str, Any]) -> list[TaskSweep]:
    """The tasks of a `SweepResults`' content; those without dense attention are not there yet."""
    sweeps = []
    for task, facts in content["tasks"].items():
        points = [_point(run, run["tasks"][task]) for run in content["runs"].values()
                  if task in run["tasks"] and run["tasks"][task]["ratio"] is not None]  # fmt: skip
        dense = [point for point in points if point.group == DENSE]
        if dense:
            rest = tuple(point for point in points if point.group != DENSE)
            sweeps.append(
                TaskSweep(task, facts["metric"], facts["higher_is_better"], dense[0], rest)
            )
    return sweeps


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The setting that keeps most over all tasks at a budget.

    Attributes:
        label: The setting.
        ratio: The largest share of bytes it reads on any task.
        kept: Mean over the tasks of what it keeps of dense attention's quality.
        worst: The task on which it keeps least.
        worst_kept: What it keeps there.
    """

    label: str
    ratio: float
    kept: float
    worst: str
    worst_kept: float


def recommend(sweeps: Sequence[TaskSweep], budget: float) -> Recommendation | None:
    """The setting that keeps most on average, among those within the budget on every task."""
    found: list[Recommendation] = []
    by_task = [{point.label: point for point in sweep.points} for sweep in sweeps]
    for label in by_task[0] if by_task else ():
        points = [points.get(label) for points in by_task]
        there = [point for point in points if point is not None and point.ratio <= budget]
        if len(there) < len(sweeps):
            continue
        kept = [sweep.kept(point) for sweep, point in zip(sweeps, there, strict=True)]
        worst = min(range(len(kept)), key=kept.__getitem__)
        found.append(
            Recommendation(
                label,
                max(point.ratio for point in there),
                sum(kept) / len(kept),
                sweeps[worst].task,
                kept[worst],
            )
        )
    # To the third digit; below that fewer bytes decide.
    return max(found, key=lambda r: (round(r.kept, 3), -r.ratio), default=None)


def sweep_markdown(
    content: Mapping[str, Any],
    budgets: Sequence[Fraction] = BUDGETS,
    picture: str | None = None,
) -> str:
    """The report of a sweep.

    Args:
        content: A `SweepResults`' content.
        budgets: Shares of dense attention's bytes to name the best settings for.
        picture: The picture's file name, or None.
    """
    about, sweeps = content["about"], read_sweep(content)
    lines = [
        f"<!-- Made by: {about['command']} -->",
        "# Which method at which budget",
        "",
        f"Model `{about['model']}`, {about['dtype']} on {about['device']}; "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + ". Bytes are those of the KV cache (and of copies of it) that decoding steps read, as a "
        "share of what dense attention reads in the same steps. Every setting has the same "
        "documents and a dense prefill.",
        "",
    ]
    if about["dtype"] == "float32":
        lines += [
            "The cache is in float32: quantised copies of the keys look twice as cheap, beside it, "
            "as they are beside one in 16 bits.",
            "",
        ]
    if picture is not None:
        lines += [f"![Quality against KV cache read]({picture})", ""]
    for sweep in sweeps:
        if not sweep.doable:
            lines += [
                f"**The model cannot do `{sweep.task}`**: dense attention scores "
                f"{sweep.dense.quality:.3g}. Settings are ranked there by how much of dense "
                "attention's own answers they reproduce.",
                "",
            ]
    lines += _recommended(sweeps, budgets) + _best(sweeps, budgets)
    for sweep in sweeps:
        lines += _front(sweep)
    lines += _everything(sweeps, content)
    return "\n".join([*lines, *_NOTES])


_NOTES = [
    "## How to read this",
    "",
    "- *kept* is the metric as a share of dense attention's (for bits per byte the other way "
    "round), at most 100 %.",
    "- *agreement* is the share of dense attention's own answer, token by token up to the first "
    "difference, that a setting gives too. Scored texts have no answer, so none.",
    "- `exact_topk` reads all keys to choose, so at least half of the cache: it shows what "
    "choosing better could still win at a given k.",
    "- `h2o` needs every softmax weight of the prompt: a second pass over its scores. That is "
    "compute and is not counted here, since no decoding step reads it. In return it could free "
    "the memory of what it drops; the other methods keep all of the cache.",
    "- `sparq` reads components from a second copy of the keys (counted), which takes memory: as "
    "much as the keys, and in 16 bits about half of that for `copy=int8` and a quarter for "
    "`copy=int4`. `copy=none` takes no memory: the components are picked out of the keys, where "
    "those of one token lie together, so that memory hands over whole keys. All keys are counted "
    "as read, which is half of the cache before any value.",
    "- `lm_infinite` never sees what lies between its first tokens and its window.",
    "- With fixed k, the share read falls as the context grows: a budget met here is met by the "
    "same k at longer contexts, with other quality.",
    "",
]


def _recommended(sweeps: Sequence[TaskSweep], budgets: Sequence[Fraction]) -> list[str]:
    if not sweeps:
        return []
    lines = [
        "## Recommended across tasks",
        "",
        "Within the budget on every task; the highest mean of what is kept of dense attention's "
        "quality (of its answers, on a task that the model cannot do).",
        "",
        "| budget | setting | bytes read, at most | kept, mean | kept, worst task |",
        "|---|---|---|---|---|",
    ]
    for budget in budgets:
        found = recommend(sweeps, float(budget))
        if found is None:
            lines.append(f"| {budget} | none reads so little | | | |")
        else:
            lines.append(
                f"| {budget} | {found.label} | {found.ratio:.1%} | {found.kept:.1%} | "
                f"{found.worst_kept:.1%} ({found.worst}) |"
            )
    return [*lines, ""]


def _best(sweeps: Sequence[TaskSweep], budgets: Sequence[Fraction]) -> list[str]:
    lines = [
        "## The best setting of each task",
        "",
        "In brackets how many other settings within the budget these documents do not tell from "
        "it (mean difference below two standard errors), and the one of them that reads least.",
        "",
        "| task | budget | setting | metric | dense | agreement | bytes read | as good |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sweep in sweeps:
        for budget in budgets:
            best = sweep.best(float(budget))
            if best is None:
                lines.append(f"| {sweep.task} | {budget} | none reads so little | | | | | |")
                continue
            others = sweep.not_told_apart(best, float(budget))
            least = min(others, key=lambda point: point.ratio, default=None)
            as_good = "" if least is None else f"{len(others)}: {least.label} ({least.ratio:.1%})"
            lines.append(
                f"| {sweep.task} | {budget} | {best.label} | {best.quality:.4g} | "
                f"{sweep.dense.quality:.4g} | {_percent(best.agreement)} | {best.ratio:.1%} | "
                f"{as_good} |"
            )
    return [*lines, ""]


def _front(sweep: TaskSweep) -> list[str]:
    direction = "higher" if sweep.higher_is_better else "lower"
    return [
        f"## Pareto front: {sweep.task}",
        "",
        f"{sweep.metric}, {direction} is better, {len(sweep.dense.scores)} documents; dense "
        f"attention {sweep.dense.quality:.4g}"
        + ("." if sweep.doable else ": **the model cannot do this task**, ranked by agreement."),
        "",
        "| bytes read | setting | metric | kept | agreement |",
        "|---|---|---|---|---|",
        *(
            f"| {point.ratio:.1%} | {point.label} | {point.quality:.4g} | "
            f"{sweep.kept(point):.1%} | {_percent(point.agreement)} |"
            for point in sweep.pareto_front()
        ),
        "",
    ]


def _everything(sweeps: Sequence[TaskSweep], content: Mapping[str, Any]) -> list[str]:
    if not sweeps:
        return []
    head = " | ".join(f"{s.task}: bytes | {s.metric} | agreement" for s in sweeps)
    lines = [
        "## All settings",
        "",
        f"| setting | {head} |",
        "|---" * (1 + 3 * len(sweeps)) + "|",
    ]
    for run in content["runs"].values():
        cells = [run["label"]]
        for sweep in sweeps:
            found = run["tasks"].get(sweep.task)
            if found is None or found["ratio"] is None:
                cells += ["", "", ""]
            else:
                cells += [
                    f"{found['ratio']:.1%}",
                    f"{found['quality']:.4g}",
                    _percent(found["agreement"]),
                ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for run in content["runs"].values():
        for task, reason in run.get("refused", {}).items():
            lines.append(f"- {run['label']} is refused on {task}: {reason}")
    return [*lines, ""]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _point(run: Mapping[str, Any], measured: Mapping[str, Any]) -> SweepPoint:
    return SweepPoint(
        label=run["label"],
        group=run["group"],
        attn=run["attn"],
        ratio=measured["ratio"],
        quality=measured["quality"],
        agreement=measured["agreement"],
        scores=tuple(measured["scores"]),
        agreements=None if measured["agreements"] is None else tuple(measured["agreements"]),
    )


def _differ(one: Sequence[float], two: Sequence[float]) -> bool:
    """Whether the mean difference of paired scores is two of its standard errors or more."""
    differences = [a - b for a, b in zip(one, two, strict=True)]
    count = len(differences)
    if count < 2:
        return False
    mean = sum(differences) / count
    if mean == 0:
        return False
    variance = sum((d - mean) ** 2 for d in differences) / (count - 1)
    return abs(mean) >= 2 * math.sqrt(variance / count)
