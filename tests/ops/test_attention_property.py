"""Thousands of random calls of `attention` against attention written out pair by pair.

They run on a GPU where there is one.
"""

import random

import pytest
import torch

from hf_attn_plugin.ops import attention
from hf_attn_plugin.patterns import Pattern
from tests.oracle import oracle_attention, oracle_mask

CASES_PER_SEED = 100
SEEDS = 25
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TENSORS = {
    "key_valid": torch.bool,
    "global_tokens": torch.bool,
    "kv_documents": torch.int64,
    "q_documents": torch.int64,
}


def random_spec(rng: random.Random, batch: int, q_len: int, kv_len: int) -> dict:
    """A random pattern; every term and every pair of terms occurs."""

    def maybe(chance: float, *values):
        return rng.choice(values) if rng.random() < chance else None

    spec = {
        "causal": rng.random() < 0.7,
        "band": maybe(0.2, 1, 4, 17, 200),
        "window": maybe(0.5, 1, 3, 16, 65, 300),
        "stride": maybe(0.2, 1, 3, 8, 40),
        "num_sink_tokens": maybe(0.3, 1, 4) or 0,
        "num_global_tokens": maybe(0.3, 1, 5, 70) or 0,
        "dilation": 1,
    }
    if spec["window"]:
        spec["dilation"] = maybe(0.3, 2, 5) or 1
    if rng.random() < 0.2:
        spec["kv_offset"] = rng.choice([3, 100])
    if rng.random() < 0.2:  # queries before the last key: slots of a static cache
        spec["q_offset"] = spec.get("kv_offset", 0) + rng.randint(0, kv_len - q_len)
    rows = rng.choice([1, batch])
    padding = maybe(0.4, "left", "right", "holes", "all")
    if padding and not spec.get("kv_offset"):
        lengths = [rng.randint(0, kv_len) for _ in range(rows)]
        spec["key_valid"] = [
            {
                "left": [j >= kv_len - n for j in range(kv_len)],
                "right": [j < n for j in range(kv_len)],
                "holes": [rng.random() < 0.7 for _ in range(kv_len)],
                "all": [False] * kv_len,
            }[padding]
            for n in lengths
        ]
    if rng.random() < 0.25 and not spec.get("kv_offset"):
        spec["kv_documents"] = []
        for _ in range(rows):
            number, numbers = 0, []
            for _ in range(kv_len):
                number += rng.random() < 0.08
                numbers.append(number)
            spec["kv_documents"].append(numbers)
        start = spec.get("q_offset", kv_len - q_len)
        spec["q_documents"] = [row[start : start + q_len] for row in spec["kv_documents"]]
    if rng.random() < 0.15:
        marked = [[rng.random() < 0.05 for _ in range(kv_len)] for _ in range(rows)]
        spec["global_tokens"] = marked
    return spec


def to_pattern(spec: dict, q_len: int, kv_len: int) -> Pattern:
    fields = {
        name: torch.tensor(value, dtype=TENSORS[name]) if name in TENSORS else value
        for name, value in spec.items()
        if value is not None
    }
    return Pattern(q_len=q_len, kv_len=kv_len, **fields)


