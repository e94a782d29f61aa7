"""What transformers hands to an attention function, read once and checked for every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_attn_plugin.compat import attention_weights_wanted, update_paged_cache
from hf_attn_plugin.config import ConfigT, parameters_of
from hf_attn_plugin.methods.counting import is_counted, record
from hf_attn_plugin.methods.packing import (
    keep_states_apart,
    refuse_packed_states,
    with_lengths,
    with_restarts,
)
from hf_attn_plugin.methods.sharding import Rows, rows_of, whole_pattern
from hf_attn_plugin.ops import attention
from hf_attn_plugin.ops.reads import nbytes
from hf_attn_plugin.patterns import Pattern, PatternMask
from hf_attn_plugin.patterns.documents import numbers_tokens

T = TypeVar("T")

# Arguments that would change the result and that no method here computes.
_REFUSED = {
    "position_bias": "a position bias added to the scores (T5 and its kin)",
    "indices": "a model's own choice of keys (DeepSeek sparse attention)",
    "block_indices": "a model's own choice of key blocks",
}


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, in this package's terms.

    Attributes:
        method: The ``attn_implementation`` name.
        module: The attention module that called.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``, not expanded.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        pattern: What the model itself lets attend.
        scaling: Factor on the scores.
        softcap: Cap of the scores, or None.
        sinks: ``[heads]`` attention sinks, or None.
        extra: The other keyword arguments.
        own_mask: Whether the caller passed a 4D mask of its own.
        rows: The rows of which query, key and value are a part, spread over ranks; ``pattern`` is
            of all their tokens then. None where there is nothing else.
    """

    method: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    pattern: Pattern
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    extra: dict[str, Any]
    own_mask: bool
    rows: Rows | None = None

    @property
    def is_decoding(self) -> bool:
        """Whether this is one query per sequence over earlier keys."""
        return self.pattern.q_len == 1 and self.pattern.kv_len > 1

    @property
    def is_causal(self) -> bool:
        """Whether the layer looks back only. A mask of the caller's own does not tell."""
        return _is_causal(self.module, self.extra)

    def parameters(self, cls: type[ConfigT]) -> ConfigT:
        """The method's parameters in the model's config, or its defaults."""
        return parameters_of(getattr(self.module, "config", None), cls)


def read_call(
    method: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **extra: Any,
) -> AttentionCall:
    """Read a call of transformers' attention interface.

    Raises:
        ValueError: It asks for something no method here computes (dropout, returned attention
            weights, a position bias, ...), naming what to use instead.
    """
    if dropout:
        raise ValueError(
            f"attn_implementation={method!r} has no attention dropout, and the model asks for "
            f"{dropout}. Set it to 0 in the model's config (attention_dropout=0.0, in some models "
            "attention_probs_dropout_prob=0.0 or attn_pdrop=0.0), or use 'sdpa'."
        )
    if extra.get("output_attentions") or attention_weights_wanted():
        raise ValueError(
            f"attn_implementation={method!r} never holds the attention weights, so "
            "output_attentions=True cannot be honoured. Use attn_implementation='eager'."
        )
    for name, meaning in _REFUSED.items():
        if extra.get(name) is not None:
            raise ValueError(
                f"attn_implementation={method!r} does not support {meaning}, passed as {name!r} by "
                f"{type(module).__name__}. Use attn_implementation='sdpa' or 'eager'."
            )
    if extra.get("global_attention_mask") is not None and method != "longformer":
        raise ValueError(
            f"attn_implementation={method!r} has no global tokens, so global_attention_mask cannot "
            "be honoured. Use attn_implementation='longformer'."
        )
    if extra.get("cache") is not None:
        if method != "flash":
            raise ValueError(
                f"attn_implementation={method!r} does not take part in continuous batching "
                "(generate_batch). Use attn_implementation='flash'."
            )
        key, value = update_paged_cache(extra["cache"], key, value, _layer_idx(module), extra)
        attention_mask = None  # made for the new tokens only; the cumulative lengths say it all
    query, key, value = _under_autocast(query, key, value)
    rows = rows_of(module)
    if rows is None:
        pattern = _pattern(method, module, query, key, attention_mask, extra)
    else:
        pattern = whole_pattern(
            method,
            module,
            rows,
            query,
            key,
            attention_mask,
            causal=_is_causal(module, extra),
            band=extra.get("sliding_window"),
            chunk=chunk_size(module),
            lengths=extra.get("cu_seq_lens_q") is not None,
        )
    return AttentionCall(
        method=method,
        module=module,
        query=query,
        key=key,
        value=value,
        pattern=pattern,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap,
        sinks=s_aux if s_aux is not None else sinks,
        extra=extra,
        own_mask=isinstance(attention_mask, Tensor) and attention_mask.ndim == 4,
        rows=rows,
    )


