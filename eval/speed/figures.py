"""The pictures: time and memory of every contender over the length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .report import OK, Row

# Okabe and Ito's palette, which people with any colour vision tell apart; markers differ as well.
_STYLES = {
    "sdpa-flash": ("#E69F00", "s"),
    "sdpa-cudnn": ("#56B4E9", "v"),
    "varlen": ("#000000", "x"),
    "flex": ("#009E73", "^"),
    "fa4": ("#CC79A7", "D"),
    "triton": ("#D55E00", "o"),
    "flash": ("#0072B2", "P"),
}

# Field of a row, label and scale of its panel.
_PANELS = (
    ("total_ms", "forward + backward, ms", "log"),
    ("tflops", "TFLOP/s on visible pairs", "linear"),
    ("extra_gib", "peak memory above the inputs, GiB", "log"),
)


def draw_lengths(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Draw time, operations per second and peak memory over the length, a column per case.

    Args:
        rows: Measured rows of any cases and lengths.
        path: The file to write; its suffix chooses the format.
        title: Above all panels.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, StrMethodFormatter
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hf-attn-plugin[plot]'") from error
    measured = [row for row in rows if row.status == OK]
    titles = list(dict.fromkeys(row.title for row in measured))
    columns = max(1, len(titles))
    figure = Figure(figsize=(5.2 * columns, 9), layout="constrained")
    axes = figure.subplots(len(_PANELS), columns, squeeze=False, sharex=True)
    handles = {}
    for column, name in enumerate(titles):
        own = [row for row in measured if row.title == name]
        for contender in dict.fromkeys(row.contender for row in own):
            line = sorted(
                (row for row in own if row.contender == contender), key=lambda row: row.length
            )
            color, marker = _STYLES.get(contender, ("#7F7F7F", "."))
            for panel, (field, _, _) in zip(axes[:, column], _PANELS, strict=True):
                (handles[contender],) = panel.plot(
                    [row.length for row in line],
                    [getattr(row, field) for row in line],
                    color=color,
                    marker=marker,
                    linewidth=1.4,
                )
        axes[0][column].set_title(name)
        ticks = sorted({row.length for row in own})
        axes[-1][column].set_xscale("log", base=2)
        axes[-1][column].set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
        axes[-1][column].set_xlabel("tokens")
        for panel, (_, label, scale) in zip(axes[:, column], _PANELS, strict=True):
            panel.set_yscale(scale)
            panel.grid(alpha=0.3)
            if scale == "log":
                panel.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                panel.yaxis.set_minor_formatter("")
            else:
                panel.set_ylim(bottom=0)
            if column == 0:
                panel.set_ylabel(label)
    figure.suptitle(title)
    if handles:
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
