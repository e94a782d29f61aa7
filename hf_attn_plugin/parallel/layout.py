"""Which tokens of a sequence every rank holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """A sequence cut into chunks of equal size, of which every rank holds the same number.

    With one chunk per rank, rank r holds the r-th part of the sequence. With two (head-tail, or
    zigzag: chunk c of 2P goes to rank ``min(c, 2P - 1 - c)``), causal attention is the same work
    for every rank. With 4, 6, ... the sequence is cut into 2, 3, ... parts, each laid out so, which
    balances documents and windows better. Example of 4 ranks, chunks in order::

        chunks=1    0 1 2 3
        chunks=2    0 1 2 3 3 2 1 0
        chunks=4    0 1 2 3 3 2 1 0 0 1 2 3 3 2 1 0

    Attributes:
        length: Tokens of the whole sequence, a multiple of ``ranks * chunks``.
        ranks: How many ranks share it.
        chunks: Chunks per rank: 1, or an even number.
    """

    length: int
    ranks: int
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"Layout: ranks must be >= 1, got {self.ranks}.")
        if self.chunks != 1 and (self.chunks < 1 or self.chunks % 2):
            raise ValueError(
                f"Layout: chunks must be 1 (contiguous) or even (zigzag), got {self.chunks}."
            )
        if self.length < 0 or self.length % (self.ranks * self.chunks):
            raise ValueError(
                f"Layout: a length of {self.length} does not divide into {self.chunks} equal "
                f"chunks for each of {self.ranks} ranks; pad it to "
                f"{padded_length(self.length, self.ranks, self.chunks)} (padded_length)."
            )

    @classmethod
    def contiguous(cls, length: int, ranks: int) -> Layout:
        """Rank r holds the r-th part of the sequence."""
        return cls(length, ranks, 1)

    @classmethod
    def zigzag(cls, length: int, ranks: int, chunks: int = 2) -> Layout:
        """Every rank holds a chunk from the head and one from the tail, ``chunks / 2`` times."""
        return cls(length, ranks, chunks)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.length // (self.ranks * self.chunks)

    @property
    def share(self) -> int:
        """Tokens of a rank."""
        return self.length // self.ranks

    def owner(self, chunk: int) -> int:
        """The rank that holds the ``chunk``-th chunk of the sequence."""
        if self.chunks == 1:
            return chunk
        place = chunk % (2 * self.ranks)
        return min(place, 2 * self.ranks - 1 - place)

    def segments(self, rank: int) -> tuple[range, ...]:
        """The tokens of a rank: its chunks, ascending, which may be neighbours."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"Layout: there is no rank {rank} among {self.ranks}.")
        numbers = (c for c in range(self.ranks * self.chunks) if self.owner(c) == rank)
        return tuple(range(c * self.chunk, (c + 1) * self.chunk) for c in numbers)

    def runs(self, rank: int) -> tuple[range, ...]:
        """`segments`, neighbours joined: the fewest runs of tokens that a rank holds."""
        joined: list[range] = []
        for segment in self.segments(rank):
            if joined and joined[-1].stop == segment.start:
                joined[-1] = range(joined[-1].start, segment.stop)
            else:
                joined.append(segment)
        return tuple(joined)

    def local(self, rank: int, tokens: range) -> range:
        """Where a run of the sequence's tokens lies in what a rank holds.

        Raises:
            ValueError: The rank does not hold all of them, one after another.
        """
        start = 0
        for run in self.runs(rank):
            if run.start <= tokens.start and tokens.stop <= run.stop:
                first = start + tokens.start - run.start
                return range(first, first + len(tokens))
            start += len(run)
        raise ValueError(
            f"Layout: rank {rank} does not hold the tokens {tokens.start}..{tokens.stop} in a run."
        )

    def take(self, tensor: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The tokens of a rank out of the whole sequence; a view where they are one run."""
        self._check(tensor, dim, self.length)
        parts = [tensor.narrow(dim, run.start, len(run)) for run in self.runs(rank)]
        return parts[0] if len(parts) == 1 else concatenate(parts, dim)

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole sequence, out of what every rank holds: the inverse of `take`."""
        if len(parts) != self.ranks:
            raise ValueError(f"Layout: {len(parts)} parts for {self.ranks} ranks.")
        placed = []
        for rank, part in enumerate(parts):
            self._check(part, dim, self.share)
            for run in self.runs(rank):
                own = self.local(rank, run)
                placed.append((run.start, part.narrow(dim, own.start, len(own))))
        placed.sort(key=lambda entry: entry[0])
        return concatenate([part for _, part in placed], dim)

    def grouped(self, size: int) -> Layout:
        """The layout of groups of ``size`` neighbouring ranks, each holding what its ranks hold."""
        if size < 1 or self.ranks % size:
            raise ValueError(f"Layout: groups of {size} ranks do not divide {self.ranks} ranks.")
        return Layout(self.length, self.ranks // size, self.chunks)

    def within(self, size: int) -> Layout:
        """How a group of ``size`` neighbouring ranks shares what it holds, the same for all groups.

        What a group holds, in the order of the sequence, is a sequence of its own: rank i of the
        group holds of it what rank i of this layout holds.
        """
        return Layout(self.share * size, size, self.chunks)

    def _check(self, tensor: Tensor, dim: int, length: int) -> None:
        if tensor.shape[dim] != length:
            raise ValueError(
                f"Layout: dimension {dim} must have {length} tokens, got {tuple(tensor.shape)}."
            )


def concatenate(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, which autocast would give another dtype or refuse."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return torch.cat(tensors, dim)
    with torch.autocast(kind, enabled=False):
        return torch.cat(tensors, dim)


def padded_length(length: int, ranks: int, chunks: int, multiple: int = 1) -> int:
    """The shortest length that divides into equal chunks.

    Args:
        length: Tokens there are.
        ranks: Ranks that share them.
        chunks: Chunks per rank.
        multiple: What the size of a chunk is a multiple of.
    """
    unit = ranks * chunks * multiple
    return -(-length // unit) * unit
