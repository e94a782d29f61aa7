"""How well the text after a long context is predicted: the tasks `long_bpb` and `wikitext_bpc`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_attn_plugin.lm_eval.options import (
    adds_special_tokens,
    check_fits,
    parse_options,
    require_positive,
    task_tokenizer,
)
from hf_attn_plugin.lm_eval.rows import choose_dataset, load_rows
from hf_attn_plugin.lm_eval.texts import encode_texts, iterate_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1", "split": "test"}
"""Where `wikitext_bpc` gets its articles from."""

_SHIFTS = 200

_TITLE = re.compile(r" = [^=\n].* = \n?")


@dataclasses.dataclass(frozen=True)
class LongBpbOptions:
    """Options of the task `long_bpb`.

    Attributes:
        context: Tokens that the model reads before it is scored.
        scored: Tokens that are scored after them.
        samples: Pieces of text, one after the other from the start.
        files: Text files, held out from training.
        dataset: A dataset instead, see `texts.iterate_texts`. With neither, the Python standard
            library's sources.
    """

    context: int = 1024
    scored: int = 64
    samples: int = 16
    files: tuple[str, ...] | None = None
    dataset: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        require_positive("long_bpb", context=self.context, scored=self.scored, samples=self.samples)


@dataclasses.dataclass(frozen=True)
class WikitextBpcOptions:
    """Options of the task `wikitext_bpc`.

    The SparQ paper (arXiv 2312.04985) reads 6,000 characters, scores 400, and takes 500 articles
    of the training split: about 1,536 and 96 tokens.

    Attributes:
        context: Tokens that the model reads before it is scored.
        scored: Tokens that are scored after them.
        samples: Pieces of text: the start of every article that is long enough, then, if these
            are too few, the next piece of each.
        files: Text files in place of the dataset; each is an article, or has articles under
            WikiText's own titles.
        dataset: What differs from `WIKITEXT`: ``{"split": "train"}``, or another ``path``.
    """

    context: int = 1536
    scored: int = 96
    samples: int = 50
    files: tuple[str, ...] | None = None
    dataset: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        require_positive(
            "wikitext_bpc", context=self.context, scored=self.scored, samples=self.samples
        )


def long_bpb_documents(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of `long_bpb`: a context and the text that follows it in the source.

    Args:
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.

    Raises:
        ValueError: Wrong options, too little text, or more tokens than the model's maximum.
    """
    options = parse_options(LongBpbOptions, "long_bpb", metadata)
    tokenizer = task_tokenizer(metadata)
    window = options.context + options.scored
    check_fits(metadata, "long_bpb", window)
    ids = encode_texts(
        tokenizer,
        iterate_texts(options.files, options.dataset),
        options.samples * (window + _SHIFTS),
    )
    if len(ids) < options.samples * window:
        raise ValueError(
            f"long_bpb needs {options.samples} x {window} tokens of text and found {len(ids)}: "
            "give more text, or fewer samples or tokens."
        )
    spacing = (len(ids) - window) // max(options.samples - 1, 1)
    special = adds_special_tokens(metadata)
    documents = []
    for index in range(options.samples):
        start = index * spacing
        document = _cut_continuation(
            tokenizer, ids, start, options.context, options.scored, special
        )
        if document is None:
            raise ValueError(
                f"long_bpb found no piece of text of exactly {options.context} + "
                f"{options.scored} tokens near token {start}: give other text, or a tokenizer "
                "that encodes what it decodes."
            )
        documents.append(document)
    return documents


def wikitext_bpc_documents(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of `wikitext_bpc`: pieces of articles, none across two of them.

    Args:
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.

    Raises:
        ValueError: Wrong options, too little text, or more tokens than the model's maximum.
        OSError: The dataset or a file cannot be read.
    """
    options = parse_options(WikitextBpcOptions, "wikitext_bpc", metadata)
    if options.files is not None and options.dataset is not None:
        raise ValueError("wikitext_bpc: give either files or a dataset, not both.")
    tokenizer = task_tokenizer(metadata)
    special = adds_special_tokens(metadata)
    window = options.context + options.scored
    check_fits(metadata, "wikitext_bpc", window)
    rounds: list[list[dict[str, Any]]] = []
    seen = 0
    for article in _wikitext_articles(options):
        seen += 1
        # An article of fewer characters than tokens wanted is not worth encoding.
        ids = encode_texts(tokenizer, [article], len(article)) if len(article) >= window else []
        starts = range(0, len(ids) - window + 1, window)[: options.samples]
        for index, start in enumerate(starts):
            document = _cut_continuation(
                tokenizer, ids, start, options.context, options.scored, special
            )
            if document is not None:
                rounds += [[] for _ in range(index + 1 - len(rounds))]
                rounds[index].append({**document, "article": seen - 1})
        if rounds and len(rounds[0]) >= options.samples:
            break
    documents = [document for pieces in rounds for document in pieces]
    if len(documents) < options.samples:
        raise ValueError(
            f"wikitext_bpc found {len(documents)} pieces of {options.context} + {options.scored} "
            f"tokens in {seen} articles, but samples is {options.samples}: ask for fewer samples "
            'or tokens, or take more text, for example {"dataset": {"split": "train"}}.'
        )
    return documents[: options.samples]


def _wikitext_articles(options: WikitextBpcOptions) -> Iterator[str]:
    """Whole articles: the dataset holds one line per row, titles as `` = Title = ``."""
    if options.files is not None:
        for text in iterate_texts(options.files):
            yield from _split_articles(text.splitlines(keepends=True))
        return
    rows = load_rows(choose_dataset(WIKITEXT, options.dataset), ["text"])
    yield from _split_articles(rows["text"])


def _split_articles(lines: Iterable[str]) -> Iterator[str]:
    article: list[str] = []
    for line in lines:
        if _TITLE.fullmatch(line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


def _cut_continuation(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    start: int,
    context: int,
    scored: int,
    special: bool,
) -> dict[str, Any] | None:
    """A piece of text near `start` that lm-eval's tokenisation splits exactly as asked.

    lm-eval encodes the context, and the context with its continuation, and moves blanks at the
    context's end over to the continuation; pieces where this shifts a token are passed by.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    extra = len(encode(""))
    window = context + scored
    for shift in range(_SHIFTS):
        # Backwards where the text ends.
        first = start + shift if start + shift + window <= len(ids) else start - shift
        if first < 0:
            break
        middle = first + context - extra
        before = decode(ids[first:middle])
        text = decode(ids[first : middle + scored])
        continuation = text[len(before) :]
        if before != before.rstrip() or not text.startswith(before) or "\ufffd" in text:
            continue
        context_ids, text_ids = encode(before), encode(text)
        if (
            len(context_ids) == context
            and len(text_ids) == window
            and text_ids[:context] == context_ids
        ):
            return {
                "context": before,
                "continuation": continuation,
                "bytes": len(continuation.encode("utf-8")),
                "characters": len(continuation),
                "context_tokens": context,
                "scored_tokens": scored,
                "start": first,
            }
    return None


def long_bpb_score(
    document: Mapping[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, tuple[float, int]]:
    """Log-likelihood (nats) and bytes; lm-eval's aggregation makes bits per byte of their sums."""
    log_likelihood, _ = results[0]
    return {"bits_per_byte": (log_likelihood, document["bytes"])}


def wikitext_bpc_score(
    document: Mapping[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, tuple[float, int]]:
    """Log-likelihood (nats) and characters; the aggregation divides the sum of bits by theirs."""
    log_likelihood, _ = results[0]
    return {"bits_per_character": (log_likelihood, document["characters"])}
