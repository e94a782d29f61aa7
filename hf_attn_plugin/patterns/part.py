"""A rectangle of a pattern as a pattern of its own: some queries and some keys of the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.patterns.pattern import Pattern


def part(pattern: Pattern, rows: range, cols: range) -> Pattern:
    """The pairs of some neighbouring queries and keys; all stay what they are in the whole.

    Positions, documents, padding, which keys are the first of their sequence and which queries are
    global are those of the whole, whatever the part shows of it. What bites nowhere in the part is
    left out (padding where there is none, documents where there is one), so that kernels that do
    not know it can compute the part. That reads values, and so waits for a device that has them.

    Args:
        pattern: The whole.
        rows: Indices of queries, in steps of 1.
        cols: Indices of keys, in steps of 1.

    Returns:
        A pattern of ``len(rows)`` queries and ``len(cols)`` keys.

    Raises:
        ValueError: They are not all of the whole.
    """
    for name, tokens, length in (("rows", rows, pattern.q_len), ("cols", cols, pattern.kv_len)):
        if tokens.step != 1 or not 0 <= tokens.start <= tokens.stop <= length:
            raise ValueError(
                f"part: {name} must be a range within 0..{length} in steps of 1, got {tokens}."
            )
    queries, keys = slice(rows.start, rows.stop), slice(cols.start, cols.stop)
    changes: dict[str, Any] = {
        "q_len": len(rows),
        "kv_len": len(cols),
        "q_offset": _first_query(pattern, rows.start),
        "kv_offset": pattern.kv_offset + cols.start,
    }
    for name, index in (
        ("q_documents", queries),
        ("q_positions", queries),
        ("kv_documents", keys),
        ("kv_positions", keys),
        ("key_valid", keys),
        ("global_tokens", keys),
    ):
        tensor = getattr(pattern, name)
        changes[name] = None if tensor is None else tensor[:, index]
    if pattern.dense is not None:
        changes["dense"] = pattern.dense[:, :, queries, keys]
    changes |= _documents_that_differ(changes)
    changes |= _padding(changes)
    changes |= _first_tokens(pattern, queries, keys)
    return pattern.replace(**changes)


def _first_query(pattern: Pattern, row: int) -> int | Tensor | None:
    """Where the part's first query sits."""
    if pattern.q_positions is not None:
        return None
    offset = pattern.q_offset
    if offset is None:
        offset = pattern.kv_offset + pattern.kv_len - pattern.q_len
    return offset + row


def _documents_that_differ(fields: dict[str, Any]) -> dict[str, Tensor | None]:
    """Documents, if in some row of the batch the part's pairs are not all of one."""
    queries, keys = fields["q_documents"], fields["kv_documents"]
    if queries is None or not queries.numel() or not keys.numel():
        return {}
    one = bool((queries == keys[:, :1]).all() and (keys == keys[:, :1]).all())
    return {"q_documents": None, "kv_documents": None} if one else {}


def _padding(fields: dict[str, Any]) -> dict[str, Tensor | None]:
    valid = fields["key_valid"]
    return {"key_valid": None} if valid is not None and bool(valid.all()) else {}


def _first_tokens(pattern: Pattern, queries: slice, keys: slice) -> dict[str, Any]:
    """Sink tokens and global tokens of the part, which the part alone would find elsewhere."""
    fields: dict[str, Any] = {"kv_ranks": None, "global_queries": None}
    ranked = False
    # A method's window or stride still says that not all pairs are kept.
    restricted = pattern.window is not None or pattern.stride is not None
    if pattern.num_sink_tokens:
        sinks = pattern.cached("sinks", _device(pattern))[:, keys]
        if restricted and not bool(sinks.any()):
            fields["num_sink_tokens"] = 0
        else:
            ranked = True
    if pattern.has_globals:
        all_queries, all_keys = pattern.cached("globals", _device(pattern))
        global_queries = all_queries[:, queries]
        some = global_queries.any() | all_keys[:, keys].any()
        if restricted and not bool(some):
            fields |= {"num_global_tokens": 0, "global_tokens": None}
        else:
            fields["global_queries"] = global_queries
            ranked = ranked or pattern.num_global_tokens > 0
    if ranked:
        fields["kv_ranks"] = _ranks(pattern, keys)
    return fields


def _ranks(pattern: Pattern, keys: slice) -> Tensor | None:
    """How many tokens of its sequence precede a key, where its position does not say it."""
    given = (pattern.kv_ranks, pattern.key_valid, pattern.kv_documents)
    if all(tensor is None for tensor in given):
        return None
    device = _device(pattern)
    return pattern.derive(("ranks", str(device)), lambda: pattern.key_ranks(device))[:, keys]


def _device(pattern: Pattern) -> torch.device:
    """Where the values of a pattern are."""
    tensors = pattern.tensors().values()
    return next((tensor.device for tensor in tensors if tensor.ndim == 2), torch.device("cpu"))
