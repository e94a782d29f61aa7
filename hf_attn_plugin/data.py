"""Texts in, packed rows of token ids out: several documents per row, none seeing another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
"""The label that transformers' losses leave out."""


def pack_documents(
    documents: Iterable[Sequence[int]], length: int
) -> Iterator[dict[str, list[int]]]:
    """Cut and join documents into rows of exactly `length` tokens, without padding.

    A document that does not fit into what is left of a row continues in the next row as a
    document of its own. The last row is dropped if it is not full. The rows carry no
    `attention_mask`: attention is kept inside each document by `position_ids`, which
    transformers reads as packing when there is neither an attention mask nor a cache
    (`use_cache=False`, as its Trainer sets).

    Args:
        documents: Token ids of each document, at least one per document.
        length: Tokens per row, at least 2.

    Returns:
        An iterator of rows, each with three lists of `length` integers: `input_ids`;
        `position_ids`, from 0 in every document; `labels`, which are the `input_ids` but -100 at
        the first token of every document, so that no token is predicted from another document.

    Raises:
        ValueError: If `length` is no integer from 2 on (at once), or a document is empty or
            something else than token ids (when it is reached).
    """
    _check_length(length)
    return _pack(documents, length)


def _check_length(length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"length must be at least 2 tokens, got {length!r}")


def _pack(documents: Iterable[Sequence[int]], length: int) -> Iterator[dict[str, list[int]]]:
    row: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
    for number, given in enumerate(documents):
        document = _token_ids(given, number)
        if len(document) == 0:
            raise ValueError(
                f"document {number} is empty: a document needs at least one token, "
                "leave empty ones out before packing"
            )
        start = 0
        while start < len(document):
            piece = list(document[start : start + length - len(row["input_ids"])])
            row["input_ids"] += piece
            row["position_ids"] += range(len(piece))
            row["labels"] += [IGNORE_INDEX, *piece[1:]]
            start += len(piece)
            if len(row["input_ids"]) == length:
                yield row
                row = {"input_ids": [], "position_ids": [], "labels": []}


def _token_ids(document: Any, number: int) -> Sequence[int]:
    """A document as plain integers; arrays and tensors are taken too."""
    ids = document.tolist() if hasattr(document, "tolist") else document
    plain = isinstance(ids, Sequence) and not isinstance(ids, str | bytes)
    if not plain or any(isinstance(i, bool) or not isinstance(i, int) for i in ids[:1]):
        raise ValueError(
            f"document {number} must be one row of token ids, got {type(document).__name__} "
            f"{ids!r:.40}: tokenize it first, pack_texts does that too"
        )
    return ids