def attend(
    call: AttentionCall, pattern: Pattern, tokens_seen: int | None = None
) -> tuple[Tensor, None]:
    """Exact attention of a call over ``pattern``, as transformers wants it returned.

    A decoding step over a sparse pattern reads only the keys that its query sees.

    Args:
        call: The call.
        pattern: Its pairs, the method's terms included.
        tokens_seen: Tokens that dense attention would read, where the cache has dropped some.

    Returns:
        The output, contiguous ``[batch, q_len, heads, value_dim]``, and None for the weights.
    """
    if call.rows is not None:
        record(call.module, call.method)
        return call.rows.attend(call, pattern).transpose(1, 2).contiguous(), None
    key, value = call.key, call.value
    # On a GPU the kernel skips blocks that are hidden; of a stride every block holds a key.
    gathers = not key.is_cuda or pattern.stride is not None or is_counted(call.module)
    if call.is_decoding and pattern.is_sparse and gathers and not torch.compiler.is_compiling():
        pattern, index = pattern.derive(
            ("seen", str(key.device)), lambda: _seen(pattern, key.device)
        )
        if isinstance(index, slice):
            key, value = key[:, :, index], value[:, :, index]
        else:
            key, value = key.index_select(2, index), value.index_select(2, index)
    if call.is_decoding:
        held = call.key.shape[2]
        dense = nbytes(call.key, call.value) // held * (tokens_seen or held)
        record(call.module, call.method, read=nbytes(key, value), dense=dense)
    else:
        record(call.module, call.method)
    output, _ = attention(
        call.query,
        key,
        value,
        pattern,
        scaling=call.scaling,
        softcap=call.softcap,
        sinks=call.sinks,
        need_lse=False,
    )
    return output.transpose(1, 2).contiguous(), None


def sparsify(call: AttentionCall, **terms: Any) -> Pattern:
    """The call's pattern with a method's terms, made once for all layers of a forward pass."""
    refuse_cross_attention(call)
    if call.own_mask and (terms.get("num_sink_tokens") or terms.get("num_global_tokens")):
        raise ValueError(
            f"attn_implementation={call.method!r} gives every sequence its own first tokens, and a "
            "4D attention_mask does not tell where sequences start. Pass a 2D attention_mask (and "
            "position_ids for packed documents), or set num_sink_tokens / num_global_tokens to 0."
        )
    tensors = [value for value in terms.values() if isinstance(value, Tensor)]
    plain = [(name, value) for name, value in terms.items() if not isinstance(value, Tensor)]
    return once(call.pattern, ("terms", *plain), tensors, lambda: call.pattern.replace(**terms))


