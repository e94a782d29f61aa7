"""The task `repetition`: a passage, then its words again, to be continued verbatim.

After SparQ's (arXiv 2312.04985): a passage of Tiny Shakespeare, an excerpt of it once more, and the
count of characters that the model continues without an error. What is missing cannot be guessed, so
the score shows whether attention finds the one place in the cache that matters, token after token.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_attn_plugin.lm_eval.options import (
    adds_special_tokens,
    check_fits,
    parse_options,
    require_positive,
    task_tokenizer,
)
from hf_attn_plugin.lm_eval.rows import choose_dataset
from hf_attn_plugin.lm_eval.texts import encode_texts, iterate_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTINUATION = 64
"""Tokens to continue with; `max_gen_toks` in repetition.yaml."""

TINY_SHAKESPEARE = {
    "path": "karpathy/tiny_shakespeare",
    # The main branch holds a loading script, which datasets no longer runs.
    "revision": "refs/convert/parquet",
    "split": "train",
}
"""Where `repetition` gets its text from."""

_ATTEMPTS = 100
_ADJUSTMENTS = 12


@dataclasses.dataclass(frozen=True)
class RepetitionOptions:
    """Options of the task `repetition`.

    The SparQ paper takes passages of 6,000 characters and excerpts of 128, scores 256, 1,000 times.

    Attributes:
        length: Tokens of the prompt and the continuation (64) together; a chat template's own
            tokens come on top.
        excerpt: Tokens that are repeated before the model takes over.
        depth: Where in the passage the excerpt begins: 0 is the passage's own beginning, 1 the
            last place that leaves room for the continuation, None a random one, as in the paper.
        samples: Prompts.
        files: Text files in place of the dataset.
        dataset: What differs from `TINY_SHAKESPEARE`, or another ``path`` (and ``column``).
        seed: Another seed draws other passages.
    """

    length: int = 2048
    excerpt: int = 32
    depth: float | None = None
    samples: int = 100
    files: tuple[str, ...] | None = None
    dataset: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(
            "repetition", length=self.length, excerpt=self.excerpt, samples=self.samples
        )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"repetition: depth must be within 0 and 1, got {self.depth!r}.")
        shortest = 2 * (self.excerpt + CONTINUATION) + 4
        if self.length < shortest:
            raise ValueError(
                f"repetition: a length of {self.length} tokens has no room for an excerpt of "
                f"{self.excerpt} and {CONTINUATION} to continue with, twice: ask for at least "
                f"{shortest}."
            )


def repetition_documents(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of `repetition`.

    Args:
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.

    Raises:
        ValueError: Wrong options, too little text, or more tokens than the model's maximum.
        OSError: The dataset or a file cannot be read.
    """
    options = parse_options(RepetitionOptions, "repetition", metadata)
    tokenizer = task_tokenizer(metadata)
    check_fits(metadata, "repetition", options.length)
    dataset = options.dataset
    if options.files is None:
        dataset = choose_dataset(TINY_SHAKESPEARE, dataset, extra=("column",))
    texts = iterate_texts(options.files, dataset)
    # Twenty times one passage is enough for passages to differ.
    ids = encode_texts(tokenizer, texts, options.length * max(options.samples, 20))
    if len(ids) < options.length:
        raise ValueError(
            f"repetition needs {options.length} tokens of text and found {len(ids)}: give more "
            "text, or a shorter length."
        )
    special = adds_special_tokens(metadata)
    return [
        _make_document(tokenizer, ids, options, random.Random(f"{options.seed} {sample}"), special)
        for sample in range(options.samples)
    ]


def _make_document(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    options: RepetitionOptions,
    rng: random.Random,
    special: bool,
) -> dict[str, Any]:
    """A passage and an excerpt whose text, encoded again, has exactly the length asked for."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    wanted = options.length - CONTINUATION
    repeated = options.excerpt + CONTINUATION
    for _ in range(_ATTEMPTS):
        count = wanted - options.excerpt
        start = rng.randrange(len(ids) - count + 1)
        place = rng.random() if options.depth is None else options.depth
        for _ in range(_ADJUSTMENTS):
            passage = ids[start : start + count]
            first = round(place * (len(passage) - repeated))
            excerpt = decode(passage[first : first + options.excerpt])
            # Not decoded alone: some tokenizers then lose the blank in front.
            rest = decode(passage[first : first + repeated])[len(excerpt) :]
            context = decode(passage)
            question = "\n" + excerpt.lstrip()
            prompt_ids = encode(context + question)
            missing = wanted - len(prompt_ids)
            if missing == 0:
                break
            count = min(max(count + missing, repeated), len(ids) - start)
        full_ids = encode(context + question + rest)
        if (
            missing == 0
            and "\ufffd" not in context + question + rest
            and question == question.rstrip()
            # Between two words, where a tokenizer leaves the excerpt's tokens as they are.
            and rest[:1].isspace()
            and rest.strip()
            # One place only to continue from, and one way to do so within the tokens there are.
            and context.count(question[1:]) == 1
            and question[1:] + rest in context
            and full_ids[:wanted] == prompt_ids
            and len(full_ids) <= options.length
        ):
            return {
                "context": context,
                "question": question,
                "reference": rest,
                "prompt_tokens": wanted,
                "length": options.length,
                "place": context.index(question[1:]),
                "characters": len(rest.lstrip()),
            }
    raise ValueError(
        f"repetition found no passage of exactly {wanted} tokens whose excerpt occurs once, in "
        f"{_ATTEMPTS} attempts: give other text, a longer excerpt, or a tokenizer that encodes "
        "what it decodes."
    )


def repetition_score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Characters that are right before the first error: their number, and their share.

    Blanks at the beginning do not count on either side: some tokenizers lose the first one when
    they decode a continuation alone.
    """
    reference, generated = document["reference"].lstrip(), results[0].lstrip()
    matched = 0
    for expected, given in zip(reference, generated, strict=False):
        if expected != given:
            break
        matched += 1
    return {"matched_characters": float(matched), "matched_share": matched / len(reference)}
