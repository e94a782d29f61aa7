"""Questions about long texts: the tasks `sparq_squad` and `sparq_triviaqa`.

Data, lengths and scores are those of the SparQ paper's evaluation (arXiv 2312.04985, appendix); the
wording of the prompts is ours, so compare numbers with numbers made here.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_attn_plugin.lm_eval.options import parse_options, require_positive, require_range
from hf_attn_plugin.lm_eval.rows import choose_dataset, load_rows, nested
from hf_attn_plugin.lm_eval.scoring import (
    begins_with_answer,
    exact_match,
    f1,
    squad_normalize,
    triviaqa_normalize,
)

SQUAD = {"path": "rajpurkar/squad", "name": "plain_text", "split": "validation"}
"""Where `sparq_squad` gets its questions from: SQuAD v1.1."""

TRIVIAQA = {"path": "mandarjoshi/trivia_qa", "name": "rc.wikipedia", "split": "validation"}
"""Where `sparq_triviaqa` gets its questions and pages from."""

ANSWER_PREFIX = "\nAnswer:"
"""What every prompt ends with; `gen_prefix` in the YAML files."""

_DRAWS = 20


@dataclasses.dataclass(frozen=True)
class SquadOptions:
    """Options of the task `sparq_squad`.

    Attributes:
        confusion_contexts: Paragraphs besides the one with the answer, all shuffled. They come
            from other articles where there are any, else from the same one, and none of them
            holds any of the right answers as a word.
        characters: Smallest and largest length of a prompt, in characters.
        samples: Questions at most; fewer where fewer fit.
        files: SQuAD's own JSON files in place of the dataset.
        dataset: What differs from `SQUAD`, or another ``path`` with the same columns.
        seed: Another seed draws and shuffles otherwise.
    """

    confusion_contexts: int = 7
    characters: tuple[int, ...] = (4000, 8000)
    samples: int = 4000
    files: tuple[str, ...] | None = None
    dataset: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(
            "sparq_squad", samples=self.samples, confusion_contexts=self.confusion_contexts
        )
        require_range("sparq_squad", "characters", self.characters)
        if self.files is not None and self.dataset is not None:
            raise ValueError("sparq_squad: give either files or a dataset, not both.")


@dataclasses.dataclass(frozen=True)
class TriviaqaOptions:
    """Options of the task `sparq_triviaqa`.

    Attributes:
        characters: Smallest and largest length of a page that is read, in characters. Of several
            such pages one is drawn.
        samples: Questions at most; fewer where fewer have such a page.
        dataset: What differs from `TRIVIAQA`, or another ``path`` with the same columns.
        seed: Another seed draws and shuffles otherwise.
    """

    characters: tuple[int, ...] = (4000, 8000)
    samples: int = 2992
    dataset: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("sparq_triviaqa", samples=self.samples)
        require_range("sparq_triviaqa", "characters", self.characters)


@dataclasses.dataclass(frozen=True)
class _Question:
    """One question of SQuAD: ``paragraph`` holds every one of ``answers``.

    ``golds`` are the answers as they are compared and looked for.
    """

    id: str
    title: str
    paragraph: str
    question: str
    answers: tuple[str, ...]
    golds: frozenset[str]


class _Paragraph:
    """A paragraph with its questions, and its words as answers are looked for in them."""

    def __init__(self, text: str, title: str) -> None:
        self.text, self.title = text, title
        self.questions: list[_Question] = []
        self._words = f" {squad_normalize(text)} "

    def holds(self, golds: Iterable[str]) -> bool:
        """Whether any of the normalised answers stands here, as whole words."""
        return any(f" {gold} " in self._words for gold in golds)


def squad_documents(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of `sparq_squad`: one prompt per question, with one answered question.

    Args:
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.

    Raises:
        ValueError: Wrong options, or no question fits them.
        OSError: The dataset or a file cannot be read.
    """
    options = parse_options(SquadOptions, "sparq_squad", metadata)
    questions = list(_read_squad(options))
    paragraphs: dict[str, _Paragraph] = {}
    for question in questions:
        if question.paragraph not in paragraphs:
            paragraphs[question.paragraph] = _Paragraph(question.paragraph, question.title)
        paragraphs[question.paragraph].questions.append(question)
    random.Random(options.seed).shuffle(questions)
    documents = []
    for question in questions:
        rng = random.Random(f"{options.seed} {question.id}")
        documents += _squad_document(question, options, paragraphs, rng)
        if len(documents) == options.samples:
            break
    if not documents:
        raise ValueError(
            f"sparq_squad: none of {len(questions)} questions makes a prompt of "
            f"{options.characters[0]} to {options.characters[1]} characters with "
            f"{options.confusion_contexts} confusion contexts: change these two options, or give "
            "more text."
        )
    return documents


