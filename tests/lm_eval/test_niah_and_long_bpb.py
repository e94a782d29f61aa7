"""The tasks, scored on language models whose answers are known."""

import math
import re

import lm_eval.tasks
import pytest
from lm_eval import evaluator
from lm_eval.api.model import LM

from hf_attn_plugin.lm_eval import NeedleGrid, load_tasks
from hf_attn_plugin.lm_eval.niah import niah_score

NIAH = {"lengths": [160, 224], "depths": [0, 0.5, 1], "samples": 2}
BPB = {"context": 100, "scored": 20, "samples": 5}


class Reader(LM):
    """Reads the prompt with a regular expression, and says what `speak` makes of the answer."""

    def __init__(self, speak, bits_per_byte=1.0):
        super().__init__()
        self.speak = speak
        self.bits_per_byte = bits_per_byte

    def generate_until(self, requests):
        answers = []
        for request in requests:
            prompt = request.args[0]
            key = re.search(r"The secret number of (\w+) is$", prompt)[1]
            value = re.search(rf"The secret number of {key} is (\d+)\.", prompt)[1]
            answers.append(self.speak(value, request.doc))
        return answers

    def loglikelihood(self, requests):
        return [
            (-math.log(2) * self.bits_per_byte * len(request.args[1].encode()), False)
            for request in requests
        ]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def run(tokenizer, text_file, speak, **options):
    metadata = {
        "niah": {**NIAH, "files": [text_file], **options},
        "long_bpb": {**BPB, "files": text_file},
    }
    tasks = load_tasks(tokenizer, "niah,long_bpb", metadata)
    lm = Reader(speak, bits_per_byte=1.75)
    return evaluator.evaluate(
        lm, {"tasks": {task.task_name: task for task in tasks}}, bootstrap_iters=0
    )


@pytest.mark.parametrize("distractors", [0, 2])
def test_a_perfect_reader_finds_every_needle(any_tokenizer, text_file, distractors):
    results = run(any_tokenizer, text_file, lambda value, doc: f" {value}", distractors=distractors)
    assert results["results"]["niah"]["exact_match,none"] == 1.0
    assert results["n-samples"]["niah"]["effective"] == 12


def test_a_wrong_reader_finds_none(tokenizer, text_file):
    results = run(tokenizer, text_file, lambda value, doc: f" {int(value) + 1}")
    assert results["results"]["niah"]["exact_match,none"] == 0.0


def test_the_grid_shows_where_needles_are_lost(tokenizer, text_file):
    def near_only(value, doc):
        found = doc["length"] * (1 - doc["depth"]) < 100
        return f" {value}" if found else " 0"

    results = run(tokenizer, text_file, near_only)
    grid = NeedleGrid.from_samples(results["samples"]["niah"])
    assert grid == NeedleGrid((160, 224), (0.0, 0.5, 1.0), ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)))
    assert results["results"]["niah"]["exact_match,none"] == 0.5


def test_long_bpb_weighs_by_bytes(tokenizer, text_file):
    results = run(tokenizer, text_file, lambda value, doc: value)
    assert results["results"]["long_bpb"]["bits_per_byte,none"] == pytest.approx(1.75)


def test_long_bpb_splits_the_text_where_lm_eval_does(any_tokenizer, text_file, text):
    (task,) = load_tasks(any_tokenizer, "long_bpb", {"long_bpb": {**BPB, "files": [text_file]}})
    documents = list(task.test_docs())
    assert len(documents) == 5
    for document in documents:
        context_ids = any_tokenizer(document["context"])["input_ids"]
        all_ids = any_tokenizer(document["context"] + document["continuation"])["input_ids"]
        assert (len(context_ids), len(all_ids)) == (100, 120)
        assert all_ids[:100] == context_ids
        assert document["bytes"] == len(document["continuation"].encode())
        assert document["context"] + document["continuation"] in text
    assert len({document["start"] for document in documents}) == 5


def test_the_first_documents_cover_every_cell(tokenizer, text_file):
    (task,) = load_tasks(tokenizer, ["niah"], {"niah": {**NIAH, "files": [text_file]}})
    first = [(doc["length"], doc["depth"]) for doc in task.test_docs()][:6]
    assert len(set(first)) == 6


