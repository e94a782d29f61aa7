"""Patterns in the terms that vendors' kernels know: causal, a window, documents."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from hf_attn_plugin.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """A pattern that such terms say completely. Every query sees at least one key.

    Attributes:
        causal: Whether a query sees only keys at its own position and before; the last query sits
            at the last key.
        window: Keys seen, the query included; to both sides where not causal. None: no window.
        documents: Whether only keys of the query's own document are seen.
    """

    causal: bool
    window: int | None
    documents: bool

    @property
    def unrestricted(self) -> bool:
        """Whether nothing but causality limits the pairs."""
        return self.window is None and not self.documents


def built_in(pattern: Pattern) -> BuiltIn | str:
    """The pattern in these terms, or which term it has that they lack.

    Made once per pattern. Reads the value of an offset that is a tensor (synchronises), no others.
    """
    return pattern.derive("built in", lambda: _built_in(pattern))


def _built_in(pattern: Pattern) -> BuiltIn | str:
    unknown = {
        "dense": "mask of the caller's own",
        "q_positions": "queries and keys that are numbered apart",
        "key_valid": "padding",
    }
    for name, meaning in unknown.items():
        if getattr(pattern, name) is not None:
            return meaning
    if isinstance(pattern.q_offset, Tensor) and pattern.q_offset.numel() != 1:
        return "positions of its own for every row"
    first = pattern.first_query - pattern.kv_offset  # index of the key beside the first query
    aligned = first == pattern.kv_len - pattern.q_len and first >= 0
    farthest = first + pattern.q_len - 1
    if not pattern.causal:
        farthest = max(farthest, pattern.kv_len - 1 - first)
    window = None
    if pattern.is_sparse:
        kept = _kept_window(pattern, farthest + 1)
        if isinstance(kept, str):
            return kept
        window = kept
    if pattern.band is not None and pattern.band <= farthest:
        window = pattern.band if window is None else min(window, pattern.band)
    documents = pattern.q_documents is not None
    if documents and (not aligned or first != 0):
        return "packed documents over a cache"
    causal = pattern.causal and (first < pattern.kv_len - 1 or window is not None)
    if (causal or window is not None) and not aligned:
        return "last query that is not at the last key"
    return BuiltIn(causal=causal, window=window, documents=documents)


def _kept_window(pattern: Pattern, span: int) -> int | str | None:
    """The window that the method's terms are, None for every pair, or which term is no window."""
    if pattern.reach is not None and pattern.dilation == 1 and pattern.reach >= span:
        return None  # and then the other terms add nothing
    if pattern.has_globals:
        return "global tokens"
    if pattern.num_sink_tokens:
        return "sink tokens"
    if pattern.stride is not None:
        return "stride"
    if pattern.dilation > 1:
        return "dilation"
    return pattern.window
