"""What the user reads in the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_attn_plugin.quickstart.settings import QuickstartSettings


def recovered(converted: Mapping[str, Any]) -> float:
    """Share of the loss that a conversion cost which the uptraining won back.

    Args:
        converted: ``{"before": {"loss": …}, "converted": …, "uptrained": …}``.
    """
    before, after, end = (
        converted[stage]["loss"] for stage in ("before", "converted", "uptrained")
    )
    return (after - end) / (after - before) if after != before else 1.0


def summary(results: Mapping[str, Any], settings: QuickstartSettings) -> str:
    """The table, the losses and what they say; nothing in it but what was measured."""
    evaluation, converted = results["evaluation"], results["converted"]
    header = (
        "method",
        "computes",
        f"needles <={settings.window} back",
        "needles, all",
        "bits per byte",
        "KV cache read",
    )
    rows: list[tuple[str, ...]] = [header]
    for label, row in evaluation.items():
        near = row["niah_within_window"]
        rows.append(
            (
                label,
                "all pairs" if row["exact"] else "a part",
                "-" if near is None else f"{near:.1%}",
                f"{row['niah']:.1%}",
                f"{row['bits_per_byte']:.3f}",
                "-" if row["niah_kv_share"] is None else f"{row['niah_kv_share']:.3f} of dense",
            )
        )
    dense, *others = evaluation.items()
    lines = [
        f"Evaluated through lm-eval at {settings.lengths[0]} to {settings.lengths[-1]} tokens "
        f"(pretrained at {settings.context}), {dense[1]['needles']} needles per method:",
        "",
        _aligned(rows),
        "",
        _needles(dense),
    ]
    lines += [
        f"{label} finds {100 * (row['niah'] - dense[1]['niah']):+.1f} points compared with dense, "
        f"reading {row['niah_kv_share']:.0%} of the cache."
        for label, row in others
        if row["attn"] == "sparq" and row["niah_kv_share"] is not None
    ]
    old_heads, new_heads = converted["heads"]
    before, after, end = (
        converted[stage]["loss"] for stage in ("before", "converted", "uptrained")
    )
    lines += [
        "",
        f"Conversion from {old_heads} to {new_heads} key/value heads, loss on held-out text: "
        f"{before:.3f} before, {after:.3f} after, {end:.3f} after {converted['steps']} more steps "
        f"({recovered(converted):.0%} of what it cost won back).",
    ]
    return "\n".join(lines)


def _needles(dense: tuple[str, Mapping[str, Any]]) -> str:
    label, row = dense
    grid = row["grid"]
    cells = [
        (score, length, depth)
        for depth, scores in zip(grid["depths"], grid["scores"], strict=True)
        for length, score in zip(grid["lengths"], scores, strict=True)
    ]
    score, length, depth = min(cells)
    return (
        f"{label} finds {row['niah']:.1%} of the needles; its worst cell is {score:.0%}, at "
        f"{length} tokens and depth {depth:.2f}."
    )


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def places(model_folder: Path, heatmaps: Path, quality: Path, results: Path) -> str:
    """Where everything lies."""
    return "\n".join(
        f"{what:9} {path}"
        for what, path in (
            ("needles", model_folder / heatmaps),
            ("quality", model_folder / quality),
            ("results", results),
            ("model", model_folder),
        )
    )
