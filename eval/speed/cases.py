"""The cases of the speed table: patterns at the lengths at which they matter."""

from __future__ import annotations

import dataclasses
import itertools
import random

import torch

from hf_attn_plugin.patterns import Pattern, build_schedule

DOCUMENTS = 64
SHORTEST, LONGEST, PACKED = 500, 8000, 131072  # tokens of a document, and of all together
_GATE_LENGTH = 2048
_COUNT_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call: batch 1, causal, grouped heads.

    Attributes:
        name: What it is called on the command line.
        title: What it is called in tables.
        length: Tokens.
        window: Keys that a query sees before it, itself included; None for all.
        num_global_tokens: First tokens, which all see.
        stride: Further keys, at multiples of this distance.
        packed: Whether the tokens are `DOCUMENTS` documents of random lengths.
        seed: Draws these lengths.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Their width.
    """

    name: str
    title: str
    length: int
    window: int | None = None
    num_global_tokens: int = 0
    stride: int | None = None
    packed: bool = False
    seed: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def at(self, length: int) -> Case:
        """The same pattern over another number of tokens."""
        return dataclasses.replace(self, length=length)

    def for_gate(self) -> Case:
        """Short enough for the reference, long enough for the window to bite."""
        return self.at(max(_GATE_LENGTH, (self.window or 0) + 1024))

    @property
    def is_plain_causal(self) -> bool:
        """Whether nothing but causality limits the pairs."""
        return self.window is None and self.stride is None and not self.packed

    def document_lengths(self) -> list[int]:
        """Tokens of each document; one document where nothing is packed."""
        return document_lengths(self.length, self.seed) if self.packed else [self.length]

    def pattern(self, device: torch.device | str) -> Pattern:
        """The pattern, with its tensors on ``device``."""
        documents = None
        if self.packed:
            lengths = torch.tensor(self.document_lengths())
            documents = torch.arange(len(lengths)).repeat_interleave(lengths)[None].to(device)
        return Pattern(
            q_len=self.length,
            kv_len=self.length,
            window=self.window,
            num_global_tokens=self.num_global_tokens,
            stride=self.stride,
            q_documents=documents,
            kv_documents=documents,
        )

    def forward_flops(self, pairs: int) -> float:
        """Operations of the two products of the forward pass; the backward has 2.5 times these."""
        return 4.0 * self.heads * self.head_dim * pairs


CASES = {
    case.name: case
    for case in (
        Case("full", "full", 16384),
        Case("window-1024", "window 1024", 131072, window=1024),
        Case("window-4096", "window 4096", 131072, window=4096),
        Case("global", "window 512 + 64 global", 32768, window=512, num_global_tokens=64),
        Case("documents", f"{DOCUMENTS} packed documents", PACKED, packed=True),
        Case("strided", "window 512 + every 64th", 32768, window=512, stride=64),
    )
}

# The pictures: time and memory over the length.
SWEPT = tuple(
    CASES[name].at(length)
    for name in ("full", "window-1024")
    for length in (4096, 8192, 16384, 32768, 65536, 131072)
)


def document_lengths(total: int, seed: int = 0) -> list[int]:
    """Lengths of `DOCUMENTS` documents that sum to ``total``.

    At `PACKED` tokens they lie between `SHORTEST` and `LONGEST`, many short and few long ones; of
    another total they are in proportion.

    Args:
        total: Tokens of all documents; at least one for each.
        seed: Draws the lengths; the same seed gives the same ones everywhere.
    """
    rng = random.Random(seed)
    shortest = max(1, SHORTEST * total // PACKED)
    longest = max(shortest + 1, -(-LONGEST * total // PACKED))
    if not DOCUMENTS * shortest <= total <= DOCUMENTS * longest:
        raise ValueError(f"{total} tokens cannot be split into {DOCUMENTS} documents")
    weights = [rng.expovariate(1.0) for _ in range(DOCUMENTS)]
    spare = total - DOCUMENTS * shortest
    lengths = [min(longest, shortest + int(spare * w / sum(weights))) for w in weights]
    missing = total - sum(lengths)
    for index in itertools.cycle(range(DOCUMENTS)):
        if missing == 0:
            return lengths
        step = min(missing, longest - lengths[index], 1 + missing // DOCUMENTS)
        lengths[index] += step
        missing -= step
    raise AssertionError("unreachable")


def count_pairs(pattern: Pattern, device: torch.device | str) -> int:
    """How many (query, key) pairs the pattern has, exactly.

    Args:
        pattern: Of one batch row.
        device: Where masks of partly visible blocks are counted.
    """
    schedule = build_schedule(pattern, _COUNT_BLOCK, _COUNT_BLOCK)
    pairs = 0
    for block, start in enumerate(range(0, pattern.q_len, _COUNT_BLOCK)):
        stop = min(start + _COUNT_BLOCK, pattern.q_len)
        for first, end, full in schedule.runs(block, max_blocks=64):
            low, high = first * _COUNT_BLOCK, min(end * _COUNT_BLOCK, pattern.kv_len)
            if full:
                pairs += (stop - start) * (high - low)
            else:
                pairs += int(pattern.visible(device, start, stop, low, high).sum())
    return pairs
