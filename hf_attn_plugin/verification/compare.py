"""One call of an attention function beside its definition in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_attn_plugin.integrations.attention_calls import InterfaceCall
from hf_attn_plugin.methods import METHODS
from hf_attn_plugin.verification.definitions import (
    Definition,
    linear_definition,
    linear_denominator,
    linear_numerator,
    softmax_definition,
)
from hf_attn_plugin.verification.expected import ExpectedPairs


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far a result is from the truth; the fields are those of `LayerCheck`."""

    max_abs_error: float
    relative_error: float
    budget: float | None
    ok: bool
    detail: str = ""
    from_softmax: float | None = None


def compare_output(
    call: InterfaceCall,
    reference: InterfaceCall,
    output: Tensor,
    pairs: ExpectedPairs,
    approximate: bool,
    definition: Definition,
) -> Comparison:
    """Judge the output of a call, ``[batch, q_len, heads, value_dim]``.

    Args:
        call: The call as it was made.
        reference: The same with the keys and values that eager attention would have.
        output: What the call returned.
        pairs: Which of the reference's pairs should attend.
        approximate: Whether the method is an approximation here.
        definition: What it should compute over these pairs.
    """
    empty = _empty_rows(pairs)
    exact = _without(definition(reference, pairs, torch.float64), empty)
    plain = _without(definition(reference, pairs, call.query.dtype), empty)
    tried = output if call.implementation in METHODS else _without(output, empty)
    comparison = _compare(tried, plain, exact, None if approximate else _rounding(output))
    if definition is not softmax_definition:
        softmax = _without(softmax_definition(reference, pairs, torch.float64), empty)
        distance = _compare(exact, softmax, softmax, None).relative_error
        comparison = dataclasses.replace(comparison, from_softmax=distance)
    if comparison.ok:
        return comparison
    if reference is not call:
        keeps_keys = definition is softmax_definition
        cache = "a cache that has dropped keys" if keeps_keys else "a state of earlier keys"
        return dataclasses.replace(comparison, detail=f"over {cache}")
    where = "" if approximate else _describe(call, pairs)
    return dataclasses.replace(comparison, detail=where)


def compare_gradients(
    call: InterfaceCall, pairs: ExpectedPairs, approximate: bool, definition: Definition
) -> list[tuple[str, Comparison]]:
    """Judge the gradients of query, key and value for random gradients of the output.

    Gradients of ``linear`` are small differences between those of its numerator and those of its
    denominator, which any order of computation rounds separately. One evaluation of the definition
    does not show how far that reaches, so it is measured: both are taken in float64 at inputs that
    are rounded at random, each in its own way.
    """
    empty = _empty_rows(pairs)
    generator = torch.Generator().manual_seed(0)
    batch, heads, q_len, _ = call.query.shape
    shape = (batch, q_len, heads, call.value.shape[-1])
    # The same in every dtype: what is judged is not to answer for rounded weights.
    weights = torch.randn(shape, generator=generator).bfloat16().double()
    weights = _without(weights.to(call.query.device), empty)

    def gradients(
        function: Definition | None, dtype: torch.dtype | None, seed: int | None = None
    ) -> list[Tensor]:
        """Of ``function``, or of the call itself; with a seed, at inputs rounded at random."""
        leaves = [
            _rounded(tensor.detach().to(dtype or tensor.dtype), seed).requires_grad_()
            for tensor in (call.query, call.key, call.value)
        ]
        changed = dataclasses.replace(call, query=leaves[0], key=leaves[1], value=leaves[2])
        with torch.enable_grad():
            output = function(changed, pairs, dtype) if function and dtype else changed.run()[0]
            found = torch.autograd.grad(
                output, leaves, _rounded(weights, seed).to(output.dtype), materialize_grads=True
            )
        return [tensor.transpose(1, 2) for tensor in found]  # tokens first, as in the output

    double = torch.float64
    exact, plain = gradients(definition, double), gradients(definition, call.query.dtype)
    shaken: list[list[Tensor]] = []
    if definition is linear_definition and not approximate:
        for seed in (0, 2):
            above = gradients(linear_numerator, double, seed)
            below = gradients(linear_denominator, double, seed + 1)
            shaken.append([one + other for one, other in zip(above, below, strict=True)])
    result = []
    for index, (name, tried) in enumerate(
        zip(("query", "key", "value"), gradients(None, None), strict=True)
    ):
        comparison = _compare(
            tried,
            plain[index],
            exact[index],
            None if approximate else _rounding(tried),
            [draw[index] for draw in shaken],
        )
        result.append((f"{name} gradient", comparison))
    return result


