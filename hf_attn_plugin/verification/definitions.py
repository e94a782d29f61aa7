"""What a call should give over the pairs that it should attend to: softmax's and ``linear``'s.

Both look at every pair, in time and memory quadratic in the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hf_attn_plugin.config import LinearConfig, parameters_of
from hf_attn_plugin.integrations.attention_calls import InterfaceCall
from hf_attn_plugin.ops.torch.linear_features import (
    EluFeatures,
    FavorFeatures,
    FeatureMap,
    floored_log,
)
from hf_attn_plugin.verification.expected import ExpectedPairs

Definition = Callable[[InterfaceCall, ExpectedPairs, torch.dtype], Tensor]
"""From a call, its pairs and a dtype to the output, ``[batch, q_len, heads, value_dim]``."""


def softmax_definition(call: InterfaceCall, pairs: ExpectedPairs, dtype: torch.dtype) -> Tensor:
    """The family's own eager attention of this call in ``dtype``."""
    assert call.eager is not None
    tensors = [tensor.to(dtype) for tensor in (call.query, call.key, call.value)]
    arguments = (call.module, *tensors, pairs.additive(dtype))
    if dtype is not torch.float64:
        output: Tensor = call.eager(*arguments, **call.kwargs)[0]
        return output
    with torch.autocast(call.query.device.type, enabled=False), _Float64():
        exact: Tensor = call.eager(*arguments, **call.kwargs)[0]
        return exact


def linear_definition(call: InterfaceCall, pairs: ExpectedPairs, dtype: torch.dtype) -> Tensor:
    """``sum_j phi(q)phi(k_j) v_j / sum_j phi(q)phi(k_j)`` over the pairs, weight by weight.

    What `ops.linear.reference_linear_attention` says, with a matrix product over the features. Half
    precision is computed in float32, as the method promises.
    """
    logits, value, empty = _linear_terms(call, pairs, dtype)
    weights = logits.softmax(-1).masked_fill(empty, 0.0)
    return (weights @ value).transpose(1, 2)


def linear_numerator(call: InterfaceCall, pairs: ExpectedPairs, dtype: torch.dtype) -> Tensor:
    """`linear_definition`, with gradients of its numerator alone."""
    logits, value, empty = _linear_terms(call, pairs, dtype)
    weights = (logits - logits.logsumexp(-1, keepdim=True).detach()).exp()
    return (weights.masked_fill(empty, 0.0) @ value).transpose(1, 2)


def linear_denominator(call: InterfaceCall, pairs: ExpectedPairs, dtype: torch.dtype) -> Tensor:
    """`linear_definition`, with gradients of its denominator alone."""
    logits, value, empty = _linear_terms(call, pairs, dtype)
    weights = (logits.detach() - logits.logsumexp(-1, keepdim=True)).exp()
    return (weights.masked_fill(empty, 0.0) @ value.detach()).transpose(1, 2)


def _linear_terms(
    call: InterfaceCall, pairs: ExpectedPairs, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of the weights, -inf where a pair does not attend; values; rows without pairs.

    Every query's logarithms are without its own common factor, which the denominator has too.
    """
    dtype = dtype if dtype is torch.float64 else torch.float32
    query, key, value = (tensor.to(dtype) for tensor in (call.query, call.key, call.value))
    scaling = call.kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    features = _features(call.module)
    groups = query.shape[1] // key.shape[1]
    log_q = floored_log(features, query, scaling)
    log_k = floored_log(features, key, scaling).repeat_interleave(groups, 1)
    # A token's common factor: a query's cancels, a key's is added to its logarithms again.
    largest_q, largest_k = log_q.amax(-1, keepdim=True), log_k.amax(-1, keepdim=True)
    products = torch.exp(log_q - largest_q) @ torch.exp(log_k - largest_k).transpose(-1, -2)
    logits = products.log() + largest_k.transpose(-1, -2)
    empty = ~pairs.allowed.any(-1, keepdim=True)
    logits = logits.masked_fill(~(pairs.allowed | empty), float("-inf"))
    return logits, value.repeat_interleave(groups, 1), empty


def _features(module: nn.Module) -> FeatureMap:
    parameters = parameters_of(getattr(module, "config", None), LinearConfig)
    if parameters.feature_map == EluFeatures.name:
        return EluFeatures()
    layer: Any = getattr(module, "layer_idx", None)
    return FavorFeatures(parameters.num_features, parameters.seed, parameters.redraw, layer)


class _Float64(TorchFunctionMode):
    """Runs in float64 what casts to float32 inside, as eager attention's softmax does."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()

        def widen(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        return func(*tree_map(widen, args), **tree_map(widen, kwargs or {}))
