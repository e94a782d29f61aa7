"""The picture of a sweep: quality, and agreement with dense attention, against bytes read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn_plugin.hub.figures import _new_figure, _save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hf_attn_plugin.lm_eval.sweep_report import SweepPoint, TaskSweep

# Okabe and Ito's palette, which people with any colour vision tell apart; markers differ as well.
_BASELINE_STYLES = {
    "exact_topk": ("#000000", "X"),
    "h2o": ("#D55E00", "s"),
    "lm_infinite": ("#CC79A7", "^"),
}
_COVERAGE_COLORS = ("#009E73", "#66C2A5")
_COPY_STYLES = {"int8": ("#E69F00", "P"), "int4": ("#B07900", "*"), "none": ("#7A5400", "h")}
_RANK_MARKERS = ("o", "v", "<", ">", "p", "8")


def sweep_figure(
    sweeps: Sequence[TaskSweep], path: Path | str, *, title: str = "Quality against KV cache read"
) -> Path:
    """Draw one column per task: its metric above, the agreement with dense attention below.

    Settings that differ in their budget only are joined by a line; the grey staircase is the
    Pareto front, the dotted line dense attention.

    Args:
        sweeps: What `read_sweep` returned.
        path: The file to write; its suffix chooses the format.
        title: Above all panels.

    Returns:
        The path.

    Raises:
        ValueError: There is nothing to draw.
    """
    sweeps = [sweep for sweep in sweeps if sweep.points]
    if not sweeps:
        raise ValueError("sweep_figure: no task has been measured beyond dense attention.")
    groups = list(dict.fromkeys(point.group for sweep in sweeps for point in sweep.points))
    styles = _styles(groups)
    rows = 2 if any(sweep.dense.agreement is not None for sweep in sweeps) else 1
    legend_rows = math.ceil((len(groups) + 2) / 5)
    figure = _new_figure(max(4.2 * len(sweeps), 7.5), 3.3 * rows + 0.6 + 0.22 * legend_rows)
    axes = figure.subplots(rows, len(sweeps), squeeze=False)
    lowest = min(point.ratio for sweep in sweeps for point in sweep.points)
    handles: dict[str, Any] = {}
    for column, sweep in enumerate(sweeps):
        direction = "higher" if sweep.higher_is_better else "lower"
        note = "" if sweep.doable else "\n(the model cannot do this task)"
        top = axes[0][column]
        top.set_title(sweep.task + note, fontsize=10)
        top.set_ylabel(f"{sweep.metric} ({direction} is better)")
        _draw(top, sweep, styles, handles, agreement=False)
        if rows == 2:
            _draw_agreement(axes[1][column], sweep, styles, handles)
        panels = [axes[row][column] for row in range(rows) if axes[row][column].axison]
        for ax in panels:
            _share_axis(ax, lowest)
        panels[-1].set_xlabel("KV cache bytes read in decoding, of dense")
    figure.suptitle(title, fontsize=12)
    order = [name for name in (*groups, "Pareto front", "dense") if name in handles]
    figure.legend(
        [handles[name] for name in order],
        order,
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    return _save(figure, path)


def _draw_agreement(
    ax: Axes, sweep: TaskSweep, styles: dict[str, dict[str, Any]], handles: dict[str, Any]
) -> None:
    if sweep.dense.agreement is None:
        ax.text(
            0.5, 0.5, "scored text:\nno answers to compare", ha="center", va="center",
            transform=ax.transAxes, color="0.4", fontsize=9,
        )  # fmt: skip
        ax.set_axis_off()
        return
    ax.set_ylabel("agreement with dense answers")
    _draw(ax, sweep, styles, handles, agreement=True)
    ax.set_ylim(-0.03, 1.05)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _draw(
    ax: Axes,
    sweep: TaskSweep,
    styles: dict[str, dict[str, Any]],
    handles: dict[str, Any],
    *,
    agreement: bool,
) -> None:
    def height(point: SweepPoint) -> float:
        return (point.agreement or 0.0) if agreement else point.quality

    for group, style in styles.items():
        points = sorted((p for p in sweep.points if p.group == group), key=lambda p: p.ratio)
        if points:
            (handles[group],) = ax.plot(
                [p.ratio for p in points], [height(p) for p in points], zorder=3, **style
            )
    handles["dense"] = ax.axhline(
        height(sweep.dense), color="0.3", linestyle=":", linewidth=1.2, zorder=1
    )
    if agreement != sweep.doable:  # of what the settings are ranked by
        front = sweep.pareto_front()
        (handles["Pareto front"],) = ax.step(
            [*(p.ratio for p in front), 1.0],
            [*map(height, front), height(front[-1])],
            where="post", color="0.7", linewidth=4, alpha=0.6, zorder=2, solid_capstyle="round",
        )  # fmt: skip


def _share_axis(ax: Axes, lowest: float) -> None:
    """Powers of two from 1 down to the smallest share that was read."""
    ax.set_xscale("log", base=2)
    last = max(1, math.ceil(-math.log2(lowest)))
    ax.set_xlim(2 ** -(last + 0.2), 1.12)
    powers = range(last + 1)
    ax.set_xticks(
        [2.0**-p for p in powers], labels=["1" if p == 0 else f"1/{2**p}" for p in powers]
    )
    ax.minorticks_off()
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _styles(groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each group of settings is drawn; SparQ's ranks from light to dark blue."""
    ranks = [group for group in groups if group.startswith("sparq r=")]
    coverages = [group for group in groups if group.startswith("sparq coverage")]
    styles: dict[str, dict[str, Any]] = {}
    for group in groups:
        line: dict[str, Any] = {"linewidth": 1.2, "markersize": 6, "markeredgecolor": "white"}
        if group in ranks:
            step = ranks.index(group)
            share = (step + 1) / len(ranks)
            line |= {
                "color": tuple(1 - share * (1 - part) for part in (0.0, 0.35, 0.6)),
                "marker": _RANK_MARKERS[step % len(_RANK_MARKERS)],
            }
        elif group in coverages:
            step = coverages.index(group)
            line |= {
                "color": _COVERAGE_COLORS[step % len(_COVERAGE_COLORS)],
                "marker": "Dd"[step % 2],
                "linestyle": "--",
            }
        elif group.startswith("sparq copy="):
            color, marker = _COPY_STYLES[group.removeprefix("sparq copy=")]
            line |= {"color": color, "marker": marker, "linestyle": "-.", "markersize": 9}
        else:
            color, marker = _BASELINE_STYLES[group]
            line |= {"color": color, "marker": marker}
        styles[group] = line
    return styles