def _rounded(tensor: Tensor, seed: int | None) -> Tensor:
    """Every element one rounding of float32 larger or smaller; as it is without a seed."""
    if seed is None:
        return tensor
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, tensor.shape, generator=generator).to(tensor) * 2 - 1
    return tensor * (1 + torch.finfo(torch.float32).eps * signs)


def _empty_rows(pairs: ExpectedPairs) -> Tensor:
    """Queries that see nothing, bool ``[batch or 1, q_len, heads or 1, 1]``: their output is 0.

    (Eager attention averages over all values there, which nobody reads.)
    """
    return ~pairs.allowed.any(-1).transpose(1, 2)[..., None]


def _without(output: Tensor, empty: Tensor) -> Tensor:
    return output.masked_fill(empty, 0.0)


def _rounding(tensor: Tensor) -> float:
    """The floor of the budget. Half-precision results are sums in float32 that are rounded once."""
    eps = torch.finfo(tensor.dtype).eps
    return eps if tensor.element_size() < 4 else 8 * eps


def _compare(
    tried: Tensor,
    plain: Tensor,
    exact: Tensor,
    rounding: float | None,
    shaken: Sequence[Tensor] = (),
) -> Comparison:
    """Errors of whole tokens, all heads together: single elements are too small a sample.

    Args:
        tried: ``[batch, tokens, heads, dim]``, to be judged.
        plain: The same from eager attention in the same dtype.
        exact: The same in float64.
        rounding: The floor of the budget; None for approximations, which have no budget.
        shaken: The same in float64 from inputs that are rounded at random.
    """
    norms = exact.flatten(2).norm(dim=-1)
    scale = float(norms.max()) if norms.numel() else 0.0
    scale = scale or 1.0
    error = tried.double() - exact
    per_token = error.flatten(2).norm(dim=-1)
    finite = bool(torch.isfinite(tried).all())
    relative = float(per_token.max()) / scale if per_token.numel() else 0.0
    largest = float(error.abs().max()) if error.numel() else 0.0
    if rounding is None:
        return Comparison(largest, relative, None, finite, "" if finite else "not finite")
    budget = rounding
    if per_token.numel():
        own, *moved = (
            float((other.double() - exact).flatten(2).norm(dim=-1).max())
            for other in (plain, *shaken)
        )
        budget += 2 * (own + max(moved, default=0.0)) / scale
    ok = finite and relative <= budget
    row, token = divmod(int(per_token.argmax()), max(per_token.shape[1], 1)) if not ok else (0, 0)
    return Comparison(
        largest, relative, budget, ok, "" if ok else f"largest at row {row}, token {token}"
    )


def _describe(call: InterfaceCall, pairs: ExpectedPairs) -> str:
    """What is different: the pairs that attend, or the scores.

    Queries of zeros weigh all the pairs that a function lets attend alike, and values that are the
    rows of an identity matrix show these weights: so the pattern is read off from outside.
    """
    kv_len = call.key.shape[2]
    columns = []
    for start in range(0, kv_len, 64):
        value = torch.zeros_like(call.value[..., :1]).expand(-1, -1, -1, min(64, kv_len - start))
        value = value.clone()
        index = torch.arange(value.shape[-1], device=value.device)
        value[:, :, start + index, index] = 1
        # A copy of the keys has no place of a cache with it that this would write to.
        output = call.run(query=torch.zeros_like(call.query), key=call.key.clone(), value=value)[0]
        columns.append(output != 0)
    seen = torch.cat(columns, -1).transpose(1, 2)  # [batch, heads, q_len, kv_len]
    expected = pairs.allowed.expand_as(seen)
    if call.implementation not in METHODS:
        seen = seen & expected.any(-1, keepdim=True)
    more, fewer = (seen & ~expected).any(1), (expected & ~seen).any(1)
    if not bool(more.any() | fewer.any()):
        return "the right pairs attend, the numbers differ (scaling, softcap, sinks, precision)"
    words = []
    for wrong, what in ((more, "attends to {} pairs too many"), (fewer, "misses {} pairs")):
        if bool(wrong.any()):
            row, query, key = (int(i) for i in wrong.nonzero()[0])
            words.append(
                f"{what.format(int(wrong.sum()))}, first row {row}: query {query} → key {key}"
            )
    return "; ".join(words)
