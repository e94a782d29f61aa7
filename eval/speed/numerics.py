"""The gate: no time is reported for outputs or gradients that are wrong.

Results are set beside a float64 reference, and beside plain PyTorch in the same dtype: in every
block of 16 tokens of every head, the error's norm may be twice plain PyTorch's, plus a rounding
floor; of every single token, where chance makes plain PyTorch's error small, a few times as much.

At full length, where the reference has no room for all scores, a sample of the queries is computed
exactly; with the output's gradient zero in all others, so are the gradients of all keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.patterns import Pattern

ROWS = 64
_BLOCK = 16

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random inputs of one attention call, and the gradient of its output.

    All are ``[batch, heads, tokens, dim]``, in memory ``[batch, tokens, heads, dim]`` as models
    pass them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor

    @classmethod
    def random(
        cls,
        *,
        batch: int,
        heads: int,
        kv_heads: int,
        tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int = 0,
    ) -> Inputs:
        """Normal values, never zeros: kernels run faster on those, and hide what they skip."""
        torch.manual_seed(seed)

        def normal(count: int) -> Tensor:
            shape = (batch, tokens, count, head_dim)
            return torch.randn(shape, dtype=dtype, device=device).transpose(1, 2)

        query, key, value = (
            normal(count).requires_grad_() for count in (heads, kv_heads, kv_heads)
        )
        return cls(query, key, value, normal(heads))

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    def gradient_at(self, rows: Tensor) -> Tensor:
        """The output's gradient, zero but for some queries."""
        sampled = torch.zeros_like(self.grad)
        sampled[:, :, rows] = self.grad[:, :, rows]
        return sampled


def results_of(attention: Attention, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of query, key and value."""
    output = attention(*inputs.leaves)
    grads = torch.autograd.grad(output, inputs.leaves, grad)
    return {"output": output.detach(), **dict(zip(_GRADIENTS, grads, strict=True))}


_GRADIENTS = ("query gradient", "key gradient", "value gradient")


def expected(
    inputs: Inputs, pattern: Pattern, dtype: torch.dtype, rows: Tensor | None = None
) -> dict[str, Tensor]:
    """What `reference_attention` makes of the inputs in ``dtype``, one KV head at a time.

    Args:
        inputs: Query, key, value and the output's gradient.
        pattern: Which pairs attend.
        dtype: float64 for the truth, the inputs' own for plain PyTorch.
        rows: Only these queries; the output and the query gradient then have only these rows, the
            other gradients are those under a gradient that is zero in all other queries.

    Returns:
        Tensors as `results_of` names them.
    """
    if rows is not None:
        masks = [pattern.visible(inputs.query.device, row, row + 1) for row in rows.tolist()]
        dense = torch.cat(masks, 2)
        pattern = Pattern(q_len=len(rows), kv_len=pattern.kv_len, causal=False, dense=dense)
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    parts: dict[str, list[Tensor]] = {}
    for head in range(inputs.key.shape[1]):
        own = slice(head * groups, (head + 1) * groups)
        query, grad = inputs.query[:, own].detach(), inputs.grad[:, own]
        if rows is not None:
            query, grad = query[:, :, rows], grad[:, :, rows]
        leaves = [
            tensor.detach().to(dtype).requires_grad_()
            for tensor in (query, inputs.key[:, head, None], inputs.value[:, head, None])
        ]
        q, k, v = leaves
        output, _ = reference_attention(q, k, v, pattern)
        grads = torch.autograd.grad(output, leaves, grad.to(dtype))
        for name, tensor in zip(("output", *_GRADIENTS), (output.detach(), *grads), strict=True):
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors, 1) for name, tensors in parts.items()}


def sample_rows(tokens: int, device: torch.device | str) -> Tensor:
    """Queries to check at full length: the first, the last, and others at random; ascending."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.randperm(tokens, generator=generator)[:ROWS]
    chosen = torch.cat([chosen, torch.tensor([0, tokens - 1])]).unique()
    return chosen.to(device)


def share_of_budget(got: Tensor, want: Tensor, plain: Tensor) -> float:
    """The largest error over blocks of tokens, as a share of what is allowed.

    Args:
        got: ``[..., tokens, dim]``; its dtype says how coarse a rounding is.
        want: The truth, float64, in the same shape.
        plain: Plain PyTorch's result in the dtype of ``got``.

    Returns:
        At most 1 is good; infinity where something is not finite.
    """
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return float("inf")
    eps = torch.finfo(got.dtype).eps
    rows = [
        tensor.square().sum(-1) for tensor in (got.double() - want, plain.double() - want, want)
    ]
    block_error, block_plain, block_size = (_block_means(squares) for squares in rows)
    error, plain_error, size = (squares.sqrt() for squares in rows)
    # What is 0 in truth is a sum of rounded terms in any arithmetic.
    nothing = eps / 8 * want.square().sum(-1).mean().sqrt()
    near = block_size.repeat_interleave(_BLOCK, -1)[..., : size.shape[-1]]
    shares = (
        _share(block_error, 2 * block_plain + eps * block_size + nothing),
        _share(error, 4 * (plain_error + eps * (size + near)) + nothing),
    )
    return max(shares)


def _share(error: Tensor, allowed: Tensor) -> float:
    return float(torch.where(error == 0, 0.0, error / allowed).max())


def _block_means(squares: Tensor) -> Tensor:
    """Roots of the mean squared norms in blocks of tokens, from those of ``[..., tokens]``."""
    missing = -squares.shape[-1] % _BLOCK
    padded = torch.nn.functional.pad(squares, (0, missing))
    return padded.unflatten(-1, (-1, _BLOCK)).mean(-1).sqrt()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far from the truth results are.

    Attributes:
        share: The worst error as a share of what is allowed.
        where: Which tensor that is.
    """

    share: float
    where: str

    @property
    def good(self) -> bool:
        """Whether every error is allowed."""
        return self.share <= 1


def judge(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], plain: Mapping[str, Tensor]
) -> Verdict:
    """Compare tensors by name; the worst counts."""
    shares = {name: share_of_budget(got[name], want[name], plain[name]) for name in want}
    worst = max(shares, key=lambda name: shares[name])
    return Verdict(shares[worst], worst)


class Gate:
    """One pattern on one set of inputs, with its reference, for any number of contenders.

    Args:
        inputs: The call's.
        pattern: Which pairs attend.
        rows: Sampled queries, or None for all of them.
    """

    def __init__(self, inputs: Inputs, pattern: Pattern, rows: Tensor | None = None) -> None:
        self.inputs, self.rows = inputs, rows
        self.want = expected(inputs, pattern, torch.float64, rows)
        self.plain = expected(inputs, pattern, inputs.query.dtype, rows)
        self.grad = inputs.grad if rows is None else inputs.gradient_at(rows)

    def judge(self, attention: Attention) -> Verdict:
        """Run a contender and compare it."""
        got = results_of(attention, self.inputs, self.grad)
        if self.rows is None:
            return judge(got, self.want, self.plain)
        for name in ("output", "query gradient"):
            if not bool(got[name].isfinite().all()):
                return Verdict(float("inf"), name)
        others = torch.ones(got["output"].shape[2], dtype=torch.bool, device=self.rows.device)
        others[self.rows] = False
        # No gradient comes in there, so none may come out.
        if bool((got["query gradient"][:, :, others] != 0).any()):
            return Verdict(float("inf"), "query gradient of queries without a gradient")
        sampled = {name: got[name][:, :, self.rows] for name in ("output", "query gradient")}
        return judge({**got, **sampled}, self.want, self.plain)
