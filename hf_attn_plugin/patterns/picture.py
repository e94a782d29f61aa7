"""Pictures of patterns, as text and as PNG."""

from __future__ import annotations

from pathlib import Path

import torch

from hf_attn_plugin.patterns.pattern import Pattern

SEEN, HIDDEN = "x", "."


def show_pattern(
    pattern: Pattern, path: str | Path | None = None, *, batch: int = 0, title: str = ""
) -> str:
    """Draw which keys each query sees.

    Args:
        pattern: The pattern; both lengths at most 512.
        path: Where to save a PNG besides; needs matplotlib (the extra ``plot``).
        batch: The batch row to draw, where rows differ.
        title: Over the PNG.

    Returns:
        One line per query with ``x`` for a key that it sees and ``.`` for one that it does not.

    Raises:
        ValueError: The pattern is too large to draw, or has no such batch row.
    """
    if max(pattern.q_len, pattern.kv_len) > 512:
        raise ValueError(
            f"show_pattern draws up to 512 queries and keys, got {pattern.q_len} x "
            f"{pattern.kv_len}. Draw a shorter sequence with a smaller window."
        )
    device = next((t.device for t in pattern.tensors().values()), torch.device("cpu"))
    mask = pattern.visible(device)
    if not 0 <= batch < mask.shape[0] and mask.shape[0] != 1:
        raise ValueError(f"show_pattern: batch must be from 0 to {mask.shape[0] - 1}, got {batch}.")
    grid = mask[batch if mask.shape[0] > 1 else 0, 0].cpu()
    if path is not None:
        _save_png(grid, Path(path), title)
    width = len(str(max(pattern.q_len - 1, 0)))
    return "\n".join(
        f"{row:>{width}} " + " ".join(SEEN if cell else HIDDEN for cell in cells)
        for row, cells in enumerate(grid.tolist())
    )


def _save_png(grid: torch.Tensor, path: Path, title: str) -> None:
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing a PNG needs matplotlib: pip install 'hf_attn_plugin[plot]'"
        ) from error
    rows, cols = grid.shape
    side = min(8.0, max(3.0, 0.16 * max(rows, cols)))
    figure = Figure(figsize=(side, side * rows / max(cols, 1) + 0.7), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid.int().numpy(), cmap=ListedColormap(["#eef1f5", "#2b5c8a"]), vmin=0, vmax=1)
    if max(rows, cols) <= 64:  # lines between the cells, as long as these can be told apart
        axes.set_xticks([x - 0.5 for x in range(cols + 1)], minor=True)
        axes.set_yticks([y - 0.5 for y in range(rows + 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(title or "attention pattern")
    figure.savefig(path, dpi=150)
