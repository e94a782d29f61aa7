"""SparQ decoding on the GPU: what `ops.sparq.decode` specifies, in two or three launches."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from hf_attn_plugin.ops.sparq.key_copy import (
    Components,
    FullComponents,
    QuantizedComponents,
    StridedComponents,
)
from hf_attn_plugin.ops.triton.sparq_launch import Inputs, Settings, Tiles, launch
from hf_attn_plugin.ops.triton.support_sparq import refuses_sizes


def triton_sparq(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    rank: int,
    top_k: int,
    local_window: int,
    mean_value_reallocation: bool,
    coverage: float | None = None,
    rank_coverage: float | None = None,
    scaling: float | None = None,
    components: Components | None = None,
    value_sum: Tensor | None = None,
    value_count: Tensor | None = None,
    first: Tensor | None = None,
    stop: Tensor | None = None,
    visible: Tensor | None = None,
    recent: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """SparQ's decoding step (arXiv 2312.04985) as `ops.sparq.decode.sparq_decode` defines it.

    The first kernel reads ``rank`` components of all visible keys, the last chooses ``top_k`` keys
    and attends to them; where query heads share a KV head, one between them adds up their
    approximate softmax. Nothing waits for the device and no shape depends on how many keys are
    visible, so that a captured call goes on as a cache of fixed size fills up.

    Args:
        query: ``[batch, heads, 1, head_dim]`` in float16, bfloat16 or float32.
        keys: ``[batch, kv_heads, length, head_dim]``, head_dim contiguous.
        values: ``[batch, kv_heads, length, value_dim]``, value_dim contiguous.
        rank: Query components r.
        top_k: Keys k.
        local_window: Most recent visible keys that are always chosen.
        mean_value_reallocation: Give the mass of the keys left out to the mean value.
        coverage: Share of the approximate mass that the keys need to have, in place of k keys.
        rank_coverage: Share of the query's magnitude that the components need to have.
        scaling: Factor of the scores; None is 1/√head_dim.
        components: The same keys by component, at least as many as are visible. None, and
            `StridedComponents`, read all visible keys in their place.
        value_sum: float32 ``[batch, kv_heads, value_dim]``, the sum of the visible values.
        value_count: int ``[batch or 1]``, how many these are; None is as many as are visible.
        first: int ``[batch or 1]`` or 0-dimensional, the first visible key; None is 0.
        stop: Likewise, one after the last visible key; None is ``length``. What lies outside of
            the visible run is not used, and may be NaN.
        visible: bool ``[batch or 1, length]``, which keys of that run are visible; None is all.
            With it ``recent`` and, where it is needed, ``value_count`` must be given.
        recent: Int like ``first``: visible keys from this one on are the local window.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[heads]``, one more logit per head in both softmaxes, without a value.
        tiles: How to cut the work; None takes what was measured to be fast.

    Returns:
        ``[batch, heads, 1, value_dim]`` in the query's dtype; 0 where no key is visible.

    Raises:
        ValueError: Tensors that do not fit each other, a parameter out of range, or what the
            kernels do not take (see `support_sparq`).
    """
    _check(query, keys, values, rank, top_k, local_window)
    if mean_value_reallocation and (value_sum is None or sinks is not None):
        raise ValueError(
            "triton_sparq: mean_value_reallocation needs value_sum, and is not defined with sinks."
        )
    if (visible is None) != (recent is None):
        raise ValueError("triton_sparq: visible and recent go together.")
    if visible is not None and mean_value_reallocation and value_count is None:
        raise ValueError("triton_sparq: with visible, value_count must be given.")
    head_dim = query.shape[3]
    if rank >= head_dim and rank_coverage is None:
        components = None  # all of the keys are read anyway
    inputs = Inputs(
        query,
        keys,
        values,
        value_sum=value_sum if mean_value_reallocation else None,
        value_count=value_count if mean_value_reallocation else None,
        first=first,
        stop=stop,
        visible=visible,
        recent=recent,
        sinks=sinks,
        **_parts(components),
    )
    settings = Settings(
        rank=min(rank, head_dim),
        top_k=min(top_k, keys.shape[2]),
        local_window=local_window,
        bits=components.bits if isinstance(components, QuantizedComponents) else 0,
        # As floats: Triton compiles integers, and 1 above all, into kernels of their own.
        coverage=None if coverage is None else float(coverage),
        rank_coverage=None if rank_coverage is None else float(rank_coverage),
        scaling=1 / math.sqrt(head_dim) if scaling is None else float(scaling),
        softcap=None if softcap is None else float(softcap),
    )
    if torch.compiler.is_compiling():
        tensors = (getattr(inputs, field.name) for field in dataclasses.fields(inputs))
        numbers = (getattr(settings, field.name) for field in dataclasses.fields(settings))
        output: Tensor = _sparq_op(*tensors, *numbers)
        return output
    return launch(inputs, settings, tiles)


def _parts(components: Components | None) -> dict[str, Tensor | None]:
    """The tensors of a copy, as `Inputs` has them."""
    if components is None or isinstance(components, StridedComponents):
        return {}
    if isinstance(components, FullComponents):
        parts: dict[str, Tensor | None] = {"keys_t": components.keys_t}
        contiguous = components.keys_t.stride(3) == 1
    elif isinstance(components, QuantizedComponents):
        names = ("codes", "scale", "offset", "tail")
        each = [getattr(components, name) for name in names]
        contiguous = all(part.stride(-1) == 1 for part in each)
        contiguous = contiguous and each[0].stride(3) == each[0].shape[4]
        parts = {**dict(zip(names, each, strict=True)), "tail_at": components.tail_at}
    else:
        raise ValueError(f"triton_sparq cannot read a {type(components).__name__}.")
    if not contiguous:
        raise ValueError("triton_sparq: components must be contiguous along the positions.")
    return parts


def _check(
    query: Tensor, keys: Tensor, values: Tensor, rank: int, top_k: int, local_window: int
) -> None:
    wrong = None
    if query.ndim != 4 or keys.ndim != 4 or values.ndim != 4 or query.shape[2] != 1:
        wrong = "takes one query per sequence"
    elif keys.shape[:3] != values.shape[:3] or query.shape[0] != keys.shape[0]:
        wrong = "batch, KV heads and keys must agree"
    elif query.shape[3] != keys.shape[3] or query.shape[1] % max(keys.shape[1], 1):
        wrong = "the query does not fit the keys"
    if wrong is not None:
        shapes = ", ".join(
            f"{name} {tuple(tensor.shape)}"
            for name, tensor in (("query", query), ("keys", keys), ("values", values))
        )
        raise ValueError(f"triton_sparq: {wrong}; got {shapes}.")
    if not query.dtype == keys.dtype == values.dtype:
        dtypes = f"{query.dtype}, {keys.dtype}, {values.dtype}"
        raise ValueError(f"triton_sparq: query, keys and values must share a dtype; got {dtypes}.")
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("triton_sparq: each key, and each value, must be contiguous.")
    if rank < 1 or top_k < 1 or not 0 <= local_window <= top_k:
        raise ValueError(
            "triton_sparq: rank and top_k must be at least 1 and local_window 0 to top_k; got "
            f"{rank}, {top_k}, {local_window}."
        )
    refused = refuses_sizes(
        query.dtype,
        query.shape[3],
        values.shape[3],
        query.shape[1] // max(keys.shape[1], 1),
        keys.shape[2],
        top_k,
    )
    if refused is not None:
        raise ValueError(f"triton_sparq: {refused}. Use ops.sparq.decode.sparq_decode.")


def _sparq(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    keys_t: Tensor | None,
    codes: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    tail: Tensor | None,
    tail_at: Tensor | None,
    value_sum: Tensor | None,
    value_count: Tensor | None,
    first: Tensor | None,
    stop: Tensor | None,
    visible: Tensor | None,
    recent: Tensor | None,
    sinks: Tensor | None,
    rank: int,
    top_k: int,
    local_window: int,
    bits: int,
    coverage: float | None,
    rank_coverage: float | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """The call as ``torch.compile`` sees it; arguments as in `Inputs` and `Settings`."""
    copy = (keys_t, codes, scale, offset, tail, tail_at)
    run = (first, stop, visible, recent)
    inputs = Inputs(query, keys, values, *copy, value_sum, value_count, *run, sinks)
    numbers = (rank, top_k, local_window, bits, coverage, rank_coverage, scaling, softcap)
    return launch(inputs, Settings(*numbers))


_sparq_op = torch.library.custom_op("hf_attn_plugin::sparq", _sparq, mutates_args=())


@_sparq_op.register_fake
def _sparq_fake(query: Tensor, keys: Tensor, values: Tensor, *rest: object) -> Tensor:
    return query.new_empty(*query.shape[:2], 1, values.shape[-1])
