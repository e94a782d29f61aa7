"""What the choice among implementations of attention may depend on."""

from __future__ import annotations

import dataclasses

import torch

from hf_attn_plugin.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Call:
    """What the choice may depend on, besides the pattern.

    Attributes:
        batch: Batch size.
        dtype: Of query, key and value.
        device_type: ``"cpu"``, ``"cuda"``, ...
        softcap: Whether scores are capped.
        sinks: Whether there are attention sinks.
        need_lse: Whether the caller wants the log-sum-exp.
        compiling: Whether ``torch.compile`` is tracing.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Of queries and keys.
        value_dim: Of values.
        needs_grad: Whether a backward pass may follow.
        deterministic: Whether gradients must be the same bits from run to run.
        capability: CUDA compute capability of an NVIDIA GPU, else None.
        installed: Which of the optional packages with kernels there are: ``"triton"``,
            ``"flash-attn-4"``.
    """

    batch: int
    dtype: torch.dtype
    device_type: str
    softcap: bool
    sinks: bool
    need_lse: bool
    compiling: bool
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    value_dim: int = 64
    needs_grad: bool = False
    deterministic: bool = False
    capability: tuple[int, int] | None = None
    installed: frozenset[str] = frozenset()

    def pairs(self, pattern: Pattern) -> int:
        """Pairs of queries and keys, visible or not, over batch and heads."""
        return self.batch * self.heads * pattern.q_len * pattern.kv_len

    def elements(self, pattern: Pattern) -> int:
        """Elements of the largest of query, key, value and output."""
        tokens = max(self.heads * pattern.q_len, self.kv_heads * pattern.kv_len)
        return self.batch * tokens * max(self.head_dim, self.value_dim)