def random_strides(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random values in a layout that models really pass: contiguous, transposed, or a view."""
    batch, heads, length, dim = shape
    layout = rng.choice(["contiguous", "transposed", "fused"])
    if layout == "contiguous":
        tensor = torch.randn(shape, dtype=torch.float64)
    elif layout == "transposed":
        tensor = torch.randn(batch, length, heads, dim, dtype=torch.float64).transpose(1, 2)
    else:
        fused = torch.randn(batch, length, 3, heads, dim, dtype=torch.float64)
        tensor = fused[:, :, 1].transpose(1, 2)
    return tensor.to(DEVICE, dtype)


def within_budget(name: str, got, want, plain, dtype, context) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus a rounding floor."""
    want = torch.where(want.isneginf(), 0.0, want.double())
    plain = torch.where(plain.isneginf(), 0.0, plain.double())
    assert got.dtype in (dtype, torch.float32, torch.float64)
    got = torch.where(got.isneginf(), 0.0, got.double())
    if want.numel() == 0:
        return
    # Gradients of rows that see one key are differences of equal numbers, 0 in the oracle and a few
    # roundings of the compute dtype (float32 for half precision) here. In float64 the oracle rounds
    # just as much as what it judges.
    steps = {torch.float64: 64, torch.float32: 32}.get(dtype, 4)
    floor = steps * torch.finfo(dtype).eps * (1 + want.abs().max())
    allowed = 2 * (plain - want).abs().max() + floor
    error = (got - want).abs().max()
    assert error <= allowed, f"{name}: error {error:.2e} > {allowed:.2e} in {context}"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_calls(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for case in range(CASES_PER_SEED):
        batch = rng.choice([1, 2])
        kv_len = rng.choice([1, 2, 15, 33, 63, 64, 65, 80])
        q_len = min(kv_len, rng.choice([1, 1, 2, 33, 65, 80]))
        if rng.random() < 0.1:  # one case in ten spans several blocks
            q_len = kv_len = rng.choice([129, 150])
            batch = 1
        spec = random_spec(rng, batch, q_len, kv_len)
        kv_heads, groups = rng.choice([(1, 1), (2, 1), (1, 3), (2, 2)])
        dim, value_dim = rng.choice([(4, 4), (16, 16), (12, 6), (5, 7)])
        dtype = rng.choice(
            [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.half]
        )
        softcap = rng.choice([None, None, 2.5])
        scaling = rng.choice([dim**-0.5, 1.0 / dim])
        need_lse = rng.random() < 0.6
        query = random_strides(rng, (batch, kv_heads * groups, q_len, dim), dtype)
        key = random_strides(rng, (batch, kv_heads, kv_len, dim), dtype)
        value = random_strides(rng, (batch, kv_heads, kv_len, value_dim), dtype)
        inputs = [query, key, value]
        if rng.random() < 0.25:
            inputs.append(torch.randn(kv_heads * groups).to(DEVICE, dtype))
        pattern = to_pattern(spec, q_len, kv_len).to(DEVICE)
        mask = oracle_mask(batch, q_len, kv_len, spec).to(DEVICE)
        context = {
            "case": (seed, case),
            "shape": (batch, kv_heads, groups, q_len, kv_len, dim, value_dim),
            "dtype": dtype,
            "lse": need_lse,
            "softcap": softcap,
            "sinks": len(inputs) == 4,
            **{k: v for k, v in spec.items() if k not in TENSORS},
            "tensors": [k for k in spec if k in TENSORS],
        }
        direction = torch.randn(batch, kv_heads * groups, q_len, value_dim).to(DEVICE, dtype)
        lse_direction = torch.randn(batch, kv_heads * groups, q_len).to(DEVICE)

        def results(function, as_dtype, inputs=inputs, direction=direction, turn=lse_direction):
            leaves = [t.detach().to(as_dtype).requires_grad_() for t in inputs]
            out, lse = function(leaves)
            total = (out * direction.to(out.dtype)).sum()
            if lse is not None and need_lse:  # noqa: B023 - called in this iteration
                finite = ~lse.isneginf()
                total = total + (lse[finite] * turn[finite].to(lse.dtype)).sum()
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            return out.detach(), lse, grads

        def ours(leaves, pattern=pattern, need_lse=need_lse, scaling=scaling, softcap=softcap):
            q, k, v, *sinks = leaves
            sink = sinks[0] if sinks else None
            return attention(
                q, k, v, pattern, scaling=scaling, softcap=softcap, sinks=sink, need_lse=need_lse
            )

        def oracle(leaves, mask=mask, scaling=scaling, softcap=softcap):
            q, k, v, *sinks = leaves
            return oracle_attention(q, k, v, mask, scaling, softcap, sinks[0] if sinks else None)

        got, got_lse, got_grads = results(ours, dtype)
        want, want_lse, want_grads = results(oracle, torch.float64)
        plain, plain_lse, plain_grads = results(oracle, dtype)
        within_budget("output", got, want, plain, dtype, context)
        if need_lse:
            assert torch.equal(got_lse.isneginf(), want_lse.isneginf()), context
            within_budget("log-sum-exp", got_lse, want_lse, plain_lse, dtype, context)
        names = ("query", "key", "value", "sinks")
        for name, g, w, p in zip(names, got_grads, want_grads, plain_grads, strict=False):
            assert not g.isnan().any(), (name, context)
            within_budget(f"{name} gradient", g, w, p, dtype, context)
