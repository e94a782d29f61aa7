"""`repetition` and `wikitext_bpc`: exact lengths, scores by hand, data sources."""

import datasets
import pytest
from readers import read, shared_file

from hf_attn_plugin import SparQConfig
from hf_attn_plugin.lm_eval import evaluate, load_tasks

REPETITION = {"length": 240, "excerpt": 16, "samples": 6}
BPC = {"context": 60, "scored": 12}


def documents(tokenizer, task, options):
    (loaded,) = load_tasks(tokenizer, task, {task: options})
    return list(loaded.test_docs())


@pytest.fixture(scope="module")
def shakespeare():
    return shared_file("tinyshakespeare.txt")


@pytest.mark.parametrize("depth", [None, 0.0, 0.4, 1.0])
def test_repetition_is_exact_in_tokens_and_can_be_continued(any_tokenizer, text_file, text, depth):
    found = documents(
        any_tokenizer, "repetition", {**REPETITION, "files": text_file, "depth": depth}
    )
    assert len(found) == 6
    for document in found:
        prompt = document["context"] + document["question"]
        ids = any_tokenizer(prompt)["input_ids"]
        assert len(ids) == document["prompt_tokens"] == 240 - 64
        full = any_tokenizer(prompt + document["reference"])["input_ids"]
        assert full[: len(ids)] == ids
        assert len(full) <= 240
        excerpt = document["question"][1:]
        assert document["context"].count(excerpt) == 1
        assert excerpt + document["reference"] in document["context"]
        assert document["context"] in text
        if depth is not None:
            passage = any_tokenizer(document["context"])["input_ids"]
            before = any_tokenizer(document["context"][: document["place"]])["input_ids"]
            # The continuation is 64 tokens; an excerpt that begins with blanks is shortened.
            assert len(before) == pytest.approx(depth * (len(passage) - 16 - 64), abs=4)
    assert len({document["place"] for document in found}) > 1 or depth == 0


def test_a_copier_gets_all_and_a_sloppy_one_what_came_before_the_error(tokenizer, text_file):
    metadata = {"repetition": {**REPETITION, "files": [text_file]}}

    def copy(prompt, document, errors=None):
        excerpt = document["question"][1:]
        passage = prompt[: -len(document["question"])]
        rest = passage[passage.index(excerpt) + len(excerpt) :].lstrip()
        return rest if errors is None else rest[:errors] + "\x00" + rest[errors + 1 :]

    results, reader = read(tokenizer, "repetition", metadata, copy)
    scores = results["results"]["repetition"]
    sizes = [sample["doc"]["characters"] for sample in results["samples"]["repetition"]]
    assert all(prompt.count("\n") for prompt in reader.prompts)
    assert scores["matched_share,none"] == 1.0
    assert scores["matched_characters,none"] == pytest.approx(sum(sizes) / 6)
    assert min(sizes) > 64
    sloppy, _ = read(tokenizer, "repetition", metadata, lambda *args: copy(*args, errors=10))
    assert sloppy["results"]["repetition"]["matched_characters,none"] == 10.0
    assert sloppy["results"]["repetition"]["matched_share,none"] == pytest.approx(
        sum(10 / size for size in sizes) / 6
    )


def test_repetition_on_tiny_shakespeare_end_to_end(model, tokenizer, shakespeare):
    metadata = {"repetition": {**REPETITION, "files": [shakespeare], "samples": 2}}
    run = evaluate(model, tokenizer, tasks="repetition", metadata=metadata)
    assert 0 <= run.metric("repetition", "matched_share") <= 1
    assert run.reads.decode_steps > 0
    with pytest.raises(ValueError, match="repetition asks for 300 tokens, but the model takes 256"):
        evaluate(model, tokenizer, tasks="repetition", metadata={"repetition": {"length": 300}})


def wikitext_lines(sizes, text):
    """Articles of so many characters, as rows: a title, blank rows, lines with their ends."""
    for index, size in enumerate(sizes):
        body = text[index * 7000 :][:size].replace(" = ", " is ").replace("\x00", "")
        yield f" = Article {index} = \n"
        yield ""
        yield from body.splitlines(keepends=True)
        yield " = = Section = = \n"


@pytest.fixture
def wikitext(text, tmp_path):
    rows = {"text": list(wikitext_lines([900, 60, 2000, 1200], text))}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "test.parquet")
    return {"path": str(tmp_path)}


def test_wikitext_pieces_stay_within_articles_and_start_with_each(any_tokenizer, wikitext):
    found = documents(any_tokenizer, "wikitext_bpc", {**BPC, "dataset": wikitext, "samples": 5})
    # One piece of each article that is long enough comes before the second of any.
    assert [document["article"] for document in found[:3]] == [0, 2, 3]
    assert all(
        f" = Article {document['article']} = " in document["context"] for document in found[:3]
    )
    for document in found:
        whole = document["context"] + document["continuation"]
        assert len(any_tokenizer(document["context"])["input_ids"]) == 60
        assert len(any_tokenizer(whole)["input_ids"]) == 72
        assert " = Article " not in whole[12:]
        assert document["characters"] == len(document["continuation"])