@pytest.mark.parametrize(
    ("generated", "score"),
    [
        (" 4821", 1.0),
        ("4821 and more", 1.0),
        (" **4821**", 1.0),
        (" 48213", 0.0),
        (" 482", 0.0),
        (" not 4821", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_exact_number_counts(generated, score):
    assert niah_score({"value": "4821"}, [generated]) == {"exact_match": score}


@pytest.mark.parametrize(
    ("generated", "score"),
    [
        (" amber.\n", 1.0),
        ("amber", 1.0),
        (": *amber* is", 1.0),
        (" ambers", 0.0),
        (" amber_2", 0.0),
        (" coral, amber", 0.0),
        ("", 0.0),
    ],
)
def test_words_are_scored_like_numbers(generated, score):
    assert niah_score({"value": "amber"}, [generated]) == {"exact_match": score}


def test_a_template_of_words(tokenizer, text_file):
    words = {
        "values": ["amber", "coral"],
        "needle": " Pass {key}: {value}.",
        "question": " Pass {key}:",
    }
    metadata = {"niah": {**NIAH, "files": [text_file], "template": words}}
    (task,) = load_tasks(tokenizer, "niah", metadata)
    documents = list(task.test_docs())
    assert {document["value"] for document in documents} == {"amber", "coral"}
    assert all(f" Pass {d['key']}: {d['value']}." in d["context"] for d in documents)


def test_the_default_haystack_needs_no_files(tokenizer):
    tasks = load_tasks(
        tokenizer,
        "niah,long_bpb",
        {
            "niah": {"lengths": 200, "depths": 0.5, "samples": 1},
            "long_bpb": {"context": 60, "scored": 10, "samples": 2},
        },
    )
    assert [len(task.test_docs()) for task in tasks] == [1, 2]


def test_a_dataset_as_haystack(tokenizer, text, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": [text[:20_000], text[20_000:40_000]]})
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    dataset = {
        "path": "parquet",
        "data_files": str(tmp_path / "rows.parquet"),
        "split": "train",
        "column": "body",
    }
    metadata = {"niah": {**NIAH, "dataset": dataset}}
    (task,) = load_tasks(tokenizer, "niah", metadata)
    assert len(task.test_docs()) == 12
    dataset["column"] = "txt"
    with pytest.raises(ValueError, match="no column 'txt'; it has body"):
        load_tasks(tokenizer, "niah", metadata)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"niah": {"lenghts": [200]}}, "no option 'lenghts'; it has lengths, depths"),
        ({"niah": {"lengths": []}}, "lengths must be a list"),
        ({"niah": {"samples": 0}}, "samples must be an integer >= 1"),
        ({"niah": [200]}, "must be a JSON object"),
        ({"niah": {"lengths": [200], "depths": [2]}}, "depth must be within 0"),
        ({"niah": {"lengths": [200], "template": {"digit": 3}}}, "no field 'digit'"),
        ({"niah": {"lengths": [200], "files": ["a"], "dataset": {"path": "b"}}}, "not both"),
        ({"max_length": 256}, "niah asks for 4096 tokens, but the model takes 256"),
        ({"niah": {"lengths": [256, 300.5]}}, "lengths must be a list of integers, got .256, 3"),
        ({"niah": {"lengths": {"256": 1}}}, "lengths must be a list of integers, got {"),
        ({"niah": {"distractors": "a"}}, "niah: distractors must be an integer, got 'a'"),
        ({"niah": {"template": 3}}, "niah: template must be an object"),
        ({"niah": {"template": {"keys": 3}}}, r"template: keys must be a list of texts, got \[3\]"),
        ({"niah": {"template": {"needle": "{value"}}}, "braces of needle do not match in '{value'"),
        ({"niahh": {"lengths": [256]}}, "no task reads the metadata 'niahh'.*our tasks are"),
        ({"lengths": [256]}, "no task reads the metadata 'lengths'"),
    ],
)
def test_wrong_options_are_refused(tokenizer, metadata, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(tokenizer, "niah", metadata)


def test_too_little_text_is_refused(tokenizer, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too little.")
    with pytest.raises(ValueError, match="give more text"):
        load_tasks(tokenizer, "long_bpb", {"long_bpb": {**BPB, "files": [str(short)]}})
    with pytest.raises(ValueError, match="give more text"):
        load_tasks(tokenizer, "niah", {"niah": {**NIAH, "files": [str(short)]}})
    with pytest.raises(OSError, match=r"absent\.txt"):
        load_tasks(tokenizer, "niah", {"niah": {**NIAH, "files": [str(tmp_path / "absent.txt")]}})


def test_an_unknown_task_is_refused(tokenizer, monkeypatch):
    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        # Without indexing lm-eval's thousands of tasks.
        lm_eval.tasks,
        "TaskManager",
        lambda **options: real(**{**options, "include_defaults": False}),
    )
    with pytest.raises(
        ValueError, match="no task named nieh; ours are cnn_dailymail, long_bpb, niah, "
    ):
        load_tasks(tokenizer, "nieh")
