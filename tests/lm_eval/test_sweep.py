"""`run_sweep`: what it measures, that it goes on where it was, and what it refuses."""

import json

import pytest
import torch

from hf_attn_plugin import H2OConfig, LMInfiniteConfig, SparQConfig
from hf_attn_plugin.lm_eval import load_tasks
from hf_attn_plugin.lm_eval.sweep import (
    SweepResults,
    SweepSetting,
    fingerprint,
    run_sweep,
    sweep_settings,
    token_agreement,
)
from hf_attn_plugin.lm_eval.sweep_report import read_sweep

METADATA = {
    "niah": {"lengths": [160], "depths": [0, 1], "samples": 2},
    "long_bpb": {"context": 120, "scored": 8, "samples": 3},
}
SETTINGS = sweep_settings(
    8, ranks=[2, 64], top_ks=[8, 160], coverages=[0.9], key_copies=["int8"], baselines=["h2o"]
)
LABELS = [
    "dense", "sparq r=2 k=8", "sparq r=2 k=160", "sparq r=2 coverage=0.9 k≤160",
    "sparq r=2 k=8 copy=int8", "sparq r=2 k=160 copy=int8", "h2o 8", "h2o 160",
]  # fmt: skip


def tasks_with(tokenizer, text_file, **changes):
    metadata = {name: {**options, "files": [text_file]} for name, options in METADATA.items()}
    for name, options in changes.items():
        metadata[name] |= options
    return load_tasks(tokenizer, "niah,long_bpb", metadata, max_length=256)


@pytest.fixture(scope="module")
def tasks(tokenizer, text_file):
    return tasks_with(tokenizer, text_file)


def test_the_settings():
    assert [setting.label for setting in SETTINGS] == LABELS
    assert len({setting.key for setting in SETTINGS}) == len(SETTINGS)
    coverage = SETTINGS[3].parameters
    assert coverage == SparQConfig(rank=2, top_k=160, coverage=0.9)
    everything = sweep_settings(64)
    assert {s.attn for s in everything} == {"sdpa", "sparq", "exact_topk", "h2o", "lm_infinite"}
    ranks = {s.parameters.rank for s in everything if "coverage" in s.label}
    assert ranks == {16, 32}  # a quarter and a half of head_dim
    window = next(s.parameters for s in everything if s.label == "lm_infinite 64")
    assert window == LMInfiniteConfig(window=60, num_sink_tokens=4)
    only = sweep_settings(64, ranks=[], baselines=["h2o"])
    assert {s.attn for s in only} == {"sdpa", "h2o"}
    with pytest.raises(ValueError, match=r"no baseline named quest; known: exact_topk, h2o"):
        sweep_settings(64, baselines=["quest"])
    with pytest.raises(ValueError, match=r"every rank of \[32\] is above .* head_dim 8"):
        sweep_settings(8, ranks=[32])


def test_every_setting_has_a_label_of_its_own():
    several = [
        *sweep_settings(64),
        *sweep_settings(64, top_ks=[32, 64]),
        *sweep_settings(64, mean_value_reallocation=True),
    ]
    assert len({s.label for s in several}) == len({s.key for s in several})


def sweep(model, tokenizer, tasks, folder, settings=SETTINGS, stop=None, **options):
    """What was measured in this call, as (label, task)."""
    done = []
    results = SweepResults(folder)
    for setting, task in run_sweep(model, tokenizer, tasks, settings, results, **options):
        if len(done) == stop:
            break
        done.append((setting.label, task))
    return done, results.content


def stripped(content):
    """Without the times."""
    runs = json.loads(json.dumps(content["runs"]))
    for run in runs.values():
        for measured in run["tasks"].values():
            measured.pop("seconds")
    return runs


def test_it_goes_on_where_it_was(model, tokenizer, tasks, tmp_path):
    whole, content = sweep(model, tokenizer, tasks, tmp_path / "whole")
    assert whole == [(label, task) for label in LABELS for task in ("niah", "long_bpb")]
    first, _ = sweep(model, tokenizer, tasks, tmp_path / "parts", stop=5)
    second, parts = sweep(model, tokenizer, tasks, tmp_path / "parts")
    assert [*first, *second] == whole
    assert stripped(parts) == stripped(content)
    assert sweep(model, tokenizer, tasks, tmp_path / "parts")[0] == []
    more = [*SETTINGS, *sweep_settings(8, ranks=[], top_ks=[16], baselines=["lm_infinite"])[1:]]
    again, _ = sweep(model, tokenizer, tasks, tmp_path / "parts", settings=more)
    assert again == [("lm_infinite 16", "niah"), ("lm_infinite 16", "long_bpb")]


def test_what_is_measured(model, tokenizer, tasks, tmp_path):
    _, content = sweep(model, tokenizer, tasks, tmp_path)
    niah, text = read_sweep(content)
    assert (niah.metric, niah.higher_is_better) == ("exact_match", True)
    assert (text.metric, text.higher_is_better) == ("bits_per_byte", False)
    assert niah.dense.ratio == text.dense.ratio == niah.dense.agreement == 1
    assert text.dense.agreement is None
    by_label = {point.label: point for point in niah.points}
    # The prompts have 152 tokens at most: with 160 keys nothing is left out.
    for label in ("sparq r=2 k=160", "h2o 160"):
        assert by_label[label].ratio == by_label[label].agreement == 1
    assert by_label["h2o 8"].ratio < 0.06
    assert by_label["sparq r=2 k=8"].agreement < 1
    bits = {point.label: point.quality for point in text.points}
    assert bits["h2o 160"] == pytest.approx(text.dense.quality, abs=1e-5)
    assert abs(bits["h2o 8"] - text.dense.quality) > 1e-3
    assert text.dense.quality == pytest.approx(sum(text.dense.scores) / 3, rel=0.3)
    assert len(niah.dense.scores) == 4


