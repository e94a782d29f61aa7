"""Real text from any machine, a part of it held out, and a tokenizer trained on the spot."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_attn_plugin.quickstart.settings import TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MINIMUM_CHARACTERS = 100_000
"""Less text is learnt by heart, and does not give enough held-out text to measure on."""

_STANDARD_LIBRARY_CHARACTERS = 2_000_000
_PACKAGES = (
    *("asyncio", "collections", "concurrent", "email", "html", "http", "importlib"),
    *("json", "logging", "multiprocessing", "unittest", "urllib", "xml"),
)
_HELD_OUT = 0.1
_SENTENCES = 2000


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text to train on, and text that is kept for measuring.

    Attributes:
        source: Where it is from, for people.
        train: One string per file.
        held_out: The end of every file.
    """

    source: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A hash of all the text."""
        sha = hashlib.sha256()
        for text in (*self.train, *self.held_out):
            sha.update(text.encode("utf-8", "surrogatepass") + b"\0")
        return sha.hexdigest()


def read_corpus(
    files: Sequence[Path | str] = (), minimum_characters: int = MINIMUM_CHARACTERS
) -> Corpus:
    """Read the user's text files, or else the Python standard library's own sources.

    Args:
        files: Text files, UTF-8.
        minimum_characters: Refuse less text than this.

    Raises:
        OSError: A file cannot be read, or Python was installed without its sources.
        ValueError: A file is empty or no text, or there is too little text.
    """
    if files:
        texts = [_read(Path(file)) for file in files]
        source = ", ".join(Path(file).name for file in files)
    else:
        texts, source = _standard_library(), "the Python standard library's sources"
    characters = sum(map(len, texts))
    if characters < minimum_characters:
        raise ValueError(
            f"{source}: {characters:,} characters are too few, at least {minimum_characters:,} are "
            "needed. Give more files with --text."
        )
    cuts = [_cut(text) for text in texts]
    return Corpus(
        source,
        tuple(text[:cut] for text, cut in zip(texts, cuts, strict=True)),
        tuple(text[cut:] for text, cut in zip(texts, cuts, strict=True)),
    )


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {file} is not UTF-8 text ({error.reason}).") from error
    if not text.strip():
        raise ValueError(f"--text {file} is empty: there is nothing to learn from.")
    return text


def _standard_library() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    sources = sorted(folder.glob("*.py"))
    for package in _PACKAGES:
        sources += sorted((folder / package).rglob("*.py"))
    texts: list[str] = []
    # Some files declare another encoding; what they lose does not matter here.
    for source in sources:
        texts.append(source.read_text(encoding="utf-8", errors="ignore"))
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise FileNotFoundError(
            f"this Python has no sources of its standard library in {folder}: give text files with "
            "--text."
        )
    # Every n-th file, so that a part stands for the whole.
    stride = max(1, round(sum(map(len, texts)) / _STANDARD_LIBRARY_CHARACTERS))
    return texts[::stride]


def _cut(text: str) -> int:
    """Where the held-out end of a text begins: at a line, if there is one near."""
    cut = int(len(text) * (1 - _HELD_OUT))
    line = text.rfind("\n", 0, cut) + 1
    return line if line > cut // 2 else cut


def train_tokenizer(
    texts: Sequence[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, in which the words of the needles are single tokens.

    Such plain words are single tokens in the vocabulary of any large model. In one of a few hundred
    tokens they would be several, and a two-layer model learns in minutes to copy one token.

    Args:
        texts: What to train on.
        vocab_size: Number of tokens learnt from the text, special ones and single bytes included.
        max_length: Context of the model, kept with the tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sentence = TEMPLATE.needle.format(key="", value="")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer.train_from_iterator(
        [*texts, *[sentence] * _SENTENCES],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    words = [*TEMPLATE.keys, *TEMPLATE.values]
    tokenizer.add_tokens([AddedToken(f" {word}", normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )
