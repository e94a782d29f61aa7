"""Linear attention: softmax's exp(q k) replaced by a product of features, phi(q) phi(k)."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from hf_attn_plugin.ops.attention import SlowAttentionWarning
from hf_attn_plugin.ops.backend import capability_of, installed_packages
from hf_attn_plugin.ops.checks import check_tensors
from hf_attn_plugin.ops.linear_backend import (
    LinearBackend,
    LinearCall,
    choose_linear_backend,
    triton_refuses,
)
from hf_attn_plugin.ops.linear_state import LinearState
from hf_attn_plugin.ops.torch.linear_chunked import Problem, chunked_linear_attention, plan_steps
from hf_attn_plugin.ops.torch.linear_features import (
    EluFeatures,
    FavorFeatures,
    FeatureMap,
    floored_log,
)
from hf_attn_plugin.patterns import Pattern

# Long enough for the matrix products to be worth it, short enough for the pairs inside a chunk.
CHUNK = 128
_INSTALLED = installed_packages()


def feature_map_named(name: str, num_features: int | None = None, seed: int = 0) -> FeatureMap:
    """The feature map ``"elu"`` or ``"favor"``."""
    if name == EluFeatures.name and num_features is None:
        return EluFeatures()
    if name == FavorFeatures.name:
        return FavorFeatures(num_features, seed)
    if name == EluFeatures.name:
        raise ValueError("feature_map='elu' has as many features as head_dim; leave num_features.")
    raise ValueError(f"feature_map must be 'elu' or 'favor'; got {name!r}.")


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    feature_map: FeatureMap | str = "elu",
    scaling: float | None = None,
    state: LinearState | None = None,
    chunk: int | None = None,
    backend: LinearBackend | None = None,
) -> tuple[Tensor, LinearState | None]:
    """Attention with ``phi(q) phi(k)`` in place of ``exp(scaling * q k)``, in O(N).

    Sums are in float32 (float64 for float64 inputs). Differentiable once, in ``state`` too.

    Args:
        query: ``[batch, heads, q_len, head_dim]``, any strides.
        key: ``[batch, kv_heads, kv_len, head_dim]``, never expanded: query head h reads KV head
            ``h // (heads / kv_heads)``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        pattern: Causality, padding, packed documents and offsets. Documents must be numbered in
            ascending order.
        feature_map: ``"elu"`` (arXiv 2006.16236), ``"favor"`` (arXiv 2009.14794) or a map with
            options of its own, ``FavorFeatures(num_features=256, seed=1)``.
        scaling: Factor on the scores that favor approximates; None is ``head_dim ** -0.5``. elu
            has none.
        state: Of earlier keys, which every query sees (with documents, those of the first one).
        chunk: Tokens computed together, None for what suits the backend; changes rounding only.
            Triton rounds it up to whole tiles.
        backend: What computes it; None for the choice of `choose_linear_backend`.

    Returns:
        The output ``[batch, heads, q_len, value_dim]`` in the inputs' dtype, 0 for a query that
        sees nothing; and the state after all keys that the last query may see. With documents it is
        that of the last one, and None where these are not causal.

    Raises:
        ValueError: Shapes or dtypes do not fit together, the pattern has windows or a mask of the
            caller's own, ``state`` was made with other features, or ``backend`` cannot honour the
            call.
    """
    if isinstance(feature_map, str):
        feature_map = feature_map_named(feature_map)
    _check(query, key, value, pattern, feature_map, state, chunk)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not pattern.causal and pattern.q_documents is not None:
        if state is not None:
            raise ValueError("linear_attention: documents seen both ways take no earlier state.")
        output = _each_document(query, key, value, pattern, feature_map, scaling, chunk, backend)
        return output, None
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if state is None:
        batch, kv_heads = key.shape[:2]
        features = feature_map.width(query.shape[-1])
        sums = key.new_zeros(batch, kv_heads, features, value.shape[-1] + 1, dtype=dtype)
        log_scale = key.new_full((batch, kv_heads), float("-inf"), dtype=dtype)
        state = LinearState(sums, log_scale, feature_map)
    if _backend(query, key, value, backend) is LinearBackend.TRITON:
        from hf_attn_plugin.ops.triton.linear import triton_linear_attention

        return triton_linear_attention(
            query, key, value, pattern, state, scaling=scaling, chunk=chunk
        )
    device, size = query.device, chunk or CHUNK
    steps = pattern.derive(
        ("linear steps", size, str(device)), lambda: plan_steps(pattern, size, device)
    )
    problem = Problem(steps, feature_map, scaling, dtype, query.shape[1] // key.shape[1])
    output, sums, log_scale = chunked_linear_attention(
        problem, query, key, value, state.sums, state.log_scale
    )
    return output, LinearState(sums, log_scale, feature_map)


def _backend(
    query: Tensor, key: Tensor, value: Tensor, asked: LinearBackend | None
) -> LinearBackend:
    """The backend that was asked for, or the choice of `choose_linear_backend`."""
    call = LinearCall(
        dtype=query.dtype,
        device_type=query.device.type,
        capability=capability_of(query.device),
        installed=_INSTALLED,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        empty=0 in (query.shape[0], query.shape[2], key.shape[2]),
    )
    if asked is None:
        choice = choose_linear_backend(call)
        if choice.falls_back:
            _warn_once(choice.reason)
        return choice.backend
    refused = triton_refuses(call) if asked is LinearBackend.TRITON else None
    if refused is not None:
        raise ValueError(
            f"linear_attention: {asked} cannot compute this call: {refused}. Pass backend=None."
        )
    return asked


def reference_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    feature_map: FeatureMap | str = "elu",
    scaling: float | None = None,
) -> Tensor:
    """The specification of `linear_attention`: every pair by itself, differentiable by autograd.

    Args:
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        pattern: Which pairs attend; any pattern.
        feature_map: The features.
        scaling: Factor on the scores that favor approximates; None is ``head_dim ** -0.5``.

    Returns:
        ``[batch, heads, q_len, value_dim]`` in the inputs' dtype, 0 for a query that sees nothing.
    """
    if isinstance(feature_map, str):
        feature_map = feature_map_named(feature_map)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    log_q = floored_log(feature_map, query, scaling)
    log_k = floored_log(feature_map, key, scaling).repeat_interleave(groups, 1)
    products = torch.logsumexp(log_q[:, :, :, None] + log_k[:, :, None], -1)
    products = products.masked_fill(~pattern.visible(query.device), float("-inf"))
    total = torch.logsumexp(products, -1, keepdim=True)
    weights = torch.exp(products - torch.where(total.isneginf(), 0.0, total))
    return weights @ value.repeat_interleave(groups, 1)


@functools.cache  # bounded by the reasons there are
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"linear_attention runs chunk after chunk in PyTorch, which is many times slower on a GPU "
        f"than Triton's kernels: {reason}.",
        SlowAttentionWarning,
        stacklevel=4,
    )


def _each_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    feature_map: FeatureMap,
    scaling: float,
    chunk: int | None,
    backend: LinearBackend | None,
) -> Tensor:
    """Documents whose queries see all of their keys, one after another."""
    assert pattern.q_documents is not None
    assert pattern.kv_documents is not None
    rows = []
    for b in range(query.shape[0]):
        q_documents = pattern.q_documents[b if pattern.q_documents.shape[0] > 1 else 0]
        kv_documents = pattern.kv_documents[b if pattern.kv_documents.shape[0] > 1 else 0]
        parts: list[Tensor] = []
        for document, length in zip(
            *(t.tolist() for t in q_documents.unique_consecutive(return_counts=True)), strict=True
        ):
            start = sum(part.shape[2] for part in parts)
            first, last = (
                int(torch.searchsorted(kv_documents, document, right=right))
                for right in (False, True)
            )
            valid = pattern.key_valid
            if valid is not None:
                valid = valid[b if valid.shape[0] > 1 else 0, None, first:last]
            one = Pattern(q_len=length, kv_len=last - first, causal=False, key_valid=valid)
            part, _ = linear_attention(
                query[b : b + 1, :, start : start + length],
                key[b : b + 1, :, first:last],
                value[b : b + 1, :, first:last],
                one,
                feature_map=feature_map,
                scaling=scaling,
                chunk=chunk,
                backend=backend,
            )
            parts.append(part)
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    feature_map: FeatureMap,
    state: LinearState | None,
    chunk: int | None,
) -> None:
    check_tensors("linear_attention", query, key, value, pattern)
    check_pattern(pattern)
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_attention: chunk must be at least 1 token; got {chunk}.")
    if state is None:
        return
    if state.feature_map != feature_map:
        raise ValueError(
            f"linear_attention: the state was made with {state.feature_map}, the call is for "
            f"{feature_map}. Features cannot change while a state lives: start a new cache."
        )
    wanted = (*key.shape[:2], feature_map.width(query.shape[-1]), value.shape[-1] + 1)
    if tuple(state.sums.shape) != wanted:
        raise ValueError(
            f"linear_attention: the state is {tuple(state.sums.shape)}, the call needs {wanted}."
        )


def check_pattern(pattern: Pattern) -> None:
    """Refuse what a sum over all earlier keys cannot honour.

    Raises:
        ValueError: The pattern has windows, a mask of the caller's own, positions of its own, or
            documents that are not numbered in ascending order.
    """
    refused = {
        "a window": pattern.band is not None or pattern.is_sparse,
        "a dense mask": pattern.dense is not None,
        "positions of its own": pattern.q_positions is not None,
    }
    for what, present in refused.items():
        if present:
            raise ValueError(
                f"linear_attention adds up all earlier keys and cannot leave some out, and the "
                f"pattern has {what}. Use attention(), which is softmax attention."
            )
    if not pattern.derive("ascending", lambda: _ascending(pattern)):
        raise ValueError("linear_attention: documents must be numbered in ascending order.")


def _ascending(pattern: Pattern) -> bool:
    documents = (pattern.q_documents, pattern.kv_documents)
    return all(bool((d.diff(dim=1) >= 0).all()) for d in documents if d is not None)
