"""Training documents: real text in which facts are stated and asked for again.

A fact is the needle's sentence of the evaluation, and the question is the same sentence later in
the document, as `hf_attn_plugin.lm_eval.needle` asks it. Nobody can foresee the word in the first,
so it is left out of the loss; the word in the second can be looked up, and that is what is learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_attn_plugin.data import IGNORE_INDEX, pack_documents
from hf_attn_plugin.quickstart.settings import TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT, FACT, ANSWER = 0, 1, 2
"""What a token is: text, a word that nobody can foresee, a word that can be looked up."""


@dataclasses.dataclass(frozen=True)
class Mix:
    """What documents are made of.

    Attributes:
        share: Share of the tokens in facts and questions; many of them in a document teach
            retrieval in a tenth of the steps that one would take.
        reach: A question comes less than this many tokens after its fact, because the attention
            that is trained sees no farther: beyond it, guessing would be taught. None is no limit.
        global_tokens: First tokens of a document that are seen from everywhere, facts in them too.
    """

    share: float
    reach: int | None = None
    global_tokens: int = 0


class DocumentMaker:
    """Makes documents out of a long text.

    Args:
        tokenizer: The words of the needles have to be single tokens in it.
        text: Token ids of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: Sequence[int]) -> None:
        def encode(piece: str) -> np.ndarray:
            return np.array(tokenizer(piece, add_special_tokens=False)["input_ids"], dtype=np.int64)

        before, after = TEMPLATE.needle.split(" {value}")
        self.text = np.asarray(text, dtype=np.int64)
        self.prefixes = np.stack([encode(before.format(key=key)) for key in TEMPLATE.keys])
        self.values = np.concatenate([encode(f" {value}") for value in TEMPLATE.values])
        self.suffix = encode(after)
        if len(self.values) != len(TEMPLATE.values):
            raise ValueError("the tokenizer has to give every value of the needles one token.")
        self.value_at = self.prefixes.shape[1]
        self.sentence_length = self.value_at + 1 + len(self.suffix)

    def make(
        self, rng: np.random.Generator, length: int, mix: Mix
    ) -> tuple[np.ndarray, np.ndarray]:
        """One document.

        Args:
            rng: Draws everything.
            length: Tokens, at least two sentences.
            mix: How many facts, and how far their questions.

        Returns:
            Token ids and what they are (`TEXT`, `FACT`, `ANSWER`), int64 ``[length]`` each.
        """
        start = rng.integers(0, len(self.text) - length + 1)
        tokens = self.text[start : start + length].copy()
        kinds = np.full(length, TEXT, dtype=np.int64)
        size = self.sentence_length
        facts = int(np.clip(length * mix.share / (2 * size), 1, len(self.prefixes)))
        room = length - 2 * facts * size
        if room < 0:
            return tokens, kinds
        gaps = np.sort(rng.integers(0, room + 1, 2 * facts))
        places = gaps + np.arange(2 * facts) * size
        farthest = length if mix.reach is None else mix.reach - size
        pairs = _pair_up(rng, places, farthest, mix.global_tokens - size)
        keys = rng.choice(len(self.prefixes), len(pairs), replace=False)
        values = rng.choice(self.values, len(pairs))
        for (fact, question), key, value in zip(pairs, keys, values, strict=True):
            sentence = np.concatenate([self.prefixes[key], [value], self.suffix])
            for place, kind in ((fact, FACT), (question, ANSWER)):
                tokens[place : place + size] = sentence
                kinds[place + self.value_at] = kind
        return tokens, kinds


def _pair_up(
    rng: np.random.Generator, places: np.ndarray, farthest: int, last_global: int
) -> list[tuple[int, int]]:
    """Pairs of places, each used once; some may be left over.

    They are at most ``farthest`` apart, except where the first is not beyond ``last_global``.
    """
    free = [int(place) for place in places]
    pairs = []
    while free:
        fact = free.pop(0)
        seen = [place for place in free if place - fact <= farthest or fact <= last_global]
        if seen:
            question = seen[int(rng.integers(len(seen)))]
            free.remove(question)
            pairs.append((fact, question))
    return pairs


class TrainingBatches(Dataset[dict[str, torch.Tensor]]):
    """One batch per training step, made from its index alone, so that a resumed run sees the same.

    Args:
        maker: Makes the documents.
        steps: Number of batches.
        tokens: Tokens per batch.
        length_at: The length of the rows at a step.
        seed: Another seed gives other documents.
        mix_at: What the documents of a step are made of.
        packed: Put several documents into a row, with positions that start anew in each.
    """

    def __init__(
        self,
        maker: DocumentMaker,
        steps: int,
        tokens: int,
        length_at: Callable[[int], int],
        seed: Sequence[int],
        mix_at: Callable[[int], Mix],
        packed: bool,
    ) -> None:
        self.maker = maker
        self.steps = steps
        self.tokens = tokens
        self.length_at = length_at
        self.seed = list(seed)
        self.mix_at = mix_at
        self.packed = packed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        length = self.length_at(step)
        return make_batch(
            self.maker,
            np.random.default_rng([*self.seed, step]),
            max(1, self.tokens // length),
            length,
            self.mix_at(step),
            self.packed,
        )


def make_batch(
    maker: DocumentMaker,
    rng: np.random.Generator,
    rows: int,
    length: int,
    mix: Mix,
    packed: bool,
) -> dict[str, torch.Tensor]:
    """A batch of training rows.

    Args:
        maker: Makes the documents.
        rng: Draws everything.
        rows: Number of rows.
        length: Tokens per row.
        mix: What the documents are made of.
        packed: Put several documents into a row.

    Returns:
        `input_ids`, `labels` and `kinds`, and `position_ids` for packed rows; int64
        ``[rows, length]`` each.
    """
    documents = []
    for _ in range(rows):
        lengths = [length]
        if packed and rng.random() < 0.5:
            first = int(rng.integers(length // 4, 3 * length // 4))
            lengths = [first, length - first]
        documents += [maker.make(rng, piece, mix) for piece in lengths]
    columns: dict[str, Any]
    if packed:
        packed_rows = list(pack_documents((tokens.tolist() for tokens, _ in documents), length))
        columns = {
            name: [row[name] for row in packed_rows]
            for name in ("input_ids", "position_ids", "labels")
        }
        kinds = pack_documents((kinds.tolist() for _, kinds in documents), length)
        columns["kinds"] = [row["input_ids"] for row in kinds]
    else:
        columns = {
            "input_ids": [tokens for tokens, _ in documents],
            "kinds": [kinds for _, kinds in documents],
        }
        columns["labels"] = columns["input_ids"]
    batch = {name: torch.tensor(np.array(values)) for name, values in columns.items()}
    batch["labels"] = batch["labels"].masked_fill(batch["kinds"] == FACT, IGNORE_INDEX)
    return batch
