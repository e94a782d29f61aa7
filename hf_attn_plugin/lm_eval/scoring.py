"""Scores of generated answers, as the published scorers compute them."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LEADING_ARTICLE = re.compile(r"(a|an|the) ")
_TRIMMED = string.whitespace + "\"'_.,"
_TRIVIAQA_PUNCTUATION = str.maketrans(
    # Single quotation marks, left and right, and the acute accent.
    dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4", " ")
)
_SQUAD_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_normalize(text: str) -> str:
    """Text as SQuAD v1.1's official scorer compares it.

    Lower case, ASCII punctuation removed (and nothing put in its place), articles removed, blanks
    merged, in this order: "The U.S., an" becomes "us".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_SQUAD_PUNCTUATION)).split())


def triviaqa_normalize(text: str) -> str:
    """Text as TriviaQA's official scorer compares it.

    As SQuAD's, but punctuation becomes a blank, and curved quotes and accents count as such:
    "spider-man" becomes "spider man".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_TRIVIAQA_PUNCTUATION)).split())


def exact_match(
    prediction: str, answers: Sequence[str], normalize: Callable[[str], str] = squad_normalize
) -> float:
    """1 when the normalised prediction is any of the answers, else 0."""
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


def f1(
    prediction: str, answers: Sequence[str], normalize: Callable[[str], str] = squad_normalize
) -> float:
    """Harmonic mean of precision and recall of the words (each as often as it occurs).

    The best over the answers; 0 without a common word, as in SQuAD's scorer for v1.1.
    """
    given = normalize(prediction).split()

    def single(answer: str) -> float:
        expected = normalize(answer).split()
        common = sum((Counter(given) & Counter(expected)).values())
        return 2 * common / (len(given) + len(expected)) if common else 0.0

    return max(map(single, answers))


def begins_with_answer(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction begins with any of the answers: the accuracy of the SparQ paper.

    The paper (arXiv 2312.04985) calls it exact string match. Its published code compares lower
    case text without blanks, quotes, underscores, full stops and commas at both ends and without
    a leading article, and asks only that the prediction *begins* with the answer: a base model
    does not know where to stop. So "1999" is right where "19" is asked for; `exact_match` is the
    strict score.
    """

    def trim(text: str) -> str:
        begun = text.lower().lstrip(_TRIMMED)
        article = _LEADING_ARTICLE.match(begun)
        return begun[article.end() if article else 0 :].rstrip(_TRIMMED)

    given = trim(prediction)
    return float(any(given.startswith(known) for known in map(trim, answers) if known))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L's F-measure, words stemmed (Porter), by Google's `rouge_score`.

    Raises:
        ImportError: `rouge_score` is not installed.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


@functools.cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            "ROUGE needs the rouge_score package: pip install 'hf_attn_plugin[eval]'"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)
