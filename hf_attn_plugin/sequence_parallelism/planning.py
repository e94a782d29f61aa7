"""Which tokens go to which rank: the layers that a rehearsal found, set before the estimate."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hf_attn_plugin.methods.sharding import WholeRows
from hf_attn_plugin.parallel.choice import MEMORY, Choice, choose, suggested_length
from hf_attn_plugin.parallel.estimates import Shapes
from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.parallel.shard import SCHEDULES
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.sequence_parallelism.batch import WholeBatch, appended
from hf_attn_plugin.sequence_parallelism.rehearsal import LayerKind, Rehearsal

LAYOUTS = ("contiguous", "zigzag")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a caller asks for; None leaves it to the estimate.

    Attributes:
        schedule: One of `SCHEDULES`.
        layout: One of `LAYOUTS`.
        ulysses: Ranks that exchange heads for tokens.
    """

    schedule: str | None
    layout: str | None
    ulysses: int | None

    def check(self, ranks: int) -> None:
        """Refuse what does not exist or does not fit the number of ranks.

        Raises:
            ValueError: With what there is.
        """
        for name, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("layout", self.layout, LAYOUTS),
        ):
            if value is not None and value not in known:
                raise ValueError(
                    f"sequence_parallel: {name} must be one of {', '.join(map(repr, known))} or "
                    f"None, got {value!r}."
                )
        if self.ulysses is not None and (
            not isinstance(self.ulysses, int) or self.ulysses < 1 or ranks % self.ulysses
        ):
            raise ValueError(
                f"sequence_parallel: ulysses must divide the {ranks} ranks, got {self.ulysses!r}."
            )

    def statement(self) -> dict[str, Any]:
        """What must be the same on every rank."""
        return dataclasses.asdict(self)


def whole_rows(whole: WholeBatch, config: Any, ranks: int) -> WholeRows:
    """What attention has to know of the rows, at a length that divides.

    Args:
        whole: The batch.
        config: Of the model.
        ranks: How many share each row.
    """
    length = whole.length if ranks == 1 else suggested_length(whole.length, ranks)
    count = length - whole.length
    valid, documents = whole.valid, whole.documents(config)
    if documents is not None and count:
        documents = appended(documents, count, int(documents.max()) + 1)  # a document of their own
    return WholeRows(
        length,
        valid=None if valid is None else appended(valid, count, 0),
        appended=count,
        documents=documents,
        both_ways=whole.lengths is not None,
        named="global_attention_mask" in whole.tensors,
    )


def plan_shard(
    whole: WholeBatch,
    rows: WholeRows,
    found: Rehearsal,
    ranks: int,
    settings: Settings,
    memory: float,
) -> Choice:
    """The layout and the schedule with the least estimated time for all layers of the model.

    Args:
        whole: The batch.
        rows: The same, as attention knows it.
        found: The model's layers.
        ranks: How many share each row.
        settings: What the caller asks for.
        memory: Bytes of the smallest GPU among the ranks; the same number on all of them.

    Raises:
        ValueError: The model's heads do not fit what was asked for.
    """
    length = rows.length
    layout = None
    softmax = {kind: count for kind, count in found.layers.items() if not kind.linear}
    if settings.layout == "contiguous" or ranks == 1 or not softmax:
        # A state that goes through all tokens is the same work everywhere.
        layout = Layout.contiguous(length, ranks)
    if settings.layout == "zigzag" and ranks > 1:
        layout = Layout.zigzag(length, ranks)
    if ranks == 1 or not softmax:
        assert layout is not None
        return Choice(layout, settings.schedule, 1, (), 0.0, "nothing to choose from")
    patterns = [(_pattern(kind, rows, whole), count) for kind, count in softmax.items()]
    kind = max(softmax, key=softmax.__getitem__)
    ulysses = settings.ulysses
    if ulysses is None and settings.schedule != "ulysses":
        heads = {(other.heads, other.kv_heads) for other in softmax}
        ulysses = 1 if len(heads) > 1 else None  # what fits one need not fit the other
    return choose(
        patterns,
        ranks,
        Shapes(
            kind.heads,
            kind.kv_heads,
            kind.head_dim,
            kind.value_dim,
            whole.tokens.shape[0],
            kind.itemsize,
        ),
        schedule=settings.schedule,
        ulysses=ulysses,
        layout=layout,
        memory=memory,
    )


def gpu_bytes(device: torch.device) -> int:
    """The memory of a GPU; of anything else, what the estimates are made for."""
    if device.type != "cuda":
        return int(MEMORY)
    return torch.cuda.get_device_properties(device).total_memory


def _pattern(kind: LayerKind, rows: WholeRows, whole: WholeBatch) -> Pattern:
    pattern = rows.pattern(kind.causal, kind.band, kind.chunk, whole.tokens.device)
    terms = kind.terms()
    named = whole.tensors.get("global_attention_mask")
    if kind.method == "longformer" and named is not None:
        return pattern.replace(**terms, global_tokens=appended(named, rows.appended, 0).bool())
    plain = {"window": None, "dilation": 1, "stride": None}
    if all(value == plain.get(name, 0) for name, value in terms.items()):
        return pattern
    return pattern.derive(("planned", *terms.items()), lambda: pattern.replace(**terms))
