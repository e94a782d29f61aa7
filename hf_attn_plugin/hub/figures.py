"""Figures of evaluations: needle heatmaps, and quality against the KV cache that is read.

They are drawn with matplotlib's Figure objects; the global pyplot state is not touched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_attn_plugin.lm_eval.run import NeedleGrid

_PANELS_PER_ROW = 3
# Told apart by people with any colour vision (Okabe and Ito's palette), and by their markers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclasses.dataclass(frozen=True)
class QualityPoint:
    """One configuration in a plot of quality against reads.

    Attributes:
        label: The configuration, for example "sparq 1/4".
        kv_share: Bytes of KV cache it read, as a share of what dense attention would have read in
            the same decoding steps. (Bytes alone would also say who stops generating earlier.)
        quality: The measured value.
    """

    label: str
    kv_share: float
    quality: float


def needle_heatmaps(
    grids: Mapping[str, NeedleGrid],
    path: Path | str,
    *,
    title: str = "Needle in a haystack",
    trained_length: int | None = None,
) -> Path:
    """Draw the share of needles found over context length and depth, one panel per method.

    Args:
        grids: A grid per method; the key is the panel's title.
        path: The file to write; its suffix chooses the format.
        title: Above all panels.
        trained_length: Context length in tokens that the model was trained at: a dashed line is
            drawn behind the last length that is not above it.

    Returns:
        The path.
    """
    if not grids:
        raise ValueError("needle_heatmaps needs at least one grid, got none.")
    rows = math.ceil(len(grids) / _PANELS_PER_ROW)
    columns = math.ceil(len(grids) / rows)
    cells_across = max(len(grid.lengths) for grid in grids.values())
    cells_down = max(len(grid.depths) for grid in grids.values())
    width = min(max(0.62 * cells_across + 1.0, 2.7), 6.0)
    height = min(max(0.42 * cells_down + 1.0, 2.3), 5.0)
    figure = _new_figure(columns * width + 1.0, rows * height + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False)
    images = []
    for index, ax in enumerate(axes.flat):
        if index >= len(grids):
            ax.set_axis_off()
            continue
        name, grid = list(grids.items())[index]
        images.append(_draw_grid(ax, name, grid, trained_length))
        if index % columns == 0:
            ax.set_ylabel("depth of the needle")
        if index + columns >= len(grids):
            ax.set_xlabel("context length (tokens)")
    bar = figure.colorbar(images[0], ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("needles found")
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=12)
    return _save(figure, path)


def _draw_grid(ax: Axes, name: str, grid: NeedleGrid, trained_length: int | None) -> Any:
    image = ax.imshow(grid.scores, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto")
    ax.set_title(name, fontsize=10)
    ax.set_xticks(range(len(grid.lengths)), labels=[f"{length:,}" for length in grid.lengths])
    ax.set_yticks(range(len(grid.depths)), labels=[f"{100 * depth:.0f} %" for depth in grid.depths])
    if len(grid.lengths) > 5:
        ax.tick_params(axis="x", rotation=45)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    # White lines between the cells.
    ax.set_xticks([index - 0.5 for index in range(1, len(grid.lengths))], minor=True)
    ax.set_yticks([index - 0.5 for index in range(1, len(grid.depths))], minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="minor", length=0)
    if len(grid.lengths) <= 10:
        for row, scores in enumerate(grid.scores):
            for column, score in enumerate(scores):
                if math.isnan(score):
                    continue
                dark = score < 0.15 or score > 0.85
                text = f"{100 * score:.0f}"
                color = "white" if dark else "black"
                ax.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    if trained_length is not None:
        inside = sum(length <= trained_length for length in grid.lengths)
        if 0 < inside < len(grid.lengths):
            ax.axvline(inside - 0.5, color="black", linestyle="--", linewidth=2)
    return image


def quality_against_reads(
    panels: Mapping[str, Sequence[QualityPoint]],
    path: Path | str,
    *,
    title: str = "Quality against KV cache read",
    dense: str | None = None,
) -> Path:
    """Draw measured quality over the share of the KV cache read, one panel per metric.

    Args:
        panels: The points of each metric; the key is the axis label, with its direction:
            "needles found (higher is better)".
        path: The file to write; its suffix chooses the format.
        title: Above all panels.
        dense: The label of the configuration that all others are compared with; a thin line is
            drawn at its quality.

    Returns:
        The path.
    """
    if not panels or not all(panels.values()):
        raise ValueError("quality_against_reads needs at least one point per panel.")
    labels = list(dict.fromkeys(point.label for points in panels.values() for point in points))
    most = max(point.kv_share for points in panels.values() for point in points)
    legend_rows = math.ceil(len(labels) / 3)
    figure = _new_figure(4.4 * len(panels), 3.4 + 0.25 * legend_rows)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for ax, (metric, points) in zip(axes, panels.items(), strict=True):
        for point in points:
            style = labels.index(point.label)
            (handles[point.label],) = ax.plot(
                100 * point.kv_share,
                point.quality,
                linestyle="none",
                marker=_MARKERS[style % len(_MARKERS)],
                color=_COLORS[style % len(_COLORS)],
                markersize=9,
                markeredgecolor="white",
                label=point.label,
                clip_on=False,
                zorder=3,
            )
            if point.label == dense:
                ax.axhline(point.quality, color="0.6", linewidth=1, linestyle=":", zorder=1)
        ax.set_xlim(0, 108 * most if most else 1)
        values = [point.quality for point in points]
        margin = 0.15 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 0.05
        ax.set_ylim(min(values) - margin, max(values) + margin)
        ax.set_xlabel("KV cache bytes read in decoding (% of dense)")
        ax.set_ylabel(metric)
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 3),
        frameon=False,
        fontsize=9,
    )
    return _save(figure, path)


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'hf_attn_plugin[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")
    return path
