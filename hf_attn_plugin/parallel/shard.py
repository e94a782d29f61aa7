"""What one rank knows of the sequence that is spread over a group."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from hf_attn_plugin.parallel.choice import MEMORY
from hf_attn_plugin.parallel.groups import place_in, prepare, subgroups
from hf_attn_plugin.parallel.layout import Layout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SCHEDULES = ("gather", "ring", "ulysses")


@dataclasses.dataclass(eq=False)
class Shard:
    """One rank's part of a sequence.

    Making it is collective: every rank of the group makes its own, since the first one makes the
    process groups for transfers (`groups.prepare`).

    Attributes:
        layout: Which tokens every rank holds.
        rank: This rank's place in the group.
        group: The ranks over which the sequence is spread; None for all processes.
        ulysses: Ranks (neighbours in the group) among which heads are exchanged for tokens.
        schedule: How keys meet queries among the other ranks: ``"gather"``, ``"ring"``; or
            ``"ulysses"``, heads for tokens among all. None: for every pattern the fastest
            (`choice.choose_way`).
        head_groups: Into how many groups "gather" and "ulysses" split the KV heads of a rank, so
            that one group travels while another is computed; the most up to this that divide them.
            The same on all ranks. None: by how much there is to send (`grouping.count_groups`).
        memory: Bytes of the smallest GPU among the ranks, for the choice of a schedule. The same
            number on all of them.
    """

    layout: Layout
    rank: int
    group: ProcessGroup | None = None
    ulysses: int = 1
    schedule: str | None = None
    head_groups: int | None = None
    memory: float = MEMORY
    # One cell for this shard and its inner one.
    _sent: list[int] = dataclasses.field(default_factory=lambda: [0], repr=False)

    def __post_init__(self) -> None:
        ranks = self.layout.ranks
        if not 0 <= self.rank < ranks:
            raise ValueError(f"Shard: rank must be one of the layout's {ranks}, got {self.rank}.")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(
                f"Shard: schedule must be one of {', '.join(SCHEDULES)} or None, "
                f"got {self.schedule!r}."
            )
        if self.schedule == "ulysses" and self.ulysses == 1:
            self.ulysses = ranks
        if self.ulysses < 1 or ranks % self.ulysses:
            raise ValueError(f"Shard: ulysses must divide the {ranks} ranks, got {self.ulysses}.")
        if self.schedule == "ulysses" and self.ulysses != ranks:
            raise ValueError(
                f"Shard: schedule 'ulysses' exchanges heads among all {ranks} ranks; for "
                f"ulysses={self.ulysses} say 'gather' or 'ring', which brings the groups together."
            )
        if ranks > 1:
            place = place_in(self.group)
            if place not in (None, (self.rank, ranks)):
                raise ValueError(
                    f"Shard: rank {self.rank} of a layout of {ranks} ranks does not fit this "
                    f"process, which (rank, ranks of its group) is {place}."
                )
            prepare(self.group, self.ulysses)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent for attention, forward and backward."""
        return self._sent[0]

    @bytes_sent.setter
    def bytes_sent(self, total: int) -> None:
        self._sent[0] = total

    @functools.cached_property
    def by_heads(self) -> Shard:
        """The same part, with heads exchanged for tokens among all ranks."""
        return dataclasses.replace(self, ulysses=self.layout.ranks, schedule="ulysses")

    @property
    def neighbours(self) -> ProcessGroup | None:
        """The ranks with which this one exchanges heads for tokens."""
        if self.ulysses == self.layout.ranks:
            return self.group
        return subgroups(self.group, self.ulysses)[0]

    @functools.cached_property
    def inner(self) -> Shard:
        """What remains to be done after heads were exchanged: a group of ranks counts as one."""
        if self.ulysses == 1:
            return self
        alone = self.ulysses == self.layout.ranks
        return Shard(
            self.layout.grouped(self.ulysses),
            self.rank // self.ulysses,
            None if alone else subgroups(self.group, self.ulysses)[1],
            schedule=self.schedule,
            head_groups=self.head_groups,
            memory=self.memory,
            _sent=self._sent,
        )
