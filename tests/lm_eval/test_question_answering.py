"""`sparq_squad`, `sparq_triviaqa` and `cnn_dailymail`: prompts, data sources, scores."""

import json
import re
from pathlib import Path

import datasets
import pytest
from readers import read, shared_file

from hf_attn_plugin.lm_eval import evaluate, load_tasks
from hf_attn_plugin.lm_eval.scoring import squad_normalize

SENTENCE = "It was seen by many people on that day and written about at length in the papers. "
SQUAD_COLUMNS = datasets.Features(
    {
        **{name: datasets.Value("string") for name in ("id", "title", "context", "question")},
        "answers": {
            "text": datasets.List(datasets.Value("string")),
            "answer_start": datasets.List(datasets.Value("int32")),
        },
    }
)


def squad_rows(articles=5, paragraphs=3):
    """Two questions per paragraph; only the question's own paragraph names its answer."""
    for article in range(articles):
        for paragraph in range(paragraphs):
            name = f"P{article}{paragraph}"
            context = f"Tower {name}x{article} has the colour {name}. The king is K{name}. "
            context += SENTENCE * 8
            for kind, answer in (("colour", name), ("king", f"K{name}")):
                yield {
                    "id": f"{kind}{name}",
                    "title": f"Article_{article}",
                    "context": context,
                    "question": f"What is the {kind} of tower {name}?",
                    "answers": {
                        "text": [f"the {answer}", answer],
                        "answer_start": [0, context.index(answer)],
                    },
                }


