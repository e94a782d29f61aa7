"""``hf-attn bench decode``: the gate, rows, quality, the page. No GPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_plugin.cli.bench import speed_module
from tests.test_speed import CPU, CountingClock

decode, generation = map(speed_module, ("decode", "generation"))
decoding, numerics, quality = map(speed_module, ("sparq_decoding", "sparq_numerics", "quality"))
report, sparq_report = map(speed_module, ("report", "sparq_report"))

Setting, Shape, Row = numerics.Setting, decoding.Shape, decoding.SparQRow
TINY = Shape(2, 300, 8)
REPOSITORY = Path(__file__).resolve().parents[1]
SCORES = REPOSITORY / "eval/results/sweep/lab/results.json"


# -- the gate --------------------------------------------------------------------------------------


def judged(setting: Any, run_as: Any = None, change: Callable[..., Tensor] | None = None) -> Any:
    """The verdict on the step in PyTorch, which may run with another setting or be spoilt."""
    inputs = decoding.random_inputs(TINY, CPU)
    copy = decoding.make_copy(setting, inputs[1])
    output, _ = decoding.torch_step(run_as or setting, inputs, copy)
    if change is not None:
        output = change(output)
    return numerics.judge(setting, *inputs, copy, output, [(0, 0), (1, 7)])


@pytest.mark.parametrize("coverage", [None, 0.25])
@pytest.mark.parametrize("key_copy", ["full", "int8", "int4", "none"])
def test_the_gate_lets_the_step_through(key_copy: str, coverage: float | None) -> None:
    verdict = judged(Setting(32, 64, key_copy, coverage))
    assert 0.01 < verdict.share <= 1
    assert verdict.exchanged == 0


@pytest.mark.parametrize(
    "other",
    [
        Setting(32, 65),
        Setting(32, 63),
        Setting(31, 64),
        Setting(32, 64, coverage=0.25),
        Setting(32, 64, "int4"),
    ],
    ids=lambda setting: setting.title,
)
def test_the_gate_refuses_other_choices(other: Any) -> None:
    setting = Setting(32, 64)
    inputs = decoding.random_inputs(TINY, CPU)
    full, copy = (decoding.make_copy(one, inputs[1]) for one in (setting, other))
    output, _ = decoding.torch_step(other, inputs, copy)
    assert numerics.judge(setting, *inputs, full, output, [(0, 0), (1, 7)]).share > 1


def test_the_gate_refuses_wrong_sums() -> None:
    setting = Setting(32, 64)
    assert judged(setting, change=lambda output: output * 1.05).share > 1
    assert judged(setting, change=lambda output: output.index_fill(1, torch.tensor(0), 0)).share > 1
    spoilt = judged(setting, change=lambda output: output.index_fill(1, torch.tensor(9), torch.nan))
    assert spoilt.share == float("inf")


def head_output(output: Tensor, query: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> None:
    """Put attention of the first head over some of its keys into a step's output."""
    output[0, 0] = numerics._attend(query[0, 0], keys[0, 0, at], values[0, 0, at])[0]


@pytest.mark.parametrize(("times", "allowed"), [(0.25, True), (4.0, False)])
def test_only_keys_with_nearly_equal_masses_may_be_exchanged(times: float, allowed: bool) -> None:
    """All components are used, so that a key's score can be set along the query."""
    setting = Setting(128, 8)
    query, _, values = (t.float() for t in decoding.random_inputs(Shape(1, 64, 32), CPU))
    unit = query / query.square().sum(-1, keepdim=True) * 128**0.5
    scores = torch.linspace(3, -3, 64)
    scores[6] = scores[5] - times * numerics.TOLERANCE
    keys = unit * scores[None, None, :, None]
    output = torch.zeros_like(query)
    # The last two are the local window; the sixth is left out for the seventh.
    head_output(output, query, keys, values, torch.tensor([0, 1, 2, 3, 4, 6, 62, 63]))
    verdict = numerics.judge(setting, query, keys, values, None, output, [(0, 0)])
    assert (verdict.share <= 1) is allowed
    assert verdict.exchanged == int(allowed)