def collate_packed(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack packed rows into a batch; a `data_collator` for transformers' Trainer.

    Args:
        rows: Rows of equal length as `pack_documents` makes them.

    Returns:
        `input_ids`, `position_ids` and `labels`, each int64 `[rows, length]`, and nothing else.

    Raises:
        ValueError: If there is no row, rows differ in length, or a row lacks one of the three:
            Trainer takes away the columns that the model's `forward` does not name, and without
            `position_ids` documents would mix.
    """
    keys = ("input_ids", "position_ids", "labels")
    if not rows:
        raise ValueError("collate_packed needs at least one row, got none")
    missing = [key for key in keys if any(key not in row for row in rows)]
    if missing:
        raise ValueError(
            f"packed rows need {', '.join(keys)}, but {', '.join(missing)} is missing. Trainer "
            "removes what the model's forward() does not name: such a model cannot keep packed "
            "documents apart, train it on one document per row instead"
        )
    lengths = sorted({len(row[key]) for row in rows for key in keys})
    if len(lengths) > 1:
        raise ValueError(
            f"packed rows must all have one length, got {', '.join(map(str, lengths))} tokens: "
            "pack documents into rows with pack_documents or pack_texts, which leave no gaps"
        )
    return {
        key: torch.stack([torch.as_tensor(row[key], dtype=torch.int64) for row in rows])
        for key in keys
    }


@dataclass(kw_only=True)
class TextArguments:
    """Command-line options for `transformers.HfArgumentParser`: which texts to train on.

    Attributes:
        text: Text files, one document each; or else
        dataset: A dataset on the Hub, or a folder with JSON lines, CSV, Parquet or text files.
        dataset_config: The dataset's configuration, if it has several.
        split: Which split of the dataset, or slice of one.
        text_column: The dataset's column that holds the text.
        eval_fraction: Part of the packed rows to keep for evaluation: the last ones.
    """

    text: list[str] = field(default_factory=list, metadata={"help": "text files to train on"})
    dataset: str | None = field(default=None, metadata={"help": "or a Hub dataset or folder"})
    dataset_config: str | None = None
    split: str = "train"
    text_column: str = "text"
    eval_fraction: float = field(default=0.05, metadata={"help": "last rows, held out"})

    def load_rows(self, tokenizer: PreTrainedTokenizerBase, length: int) -> datasets.DatasetDict:
        """Load, tokenize and pack into rows of `length` tokens, with splits `train` and `test`.

        Raises:
            ValueError: As `load_texts` and `pack_texts`, or if a split would have no row.
        """
        texts = load_texts(
            self.text,
            self.dataset,
            dataset_config=self.dataset_config,
            split=self.split,
            text_column=self.text_column,
        )
        rows = pack_texts(texts, tokenizer, length)
        held_out = round(len(rows) * self.eval_fraction)
        if not 0 < held_out < len(rows):
            raise ValueError(
                f"eval_fraction {self.eval_fraction} of {len(rows)} packed rows leaves no row for "
                "evaluation or none for training: give more text, or another fraction"
            )
        return rows.train_test_split(test_size=held_out, shuffle=False)


def load_texts(
    files: Sequence[str | Path] = (),
    dataset: str | None = None,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
) -> datasets.Dataset:
    """Load documents, one string each, from text files or from a dataset.

    Args:
        files: UTF-8 text files; each is one document.
        dataset: Anything `datasets.load_dataset` takes: a Hub id, or a folder with JSON lines,
            CSV, Parquet or text files; each record is one document.
        dataset_config: The dataset's configuration, if it has several.
        split: Which split, or slice of one (`"train[:1%]"`).
        text_column: The column that holds the text.

    Returns:
        A dataset with the single column `text`.

    Raises:
        ValueError: If not exactly one of `files` and `dataset` is given, or a file is empty, or
            the dataset has no such column.
        FileNotFoundError: If a file does not exist.
        ImportError: If `datasets` is not installed.
    """
    datasets = _import_datasets()
    if bool(files) == (dataset is not None):
        raise ValueError("give either text files or a dataset, not both and not neither")
    if isinstance(files, str | Path):
        raise ValueError(
            f"files must be a list of paths, got {str(files)!r}: write [{str(files)!r}]"
        )
    if dataset is None:
        for file in files:
            if not Path(file).is_file():
                raise FileNotFoundError(f"there is no text file {file}")
            if Path(file).stat().st_size == 0:
                raise ValueError(f"{file} is empty: a document needs at least one token")
        return datasets.load_dataset(
            "text", data_files=[str(file) for file in files], sample_by="document", split="train"
        )
    records = datasets.load_dataset(dataset, dataset_config, split=split)
    if text_column not in records.column_names:
        raise ValueError(
            f"dataset {dataset!r} has no column {text_column!r}, "
            f"only {', '.join(records.column_names)}"
        )
    texts = records.select_columns([text_column])
    return texts if text_column == "text" else texts.rename_column(text_column, "text")


def pack_texts(
    texts: datasets.Dataset | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Tokenise texts and pack them with `pack_documents`, with progress bars.

    Every document gets the special tokens that its tokenizer adds, and the end-of-sequence token
    at its end, if the tokenizer has one. Texts that hold no token are left out, and counted in a
    warning.

    Args:
        texts: Strings, or a dataset with a column `text`, as `load_texts` returns it.
        tokenizer: Any transformers tokenizer.
        length: Tokens per row, at least 2.
        num_proc: Processes to tokenise with.

    Returns:
        A dataset of rows as `pack_documents` makes them, kept on disk in `datasets`' cache when
        the texts are; `collate_packed` makes batches of them.

    Raises:
        ValueError: If the texts do not fill one row, or `length` is below 2.
        ImportError: If `datasets` is not installed.
    """
    datasets = _import_datasets()
    _check_length(length)
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings or a dataset, got one string: [text]")
    if not isinstance(texts, datasets.Dataset):
        texts = datasets.Dataset.from_dict({"text": list(texts)})
    if "text" not in texts.column_names:
        raise ValueError(
            f"the dataset has no column 'text', only {', '.join(texts.column_names)}: load it with "
            "load_texts, or rename its column"
        )

    documents = texts.map(
        _tokenize,
        batched=True,
        batch_size=100,
        num_proc=num_proc,
        remove_columns=texts.column_names,
        fn_kwargs={"tokenizer": tokenizer},
        desc="Tokenizing",
    )
    if len(documents) < len(texts):
        logger.warning(
            f"left out {len(texts) - len(documents)} of {len(texts)} texts: no token in them"
        )
    tokens = sum(documents["tokens"]) if len(documents) else 0
    if tokens < length:
        raise ValueError(
            f"{tokens} tokens in {len(documents)} documents do not fill one row of {length}: "
            "give more text or a shorter length"
        )
    integers = datasets.List(datasets.Value("int32"))
    return datasets.Dataset.from_generator(
        _pack_dataset,
        features=datasets.Features(
            {"input_ids": integers, "position_ids": integers, "labels": integers}
        ),
        gen_kwargs={"documents": documents, "length": length},
    )


def _tokenize(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    texts = [text for text in batch["text"] if text]
    if not texts:
        return {"input_ids": [], "tokens": []}
    documents = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    # Some tokenizers end every text with the token themselves.
    documents = [
        ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in documents if ids
    ]
    return {"input_ids": documents, "tokens": [len(ids) for ids in documents]}


def _pack_dataset(documents: datasets.Dataset, length: int) -> Iterator[dict[str, list[int]]]:
    return pack_documents((document["input_ids"] for document in documents), length)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "loading and packing texts needs `datasets`: pip install 'hf_attn_plugin[train]'"
        ) from error
    return datasets
