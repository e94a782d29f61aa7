"""``hf-attn bench`` where there is no GPU, and from an installed wheel."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import hf_attn_plugin
from hf_attn_plugin.cli.bench import command_line
from hf_attn_plugin.cli.main import main

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_cases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    listed = capsys.readouterr().out
    for name in ("full", "window-4096", "documents", "strided", "sdpa-cudnn", "flex", "triton"):
        assert f"\n  {name}" in listed


@no_gpu
@pytest.mark.parametrize(
    "what", [[], ["full"], ["compile"], ["model"], ["decode", "--quick"], ["linear"]]
)
def test_a_gpu_is_asked_for(
    what: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *what, "--out", str(tmp_path / "out")]) == 2
    assert "hf-attn bench needs a CUDA GPU, and torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fulll"], "no case named fulll: choose from full, window-1024"),
        (["--peers", "fa5"], "no peer named fa5: choose from sdpa-flash"),
        (["full", "--layers", "2"], "--layers is for hf-attn bench model, hf-attn bench decode, "),
        (["decode", "--peers", "fa4"], "--peers is for hf-attn bench, hf-attn bench compile, "),
        (["linear", "--fresh"], "hf-attn bench linear has no use for it"),
        (["compile", "--quick"], "hf-attn bench compile has no use for it"),
        (["decode", "--peer-timeout", "9"], "hf-attn bench decode has no use for it"),
        (["model", "--no-figures"], "--no-figures is for hf-attn bench, hf-attn bench decode, "),
        (["decode", "sparks"], "has no part sparks: choose from dense, table, settings"),
        (["decode", "errors"], "hf-attn bench decode errors needs --model with a folder"),
        (["decode", "page", "--scores", "none.json"], "no speed without its quality: none.json"),
        (["model", "--scores", "x"], "--scores is for hf-attn bench decode; hf-attn bench model"),
        (["compile", "--peers", "fa5"], "no peer named fa5: choose from sdpa-flash"),
        (["model", "--peers", "fa5"], "no peer named fa5: choose from "),
        (["model", "--tokens", "0"], "--tokens must be above 0, got 0"),
        (["--peer-timeout", "0"], "--peer-timeout must be above 0"),
        (["compile", "full"], "hf-attn bench compile takes no cases; got full"),
        (["draw"], "holds no lengths to draw: run hf-attn bench first"),
        (["ring", "full"], "no case of hf-attn bench ring is named full: choose from causal, "),
        (["ring", "--peers", "fa4"], "no peer of hf-attn bench ring is named fa4: choose from cp-"),
        (["ring", "model", "windows"], "no case of hf-attn bench ring is named windows"),
        (["ring", "--rounds", "0"], "--rounds must be above 0, got 0"),
        (["ring", "--ranks", "1"], "--ranks must be at least 2, got 1"),
        (["ring", "draw"], "there are no timelines to draw: run hf-attn bench ring first"),
        (["model", "--ranks", "2"], "--ranks is for hf-attn bench ring; hf-attn bench model has"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_pages_name_their_command_without_a_folder() -> None:
    line = ["bench", "full", "--out", "/somewhere/else", "--quick", "--out=x"]
    assert command_line(line) == "hf-attn bench full --quick"


@pytest.mark.parametrize("what", ["decode", "linear"])
def test_pages_get_the_command_with_its_options(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_attn_plugin.cli import bench

    given = {}
    module = bench.speed_module(bench.OTHERS[what])
    monkeypatch.setattr(module, "run", lambda out, **options: given.update(options) or 0)
    monkeypatch.setattr(bench, "_check_gpu", lambda: None)
    line = ["bench", what, "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["hf-attn", *line])
    assert main(line) == 0
    assert given.pop("command") == f"hf-attn bench {what} --quick"
    assert given.pop("quick") is True
    if what == "decode":
        assert given.pop("figures") is True
        assert given.pop("say") is bench._say
    assert not any(given.values())


def test_an_installed_wheel_holds_the_benchmarks(tmp_path: Path) -> None:
    """A copy laid out as the wheel is finds them; without them the error says so."""
    package = Path(hf_attn_plugin.__file__).parent
    pyproject = package.parent / "pyproject.toml"
    if not pyproject.is_file():
        pytest.skip("not a checkout")
    wheel = tomllib.loads(pyproject.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    site = tmp_path / "site"
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, site / "hf_attn_plugin", ignore=without_caches)
    target = site / wheel["force-include"]["eval/speed"]
    shutil.copytree(package.parent / "eval" / "speed", target, ignore=without_caches)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hf_attn_plugin.cli", "bench", "--list"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    assert "window-1024" in run().stdout
    shutil.rmtree(target)
    assert "the benchmarks are in neither" in run().stderr


def test_a_picture_from_kept_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from hf_attn_plugin.cli.bench import speed_module

    report = speed_module("report")
    results = report.Results(tmp_path / "speed.json", report.Row)
    for length in (4096, 16384):
        for name in ("flex", "triton"):
            row = report.Row("full", "full", length, name, False, "ok", stamp="X, torch")
            results.add(dataclasses.replace(row, total_ms=length / 1e3, extra_gib=length / 1e4))
    assert main(["bench", "draw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "speed.png").stat().st_size > 10_000