def once(pattern: Pattern, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
    """What ``make`` returns for these tensors, made once per pattern.

    Kept together with the tensors, so that their ids stay their own. Under torch.compile nothing is
    kept, and no id is looked at: it would be guarded, and every step would compile again.
    """
    if torch.compiler.is_compiling():
        return make()
    made: tuple[T, Sequence[Tensor]] = pattern.derive(
        (key, *map(id, tensors)), lambda: (make(), tensors)
    )
    return made[0]


def refuse_cross_attention(call: AttentionCall) -> None:
    """Positions mean nothing between a decoder's queries and an encoder's keys."""
    config = getattr(call.module, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        raise ValueError(
            f"attn_implementation={call.method!r} is defined by distances in one sequence, and "
            f"{type(call.module).__name__} belongs to a model with cross-attention. "
            "Use attn_implementation='flash'."
        )


def chunk_size(module: nn.Module) -> int | None:
    """Tokens per chunk, where the model attends within chunks in this layer (Llama 4)."""
    config: Any = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not kinds or not isinstance(layer, int) or layer >= len(kinds):
        return getattr(config, "attention_chunk_size", None)
    return config.attention_chunk_size if kinds[layer] == "chunked_attention" else None


def _is_causal(module: nn.Module, extra: dict[str, Any]) -> bool:
    causal = extra.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _layer_idx(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise ValueError(
            f"continuous batching needs attention modules that know their layer_idx, and "
            f"{type(module).__name__} does not. Use generate() instead of generate_batch()."
        )
    return index


def _under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does for PyTorch's own attention: its dtype for all three."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _seen(pattern: Pattern, device: torch.device) -> tuple[Pattern, slice | Tensor]:
    """The keys that one query per sequence sees, and the pattern left over them."""
    mask = pattern.visible(device)
    index = mask.any(0).any(0).any(0).nonzero()[:, 0]
    first, count = (int(index[0]), len(index)) if len(index) else (0, 0)
    chosen: slice | Tensor = index
    if count == 0 or int(index[-1]) - first + 1 == count:
        chosen = slice(first, first + count)
    left = mask[..., chosen]
    rest = Pattern(
        q_len=1, kv_len=count, causal=False, dense=None if bool(left.all()) else left.contiguous()
    )
    return rest, chosen


def _pattern(
    method: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | PatternMask | None,
    extra: dict[str, Any],
) -> Pattern:
    """The pairs that the model lets attend."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if isinstance(mask, PatternMask):
        pattern = mask.pattern
        if (pattern.q_len, pattern.kv_len) != (q_len, kv_len):
            raise ValueError(
                f"attn_implementation={method!r}: {type(module).__name__} attends from {q_len} "
                f"queries to {kv_len} keys, but the model's mask is for {pattern.q_len} to "
                f"{pattern.kv_len}. Use attn_implementation='sdpa' for this model."
            )
        pattern = pattern.to(query.device)
    else:
        pattern = _pattern_of_tensor(method, module, mask, (query.shape[0], q_len, kv_len), extra)
    lengths_q, lengths_k = extra.get("cu_seq_lens_q"), extra.get("cu_seq_lens_k")
    if (lengths_q is None) != (lengths_k is None):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k belong together; only one was passed.")
    if lengths_q is not None and lengths_k is not None:
        if query.shape[0] != 1:
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k describe sequences laid out one after another in "
                f"one batch row; got a batch of {query.shape[0]}. Pass position_ids that start "
                "again at every document instead."
            )
        if "cache" not in extra and lengths_q.shape[0] > 2:
            refuse_packed_states(method, module, extra)
        own_mask = isinstance(mask, Tensor) and mask.ndim == 4
        chunk = None if own_mask else chunk_size(module)
        return once(
            pattern,
            ("cu_seq_lens", chunk),
            (lengths_q, lengths_k),
            lambda: with_lengths(pattern, lengths_q, lengths_k, chunk, "cache" not in extra),
        )
    positions = extra.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 4:  # the caller's own, and the whole truth
        return pattern
    if not numbers_tokens(getattr(module, "config", None)):
        positions = None
    if isinstance(positions, Tensor) and positions.ndim in (2, 3) and positions.shape[-1] == q_len:
        one_way = pattern.causal or (pattern.dense is not None and _is_causal(module, extra))
        made = once(
            pattern,
            ("position_ids", one_way),
            (positions,),
            lambda: with_restarts(pattern, positions) if one_way else None,
        )
        pattern = pattern if made is None else made
    return keep_states_apart(pattern, method, module, extra)


def _pattern_of_tensor(
    method: str,
    module: nn.Module,
    mask: Tensor | None,
    shape: tuple[int, int, int],
    extra: dict[str, Any],
) -> Pattern:
    """The pattern of a call that did not come through our mask function."""
    batch, q_len, kv_len = shape
    if mask is not None and mask.ndim == 4:
        if mask.shape[2] not in (1, q_len) or mask.shape[3] < kv_len:
            raise ValueError(
                f"attn_implementation={method!r}: a 4D attention_mask must have shape [batch or 1, "
                f"heads or 1, {q_len}, {kv_len}]; got {tuple(mask.shape)}."
            )
        if mask.shape[0] not in (1, batch):
            raise ValueError(
                f"attn_implementation={method!r}: attention_mask is for a batch of "
                f"{mask.shape[0]}, the model's input is one of {batch}."
            )
        keep = _as_bool(method, mask)[..., :kv_len].expand(-1, -1, q_len, -1)
        return Pattern(q_len=q_len, kv_len=kv_len, causal=False, dense=keep)
    causal, band = _is_causal(module, extra), extra.get("sliding_window")
    if mask is None and band is not None and not causal and kv_len > q_len:
        raise ValueError(
            f"attn_implementation={method!r}: {type(module).__name__} names a window of {band} "
            "keys and passes no mask, for queries over longer keys that it attends to in both "
            "directions; eager attention ignores such a window (DiffusionGemma means it so), a "
            "kernel would not. Use attn_implementation='sdpa'."
        )
    pattern = Pattern(q_len=q_len, kv_len=kv_len, causal=causal, band=band)
    if mask is None:
        return pattern
    if mask.ndim != 2 or mask.shape[1] < kv_len:
        raise ValueError(
            f"attn_implementation={method!r} takes attention masks of shape [batch, {kv_len}] or "
            f"[batch, 1 or heads, {q_len}, {kv_len}]; got {tuple(mask.shape)}."
        )
    return pattern.replace(key_valid=mask[:, -kv_len:].bool())


def _as_bool(method: str, mask: Tensor) -> Tensor:
    """A 4D mask as bool: additive masks must be 0 or so low that nothing is left of the pair."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point:
        raise ValueError(
            f"attn_implementation={method!r} takes 4D attention masks of bool (True attends) or "
            f"float (0 attends, a large negative number does not); got {mask.dtype}."
        )
    keep = mask == 0
    if not torch.compiler.is_compiling() and not bool((keep | (mask <= -1e4)).all()):
        raise ValueError(
            f"attn_implementation={method!r} cannot add a bias to the scores, and the 4D "
            "attention mask holds values other than 0 and large negative ones. Use 'sdpa'."
        )
    return keep
