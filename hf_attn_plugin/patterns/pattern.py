"""The pattern: which (query, key) pairs attend.

Everything else is derived from it: the blocks to visit (`schedule`), the element-wise mask of one
block (`Pattern.visible`), and the picture (`picture`). It holds no queries x keys tensor unless a
caller supplied one (`dense`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Fields that are bool; the others per token are int64.
_FLAGS = ("global_tokens", "key_valid", "global_queries")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Pattern:
    """A set of (query, key) pairs.

    A pair is visible when everything the *model* asks for holds::

        causal         key position <= query position
        band           query - key < band          (not causal: |query - key| < band)
        documents      same document
        key_valid      the key is not padding
        dense          the caller's own mask

    and, if the *method* keeps only some pairs, at least one of its terms does::

        window         query - key < window * dilation, at multiples of dilation
                       (not causal: |query - key| < window * dilation)
        sink tokens    the key is among the first num_sink_tokens of its sequence
        global tokens  the key or the query is global: among the first num_global_tokens of its
                       sequence, or marked in global_tokens
        stride         query - key is a multiple of stride

    So a method only ever removes pairs. Example: ``window=3, num_sink_tokens=1``, causal::

        0 x . . . . .
        1 x x . . . .
        2 x x x . . .
        3 x x x x . .
        4 x . x x x .
        5 x . . x x x

    Attributes:
        q_len: Number of queries.
        kv_len: Number of keys.
        causal: Whether a query sees only keys at its own position and before.
        band: The model's own window, in keys, the query included.
        window: The method's window, in keys, the query included.
        dilation: Distance between neighbouring keys of the method's window.
        stride: The method's stride.
        num_sink_tokens: First tokens of every sequence, seen by all.
        num_global_tokens: First tokens of every sequence, seen by all and seeing all.
        global_tokens: bool ``[batch or 1, kv_len]``, further global tokens by key index.
        q_offset: Position of the first query. None: the last query sits at the last key.
        kv_offset: Position of the first key.
        key_valid: bool ``[batch or 1, kv_len]``, False at padding.
        q_documents: int64 ``[batch or 1, q_len]``, the document of each query.
        kv_documents: int64 ``[batch or 1, kv_len]``, the document of each key.
        q_positions: int64 ``[batch or 1, q_len]``, positions inside each query's own sequence, for
            layouts in which queries and keys are numbered apart (paged caches). Replaces q_offset.
        kv_positions: int64 ``[batch or 1, kv_len]``; given exactly when q_positions is.
        kv_ranks: int64 ``[batch or 1, kv_len]``, how many tokens of its sequence precede a key.
            None: derived from documents and padding.
        global_queries: bool ``[batch or 1, q_len]``, which queries are global, where there are
            global tokens. None: those whose own key is. (In a part of a pattern it may be missing.)
        dense: bool ``[batch or 1, heads or 1, q_len, kv_len]``, True where a pair may attend.
    """

    q_len: int
    kv_len: int
    causal: bool = True
    band: int | None = None
    window: int | None = None
    dilation: int = 1
    stride: int | None = None
    num_sink_tokens: int = 0
    num_global_tokens: int = 0
    global_tokens: Tensor | None = None
    q_offset: int | Tensor | None = None
    kv_offset: int = 0
    key_valid: Tensor | None = None
    q_documents: Tensor | None = None
    kv_documents: Tensor | None = None
    q_positions: Tensor | None = None
    kv_positions: Tensor | None = None
    kv_ranks: Tensor | None = None
    global_queries: Tensor | None = None
    dense: Tensor | None = None
    # What was derived once for this pattern (ranks, schedules), shared by all layers of a forward.
    _derived: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("band", "window", "stride", "dilation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Pattern: {name} must be >= 1, got {value}.")
        if self.q_len < 0 or self.kv_len < 0:
            raise ValueError(f"Pattern: lengths must be >= 0, got {self.q_len} x {self.kv_len}.")
        for name in ("num_sink_tokens", "num_global_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"Pattern: {name} must be >= 0, got {getattr(self, name)}.")
        if (self.q_documents is None) != (self.kv_documents is None):
            raise ValueError("Pattern: give q_documents and kv_documents together.")
        if (self.q_positions is None) != (self.kv_positions is None):
            raise ValueError("Pattern: give q_positions and kv_positions together.")
        if self.q_positions is not None and self.global_tokens is not None:
            raise ValueError("Pattern: global_tokens needs queries and keys in one numbering.")
        self._check_lengths()

    def _check_lengths(self) -> None:
        wanted = {
            "global_tokens": self.kv_len,
            "key_valid": self.kv_len,
            "q_documents": self.q_len,
            "kv_documents": self.kv_len,
            "q_positions": self.q_len,
            "kv_positions": self.kv_len,
            "kv_ranks": self.kv_len,
            "global_queries": self.q_len,
        }
        for name, length in wanted.items():
            tensor = getattr(self, name)
            kind = torch.bool if name in _FLAGS else torch.int64
            if tensor is not None and tensor.dtype != kind:
                raise ValueError(f"Pattern: {name} must be {kind}, got {tensor.dtype}.")
            if tensor is not None and (tensor.ndim != 2 or tensor.shape[1] != length):
                raise ValueError(
                    f"Pattern: {name} must have shape [batch or 1, {length}], "
                    f"got {tuple(tensor.shape)}."
                )
        if self.dense is not None and (
            self.dense.ndim != 4
            or self.dense.dtype != torch.bool
            or self.dense.shape[2:] != (self.q_len, self.kv_len)
        ):
            raise ValueError(
                f"Pattern: dense must be bool [batch or 1, heads or 1, {self.q_len}, "
                f"{self.kv_len}], got {self.dense.dtype} {tuple(self.dense.shape)}."
            )

    # -- what the terms are --------------------------------------------------------------------

    @property
    def is_sparse(self) -> bool:
        """Whether a method's terms restrict the pairs (and not only the model's)."""
        return bool(
            self.window is not None
            or self.stride is not None
            or self.num_sink_tokens
            or self.has_globals
        )

    @property
    def has_globals(self) -> bool:
        """Whether any token is global."""
        return self.num_global_tokens > 0 or self.global_tokens is not None

    @property
    def reach(self) -> int | None:
        """Largest distance + 1 that the method's window spans."""
        return None if self.window is None else (self.window - 1) * self.dilation + 1

    @property
    def first_query(self) -> int:
        """Position of the first query. Reads the value of a tensor offset (synchronises)."""
        offset = self.q_offset
        if offset is None:
            return self.kv_offset + self.kv_len - self.q_len
        if isinstance(offset, Tensor):
            return self.derive("first query", lambda: int(offset))
        return offset

    def replace(self, **changes: Any) -> Pattern:
        """A copy with some fields changed and nothing derived."""
        return dataclasses.replace(self, **changes, _derived={})

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields that are set, by name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: v for name, v in fields.items() if isinstance(v, Tensor)}

    def to(self, device: torch.device | str | int | None) -> Pattern:
        """The pattern with its tensors on ``device``; itself when nothing moves."""
        if device is None:
            return self
        tensors = self.derive("fields", self.tensors)  # every layer asks
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        if all(moved[name] is tensor for name, tensor in tensors.items()):
            return self
        return self.replace(**moved)

    # -- positions -----------------------------------------------------------------------------

    def query_positions(self, device: torch.device | str) -> Tensor:
        """int64 ``[batch or 1, q_len]``."""
        if self.q_positions is not None:
            return self.q_positions
        start = self.q_offset
        if start is None:
            start = self.kv_offset + self.kv_len - self.q_len
        return (torch.arange(self.q_len, device=device) + start)[None]

    def key_positions(self, device: torch.device | str) -> Tensor:
        """int64 ``[batch or 1, kv_len]``."""
        if self.kv_positions is not None:
            return self.kv_positions
        return (torch.arange(self.kv_len, device=device) + self.kv_offset)[None]

    def key_ranks(self, device: torch.device | str) -> Tensor:
        """int64 ``[batch or 1, kv_len]``: tokens of the same sequence that precede each key."""
        if self.kv_ranks is not None:
            return self.kv_ranks
        if self.kv_positions is not None:
            return self.kv_positions
        if self.key_valid is None and self.kv_documents is None:
            return self.key_positions(device)
        if self.key_valid is None:
            counted = torch.ones(1, self.kv_len, dtype=torch.int64, device=device)
        else:
            counted = self.key_valid.to(torch.int64)
        seen = counted.cumsum(1) - counted  # valid tokens before this one, whatever the document
        if self.kv_documents is None:
            return seen + self.kv_offset if self.key_valid is None else seen
        documents = self.kv_documents
        seen = seen.expand(max(seen.shape[0], documents.shape[0]), -1)
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        index = torch.arange(self.kv_len, device=documents.device)
        start_of = torch.where(starts, index, 0).cummax(1).values.expand(seen.shape[0], -1)
        return seen - seen.gather(1, start_of)

    def global_flags(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Which queries and keys are global: bool ``[batch or 1, q_len]``, ``[..., kv_len]``."""
        flags = self.key_ranks(device) < self.num_global_tokens
        if self.key_valid is not None:
            flags = flags & self.key_valid
        if self.global_tokens is not None:
            flags = flags | self.global_tokens
        if self.global_queries is not None:
            return self.global_queries.to(device), flags
        if self.q_positions is not None:
            return self.q_positions < self.num_global_tokens, flags
        # The query at position p is the token of key index p - kv_offset.
        index = self.query_positions(device)[0] - self.kv_offset
        inside = (index >= 0) & (index < self.kv_len)
        at_query = flags[:, index.clamp(0, max(self.kv_len - 1, 0))] & inside
        return at_query, flags

    # -- the predicate -------------------------------------------------------------------------

    def visible(
        self,
        device: torch.device | str,
        q_start: int = 0,
        q_stop: int | None = None,
        kv_start: int = 0,
        kv_stop: int | None = None,
    ) -> Tensor:
        """The mask of one block of pairs.

        Args:
            device: Where to make it.
            q_start: First query of the block.
            q_stop: End of the queries; None for all.
            kv_start: First key of the block.
            kv_stop: End of the keys; None for all.

        Returns:
            bool ``[batch or 1, heads or 1, queries, keys]``, True where the pair is visible.
        """
        rows = slice(q_start, self.q_len if q_stop is None else q_stop)
        cols = slice(kv_start, self.kv_len if kv_stop is None else kv_stop)
        distance = (
            self.query_positions(device)[:, rows, None] - self.key_positions(device)[:, None, cols]
        )
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen = seen & (distance >= 0)
        if self.band is not None:
            seen = seen & (distance.abs() < self.band)
        if self.is_sparse:
            seen = seen & self._kept(distance, rows, cols, device)
        if self.q_documents is not None and self.kv_documents is not None:
            seen = seen & (self.q_documents[:, rows, None] == self.kv_documents[:, None, cols])
        if self.key_valid is not None:
            seen = seen & self.key_valid[:, None, cols]
        mask = seen[:, None]
        if self.dense is not None:
            mask = mask & self.dense[:, :, rows, cols]
        return mask

    def _kept(
        self, distance: Tensor, rows: slice, cols: slice, device: torch.device | str
    ) -> Tensor:
        """The method's terms: bool, broadcastable to ``[batch, queries, keys]``."""
        kept = torch.zeros_like(distance, dtype=torch.bool)
        if self.reach is not None:
            near = distance.abs() < self.reach
            if self.dilation > 1:
                near = near & (distance % self.dilation == 0)
            kept = kept | near
        if self.stride is not None:
            kept = kept | (distance % self.stride == 0)
        if self.num_sink_tokens:
            kept = kept | self.cached("sinks", device)[:, None, cols]
        if self.has_globals:
            queries, keys = self.cached("globals", device)
            kept = kept | queries[:, rows, None] | keys[:, None, cols]
        return kept

    def sink_flags(self, device: torch.device | str) -> Tensor:
        """Which keys are sink tokens: bool ``[batch or 1, kv_len]``."""
        flags = self.key_ranks(device) < self.num_sink_tokens
        return flags if self.key_valid is None else flags & self.key_valid

    def cached(self, what: str, device: torch.device | str) -> Any:
        """`sink_flags` ("sinks") or `global_flags` ("globals"), made once."""
        make = {"sinks": self.sink_flags, "globals": self.global_flags}[what]
        return self.derive((what, str(device)), lambda: make(device))

    def derive(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, made once: all layers of a forward share one pattern."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]
