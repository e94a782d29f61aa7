"""Attention of some queries over some of the keys that they see, one direction at a time.

A piece of a softmax cannot be differentiated by itself: the gradients of all pieces follow from the
output and the log-sum-exp over all keys, which are known once the last piece is. So pieces are
computed without autograd.
"""

from __future__ import annotations

import dataclasses
import enum
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_attn_plugin.ops.attention import SlowAttentionWarning, call_of
from hf_attn_plugin.ops.backend import Backend, refuses
from hf_attn_plugin.ops.torch import blocked
from hf_attn_plugin.patterns import Pattern

if TYPE_CHECKING:
    from hf_attn_plugin.ops.triton.problem import Problem


class PieceKernel(enum.Enum):
    """What computes pieces."""

    TRITON = "Triton, blocks of the schedule"
    BLOCKED = "blocks of the schedule in PyTorch"


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How all pieces of a call are computed.

    Attributes:
        kernel: By what.
        scaling: Factor on the scores, above 0.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
    """

    kernel: PieceKernel
    scaling: float
    softcap: float | None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Attention over the keys of a piece alone.

        Args:
            query: ``[batch, heads, queries, head_dim]``.
            key: ``[batch, kv_heads, keys, head_dim]``.
            value: ``[batch, kv_heads, keys, value_dim]``.
            pattern: Of these queries and keys.

        Returns:
            The output ``[batch, heads, queries, value_dim]`` and the natural log-sum-exp
            ``[batch, heads, queries]``, in float32 (float64 for float64 inputs), in new memory. 0
            and -inf for a query that sees nothing here.
        """
        if self.kernel is PieceKernel.TRITON:
            from hf_attn_plugin.ops.triton.launch import run_forward

            return run_forward(self._problem(query, key, value, pattern), torch.float32)
        problem = blocked.make_problem(query, key, pattern, self.scaling, self.softcap)
        return blocked.run_forward(problem, query, key, value, None, problem.compute_dtype)

    def backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the pairs of a piece contribute to the gradients.

        Args:
            query: ``[batch, heads, queries, head_dim]``.
            key: ``[batch, kv_heads, keys, head_dim]``.
            value: ``[batch, kv_heads, keys, value_dim]``.
            pattern: Of these queries and keys.
            output: ``[batch, heads, queries, value_dim]``, over all keys.
            lse: ``[batch, heads, queries]``, over all keys, sinks included.
            grad_output: Like ``output``.

        Returns:
            Gradients of query, key and value, in float32 (float64 for float64 inputs), in new
            memory.
        """
        if self.kernel is PieceKernel.TRITON:
            from hf_attn_plugin.ops.triton.launch import run_backward

            problem = self._problem(query, key, value, pattern)
            return run_backward(
                problem, output, lse.contiguous(), grad_output, None, torch.float32
            )[:3]
        walk = blocked.make_problem(query, key, pattern, self.scaling, self.softcap)
        return blocked.run_backward(
            walk, query, key, value, None, output, lse, grad_output, None, walk.compute_dtype
        )[:3]

    def _problem(self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Problem:
        from hf_attn_plugin.ops.triton.attention import make_problem

        return make_problem(query, key, value, pattern, self.scaling, self.softcap)


def choose_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    scaling: float,
    softcap: float | None,
) -> Pieces:
    """The fastest kernel that computes every piece of a call; warns where a GPU has none."""
    call = call_of(query, key, value, softcap=softcap is not None, sinks=False, need_lse=True)
    refusal = refuses(Backend.TRITON, pattern, call)
    if refusal is None:
        return Pieces(PieceKernel.TRITON, scaling, softcap)
    if call.device_type == "cuda":
        warnings.warn(
            "attention over a ring is computed block after block in PyTorch, which is many times "
            f"slower on a GPU than Triton's kernels: {refusal}.",
            SlowAttentionWarning,
            stacklevel=4,
        )
    return Pieces(PieceKernel.BLOCKED, scaling, softcap)