def _squad_document(
    question: _Question,
    options: SquadOptions,
    paragraphs: Mapping[str, _Paragraph],
    rng: random.Random,
) -> list[dict[str, Any]]:
    """The document of one question; none where no draw gives the length asked for."""
    own = paragraphs[question.paragraph]
    others = [other for other in paragraphs.values() if other.title != question.title]
    if not others:
        others = [other for other in paragraphs.values() if other is not own]
    for _ in range(_DRAWS):
        # Only as many as needed are searched for the answer: there are thousands.
        drawn = rng.sample(others, min(len(others), 8 * options.confusion_contexts))
        confusion = [other for other in drawn if not other.holds(question.golds)]
        shown = [own, *confusion[: options.confusion_contexts]]
        # The answered question is about the same paragraph, or another one that can be read here.
        examples = _examples(question, shown[:1]) or _examples(question, shown[1:])
        if len(shown) <= options.confusion_contexts or not examples:
            continue
        rng.shuffle(shown)
        context = _squad_prompt(question, rng.choice(examples), shown)
        characters = len(context) + len(ANSWER_PREFIX)
        if options.characters[0] <= characters <= options.characters[1]:
            return [
                {
                    "id": question.id,
                    "context": context,
                    "answers": list(question.answers),
                    "characters": characters,
                    "position": shown.index(own),
                }
            ]
    return []


def _examples(question: _Question, shown: Sequence[_Paragraph]) -> list[_Question]:
    """Other questions about these paragraphs, which do not give the answer away."""
    return [
        other
        for paragraph in shown
        for other in paragraph.questions
        if other.id != question.id and not question.golds & other.golds
    ]


def _squad_prompt(question: _Question, example: _Question, shown: Sequence[_Paragraph]) -> str:
    parts = [f"Article: {paragraph.title}\n{paragraph.text}" for paragraph in shown]
    parts += [
        f"Answer the questions about {question.title} with words from the text above.",
        # The shortest of the right answers shows best that no sentence is wanted.
        f"Question: {example.question}{ANSWER_PREFIX} {min(example.answers, key=len)}",
        f"Question: {question.question}",
    ]
    return "\n\n".join(parts)


def _read_squad(options: SquadOptions) -> Iterator[_Question]:
    """Questions from SQuAD's own JSON layout, or from rows as on the Hub."""
    if options.files is None:
        columns = ["id", "title", "context", "question", "answers"]
        for row in load_rows(choose_dataset(SQUAD, options.dataset), columns):
            yield _parse_question(row, row["title"], row["context"], nested(row["answers"], "text"))
        return
    for file in options.files:
        try:
            articles = json.loads(Path(file).read_text(encoding="utf-8"))["data"]
            for article in articles:
                for paragraph in article["paragraphs"]:
                    for entry in paragraph["qas"]:
                        answers = [answer["text"] for answer in entry["answers"]]
                        yield _parse_question(
                            entry, article["title"], paragraph["context"], answers
                        )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not in SQuAD's JSON layout (data, paragraphs, qas, answers): {error!r}"
            ) from error


def _parse_question(
    row: Mapping[str, Any], title: str, paragraph: str, answers: Sequence[str]
) -> _Question:
    kept = tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
    if not kept:
        raise ValueError(
            f"question {row['id']!r} has no answer: sparq_squad takes SQuAD v1.1, in which every "
            "question has one."
        )
    question = row["question"].strip()
    golds = frozenset(map(squad_normalize, kept)) - {""}
    title = title.replace("_", " ")
    return _Question(str(row["id"]), title, paragraph.strip(), question, kept, golds)


def triviaqa_documents(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of `sparq_triviaqa`: one page and one question each, without an example.

    Args:
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.

    Raises:
        ValueError: Wrong options, or no question has a page of the length asked for.
        OSError: The dataset cannot be read.
    """
    options = parse_options(TriviaqaOptions, "sparq_triviaqa", metadata)
    columns = ["question", "question_id", "entity_pages", "answer"]
    rows = load_rows(choose_dataset(TRIVIAQA, options.dataset), columns).select_columns(columns)
    order = list(range(len(rows)))
    random.Random(options.seed).shuffle(order)
    smallest, largest = options.characters
    documents: list[dict[str, Any]] = []
    for index in order:
        row = rows[index]
        pages = [
            page
            for page in nested(row["entity_pages"], "wiki_context")
            if smallest <= len(page) <= largest
        ]
        if pages:
            page = random.Random(f"{options.seed} {row['question_id']}").choice(pages)
            context = (
                f"{page.strip()}\n\nAnswer the question with words from the text above.\n\n"
                f"Question: {row['question'].strip()}"
            )
            documents.append(
                {
                    "id": row["question_id"],
                    "context": context,
                    "answers": list(
                        dict.fromkeys([row["answer"]["value"], *row["answer"]["aliases"]])
                    ),
                    "characters": len(context) + len(ANSWER_PREFIX),
                }
            )
        if len(documents) == options.samples:
            break
    if not documents:
        raise ValueError(
            f"sparq_triviaqa: none of {len(order)} questions has a page of {smallest} to "
            f"{largest} characters: change the option characters."
        )
    return documents


def squad_score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The paper's accuracy, and SQuAD's own exact match and F1."""
    generated, answers = results[0], document["answers"]
    return {
        "accuracy": begins_with_answer(generated, answers),
        "exact_match": exact_match(generated, answers),
        "f1": f1(generated, answers),
    }


def triviaqa_score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The paper's accuracy, and TriviaQA's own exact match and F1 over all aliases."""
    generated, answers = results[0], document["answers"]
    return {
        "accuracy": begins_with_answer(generated, answers),
        "exact_match": exact_match(generated, answers, triviaqa_normalize),
        "f1": f1(generated, answers, triviaqa_normalize),
    }