def test_equal_components_may_be_exchanged() -> None:
    """The first two components are equal in size, and one of them is used."""
    query, keys, values = (t.float() for t in decoding.random_inputs(Shape(1, 64, 32), CPU))
    query[..., 0], query[..., 1] = 9.0, -9.0
    copy = decoding.make_copy(Setting(), keys)
    output = torch.zeros_like(query)

    def share(used: list[int]) -> float:
        at = chosen_keys(Setting(1, 8), used, query[0, 0], keys[0, 0])
        head_output(output, query, keys, values, at)
        return numerics.judge(Setting(1, 8), query, keys, values, copy, output, [(0, 0)]).share

    assert share([0]) <= 1
    assert share([1]) <= 1
    assert share([0, 1]) > 1
    assert share([2]) > 1


def chosen_keys(setting: Any, components: list[int], query: Tensor, keys: Tensor) -> Tensor:
    """The definition for one head, by a sort."""
    # A factor on all scores changes nothing.
    scores = keys[:, components] @ query[0, components]
    scores[-setting.local_window :] = torch.inf
    return scores.argsort(descending=True)[: setting.top_k]


def test_unrelated_heads_are_found_anywhere() -> None:
    torch.manual_seed(0)
    output = torch.randn(3, 8, 1, 16)
    assert numerics.unrelated_rows(output + 0.1 * torch.randn(3, 8, 1, 16), output) == 0
    assert numerics.unrelated_rows(output.roll(1, 1), output) == 24
    for value, scale in ((torch.nan, 1), (0.0, 0), (0.0, 3)):
        spoilt = output.clone()
        spoilt[1, 5] *= scale
        spoilt[1, 5, 0, 3] += value
        assert numerics.unrelated_rows(spoilt, output) == 1


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_no_two_components_are_of_equal_size(kv_heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(4, 8, 1, 128).bfloat16()
    query[0, :, 0, :5] = 1.0
    parted = numerics.part_ties(query, kv_heads)

    def ties(query: Tensor) -> int:
        sums = query.double().abs().view(4, kv_heads, -1, 128).sum(2)
        return int((sums.sort(-1).values.diff(dim=-1) == 0).sum())

    assert ties(query) > 20
    assert ties(parted) == 0
    assert ((parted - query).abs() <= 0.1 * query.abs() + 1e-3).all()
    assert (parted != query).float().mean() < 0.3


# -- rows ------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU to wait for, and the step in PyTorch in the place of our kernels."""
    monkeypatch.setattr(decoding, "host_microseconds", lambda call: 1.0)
    monkeypatch.setattr(decoding, "triton_step", in_place_of_triton)


def in_place_of_triton(setting: Any, inputs: Any, copy: Any) -> Callable[[], Tensor]:
    return lambda: decoding.torch_step(setting, inputs, copy)[0]


def test_rows_of_a_shape(on_a_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    path = tmp_path / "sparq.json"

    def bench() -> Any:
        results = report.Results(path, Row)
        return decoding.SparQBench(CountingClock(tick=2.0), CPU, results, said.append)

    settings = (Setting(32, 64), Setting(32, 64, "int8"))
    rows = bench().measure("table", TINY, settings)
    status = {(row.contender, row.setting): row.status for row in rows}
    assert status.pop(("fa4", "")) == "missing"
    assert status.pop(("sdpa-flash", "")) == "ok"
    assert status.pop(("sdpa-cudnn", "")) == status.pop(("dense triton", "")) == "error"
    assert set(status.values()) == {"ok"}
    assert len(status) == 4
    dense = next(row for row in rows if row.contender == "sdpa-flash")
    full, int8 = (row for row in rows if row.contender == "sparq torch")
    assert dense.nbytes == 2 * 300 * 8 * 128 * 2 * 2
    assert full.nbytes == 2 * 8 * (32 * 300 * 2 + 2 * 64 * 128 * 2)
    assert int8.nbytes < full.nbytes
    assert full.ms == 2.0
    assert decoding.best_dense(rows, full) == dense

    # What was measured is kept; what is wrong is tried again, and has no time.
    said.clear()
    monkeypatch.setattr(decoding, "torch_step", None)
    rows = bench().measure("table", TINY, settings[:1])
    assert [row.ms for row in rows if row.setting] == [2.0, 2.0]


def test_wrong_steps_have_no_time(
    on_a_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(32, 64)

    def row_with(change: Callable[[Tensor], Tensor]) -> Any:
        def step(setting: Any, inputs: Any, copy: Any) -> Callable[[], Tensor]:
            right = in_place_of_triton(setting, inputs, copy)
            return lambda: change(right())

        monkeypatch.setattr(decoding, "triton_step", step)
        results = report.Results(tmp_path / f"{id(change)}.json", Row)
        bench = decoding.SparQBench(
            CountingClock(), CPU, results, lambda line: None, steps=("sparq triton",)
        )
        return bench.measure("table", TINY, [setting])[-1]

    assert row_with(lambda output: output).status == "ok"
    scaled = row_with(lambda output: output * 1.1)
    assert (scaled.status, scaled.ms) == ("FAILED numerics", None)
    # In a head that is not among those compared closely.
    elsewhere = row_with(lambda output: output.index_fill(1, torch.tensor(14), 0))
    assert (elsewhere.status, elsewhere.ms) == ("FAILED numerics", None)
    assert elsewhere.detail.startswith("2 heads have nothing to do with")

    def absent(setting: Any, inputs: Any, copy: Any) -> Callable[[], Tensor]:
        raise ImportError("no triton here")

    monkeypatch.setattr(decoding, "triton_step", absent)
    bench = decoding.SparQBench(
        CountingClock(), CPU, report.Results(tmp_path / "x.json", Row), lambda line: None
    )
    assert bench.measure("table", TINY, [setting])[-1].status == "missing"


def test_shapes_are_the_issue_and_powers_of_two() -> None:
    assert [shape.title for shape in decoding.SHAPES][:2] == [
        "B=1, S=131072, 32 KV heads",
        "B=8, S=32768, 32 KV heads",
    ]
    assert decoding.SHAPES[0].dense_bytes == 131072 * 32 * 128 * 2 * 2
    shapes = decode.crossover_shapes()
    assert len(set(shapes)) == len(shapes)
    assert {(shape.batch, shape.kv_heads) for shape in shapes} == set(
        itertools.product((1, 8, 32), (8, 32))
    )
    assert max(shape.dense_bytes for shape in shapes) < 20e9


def test_all_parts_of_the_page(
    on_a_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(1, 200, 8)
    monkeypatch.setattr(decode, "SHAPES", (shape,))
    monkeypatch.setattr(decode, "_SETTINGS_SHAPES", (shape,))
    monkeypatch.setattr(decode, "crossover_shapes", lambda quick: [shape, Shape(8, 200, 8)])
    monkeypatch.setattr(decode, "copy_bytes_per_second", lambda clock, device, size: 4e12)
    scores = dataclasses.replace(quality.Scores.read(SCORES), settings=(Setting(8, 32),))

    def measured(step: Callable[..., Any]) -> tuple[bool, Any]:
        monkeypatch.setattr(decoding, "triton_step", step)
        results = report.Results(tmp_path / f"{id(step)}.json", Row)
        parts = ["table", "settings", "crossover", "data"]
        options = {"device": CPU, "clock": CountingClock(tick=2.0)}
        bad = decode.measure_sparq(results, parts, scores, False, lambda line: None, **options)
        return bad, decode.make_report(results, scores, tmp_path)

    bad, page = measured(in_place_of_triton)
    assert not bad
    assert page.copy_rate == pytest.approx(4e12)
    assert [row[1] for row in page.speedups("table")[1]] == [s.title for s in decode.VARIANTS]
    assert [row[1] for row in page.speedups("settings")[1]] == ["r=8 k=32"]
    assert [row[0] for row in page.crossover()[1]] == [
        *[Setting().title] * 2,
        *("r=32 k=128 copy=int4", "r=32 k=128 copy=int8", "r=32 k=128 copy=none"),
    ]
    assert [row[2] for row in page.by_data()[1]] == list(decode._DATA)

    def broken(setting: Any, inputs: Any, copy: Any) -> Callable[[], Tensor]:
        raise RuntimeError("an illegal memory access")

    bad, page = measured(broken)
    assert bad
    assert any("an illegal memory access" in line for line in page.notes())


# -- quality and the page --------------------------------------------------------------------------


def test_scores_are_of_the_same_share_of_components() -> None:
    scores = quality.Scores.read(SCORES)
    content = json.loads(SCORES.read_text())
    points = {run["label"]: run["tasks"] for run in content["runs"].values()}
    dense = points["dense"]
    want = dense["long_bpb"]["quality"] / points["sparq r=16 k=128"]["long_bpb"]["quality"]
    assert scores.of(Setting(32, 128))["long_bpb"] == pytest.approx(want)
    # Picked out of the keys, components are the same numbers.
    assert scores.of(Setting(32, 128, "none")) == scores.of(Setting(32, 128))
    assert scores.of(Setting(8, 128)) != scores.of(Setting(32, 128))
    assert set(scores.of(Setting(3, 5)).values()) == {None}
    assert Setting(32, 128) in scores.settings
    assert Setting(32, 512, coverage=0.9) in scores.settings
    assert "sparq_squad (answers as dense)" in scores.titles.values()
    with pytest.raises(ValueError, match="no speed without its quality"):
        quality.Scores.read(SCORES.parent / "no.json")


@pytest.mark.parametrize(
    "setting",
    [Setting(), Setting(8, 32, "int4"), Setting(16, 512, "int8", 0.9), Setting(1, 1, "none", 0.25)],
)
def test_titles_say_all_of_a_setting(setting: Any) -> None:
    assert sparq_report.setting_of(setting.title) == setting


def row_of(
    group: str, shape: Any, contender: str, ms: float | None, setting: str = "", **fields: Any
) -> Any:
    fields = {"nbytes": 10**9, "host_us": 9.0, "share": 0.1, "stamp": "X", **fields}
    status = fields.pop("status", "ok")
    head = (group, shape.title, shape.batch, shape.length, shape.kv_heads, contender, setting)
    return Row(*head, status, ms=ms, **fields)


def crossover_rows(batch: int, speedups: dict[int, float]) -> list[Any]:
    rows = []
    for length, speedup in speedups.items():
        shape = Shape(batch, length, 8)
        rows.append(row_of("crossover", shape, "sdpa-cudnn", 2.0 * speedup))
        rows.append(row_of("crossover", shape, "sdpa-flash", 9.0 * speedup))
        rows.append(row_of("crossover", shape, "sparq triton", 2.0, Setting().title))
    return rows


def test_where_it_begins_to_pay() -> None:
    rows = [
        *crossover_rows(1, {1024: 0.5, 4096: 2.0, 16384: 4.0}),
        *crossover_rows(2, {1024: 0.5, 2048: 0.9}),
        *crossover_rows(4, {1024: 1.5, 2048: 0.5, 4096: 2.0, 8192: 3.0}),
        *crossover_rows(8, {1024: 1.5, 2048: 2.5}),
    ]
    one, two, four, eight = sparq_report.crossovers(rows)
    assert one.length == pytest.approx(2048)  # halfway on logarithmic axes
    assert one.nbytes == pytest.approx(2048 * 8 * 128 * 2 * 2)
    assert two.length is None
    assert two.longest == 2048
    assert four.length == pytest.approx(2048 * 2**0.5)  # at every longer length too
    assert eight.length == 1024
    none = row_of("crossover", Shape(8, 1024, 8), "sparq triton", 5.0, "r=32 k=128 copy=none")
    more = sparq_report.crossovers([*rows, none])
    assert [found.setting for found in more] == [Setting().title] * 4 + [none.setting]
    assert more[-1].length is None


def example_rows() -> list[Any]:
    rows = [*crossover_rows(1, {1024: 0.5, 4096: 2.0}), *crossover_rows(8, {1024: 2.0, 4096: 3.0})]
    for shape, fast in ((decoding.SHAPES[0], 0.12), (decoding.SHAPES[3], 0.30)):
        rows.append(row_of("table", shape, "sdpa-cudnn", 0.48))
        rows.append(row_of("table", shape, "sdpa-flash", 0.52))
        rows.append(row_of("table", shape, "fa4", None, status="missing", detail="missing: pip"))
        for setting in (Setting(), Setting(key_copy="none")):
            slow = fast * (1 if setting.key_copy == "full" else 0.8)
            rows.append(row_of("table", shape, "sparq triton", slow, setting.title))
            rows.append(row_of("table", shape, "sparq torch", 1.0, setting.title))
    for shape in (decoding.SHAPES[1], decoding.SHAPES[4]):
        rows.append(row_of("settings", shape, "sdpa-cudnn", 1.0))
        for at, setting in enumerate(quality.Scores.read(SCORES).settings):
            rows.append(row_of("settings", shape, "sparq triton", 0.2 + at / 50, setting.title))
    rows.append(row_of("data: all equal", decoding.SHAPES[1], "sparq triton", 0.2, Setting().title))
    return rows


def test_every_speed_has_its_quality(tmp_path: Path) -> None:
    scores = quality.Scores.read(SCORES)
    errors = quality.Errors("lab", scores.model, 64, 2048, 48, {Setting().title: 0.086})
    page = sparq_report.Report(example_rows(), scores, errors, 4e12)
    header, cells = page.speedups("table")
    by_name = [dict(zip(header, row, strict=True)) for row in cells]
    assert [row["speed-up"] for row in by_name] == ["4.00x", "5.00x", "1.60x", "2.00x"]
    assert [row["to reach"] for row in by_name] == [
        "0.15 ms, 3.2x: yes",
        "-",
        "3.5x: no",
        "1.8x: yes",
    ]
    assert {row["fastest dense"] for row in by_name} == {"sdpa-cudnn"}
    assert by_name[0]["bytes bound ms at 4.00 TB/s"] == "0.250"
    assert by_name[0]["error on text"] == "8.6%"
    assert by_name[1]["error on text"] == "-"
    assert by_name[0]["niah"] == "100.0%"
    for group in ("table", "settings"):
        for row in page.speedups(group)[1]:
            kept = dict(zip(header, row, strict=True))
            assert "%" in kept["niah"]
    text = page.markdown("hf-attn bench decode", "X", tmp_path)
    assert text.startswith("<!-- Made by: hf-attn bench decode -->")
    assert str(SCORES) in text
    assert "| r=32 k=128 | 1 | 8 | 2048 |" in text
    assert "- table: fa4: missing: pip (2 shapes, such as B=1, S=131072, 32 KV heads)" in text
    assert "other weights" not in text
    other = dataclasses.replace(errors, weights="another")
    page = sparq_report.Report(example_rows(), scores, other, None)
    assert "of other weights" in page.markdown("x", "X", tmp_path)
    assert "0.50x" in page.text(["table", "crossover", "data: "]) or page.by_length()[1]


def test_copies_that_save_no_time_are_named(tmp_path: Path) -> None:
    def text(int8: float, int4: float) -> str:
        times = {"full": 0.2, "int8": int8, "int4": int4}
        rows = [
            row_of("table", decoding.SHAPES[0], "sparq triton", ms, Setting(key_copy=kind).title)
            for kind, ms in times.items()
        ]
        rows.append(row_of("table", decoding.SHAPES[0], "sdpa-cudnn", 0.4))
        page = sparq_report.Report(rows, quality.Scores.read(SCORES), None, None)
        assert page.slow_copies() in page.markdown("x", "X", tmp_path)
        return page.slow_copies()

    assert text(0.1, 0.1) == ""
    assert text(0.3, 0.1).endswith(f"{decoding.SHAPES[0].title}: int8 1.5.")
    assert text(0.3, 0.5).endswith(": int8 1.5, int4 2.5.")


def test_the_page_is_made_from_what_is_kept(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    results = report.Results(tmp_path / "sparq.json", Row)
    for row in example_rows():
        results.add(row)
    generated = report.Results(tmp_path / "generation.json", generation.GenerationRow)
    generated.add(generation.GenerationRow(4, 1, 99, "sdpa, dynamic cache", "error", "X"))
    status = decode.run(tmp_path, command="x", parts=["page"], scores=SCORES, say=lambda line: None)
    assert status == 0
    assert "sdpa, dynamic cache: error: X (1 x 99)" in (tmp_path / "generation.md").read_text()
    page = (tmp_path / "sparq.md").read_text()
    for picture in ("sparq_time.png", "sparq_quality.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
        assert f"]({picture})" in page


def test_errors_on_a_models_own_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=96,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "held_out.txt").write_text("x" * 200)

    def encode(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [(7 * at * at) % 64 for at in range(len(text))]}

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: encode)
    settings = [Setting(128, 96), Setting(32, 16), Setting(32, 4)]
    errors = quality.measure_errors(tmp_path, tmp_path / "held_out.txt", settings)
    assert (errors.head_dim, errors.keys, errors.steps) == (16, 96, 2 * quality._QUERIES)
    every, some, few = (errors.errors[setting.title] for setting in settings)
    assert every < 1e-5
    assert 0.001 < some < few
    errors.write(tmp_path)
    assert quality.Errors.read(tmp_path) == errors
    assert quality.Errors.read(tmp_path / "nowhere") is None
    (tmp_path / "held_out.txt").write_text("x" * 20)
    with pytest.raises(ValueError, match="has 20 tokens, less than the model's 96"):
        quality.measure_errors(tmp_path, tmp_path / "held_out.txt", settings)


def test_counters_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(decode, "measure_sparq", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match="needs Nsight Compute"):
        decode.run(tmp_path, command="x", parts=["table", "counters"], say=lambda line: None)
    said: list[str] = []
    monkeypatch.setattr(decode, "chosen_parts", lambda names, model: ["page", "counters"])
    assert decode.run(tmp_path, command="x", scores=SCORES, say=said.append) == 0
    assert said[0].startswith("left out: ")
