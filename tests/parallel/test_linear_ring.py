"""Linear attention over a sequence spread over processes is what one process computes."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch

from hf_attn_plugin.ops.linear import linear_attention
from hf_attn_plugin.parallel import linear as parallel_linear
from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.parallel.linear import ring_linear_attention
from hf_attn_plugin.parallel.shard import Shard
from hf_attn_plugin.patterns import Pattern
from tests.parallel.processes import run_processes
from tests.parallel.sharding import Case, make_shard

_DOCUMENTS = [[0] * 5 + [1] * 9 + [2] * 3 + [3] * 15, [0] * 13 + [1] * 19]
_OF_SHARDS = [[i // 8 for i in range(32)]]
_BOTH_SIDES = [[False] * 3 + [True] * 25 + [False] * 4, [True] * 32]

CASES = [
    Case("causal"),
    Case("causal, contiguous", chunks=1),
    Case("documents", {"kv_documents": _DOCUMENTS}),
    Case("documents, contiguous", {"kv_documents": _DOCUMENTS}, chunks=1),
    Case("documents, four chunks", {"kv_documents": _DOCUMENTS}, chunks=4),
    Case("documents of one rank each", {"kv_documents": _OF_SHARDS}, chunks=1),
    Case("padding on both sides", {"key_valid": _BOTH_SIDES}),
    Case("padding and documents", {"key_valid": _BOTH_SIDES, "kv_documents": _DOCUMENTS}),
    Case("ranks of padding", {"key_valid": [[False] * 20 + [True] * 12]}, chunks=1, batch=1),
    Case("bidirectional", {"causal": False}),
    Case("bidirectional, padded", {"causal": False, "key_valid": _BOTH_SIDES}, chunks=1),
    Case("documents, both ways", {"causal": False, "kv_documents": _DOCUMENTS}),
    Case(
        "documents, both ways, padded",
        {"causal": False, "kv_documents": _DOCUMENTS, "key_valid": _BOTH_SIDES},
        chunks=1,
    ),
    Case("shared documents", {"causal": False, "kv_documents": _DOCUMENTS[:1]}, chunks=4),
    Case("other size of values", value_dim=4, kv_heads=4),
]
CHUNK = 3  # of neither a shard nor a document


def alone(case: Case, features: str) -> dict[str, torch.Tensor]:
    tensors = case.tensors()
    grad = tensors.pop("grad")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    output, _ = linear_attention(
        *leaves.values(), case.pattern(), feature_map=features, scaling=0.3, chunk=CHUNK
    )
    output.backward(grad)
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def sharded(rank: int, case: Case, ranks: int, features: str) -> dict[str, Any]:
    shard = make_shard(case, rank, ranks)
    tensors = {n: shard.layout.take(t, rank, dim=2).detach() for n, t in case.tensors().items()}
    grad = tensors.pop("grad")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    how: dict[str, Any] = {"feature_map": features, "scaling": 0.3, "chunk": CHUNK}
    output = ring_linear_attention(*leaves.values(), case.pattern(), shard, **how)
    forward = shard.bytes_sent
    output.backward(grad)
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    return {"output": output.detach(), **grads, "bytes": (forward, shard.bytes_sent - forward)}


def many(rank: int, cases: list[Case], ranks: int, features: str) -> list[dict[str, Any]]:
    return [sharded(rank, case, ranks, features) for case in cases]


def differences(case: Case, features: str, results: list[dict[str, Any]]) -> dict[str, float]:
    layout = Layout(case.length, len(results), case.chunks)
    return {
        name: float(
            (layout.join([result[name] for result in results], dim=2) - want).abs().max()
            / want.abs().max()
        )
        for name, want in alone(case, features).items()
    }


@pytest.mark.parametrize(
    ("ranks", "features", "dtype"),
    [(2, "elu", torch.float64), (4, "elu", torch.float32), (4, "favor", torch.float32)],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_one_process(
    ranks: int, features: str, dtype: torch.dtype
) -> None:
    cases = [dataclasses.replace(case, dtype=dtype) for case in CASES]
    by_rank = run_processes(many, ranks, cases, ranks, features)
    for number, case in enumerate(cases):
        found = differences(case, features, [results[number] for results in by_rank])
        assert max(found.values()) < 16 * torch.finfo(case.dtype).eps, (case, found)


def random_case(rng: random.Random, ranks: int, chunks: int) -> Case:
    length = ranks * chunks * rng.choice([1, 2, 5])
    terms: dict[str, Any] = {"causal": rng.random() < 0.5}
    if rng.random() < 0.4:
        terms["key_valid"] = [[rng.random() < 0.7 for _ in range(length)] for _ in range(2)]
    if rng.random() < 0.6:
        rows = [[rng.random() < 0.2 for _ in range(length)] for _ in range(rng.choice([1, 2]))]
        terms["kv_documents"] = [list(itertools.accumulate(map(int, row))) for row in rows]
    return Case(f"random {terms}", terms, length=length, heads=2, kv_heads=1, chunks=chunks)


def test_random_patterns() -> None:
    rng = random.Random(0)
    cases = [random_case(rng, 4, rng.choice([1, 2, 4])) for _ in range(30)]
    by_rank = run_processes(many, 4, cases, 4, "elu")
    for number, case in enumerate(cases):
        layout = Layout(case.length, 4, case.chunks)
        for name, want in alone(case, "elu").items():
            found = layout.join([results[number][name] for results in by_rank], dim=2)
            torch.testing.assert_close(found, want, atol=1e-11, rtol=0, msg=case.name)


def test_what_is_sent_does_not_grow_with_the_sequence() -> None:
    short = [Case("causal", chunks=1), Case("", {"kv_documents": _OF_SHARDS}, chunks=1)]
    cases = [*short, dataclasses.replace(short[0], length=128)]
    by_rank = run_processes(many, 4, cases, 4, "elu")
    causal, documents, long = ([results[n]["bytes"] for results in by_rank] for n in range(3))
    assert long == causal
    state, scale = 2 * 2 * 8 * 9 * 8, 2 * 2 * 8  # batch, KV heads, features, values + 1; bytes
    assert [sent for sent, _ in causal] == [n * (state + scale) for n in (3, 2, 1, 0)]
    assert [back for _, back in causal] == [n * state for n in (0, 1, 2, 3)]
    assert documents == [(0, 0)] * 4


def without_returning(rank: int, case: Case, ranks: int) -> dict[str, Any]:
    backward = parallel_linear._ExchangeSums.backward

    def broken(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        first, second, *sums = backward(ctx, *grads)
        return first, second, *(None for _ in sums)

    parallel_linear._ExchangeSums.backward = staticmethod(broken)  # type: ignore[method-assign]
    return sharded(rank, case, ranks, "elu")


def across_documents(rank: int, case: Case, ranks: int) -> dict[str, Any]:
    everywhere = parallel_linear._sum

    def broken(states: Any, reads: Any) -> Any:
        return everywhere(states, dict.fromkeys(reads))

    parallel_linear._sum = broken
    return sharded(rank, case, ranks, "elu")


def test_errors_are_seen() -> None:
    case = Case("documents", {"kv_documents": _DOCUMENTS}, chunks=1)
    found = differences(case, "elu", run_processes(without_returning, 4, case, 4))
    assert found["output"] < 1e-14 and found["query"] < 1e-14
    assert found["key"] > 0.01 and found["value"] > 0.01
    found = differences(case, "elu", run_processes(across_documents, 4, case, 4))
    assert found["output"] > 0.01


def with_some_gradients(rank: int, needed: str) -> list[torch.Tensor | None]:
    """On the last rank nothing that others sum up, and a query that may need no gradient."""
    case = Case("causal", chunks=1)
    shard = make_shard(case, rank, 2)
    tensors = case.tensors()
    grad = shard.layout.take(tensors.pop("grad"), rank, dim=2)
    parts = {n: shard.layout.take(t, rank, dim=2).detach() for n, t in tensors.items()}
    for name, tensor in parts.items():
        tensor.requires_grad_(name in needed)
    output = ring_linear_attention(*parts.values(), case.pattern(), shard, scaling=0.3)
    output.backward(grad)
    return [tensor.grad for tensor in parts.values()]


@pytest.mark.parametrize("needed", ["value", "key value", "query"])
def test_gradients_of_some_inputs_alone(needed: str) -> None:
    """As of adapters on some projections of the first layer; nobody waits for ever."""
    case = Case("causal", chunks=1)
    expected = alone(case, "elu")
    results = run_processes(with_some_gradients, 2, needed, limit_s=20.0)
    for place, name in enumerate(("query", "key", "value")):
        grads = [result[place] for result in results]
        if name not in needed:
            assert grads == [None, None]
            continue
        whole = Layout.contiguous(case.length, 2).join(grads, dim=2)
        torch.testing.assert_close(whole, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"window": 5}, "a window"),
        ({"band": 5}, "a window"),
        ({"dense": torch.ones(1, 1, 32, 32, dtype=torch.bool)}, "a dense mask"),
        ({"kv_documents": -torch.arange(32)[None]}, "ascending order"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_state_cannot_honour_is_refused(terms: dict[str, Any], said: str) -> None:
    if "kv_documents" in terms:
        terms = {**terms, "q_documents": terms["kv_documents"]}
    shard = Shard(Layout.contiguous(32, 2), 0)
    tensors = [torch.zeros(1, heads, 16, 8) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match=said):
        ring_linear_attention(*tensors, Pattern(q_len=32, kv_len=32, **terms), shard)


def test_tensors_of_another_size_are_refused() -> None:
    shard = Shard(Layout.contiguous(32, 2), 0)
    tensors = [torch.zeros(1, heads, length, 8) for heads, length in ((4, 16), (2, 32), (2, 32))]
    with pytest.raises(ValueError, match="key must hold a rank's 16 tokens"):
        ring_linear_attention(*tensors, Pattern(q_len=32, kv_len=32), shard)
    with pytest.raises(ValueError, match="of the whole sequence, 32 x 32; got 16 x 16"):
        ring_linear_attention(*tensors, Pattern(q_len=16, kv_len=16), shard)
