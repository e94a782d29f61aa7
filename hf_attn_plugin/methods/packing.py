"""Packed documents in an attention call: told by positions or by lengths, or refused."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugin.compat import recurrent_layers
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.documents import (
    CONTINUED,
    begin_again,
    number_in_cache,
    restarts,
)
from hf_attn_plugin.patterns.refusal import refuse_where

_CONV, _SCAN, _DELTA = "causal_conv1d", "mamba_ssm", "fla"
_SEQ_IDX = ("seq_idx",)
_BOTH = ("seq_idx", "cu_seq_lens_q")

RECURRENT_PACKING: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"),
        (_SEQ_IDX, (_CONV, _SCAN)),
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe"), (_SEQ_IDX, (_CONV,))),
    **dict.fromkeys(
        ("olmo_hybrid", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text"),
        (_BOTH, (_CONV, _DELTA)),
    ),
}
"""Model types whose recurrent layers can keep packed documents apart: the arguments that all their
kernels together read, and the packages of these kernels. The plain PyTorch code that runs without
them cannot, and before transformers 5.23 it says nothing."""


def refuse_packed_states(method: str, module: nn.Module, extra: dict[str, Any]) -> None:
    """Refuse packed documents in a model with recurrent layers that would not tell them.

    Attention keeps documents apart; the state of the layers beside it runs on, except in kernels
    that read ``seq_idx`` or ``cu_seq_lens_q``.
    """
    refusal = _mixes_states(method, module, extra)
    if refusal is not None:
        raise ValueError(refusal)


def keep_states_apart(
    pattern: Pattern, method: str, module: nn.Module, extra: dict[str, Any]
) -> Pattern:
    """`refuse_packed_states` where the pattern holds more than one document.

    Under torch.compile every pattern has numbers of documents, and the graph looks at them.
    """
    documents = pattern.q_documents
    refusal = None if documents is None else _mixes_states(method, module, extra)
    if documents is None or refusal is None:
        return pattern
    if not torch.compiler.is_compiling():
        raise ValueError(refusal)
    several = documents != documents[:, :1]
    return pattern.replace(q_documents=refuse_where(several, refusal, documents))


def _mixes_states(method: str, module: nn.Module, extra: dict[str, Any]) -> str | None:
    """Why recurrent layers beside this one would not keep packed documents apart, if so."""
    config = getattr(module, "config", None)
    kinds = recurrent_layers(config)
    if not kinds:
        return None
    model_type = getattr(config, "model_type", None)
    arguments, packages = RECURRENT_PACKING.get(str(model_type), ((), ()))
    missing = [name for name in arguments if extra.get(name) is None]
    absent = [name for name in packages if find_spec(name) is None]
    if arguments and not missing and not absent:
        return None
    can = ""
    if arguments:
        can = (
            f", or pass {' and '.join(arguments)} too (DataCollatorWithFlattening makes them) and "
            f"have {' and '.join(packages)} installed, whose kernels read them"
        )
    return (
        f"attn_implementation={method!r} keeps packed documents apart, but this model "
        f"({model_type}) also has {' and '.join(map(repr, kinds))} layers, whose state runs on "
        "from one document into the next: they are not told. Pass each document as a batch row of "
        f"its own{can}."
    )


def with_restarts(pattern: Pattern, positions: Tensor) -> Pattern | None:
    """Packed documents, told by position_ids that start again; None where nothing changes.

    Transformers' own masks miss them whenever a cache is made too or a mask is passed; such
    documents would then attend to each other. (None and not the pattern: it is kept with the
    pattern, and a pattern that holds itself would wait for the garbage collector.)
    """
    if pattern.q_documents is not None or pattern.q_len < 2:
        return None
    compiling = torch.compiler.is_compiling()  # then no value may be looked at
    valid = pattern.key_valid
    empty = pattern.kv_len - pattern.q_len
    if empty and compiling:
        return _restarts_unseen(pattern, positions)
    if empty:
        start = pattern.first_query - pattern.kv_offset
        valid = None if valid is None else valid[:, start : start + pattern.q_len]
    starts = restarts(positions, valid)
    cached = None if not empty or start == 0 else _seen(pattern, start, starts.shape[0])
    again = cached is not None and bool(begin_again(positions, valid, cached).any())
    if not compiling and not again and not bool(starts.any()):
        return None
    documents = kv_documents = starts.to(torch.int64).cumsum(1)
    if empty:
        if start > 0:
            raise ValueError(CONTINUED)
        # The slots of a static cache that nothing was written to belong to no document.
        kv_documents = torch.nn.functional.pad(documents, (0, empty), value=pattern.q_len)
    return pattern.replace(q_documents=documents, kv_documents=kv_documents)


def _restarts_unseen(pattern: Pattern, positions: Tensor) -> Pattern:
    """`with_restarts` over a cache, where no value may be looked at before the graph runs."""
    start: int | Tensor = pattern.kv_len - pattern.q_len
    if pattern.q_offset is not None:
        start = pattern.q_offset - pattern.kv_offset
    index = torch.arange(pattern.kv_len, device=positions.device)
    cached = (index < start)[None]
    valid = pattern.key_valid
    if valid is not None:
        cached = cached & valid
        valid = valid[:, start + torch.arange(pattern.q_len, device=valid.device)]
    starts = restarts(positions, valid)
    begun = cached.any(1)
    wrong = (starts.any(1) & begun) | begin_again(positions, valid, begun)
    documents = number_in_cache(starts, start, pattern.kv_len)
    return pattern.replace(
        q_documents=starts.to(torch.int64).cumsum(1),
        kv_documents=refuse_where(wrong, CONTINUED, documents),
    )


def _seen(pattern: Pattern, start: int, rows: int) -> Tensor:
    """Whether any valid key lies before the first query: bool ``[rows or 1]``."""
    if pattern.key_valid is None:
        return torch.ones(rows, dtype=torch.bool)
    return pattern.key_valid[:, :start].any(1)


def with_lengths(
    pattern: Pattern, lengths_q: Tensor, lengths_k: Tensor, chunk: int | None, exact: bool
) -> Pattern:
    """Sequences laid out one after another, told by cumulative lengths (one batch row).

    ``chunk`` is the layer's own, which starts anew in every sequence. ``exact`` says that the
    lengths cover all tokens; paged caches pad theirs.
    """
    if exact and not torch.compiler.is_compiling():
        for name, lengths, total in (
            ("q", lengths_q, pattern.q_len),
            ("k", lengths_k, pattern.kv_len),
        ):
            if (
                int(lengths[0]) != 0
                or int(lengths[-1]) != total
                or bool((lengths.diff() < 0).any())
            ):
                raise ValueError(
                    f"cu_seq_lens_{name} must ascend from 0 to the {total} tokens of the call; "
                    f"got {lengths.tolist()}."
                )
    q_documents = _document_of(lengths_q, pattern.q_len)
    kv_documents = _document_of(lengths_k, pattern.kv_len)
    same = lengths_q.shape == lengths_k.shape and torch.equal(lengths_q, lengths_k)
    if same and chunk is None:
        return pattern.replace(q_documents=q_documents, kv_documents=kv_documents)
    # Queries are the last tokens of their sequences: number both from each sequence's start.
    starts_q, starts_k = lengths_q.long(), lengths_k.long()
    lead = (starts_k[1:] - starts_k[:-1]) - (starts_q[1:] - starts_q[:-1])
    last = len(lead) - 1
    q_doc, kv_doc = q_documents[0].clamp(max=last), kv_documents[0].clamp(max=last)
    q_index = torch.arange(pattern.q_len, device=q_doc.device)
    kv_index = torch.arange(pattern.kv_len, device=kv_doc.device)
    q_positions = (q_index - starts_q[q_doc] + lead[q_doc])[None]
    kv_positions = (kv_index - starts_k[kv_doc])[None]
    numbered: dict[str, Tensor] = {}
    if not same:
        numbered = {"q_positions": q_positions, "kv_positions": kv_positions}
    if chunk is not None:  # a chunk is no document: it has no first tokens of its own
        q_documents = q_documents * pattern.kv_len + q_positions // chunk
        kv_documents = kv_documents * pattern.kv_len + kv_positions // chunk
        numbered["kv_ranks"] = kv_positions
    return pattern.replace(q_documents=q_documents, kv_documents=kv_documents, **numbered)


def _document_of(lengths: Tensor, total: int) -> Tensor:
    """int64 ``[1, total]``: which of the sequences each token belongs to."""
    index = torch.arange(total, device=lengths.device)
    return torch.searchsorted(lengths[1:].long().contiguous(), index, right=True)[None]