@pytest.fixture(scope="module")
def squad_folder(tmp_path_factory):
    """A local folder laid out like the dataset on the Hub."""
    folder = tmp_path_factory.mktemp("squad")
    rows = datasets.Dataset.from_list(list(squad_rows()), features=SQUAD_COLUMNS)
    rows.to_parquet(folder / "validation-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def super_bowl():
    return shared_file("squad_v1.1_super_bowl_50.json")


def documents(tokenizer, task, metadata):
    (loaded,) = load_tasks(tokenizer, task, metadata)
    return list(loaded.test_docs())


def squad_reader(prompt, document):
    assert prompt == document["context"] + "\nAnswer:"
    *_, shot, question, _ = re.split(r"(?:^|\n\n)(?:Question|Article): ", prompt + "\n\nArticle: ")
    assert "\nAnswer: " in shot
    kind, name = re.fullmatch(r"What is the (\w+) of tower (P\d+)\?\nAnswer:", question).groups()
    found = re.search(rf"Tower {name}x\d .*?The king is (\w+)\.", prompt)[1]
    return " " + (found if kind == "king" else found[1:]) + ". And"


def test_a_reader_of_the_paragraph_answers_every_question(tokenizer, squad_folder):
    metadata = {"sparq_squad": {"dataset": {"path": squad_folder}}}
    results, _ = read(tokenizer, "sparq_squad", metadata, squad_reader)
    scores = results["results"]["sparq_squad"]
    assert results["n-samples"]["sparq_squad"]["effective"] == 30
    assert scores["accuracy,none"] == 1.0
    assert scores["exact_match,none"] == 0.0  # "And" too much
    assert scores["f1,none"] == pytest.approx(2 / 3)
    wrong, _ = read(tokenizer, "sparq_squad", metadata, lambda prompt, document: "Tower")
    assert wrong["results"]["sparq_squad"]["accuracy,none"] == 0.0


def test_confusion_contexts_come_from_other_articles_without_the_answer(tokenizer, squad_folder):
    metadata = {"sparq_squad": {"dataset": {"path": squad_folder}}}
    found = documents(tokenizer, "sparq_squad", metadata)
    for document in found:
        *articles, instruction = document["context"].split("\n\nQuestion: ")[0].split("\n\n")
        title = instruction.split(" about ")[1].split(" with ")[0]
        assert len(articles) == 8
        assert len(set(articles)) == 8
        own = [index for index, text in enumerate(articles) if text.startswith(f"Article: {title}")]
        assert own == [document["position"]]
        answer = re.compile(rf"\b{document['answers'][1]}\b")
        assert [index for index, text in enumerate(articles) if answer.search(text)] == own
        assert 4000 <= document["characters"] == len(document["context"]) + 8 <= 8000
    assert len({document["position"] for document in found}) == 8


def test_super_bowl(tokenizer, super_bowl):
    found = documents(tokenizer, "sparq_squad", {"sparq_squad": {"files": super_bowl}})
    gold = {
        entry["id"]: {answer["text"] for answer in entry["answers"]}
        for paragraph in json.loads(Path(super_bowl).read_text())["data"][0]["paragraphs"]
        for entry in paragraph["qas"]
    }
    assert len(found) > 700
    for document in found:
        articles = document["context"].split("\n\nAnswer the questions")[0].split("\n\n")
        assert len(articles) == 8
        assert 4000 <= document["characters"] <= 8000
        assert set(document["answers"]) == gold[document["id"]]
        words = [f" {squad_normalize(text)} " for text in articles]
        for answer in map(squad_normalize, document["answers"]):
            holding = [index for index, text in enumerate(words) if f" {answer} " in text]
            # The title, which stands above each of them, may hold it too.
            assert set(holding) <= {document["position"]} or answer in "super bowl 50"
        # The annotators' answers do not always begin and end with a word.
        assert any(answer in articles[document["position"]] for answer in document["answers"])
    again = documents(tokenizer, "sparq_squad", {"sparq_squad": {"files": [super_bowl]}})
    assert again == found
    other = documents(tokenizer, "sparq_squad", {"sparq_squad": {"files": super_bowl, "seed": 1}})
    assert other != found


def test_super_bowl_is_evaluated_end_to_end(model, tokenizer, super_bowl):
    metadata = {"sparq_squad": {"files": [super_bowl], "samples": 2}}
    run = evaluate(model, tokenizer, tasks="sparq_squad", metadata=metadata, max_length=8192)
    assert 0 <= run.metric("sparq_squad", "f1") <= 1
    assert [len(sample["doc"]["answers"]) > 0 for sample in run.samples["sparq_squad"]] == [
        True
    ] * 2
    with pytest.raises(ValueError, match=r"tokens does not fit: the model takes 256.*max_length="):
        evaluate(model, tokenizer, tasks="sparq_squad", metadata=metadata)


def trivia_rows():
    page = "In 1900 Ann Lee painted the tower. " + SENTENCE * 55
    for index, length in enumerate((len(page), 100, 9000)):
        yield {
            "question": f"Who painted tower {index}?",
            "question_id": f"q{index}",
            "entity_pages": {"title": ["Tower"], "wiki_context": [(page * 2)[:length]]},
            "answer": {
                "value": "Ann Lee",
                "aliases": ["Ann Lee", "Ann-Lee (painter)"],
                "normalized_aliases": ["ann lee", "ann lee painter"],
            },
        }


def test_triviaqa_reads_pages_of_the_length(tokenizer, tmp_path):
    rows = datasets.Dataset.from_list(list(trivia_rows()))
    rows.to_parquet(tmp_path / "validation.parquet")
    metadata = {"sparq_triviaqa": {"dataset": {"path": str(tmp_path)}}}

    def speak(prompt, document):
        assert prompt.endswith("Question: Who painted tower 0?\nAnswer:")
        assert prompt.startswith("In 1900 Ann Lee")
        return " ann lee, painter"

    results, reader = read(tokenizer, "sparq_triviaqa", metadata, speak)
    scores = results["results"]["sparq_triviaqa"]
    assert len(reader.prompts) == 1
    assert (scores["accuracy,none"], scores["exact_match,none"], scores["f1,none"]) == (1, 1, 1)


def test_cnn_dailymail_takes_articles_of_the_length(tokenizer, tmp_path):
    articles = [SENTENCE * 60, SENTENCE, SENTENCE * 200]
    rows = [
        {"article": article, "highlights": f"Paper {index} .\nIt was seen .", "id": str(index)}
        for index, article in enumerate(articles)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "validation.parquet")
    metadata = {"cnn_dailymail": {"dataset": {"path": str(tmp_path)}}}
    results, reader = read(
        tokenizer, "cnn_dailymail", metadata, lambda prompt, document: " Paper 0 was seen"
    )
    (prompt,) = reader.prompts
    assert prompt == f"Article: {articles[0].strip()}\nSummary:"
    # Of "paper 0 it was seen" 4 words are there, in order: precision 1, recall 4/5.
    assert results["results"]["cnn_dailymail"]["rouge_l,none"] == pytest.approx(8 / 9)


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("sparq_squad", {}, {"path": "rajpurkar/squad", "name": "plain_text"}),
        ("sparq_triviaqa", {}, {"path": "mandarjoshi/trivia_qa", "name": "rc.wikipedia"}),
        ("cnn_dailymail", {}, {"path": "abisee/cnn_dailymail", "name": "3.0.0"}),
        (
            "cnn_dailymail",
            {"split": "test", "revision": "v1"},
            {
                "path": "abisee/cnn_dailymail",
                "name": "3.0.0",
                "split": "test",
                "revision": "v1",
            },
        ),
        (
            "sparq_squad",
            {"path": "mine", "data_files": "a.json"},
            {"path": "mine", "data_files": "a.json"},
        ),
    ],
)
def test_what_is_loaded_from_the_hub(tokenizer, monkeypatch, task, options, expected):
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    metadata = {task: {"dataset": options}} if options else {}
    with pytest.raises(OSError, match=r"cannot be loaded \(no network\); without the Hub, give"):
        load_tasks(tokenizer, task, metadata)
    assert asked == [{"split": "validation", **expected}]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("sparq_squad", {"confusion": 3}, "no option 'confusion'; it has confusion_contexts"),
        ("sparq_squad", {"confusion_contexts": 0}, "confusion_contexts must be an integer >= 1"),
        ("sparq_squad", {"characters": [8000, 4000]}, r"characters must be \[smallest, largest\]"),
        ("sparq_squad", {"characters": 4000}, r"characters must be \[smallest, largest\]"),
        ("sparq_squad", {"files": "a", "dataset": {"path": "b"}}, "either files or a dataset"),
        ("sparq_squad", {"confusion_contexts": 13}, "none of 30 questions makes a prompt"),
        ("sparq_squad", {"characters": [1, 2]}, "none of 30 questions makes a prompt of 1 to 2"),
        ("sparq_squad", {"dataset": "folder"}, r"a dataset is given as \{path"),
        ("sparq_squad", {"dataset": {"pth": "folder"}}, r"a dataset is given as \{path"),
        ("sparq_triviaqa", {"samples": 0}, "samples must be an integer >= 1"),
        ("cnn_dailymail", {"samples": True}, "samples must be an integer, got True"),
    ],
)
def test_wrong_options_are_refused(tokenizer, squad_folder, task, options, message):
    if "message" not in options and message.startswith("none of"):
        options = {**options, "dataset": {"path": squad_folder}}
    with pytest.raises(ValueError, match=message):
        load_tasks(tokenizer, task, {task: options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "not in SQuAD's JSON layout"),
        ('{"version": "1.1"}', "not in SQuAD's JSON layout"),
        ('{"data": [{"title": "T"}]}', "not in SQuAD's JSON layout"),
    ],
)
def test_other_json_is_refused(tokenizer, tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tasks(tokenizer, "sparq_squad", {"sparq_squad": {"files": str(tmp_path / "a.json")}})


def test_questions_without_an_answer_are_refused(tokenizer, tmp_path):
    rows = [{**row, "answers": {"text": [], "answer_start": []}} for row in squad_rows(1, 1)]
    datasets.Dataset.from_list(rows, features=SQUAD_COLUMNS).to_parquet(
        tmp_path / "validation.parquet"
    )
    with pytest.raises(ValueError, match=r"has no answer: sparq_squad takes SQuAD v1\.1"):
        load_tasks(tokenizer, "sparq_squad", {"sparq_squad": {"dataset": {"path": str(tmp_path)}}})


def test_other_columns_are_refused(tokenizer, tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "validation.parquet")
    for task, column in (("sparq_squad", "'id'"), ("cnn_dailymail", "'article'")):
        with pytest.raises(ValueError, match=f"has no column {column}.*; it has text"):
            load_tasks(tokenizer, task, {task: {"dataset": {"path": str(tmp_path)}}})
