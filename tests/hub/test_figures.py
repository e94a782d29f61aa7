"""Figures: written, of a sensible size, without touching matplotlib's global state."""

import subprocess
import sys

import pytest

from hf_attn_plugin.hub import QualityPoint, needle_heatmaps, quality_against_reads
from hf_attn_plugin.lm_eval import NeedleGrid

matplotlib = pytest.importorskip("matplotlib")

GRID = NeedleGrid((128, 256, 512), (0.0, 0.5, 1.0), ((1, 0, float("nan")), (0.5, 1, 0), (1, 1, 1)))
POINTS = [QualityPoint("sdpa", 1.0, 0.99), QualityPoint("sparq 1/4", 0.25, 0.9)]


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_heatmaps_show_what_was_found(tmp_path, count):
    grids = {f"method {index}": GRID for index in range(count)}
    path = needle_heatmaps(grids, tmp_path / "new" / "needles.png", trained_length=256)
    image = pixels(path)
    height, width = image.shape[:2]
    assert 300 < height < 2500
    assert 400 < width < 2500
    red = (image[..., 0] > 0.6) & (image[..., 1] < 0.1)
    blue = (image[..., 2] > 0.5) & (image[..., 0] < 0.25)
    # Per panel 2 of 9 cells are all lost, 5 are all found.
    assert blue.sum() / red.sum() == pytest.approx(5 / 2, rel=0.25)


def test_quality_against_reads(tmp_path):
    panels = {"needles found": POINTS, "bits per byte": POINTS[:1]}
    image = pixels(quality_against_reads(panels, tmp_path / "quality.png", dense="sdpa"))
    assert image.shape[1] > image.shape[0] > 300


def test_svg_names_the_methods(tmp_path):
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        quality_against_reads({"needles found": POINTS}, tmp_path / "quality.svg")
        needle_heatmaps({"sparq 1/4": GRID}, tmp_path / "needles.svg")
    quality = (tmp_path / "quality.svg").read_text()
    assert "sparq 1/4" in quality
    assert "KV cache bytes read in decoding (% of dense)" in quality
    needles = (tmp_path / "needles.svg").read_text()
    assert "sparq 1/4" in needles
    assert "512" in needles


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one grid"):
        needle_heatmaps({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="at least one point"):
        quality_against_reads({"niah": []}, tmp_path / "a.png")


def test_pyplot_is_not_touched(tmp_path):
    code = (
        "import sys\n"
        "from hf_attn_plugin.hub import needle_heatmaps\n"
        "from hf_attn_plugin.lm_eval import NeedleGrid\n"
        "grid = NeedleGrid((8,), (0.5,), ((1.0,),))\n"
        f"needle_heatmaps({{'a': grid}}, {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