def test_bits_per_character_by_hand(tokenizer, wikitext):
    metadata = {"wikitext_bpc": {**BPC, "dataset": wikitext, "samples": 4}}
    results, _ = read(tokenizer, "wikitext_bpc", metadata, None, nats=50.0)
    characters = [sample["doc"]["characters"] for sample in results["samples"]["wikitext_bpc"]]
    # Every piece has 50 nats: 4 x 50 x log2(e) bits over all their characters.
    expected = 4 * 50 * 1.4426950408889634 / sum(characters)
    assert results["results"]["wikitext_bpc"]["bits_per_character,none"] == pytest.approx(expected)


def test_characters_are_not_bytes(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("Ünïcödé 漢字 naïve café.\n" * 60, encoding="utf-8")
    options = {"context": 40, "scored": 12, "samples": 1, "files": str(tmp_path / "a.txt")}
    (document,) = documents(tokenizer, "wikitext_bpc", options)
    assert document["characters"] == len(document["continuation"]) < document["bytes"]


def test_decoding_only_methods_are_scored_token_by_token(model, tokenizer, wikitext):
    metadata = {"wikitext_bpc": {**BPC, "dataset": wikitext, "samples": 3}}
    runs = [
        evaluate(model, tokenizer, tasks="wikitext_bpc", metadata=metadata, **options)
        for options in (
            {},
            {"parameters": SparQConfig(rank=2, top_k=8)},
            {"parameters": SparQConfig(rank=8, top_k=256)},
        )
    ]
    dense, sparse, everything = (run.metric("wikitext_bpc", "bits_per_character") for run in runs)
    assert runs[0].reads.decode_steps == 0
    assert runs[1].reads.decode_steps == 12
    assert abs(sparse - dense) > 1e-3
    assert everything == pytest.approx(dense, abs=1e-5)


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        (
            "wikitext_bpc",
            {},
            {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1", "split": "test"},
        ),
        (
            "wikitext_bpc",
            {"dataset": {"split": "train"}},
            {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1", "split": "train"},
        ),
        (
            "repetition",
            {},
            {
                "path": "karpathy/tiny_shakespeare",
                "revision": "refs/convert/parquet",
                "split": "train",
            },
        ),
        (
            "repetition",
            {"dataset": {"path": "deepmind/pg19", "split": "test", "column": "body"}},
            {"path": "deepmind/pg19", "split": "test"},
        ),
    ],
)
def test_what_is_loaded_from_the_hub(tokenizer, monkeypatch, text, task, options, expected):
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        return datasets.Dataset.from_dict({"text": [text[:9000]], "body": [text[:9000]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    small = REPETITION if task == "repetition" else {**BPC, "samples": 2}
    assert documents(tokenizer, task, {**small, **options})
    assert asked == [expected]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("repetition", {"length": 100}, "has no room for an excerpt of 32 and 64 to continue"),
        ("repetition", {"depth": 1.5}, "depth must be within 0 and 1"),
        ("repetition", {"depth": "x"}, "repetition: depth must be a number or null, got 'x'"),
        ("repetition", {"files": [3]}, r"files must be a list of texts or null, got \[3\]"),
        ("repetition", {"excerpt": 0}, "excerpt must be an integer >= 1"),
        ("repetition", {"text": "a.txt"}, "no option 'text'; it has length, excerpt"),
        ("wikitext_bpc", {"scored": 0}, "scored must be an integer >= 1"),
        ("wikitext_bpc", {"files": "a", "dataset": {"split": "test"}}, "either files or a dataset"),
    ],
)
def test_wrong_options_are_refused(tokenizer, task, options, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(tokenizer, task, {task: options})


def test_too_little_text_is_refused(tokenizer, tmp_path, wikitext):
    (tmp_path / "short.txt").write_text("Too little. " * 30)
    files = str(tmp_path / "short.txt")
    with pytest.raises(ValueError, match="repetition needs 2048 tokens of text and found"):
        load_tasks(tokenizer, "repetition", {"repetition": {"files": files}})
    (tmp_path / "same.txt").write_text("Again and again. " * 300)
    options = {**REPETITION, "files": str(tmp_path / "same.txt")}
    with pytest.raises(ValueError, match="whose excerpt occurs once"):
        load_tasks(tokenizer, "repetition", {"repetition": options})
    options = {**BPC, "dataset": wikitext, "samples": 500}
    with pytest.raises(ValueError, match=r"wikitext_bpc found \d+ pieces of 60 \+ 12 tokens in 4"):
        load_tasks(tokenizer, "wikitext_bpc", {"wikitext_bpc": options})
