"""Rows and batches for masked language modelling: how encoders are trained and measured."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def encoder_rows(
    documents: Iterable[Sequence[int]], length: int, first: int, last: int
) -> Iterator[dict[str, list[int]]]:
    """Join documents into rows of exactly `length` tokens, as RoBERTa was trained on them.

    Every row is `first`, tokens, `last`; between documents stands `last`. What does not fill a row
    at the end is left out.

    Args:
        documents: Token ids of each document, without special tokens; empty ones are left out.
        length: Tokens per row, at least 3.
        first: The id of [CLS] or <s>.
        last: The id of [SEP] or </s>.

    Raises:
        ValueError: If `length` is below 3.
    """
    if length < 3:
        raise ValueError(f"length must be at least 3 tokens, got {length}")
    held: list[int] = []
    for document in documents:
        if not document:
            continue
        held += [last, *document] if held else document
        while len(held) >= length - 2:
            yield {"input_ids": [first, *held[: length - 2], last]}
            held = held[length - 2 :]


def load_encoder_rows(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, length: int
) -> datasets.Dataset:
    """Tokenise texts and join them with `encoder_rows`.

    Args:
        texts: A dataset with a column `text`, as `hf_attn_plugin.data.load_texts` returns it.
        tokenizer: The encoder's tokenizer.
        length: Tokens per row.

    Raises:
        ValueError: If the tokenizer has no tokens to begin and end a row with, or no mask token,
            or the texts do not fill a row.
    """
    import datasets

    first, last = special_ids(tokenizer)
    documents = texts.map(
        _tokenize,
        batched=True,
        remove_columns=texts.column_names,
        fn_kwargs={"tokenizer": tokenizer},
        desc="Tokenizing",
    )
    arguments = {"documents": documents, "length": length, "first": first, "last": last}
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    if sum(len(document) for document in documents["input_ids"]) < length - 2:
        raise ValueError(f"the texts do not fill one row of {length} tokens: give more text")
    return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=arguments)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The ids that begin and end a row.

    Raises:
        ValueError: If the tokenizer has none, or no mask token.
    """
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id):
        raise ValueError(
            "masked language modelling needs a tokenizer with cls_token, sep_token and mask_token, "
            "as those of encoders have"
        )
    return tokenizer.cls_token_id, tokenizer.sep_token_id


def mask_rows(
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    probability: float = 0.15,
    seed: int = 0,
) -> list[dict[str, torch.Tensor]]:
    """Mask rows once and for all, so that models can be compared on them.

    Args:
        rows: Rows with `input_ids`.
        tokenizer: The encoder's tokenizer.
        probability: Share of the tokens to predict.
        seed: Of the choice.

    Returns:
        Rows with `input_ids` and `labels`, -100 where nothing is to be predicted.
    """
    collate = MaskingCollator(tokenizer, probability, seed)
    masked = [collate([row]) for row in rows]
    return [{key: batch[key][0] for key in ("input_ids", "labels")} for batch in masked]


class MaskingCollator:
    """A `data_collator` for Trainer: rows with labels as they are, others masked.

    What is masked is drawn from the rows of the batch and the seed alone, and the global random
    state is left as it is: a run that goes on from a checkpoint masks as one never stopped would.
    Rows that meet other rows in the next epoch are masked differently then.

    Args:
        tokenizer: The encoder's tokenizer.
        probability: Share of the tokens to predict.
        seed: Of the choice.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, probability: float = 0.15, seed: int = 0
    ) -> None:
        from transformers import DataCollatorForLanguageModeling

        self._mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
        self._seed = seed

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack rows of equal length into int64 `[rows, length]`."""
        ids = [[int(token) for token in row["input_ids"]] for row in rows]
        if all("labels" in row for row in rows):
            labels = [[int(label) for label in row["labels"]] for row in rows]
            return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(repr((self._seed, ids)).encode()))
            batch = self._mask([{"input_ids": row} for row in ids])
        return {key: batch[key] for key in ("input_ids", "labels")}


def _tokenize(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    texts = [text for text in batch["text"] if text]
    if not texts:
        return {"input_ids": []}
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return {"input_ids": encoded["input_ids"]}


def _rows(
    documents: datasets.Dataset, length: int, first: int, last: int
) -> Iterator[dict[str, list[int]]]:
    ids = (document["input_ids"] for document in documents)
    return encoder_rows(ids, length, first, last)
