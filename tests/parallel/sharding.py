"""One call of attention, by one process and by the ranks of a group, with all gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops import attention
from hf_attn_plugin.parallel.attention import sharded_attention
from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.parallel.shard import Shard
from hf_attn_plugin.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Case:
    """A call; `terms` are the pattern's, tensors as nested lists are made by `pattern`."""

    name: str
    terms: dict[str, Any] = dataclasses.field(default_factory=dict)
    length: int = 32
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    softcap: float | None = None
    sinks: bool = False
    chunks: int = 2
    ulysses: int = 1
    schedule: str | None = None
    head_groups: int | None = None
    dtype: torch.dtype = torch.float64

    def pattern(self) -> Pattern:
        kinds = {"key_valid": torch.bool, "global_tokens": torch.bool, "dense": torch.bool}
        terms = {
            name: torch.tensor(value, dtype=kinds.get(name, torch.int64))
            if isinstance(value, list)
            else value
            for name, value in self.terms.items()
        }
        if "kv_documents" in terms:
            terms["q_documents"] = terms["kv_documents"]
        return Pattern(q_len=self.length, kv_len=self.length, **terms)

    def tensors(self) -> dict[str, Tensor]:
        """Query, key, value, the output's gradient, and sinks; laid out as models do."""
        made = torch.Generator().manual_seed(0)

        def tensor(heads: int, dim: int) -> Tensor:
            shape = (self.batch, self.length, heads, dim)
            return torch.randn(shape, generator=made, dtype=torch.float64).transpose(1, 2)

        tensors = {
            "query": tensor(self.heads, self.head_dim),
            "key": tensor(self.kv_heads, self.head_dim),
            "value": tensor(self.kv_heads, self.value_dim),
            "grad": tensor(self.heads, self.value_dim),
        }
        if self.sinks:
            tensors["sinks"] = torch.randn(self.heads, generator=made, dtype=torch.float64)
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}


def alone(
    case: Case, dtype: torch.dtype | None = None, need_lse: bool = False
) -> dict[str, Tensor]:
    """Output and gradients by one process."""
    tensors = {name: t.to(dtype or case.dtype) for name, t in case.tensors().items()}
    grad = tensors.pop("grad")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    how = dict(scaling=0.3, softcap=case.softcap, sinks=leaves.get("sinks"))
    output, _ = attention(query, key, value, case.pattern(), need_lse=need_lse, **how)
    output.backward(grad)
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def sharded(rank: int, case: Case, ranks: int) -> dict[str, Any]:
    """Output and gradients of one rank's tokens, and the bytes it sent."""
    shard = make_shard(case, rank, ranks)
    tensors = case.tensors()
    grad, sinks = shard.layout.take(tensors.pop("grad"), rank, dim=2), tensors.pop("sinks", None)
    leaves = {
        name: shard.layout.take(tensor, rank, dim=2).detach().requires_grad_()
        for name, tensor in tensors.items()
    }
    if sinks is not None:
        leaves["sinks"] = sinks.requires_grad_()
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    how = dict(scaling=0.3, softcap=case.softcap, sinks=leaves.get("sinks"))
    output = sharded_attention(query, key, value, case.pattern(), shard, **how)
    forward = shard.bytes_sent
    output.backward(grad)
    return {
        "output": output.detach(),
        **{name: leaf.grad for name, leaf in leaves.items()},
        "bytes": (forward, shard.bytes_sent - forward),
    }


def make_shard(case: Case, rank: int, ranks: int) -> Shard:
    return Shard(
        Layout(case.length, ranks, case.chunks),
        rank,
        ulysses=case.ulysses,
        schedule=case.schedule,
        head_groups=case.head_groups,
    )


def joined(case: Case, results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What the ranks computed, as one process would have it."""
    layout = Layout(case.length, len(results), case.chunks)
    whole = {
        name: layout.join([result[name] for result in results], dim=2)
        for name in ("output", "query", "key", "value")
    }
    if case.sinks:
        whole["sinks"] = torch.stack([result["sinks"] for result in results]).sum(0)
    return whole


def differences(case: Case, results: list[dict[str, Any]]) -> dict[str, float]:
    """Largest difference between the ranks' output and gradients and one process', relative.

    To the largest number there, or to 1, about which the inputs are, where that is more.
    """
    expected = alone(case)
    found = joined(case, results)
    assert found.keys() == expected.keys()
    return {
        name: float((found[name] - want).abs().max() / want.abs().max().clamp(min=1.0))
        for name, want in expected.items()
    }


def errors_by_one_process(case: Case, results: list[dict[str, Any]]) -> dict[str, float]:
    """Errors over those of one process."""
    found = joined(case, results)
    # By the kernel that computes the parts, which returns the log-sum-exp.
    once = alone(case, need_lse=True)
    # The same rounded inputs, computed with exactly.
    exact = alone(case, dtype=torch.float64)
    return {name: rms(found[name] - exact[name]) / rms(once[name] - exact[name]) for name in exact}


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
