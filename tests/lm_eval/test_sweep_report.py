"""What follows from a sweep, on numbers made up so that the answer is known."""

from fractions import Fraction

import pytest

from hf_attn_plugin.lm_eval.sweep_report import (
    SweepPoint,
    TaskSweep,
    read_sweep,
    recommend,
    sweep_markdown,
)


def point(label, ratio, scores, agreement=None, group=None):
    agreements = None if agreement is None else (agreement,) * len(scores)
    quality = sum(scores) / len(scores)
    return SweepPoint(
        label,
        group or label,
        label.split()[0],
        ratio,
        quality,
        agreement,
        tuple(scores),
        agreements,
    )


def needles(*points, dense=(1, 1, 1, 1)):
    return TaskSweep("niah", "exact_match", True, point("dense", 1.0, dense, 1.0), points)


A = point("sparq a", 0.5, [1, 1, 1, 1], 1.0)
B = point("sparq b", 0.25, [1, 1, 1, 0], 0.9)
C = point("h2o c", 0.25, [0, 0, 0, 0], 0.1)
D = point("h2o d", 0.125, [1, 0, 0, 0], 0.2)
E = point("exact_topk e", 0.6, [1, 1, 1, 0], 0.9)


def test_front_and_best():
    sweep = needles(A, B, C, D, E)
    assert sweep.pareto_front() == [D, B, A]
    assert [sweep.best(budget) for budget in (1, 0.5, 0.3, 0.125, 0.1)] == [A, A, B, D, None]
    # Better at fewer bytes: equal quality goes to the cheaper one.
    assert needles(E, B).best(1) is B
    assert [sweep.kept(p) for p in (A, B, C)] == [1, 0.75, 0]


def test_lower_is_better():
    dense = point("dense", 1.0, [2.0, 2.0])
    near, far = point("sparq n", 0.5, [2.1, 2.1]), point("h2o f", 0.2, [4.0, 4.0])
    lucky = point("lm_infinite l", 0.1, [1.9, 1.9])
    sweep = TaskSweep("long_bpb", "bits_per_byte", False, dense, (near, far))
    assert sweep.doable
    assert sweep.best(1) is near
    assert sweep.pareto_front() == [far, near]
    assert [sweep.kept(p) for p in (near, far, lucky)] == pytest.approx([2 / 2.1, 0.5, 1.0])


def test_a_task_that_the_model_cannot_do_goes_by_agreement():
    sweep = needles(A, B, C, D, dense=(0,) * 100)
    assert not sweep.doable
    assert sweep.best(0.3) is B
    assert sweep.kept(C) == 0.1
    assert sweep.not_told_apart(B, 0.3) == []
    matched = TaskSweep(
        "repetition", "matched_characters", True, point("dense", 1.0, [3, 0, 0, 0], 1.0), (A,)
    )
    assert not matched.doable  # 0.75 characters of a text, although "75 %" would be a lot
    assert needles(A).doable


def test_noise():
    best = point("sparq x", 0.4, [1, 1, 1, 1, 1, 1, 1, 0])
    close = point("sparq y", 0.2, [1, 1, 1, 1, 1, 1, 0, 1])
    worse = point("sparq z", 0.1, [0] * 8)
    sweep = needles(best, close, worse, dense=[1] * 8)
    assert sweep.not_told_apart(best, 1) == [close]
    # The same differences, seen on many more documents, are no noise any more.
    many = point("sparq m", 0.2, [1] * 90 + [0] * 10)
    perfect = point("sparq p", 0.4, [1] * 100)
    assert needles(perfect, many, dense=[1] * 100).not_told_apart(perfect, 1) == []


