"""The task `cnn_dailymail`: news articles to be summed up, scored by ROUGE-L.

Data, lengths and score are those of the SparQ paper's evaluation (arXiv 2312.04985, appendix):
articles of 4,000 to 8,000 characters, no example, at most 128 tokens.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_attn_plugin.lm_eval.options import parse_options, require_positive, require_range
from hf_attn_plugin.lm_eval.rows import choose_dataset, load_rows
from hf_attn_plugin.lm_eval.scoring import rouge_l

CNN_DAILYMAIL = {"path": "abisee/cnn_dailymail", "name": "3.0.0", "split": "validation"}
"""Where `cnn_dailymail` gets its articles from."""


@dataclasses.dataclass(frozen=True)
class CnnDailymailOptions:
    """Options of the task `cnn_dailymail`.

    Attributes:
        characters: Smallest and largest length of an article, in characters.
        samples: Articles at most; fewer where fewer have such a length.
        dataset: What differs from `CNN_DAILYMAIL`, or another ``path`` with the same columns.
        seed: Another seed takes the articles in another order.
    """

    characters: tuple[int, ...] = (4000, 8000)
    samples: int = 500
    dataset: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("cnn_dailymail", samples=self.samples)
        require_range("cnn_dailymail", "characters", self.characters)


def cnn_dailymail_documents(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of `cnn_dailymail`.

    Args:
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.

    Raises:
        ValueError: Wrong options, or no article has the length asked for.
        OSError: The dataset cannot be read.
    """
    options = parse_options(CnnDailymailOptions, "cnn_dailymail", metadata)
    columns = ["article", "highlights", "id"]
    rows = load_rows(choose_dataset(CNN_DAILYMAIL, options.dataset), columns)
    order = list(range(len(rows)))
    random.Random(options.seed).shuffle(order)
    smallest, largest = options.characters
    documents: list[dict[str, Any]] = []
    for index in order:
        row = rows[index]
        if smallest <= len(row["article"]) <= largest:
            documents.append(
                {
                    "id": row["id"],
                    "context": f"Article: {row['article'].strip()}",
                    "reference": row["highlights"].strip(),
                    "characters": len(row["article"]),
                }
            )
        if len(documents) == options.samples:
            break
    if not documents:
        raise ValueError(
            f"cnn_dailymail: none of {len(order)} articles has {smallest} to {largest} "
            "characters: change the option characters."
        )
    return documents


def cnn_dailymail_score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-L's F-measure of as many generated words as the reference has.

    A base model goes on after its summary, which would count against its precision. The paper
    cuts to as many tokens as the reference has; words do not depend on the tokenizer.
    """
    reference = document["reference"]
    words = list(re.finditer(r"\S+", results[0]))[: len(reference.split())]
    summary = results[0][: words[-1].end()] if words else ""
    return {"rouge_l": rouge_l(summary, reference)}
