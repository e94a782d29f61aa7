"""`niah_multikey`, `niah_multivalue`, `niah_multiquery` and their group."""

import random
import re

import pytest
from readers import read

from hf_attn_plugin.lm_eval import NeedleGrid, NeedleTemplate, load_tasks, make_needle_case
from hf_attn_plugin.lm_eval.harness import summarize
from hf_attn_plugin.lm_eval.niah import niah_recall

OPTIONS = {"lengths": [260, 320], "depths": [0, 0.5], "samples": 2}
ROOM = {"niah": 8, "niah_multikey": 8, "niah_multivalue": 32, "niah_multiquery": 32}


def needles(prompt):
    return re.findall(r"The secret number of (\w+) is (\d+)\.", prompt)


def reader(prompt, document):
    """Reads every needle, and answers about the keys in the question."""
    question = prompt.rsplit("\n", 1)[1]
    found = [value for key, value in needles(prompt) if re.search(rf"\b{key}\b", question)]
    return " " + ", ".join(reversed(found))


def hidden(tokenizer, text_file, task, **options):
    metadata = {"niah_all": {**OPTIONS, "files": [text_file]}, task: options}
    (loaded,) = load_tasks(tokenizer, task, metadata)
    return list(loaded.test_docs())


@pytest.mark.parametrize("task", list(ROOM))
def test_lengths_are_exact_and_the_needles_there(any_tokenizer, text_file, task):
    for document in hidden(any_tokenizer, text_file, task):
        prompt = document["context"] + document["question"]
        tokens = len(any_tokenizer(prompt)["input_ids"])
        assert tokens == document["prompt_tokens"] == document["length"] - ROOM[task]
        found = needles(prompt)
        assert len(found) == (1 if task == "niah" else 4)
        keys = {key for key, _ in found}
        assert len(keys) == {"niah": 1, "niah_multivalue": 1}.get(task, 4)
        asked = set(document["keys"])
        assert sorted(document["values"]) == sorted(v for key, v in found if key in asked)
        assert len(set(document["values"])) == len(document["values"])
        first = (document["key"], document["value"])
        assert first in found
        if document["depth"] == 0:
            assert document["context"].startswith(
                f"\nThe secret number of {first[0]} is {first[1]}."
            )


def test_the_group_is_read_by_a_reader_and_drawn(tokenizer, text_file):
    metadata = {"niah_all": {**OPTIONS, "files": [text_file]}}
    results, _ = read(tokenizer, "niah_all", metadata, reader)
    scores = {task: results["results"][task] for task in ROOM}
    assert set(results["samples"]) == set(ROOM)
    for task in ("niah", "niah_multikey"):
        assert scores[task]["exact_match,none"] == 1.0
    for task in ("niah_multivalue", "niah_multiquery"):
        assert scores[task]["recall,none"] == 1.0
    first, _ = read(tokenizer, "niah_all", metadata, lambda prompt, _: " " + needles(prompt)[0][1])
    # Of four needles in the order of the text the first is the one asked for only at times.
    assert first["results"]["niah"]["exact_match,none"] == 1.0
    assert first["results"]["niah_multikey"]["exact_match,none"] < 1.0
    assert first["results"]["niah_multivalue"]["recall,none"] == 0.25
    grid = NeedleGrid.from_samples(first["samples"]["niah_multiquery"])
    assert grid == NeedleGrid((260, 320), (0.0, 0.5), ((0.25, 0.25), (0.25, 0.25)))
    text = summarize({"samples": first["samples"], "config": {}})
    assert "niah_multivalue: needles found" in text
    assert "0.50  25%  25%" in text


@pytest.mark.parametrize(
    ("generated", "share"),
    [
        (" 12, 34, 56 and 78", 1.0),
        ("78 56 34 12.", 1.0),
        (" 12, 12, 12 and 12", 0.25),
        (" 123456", 0.0),
        (" 12-34", 0.5),
        ("", 0.0),
    ],
)
def test_recall_counts_whole_values_in_any_order(generated, share):
    assert niah_recall({"values": ["12", "34", "56", "78"]}, [generated]) == {"recall": share}


def test_several_keys_with_several_values(tokenizer, text):
    haystack = tokenizer(text[:20_000], add_special_tokens=False)["input_ids"]
    case = make_needle_case(
        tokenizer,
        haystack,
        400,
        0.3,
        random.Random(0),
        num_distractors=2,
        num_values=2,
        num_queries=3,
    )
    found = needles(case.prompt)
    assert (len(found), len(case.keys), len(case.values)) == (8, 3, 6)
    assert case.question == "\nThe secret numbers of {}, {} and {} are".format(*case.keys)
    assert case.answer == " {}, {}, {}, {}, {} and {}".format(*case.values)
    assert len(tokenizer(case.prompt + case.answer)["input_ids"]) == 400
    start = tokenizer.decode(case.prompt_ids[case.needle_start :]).strip()
    assert start.startswith(f"The secret number of {case.key} is {case.value}.")


def test_options_of_a_task_go_before_those_of_the_group(tokenizer, text_file):
    found = hidden(tokenizer, text_file, "niah_multivalue", lengths=200, num_values=2, samples=1)
    assert {document["length"] for document in found} == {200}
    assert {len(document["values"]) for document in found} == {2}


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("niah", {"num_values": 2}, "niah asks for one value: use niah_multivalue"),
        ("niah_multikey", {"num_queries": 2}, "niah_multikey asks for one value"),
        ("niah_multivalue", {"num_values": 12}, "answer_room is 32 tokens, but the answer"),
        ("niah_multivalue", {"num_values": 0}, "num_values must be an integer >= 1"),
        ("niah_multikey", {"distractors": 99}, "num_distractors must be 0 to"),
        (
            "niah_multivalue",
            {"template": {"digits": 1}, "num_values": 10},
            "there are 9: name more",
        ),
        ("niah_multiquery", {"template": {"questions": "{key}"}}, "questions must contain"),
        ("niah_multiquery", {"lengths": [60]}, "has no room for a needle"),
    ],
)
def test_wrong_options_are_refused(tokenizer, text_file, task, options, message):
    with pytest.raises(ValueError, match=message):
        hidden(tokenizer, text_file, task, **options)


def test_an_option_of_the_group_that_does_not_exist_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the task niah_all has no option 'lenght'"):
        load_tasks(tokenizer, "niah", {"niah_all": {"lenght": 3}})


def test_values_that_cannot_be_told_from_others_are_refused():
    with pytest.raises(ValueError, match="values must be single words"):
        NeedleTemplate(values=("two words",))
