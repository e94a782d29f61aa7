"""Partial results put together: softmax over parts of the keys, sums of gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningSoftmax:
    """Attention of one run of queries over the keys seen so far, in float32 or float64.

    Takes over the first result that covers all queries, and changes it in place.

    Attributes:
        output: ``[batch, heads, queries, value_dim]``; None before the first result.
        lse: ``[batch, heads, queries]``, the natural log-sum-exp; -inf where nothing was seen.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.output: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        """Take up attention of the queries ``rows`` over further keys.

        Args:
            rows: Within the run.
            output: ``[batch, heads, rows, value_dim]``, 0 where a query saw nothing.
            lse: float32 or float64 ``[batch, heads, rows]``, -inf where a query saw nothing.
        """
        output = output.to(lse.dtype)
        if self.output is None or self.lse is None:
            if rows == slice(0, self.length):
                self.output, self.lse = output, lse
                return
            self.output = empty_rows(output, self.length, lse.dtype).zero_()
            self.lse = lse.new_full((*lse.shape[:2], self.length), float("-inf"))
        merge_(self.output[:, :, rows], self.lse[:, :, rows], output, lse)

    def add_sinks(self, sinks: Tensor) -> None:
        """Take up one more logit per head, ``[heads]``, that has no value."""
        if self.output is None or self.lse is None:
            return
        logits = sinks.to(self.lse.dtype).view(1, -1, 1)
        total = torch.logaddexp(self.lse, logits)
        self.output.mul_(torch.exp(self.lse - _finite(total))[..., None])
        self.lse = total


def merge_(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put attention over other keys into ``output`` and ``lse``, which change in place.

    ``output`` and ``part`` are ``[batch, heads, rows, value_dim]``, the others without the last
    dimension; all of one dtype.
    """
    total = torch.logaddexp(lse, part_lse)
    base = _finite(total)
    output.mul_(torch.exp(lse - base)[..., None])
    output.addcmul_(part, torch.exp(part_lse - base)[..., None])
    lse.copy_(total)


def sinks_gradient(sinks: Tensor, output: Tensor, lse: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient of the sinks, from attention with them.

    Args:
        sinks: ``[heads]``.
        output: ``[batch, heads, rows, value_dim]``.
        lse: float32 or float64 ``[batch, heads, rows]``, sinks included.
        grad_output: Like ``output``.

    Returns:
        ``[heads]`` in the dtype of ``lse``.
    """
    # A sink has weight exp(sink - lse) and value 0: d sink = weight * (0 - delta).
    delta = (output.to(lse.dtype) * grad_output.to(lse.dtype)).sum(-1)
    weight = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - _finite(lse))
    return -(weight * delta).sum((0, 2))


class RunningSum:
    """The sum of gradients of one run of tokens, in float32 or float64.

    Takes over the first summand that covers all tokens, and changes it in place.

    Attributes:
        total: ``[batch, heads, tokens, dim]``; None before the first summand.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.total: Tensor | None = None

    def add(self, rows: slice, part: Tensor) -> None:
        """Add to the tokens ``rows`` of the run."""
        dtype = torch.float64 if part.dtype == torch.float64 else torch.float32
        if self.total is None and rows == slice(0, self.length):
            self.total = part.to(dtype)
            return
        if self.total is None:
            self.total = empty_rows(part, self.length, dtype).zero_()
        self.total[:, :, rows] += part


def empty_rows(like: Tensor, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """New memory for ``[batch, heads, length, dim]``, laid out as ``[batch, length, heads, dim]``.

    So models read it, and so a run of tokens of one sequence is contiguous.
    """
    batch, heads, _, dim = like.shape
    return like.new_empty(batch, length, heads, dim, dtype=dtype or like.dtype).transpose(1, 2)


def _finite(lse: Tensor) -> Tensor:
    """What to subtract: a row that saw nothing is at -inf, and -inf - -inf would be NaN."""
    return torch.where(lse.isneginf(), 0.0, lse)
