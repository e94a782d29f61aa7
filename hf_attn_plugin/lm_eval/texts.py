"""Where the evaluation text comes from: files, a dataset, or the Python standard library."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn_plugin.lm_eval.rows import choose_dataset, load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE = 50_000
"""Characters encoded at a time, so that of a whole corpus in one file only the start is."""


def standard_library() -> list[Path]:
    """The Python standard library's own source files: real text that every machine has."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise ValueError(
            "this Python has no standard library sources to read; name text files instead."
        )
    random.Random(0).shuffle(files)
    return files


def iterate_texts(
    files: Iterable[str] | None = None, dataset: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Yield documents of text, one after the other.

    Args:
        files: Text files, read as UTF-8.
        dataset: What `datasets.load_dataset` takes: ``{"path": …, "name": …, "split": …}``, and
            the ``column`` that holds the text. With neither, the standard library's sources
            are read.

    Raises:
        ValueError: Both are given, or the dataset lacks the column.
        OSError: A file cannot be read.
    """
    if files is not None and dataset is not None:
        raise ValueError("give either files or a dataset to read text from, not both.")
    if dataset is not None:
        yield from _dataset_texts(dataset)
        return
    # The library's few files in other encodings must not stop an evaluation; a user's own should.
    errors = "replace" if files is None else "strict"
    for path in standard_library() if files is None else map(Path, files):
        try:
            text = path.read_text(encoding="utf-8", errors=errors)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        if text:
            yield text


def _dataset_texts(dataset: Mapping[str, Any]) -> Iterator[str]:
    chosen = choose_dataset({"split": "test", "column": "text"}, dataset, extra=("column",))
    if "path" not in chosen:
        raise ValueError(f"a dataset needs the path to load, got {dict(dataset)!r}.")
    column = chosen.pop("column")
    yield from (text for text in load_rows(chosen, [column])[column] if text)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], minimum: int
) -> list[int]:
    """Encode documents one after the other until there are at least `minimum` tokens.

    Args:
        tokenizer: Encodes without special tokens; a blank line separates documents.
        texts: The documents; no more are read than needed.
        minimum: Tokens wanted; fewer come back when the texts end before.
    """
    ids: list[int] = []
    for text in texts:
        document = ("\n\n" if ids else "") + text
        for start in range(0, len(document), _PIECE):
            piece = document[start : start + _PIECE]
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= minimum:
                return ids
    return ids