def test_recommendation_must_fit_every_task():
    dense = point("dense", 1.0, [2.0])
    text = TaskSweep(
        "long_bpb", "bits_per_byte", False, dense,
        (point("sparq a", 0.4, [2.0]), point("sparq b", 0.6, [2.0]), point("h2o d", 0.1, [4.0])),
    )  # fmt: skip
    sweeps = [needles(A, B, C, D), text]
    found = recommend(sweeps, 0.5)
    assert (found.label, found.ratio, found.kept) == ("sparq a", 0.5, 1.0)
    # b reads 60 % on the other task, c was not measured there.
    smaller = recommend(sweeps, 0.3)
    assert (smaller.label, smaller.kept) == ("h2o d", pytest.approx((0.25 + 0.5) / 2))
    assert (smaller.worst, smaller.worst_kept) == ("niah", 0.25)
    assert recommend(sweeps, 0.05) is None
    assert recommend([], 0.5) is None


def content(dense_quality=1.0):
    def measured(ratio, quality, agreement):
        return {
            "ratio": ratio, "quality": quality, "agreement": agreement,
            "scores": [quality] * 4, "agreements": [agreement] * 4,
        }  # fmt: skip

    def run(label, *values):
        tasks = {"niah": measured(*values)} if values else {}
        return {"label": label, "group": label.split()[0], "attn": "sparq", "tasks": tasks}

    return {
        "about": {
            "command": "hf-attn sweep M --out D", "model": "M", "dtype": "float32", "device": "cpu",
            "versions": {"torch": "2"},
        },
        "tasks": {
            "niah": {"metric": "exact_match", "higher_is_better": True},
            "later": {"metric": "f1", "higher_is_better": True},
        },
        "runs": {
            "1": run("dense", 1.0, dense_quality, 1.0),
            "2": run("sparq a", 0.4, 0.9, 0.95),
            "3": run("sparq b") | {"refused": {"niah": "not for this model"}},
        },
    }  # fmt: skip


def test_the_report():
    text = sweep_markdown(content(), [Fraction(1, 2), Fraction(1, 4)], "sweep.png")
    assert text.splitlines()[0] == "<!-- Made by: hf-attn sweep M --out D -->"
    assert "![Quality against KV cache read](sweep.png)" in text
    assert "| 1/2 | sparq a | 40.0% | 90.0% | 90.0% (niah) |" in text
    assert "| 1/4 | none reads so little | | | |" in text
    assert "| niah | 1/2 | sparq a | 0.9 | 1 | 95.0% | 40.0% |  |" in text
    assert "| dense | 100.0% | 1 | 100.0% |" in text
    assert "- sparq b is refused on niah: not for this model" in text
    assert "model cannot do `" not in text
    hopeless = sweep_markdown(content(0.0))
    assert "**The model cannot do `niah`**: dense attention scores 0" in hopeless
    assert [sweep.task for sweep in read_sweep(content())] == ["niah"]


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from hf_attn_plugin.hub.sweep_figures import _styles, sweep_figure

    groups = [
        "sparq r=4", "sparq r=64", "sparq coverage r=16", "sparq coverage r=32", "sparq copy=int8",
        "sparq copy=int4", "sparq copy=none", "exact_topk", "h2o", "lm_infinite",
    ]  # fmt: skip
    styles = _styles(groups)
    looks = {(str(s["color"]), s["marker"]) for s in styles.values()}
    assert len(looks) == len(groups)
    points = [
        point(f"{group} {i}", ratio, [i / 3] * 3, i / 3, group)
        for group in groups
        for i, ratio in enumerate((0.1, 0.2, 0.4))
    ]
    text = TaskSweep(
        "long_bpb", "bits_per_byte", False, point("dense", 1.0, [2.0]),
        (point("h2o 1", 0.1, [2.2], None, "h2o"),),
    )  # fmt: skip
    path = sweep_figure([needles(*points), text], tmp_path / "sweep.png")
    assert imread(path).std() > 0.05
    with pytest.raises(ValueError, match="no task has been measured beyond dense"):
        sweep_figure([needles()], tmp_path / "none.png")
