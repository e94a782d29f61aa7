"""The pictures of SparQ's decoding step: time against length, speed-up against quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .quality import Scores
from .report import OK
from .sparq_decoding import SPARQ, SparQRow, best_dense
from .sparq_numerics import Setting
from .sparq_report import FAST, setting_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision tell apart; markers differ as well.
_STYLES = {
    "sdpa-flash": ("#E69F00", "s"),
    "sdpa-cudnn": ("#56B4E9", "v"),
    "fa4": ("#CC79A7", "D"),
    "dense triton": ("#009E73", "^"),
    **dict(zip(SPARQ, (("#7F7F7F", "x"), ("#D55E00", "o")), strict=True)),
}
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = {32: "o", 128: "s", 512: "^"}


def draw_times(rows: Sequence[SparQRow], path: Path, title: str) -> Path:
    """Time against length, a panel per batch size and number of KV heads.

    Args:
        rows: The rows of the crossover; of SparQ only the default setting is drawn.
        path: The file; its suffix chooses the format.
        title: Above all panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure()
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    drawn = ("", Setting().title)
    measured = [
        row for row in rows if row.status == OK and row.ms is not None and row.setting in drawn
    ]
    batches = sorted({row.batch for row in measured})
    widths = sorted({row.kv_heads for row in measured}, reverse=True)
    figure.set_size_inches(4.4 * max(1, len(batches)), 3.6 * max(1, len(widths)) + 0.6)
    axes = figure.subplots(max(1, len(widths)), max(1, len(batches)), squeeze=False)
    handles: dict[str, Any] = {}
    for line, kv_heads in zip(axes, widths, strict=False):
        for panel, batch in zip(line, batches, strict=False):
            own = [row for row in measured if (row.batch, row.kv_heads) == (batch, kv_heads)]
            for name, (color, marker) in _STYLES.items():
                points = sorted((row.length, row.ms) for row in own if row.contender == name)
                if points:
                    xs, ys = zip(*points, strict=True)
                    (handles[name],) = panel.plot(xs, ys, color=color, marker=marker, lw=1.4)
            panel.set_title(f"batch {batch}, {kv_heads} KV heads of 32", fontsize=10)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.yaxis.set_minor_formatter("")
            panel.set_xlabel("keys in the cache")
            panel.set_ylabel("ms per step")
            panel.grid(alpha=0.3)
    figure.suptitle(title)
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    return _save(figure, path)


def draw_quality(rows: Sequence[SparQRow], scores: Scores, path: Path, title: str) -> Path:
    """What a setting keeps of dense attention's quality, against how much faster it is.

    A panel per task; colours are ranks and copies, markers keys; the outlined ones are of the last
    shape, where there are several.

    Args:
        rows: The rows of the settings.
        scores: The sweep's.
        path: The file; its suffix chooses the format.
        title: Above all panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure()
    tasks = scores.titles
    figure.set_size_inches(4.2 * len(tasks), 4.8)
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    measured = [row for row in rows if row.contender == FAST and row.ms is not None]
    shapes = list(dict.fromkeys(row.title for row in measured))
    groups = list(dict.fromkeys(_family(row.setting) for row in measured))
    handles: dict[str, Any] = {}
    for row in measured:
        dense = best_dense(rows, row)
        if dense is None or dense.ms is None or row.ms is None:
            continue
        setting = setting_of(row.setting)
        kept = scores.of(setting)
        color = _COLORS[groups.index(_family(row.setting)) % len(_COLORS)]
        outlined = len(shapes) > 1 and row.title == shapes[-1]
        for panel, task in zip(axes, tasks, strict=True):
            share = kept[task]
            if share is None:
                continue
            handle = panel.scatter(
                dense.ms / row.ms,
                100 * share,
                facecolors="none" if outlined else color,
                edgecolors=color,
                marker=_MARKERS.get(setting.top_k, "D"),
                s=45,
            )
            name = f"{_family(row.setting)}, k={setting.top_k}"
            if not outlined:
                handles.setdefault(name, handle)
    for panel, name in zip(axes, tasks.values(), strict=True):
        panel.axvline(1, color="#7F7F7F", lw=0.8, ls="--")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("times as fast as the fastest dense kernel")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("% of dense attention's quality")
    outline = "" if len(shapes) < 2 else f"; outlined: {shapes[-1]}"
    figure.suptitle(f"{title}\n{'; '.join(shapes[:-1] or shapes)}{outline}", fontsize=11)
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)
    return _save(figure, path)


def _family(title: str) -> str:
    """Rank and copy of a setting, which share a colour."""
    return " ".join(word for word in title.split() if not word.startswith("k"))


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hf-attn-plugin[plot]'") from error
    return Figure(layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