def test_another_metric_is_another_measurement(tmp_path):
    results = SweepResults(tmp_path)
    facts = {"metric": "acc", "documents": "0"}
    results.begin({"weights": "1"}, {"niah": facts})
    with pytest.raises(ValueError, match="results of niah by acc, asked is f1"):
        results.begin({"weights": "1"}, {"niah": {**facts, "metric": "f1"}})


def test_limit_and_metric(model, tokenizer, tasks, tmp_path):
    _, content = sweep(
        model, tokenizer, tasks, tmp_path, SETTINGS[:1], limit=2, metrics={"niah": "exact_match"}
    )
    assert [facts["count"] for facts in content["tasks"].values()] == [2, 2]
    for wrong, message in (
        ({"niah": "f1"}, r"niah has no metric 'f1'; it has exact_match"),
        ({"squad": "f1"}, r"metric is named for squad, not among the tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(model, tokenizer, tasks, tmp_path / "other", metrics=wrong)


def test_results_of_something_else_are_not_gone_on_with(
    model, tokenizer, tasks, text_file, tmp_path
):
    sweep(model, tokenizer, tasks, tmp_path, SETTINGS[:1])
    others = tasks_with(tokenizer, text_file, niah={"seed": 1})
    with pytest.raises(ValueError, match=r"results of niah on other documents"):
        sweep(model, tokenizer, others, tmp_path)
    with pytest.raises(ValueError, match=r"results of niah on other documents"):
        sweep(model, tokenizer, tasks, tmp_path, limit=1)
    before = fingerprint(model)
    model.set_attn_implementation("flash")
    assert fingerprint(model) == before
    model.model.layers[1].mlp.up_proj.weight.data *= 1.5
    with pytest.raises(ValueError, match=r"results of another model"):
        sweep(model, tokenizer, tasks, tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is not a sweep's results"):
        SweepResults(tmp_path)


def test_a_refusal_is_recorded_and_tried_again(model, tokenizer, tasks, tmp_path):
    wrong = SweepSetting("sparq r=9", "sparq r=9", "sparq", SparQConfig(rank=9))
    settings = [SETTINGS[0], wrong, SETTINGS[-1]]
    for expected in (3, 1):
        done, content = sweep(model, tokenizer, tasks[:1], tmp_path, settings)
        assert len(done) == expected
    reason = content["runs"][wrong.key]["refused"][tasks[0].task_name]
    assert "rank must be an integer from 1 to 8" in reason
    dense = SweepSetting("dense", "dense", "sparq", SparQConfig(rank=9))
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 8"):
        sweep(model, tokenizer, tasks, tmp_path / "other", [dense])


def test_a_refusal_on_one_task_outlives_a_measurement_on_another(tmp_path):
    results = SweepResults(tmp_path)
    results.record(SETTINGS[0], "one", "too long")
    results.record(SETTINGS[0], "other", {"quality": 1})
    (run,) = SweepResults(tmp_path).content["runs"].values()
    assert run["refused"] == {"one": "too long"}
    results.record(SETTINGS[0], "one", {"quality": 2})
    assert results.content["runs"][SETTINGS[0].key]["refused"] == {}


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "results.json").write_text('{"about": ')
    with pytest.raises(ValueError, match=r"results\.json cannot be read .*another folder"):
        SweepResults(tmp_path)


def test_tasks_with_filters_are_refused_before_anything_is_measured(
    model, tokenizer, text_file, tmp_path
):
    (task,) = tasks_with(tokenizer, text_file)[:1]
    task.set_config("filter_list", [{"name": "strict"}, {"name": "loose"}])
    with pytest.raises(ValueError, match=r"through the filters strict, loose"):
        sweep(model, tokenizer, [task], tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_agreement(tokenizer):
    def share(one, two):
        return token_agreement(tokenizer, one, two)

    words = " def return None"
    count = len(tokenizer(words, add_special_tokens=False)["input_ids"])
    more = len(tokenizer(words + " self", add_special_tokens=False)["input_ids"])
    assert share(words, words) == share("", "") == share(2, 2) == 1
    assert share(words, "") == share("!" + words, words) == share(1, 2) == 0
    assert share(words, words + " self") == share(words + " self", words) == count / more < 1


def test_keys_do_not_depend_on_the_label():
    one = SweepSetting("a", "b", "h2o", H2OConfig(top_k=4))
    two = SweepSetting("c", "d", "h2o", H2OConfig(top_k=4))
    assert one.key == two.key != SweepSetting("a", "b", "h2o", H2OConfig(top_k=5)).key


def test_multiple_choice_counts_equal_choices():
    from hf_attn_plugin.lm_eval.sweep import _answer

    sample = {"resps": [[(-3.0, False)], [(-1.0, True)], [(-2.0, False)]]}
    assert _answer(sample) == 1
    assert _answer({"resps": [[(-3.0, False)]]}) is None
    assert _answer({"resps": [["text"]]}) == "text"


def test_torch_state_is_left_alone(model, tokenizer, tasks, tmp_path):
    sweep(model, tokenizer, tasks[:1], tmp_path, SETTINGS[:2])
    assert model.config._attn_implementation == "sdpa"
    assert torch.is_grad_enabled()
