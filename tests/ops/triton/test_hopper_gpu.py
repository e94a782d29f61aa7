"""The warp-specialised kernels, each against float64 and beside plain PyTorch in 16 bits."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.patterns import Pattern
from tests.ops.test_attention_property import within_budget

hopper_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not hopper_gpu, reason="needs a Hopper GPU")

NAMES = ("output", "lse", "d_query", "d_key", "d_value")


@dataclasses.dataclass
class Case:
    """Inputs and the gradients of the results."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pattern: Pattern
    sinks: torch.Tensor | None
    grad_output: torch.Tensor
    grad_lse: torch.Tensor

    @property
    def scaling(self) -> float:
        return self.query.shape[3] ** -0.5


def make(
    pattern: Pattern, *, batch=1, heads=(8, 2), dim=128, dtype=torch.bfloat16, sinks=False
) -> Case:
    def rows(count: int, length: int) -> torch.Tensor:
        return torch.randn(batch, length, count, dim, device="cuda", dtype=dtype).transpose(1, 2)

    return Case(
        rows(heads[0], pattern.q_len),
        rows(heads[1], pattern.kv_len),
        rows(heads[1], pattern.kv_len),
        pattern,
        torch.randn(heads[0], device="cuda") if sinks else None,
        rows(heads[0], pattern.q_len),
        torch.randn(batch, heads[0], pattern.q_len, device="cuda"),
    )


def problem_of(case: Case):
    from hf_attn_plugin.ops.triton import attention

    tensors, numbers = attention._encode(case.pattern)
    inputs = (case.query, case.key, case.value, case.sinks)
    return attention._problem(*inputs, tensors, numbers, case.scaling, None)


def compute(case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """By the kernels themselves, twice, into memory full of NaN: launched, and repeated."""
    from hf_attn_plugin.ops.triton import hopper
    from hf_attn_plugin.ops.triton.launch import empty_results
    from hf_attn_plugin.ops.triton.recording import Recording

    problem = problem_of(case)
    inputs = (case.query, case.key, case.value)

    def memory() -> list[torch.Tensor]:
        output, lse = empty_results(case.query, case.value)
        fresh = [output, lse, *(torch.empty_like(t) for t in (*inputs, lse, lse))]
        return [t.fill_(float("nan")) for t in fresh]

    first, second = memory(), memory()
    output, lse, *grads, base, delta = first
    given = [*problem.tensors, case.grad_output, case.grad_lse]
    assert hopper.serves(problem, *inputs, case.grad_output, results=(output, *grads))
    calls = Recording([*given, *first])
    hopper.forward(calls, problem, output, lse)
    rows = (lse, case.grad_output, case.grad_lse, grads[0], base, delta)
    hopper.grad_query(calls, problem, output, *rows)
    hopper.grad_key(calls, problem, case.grad_output, base, delta, *grads[1:])
    calls.repeat([*given, *second])
    return first[:5], second[:5]


def specified(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = [t.detach().to(dtype).requires_grad_() for t in (case.query, case.key, case.value)]
    sinks = None if case.sinks is None else case.sinks.to(dtype)
    output, lse = reference_attention(*inputs, case.pattern, scaling=case.scaling, sinks=sinks)
    # Rows that see nothing have no slope.
    slope = torch.where(lse.isneginf(), 0.0, case.grad_lse.to(dtype))
    results = (output, torch.where(lse.isneginf(), 0.0, lse))
    grads = torch.autograd.grad(results, inputs, (case.grad_output.to(dtype), slope))
    return [output.detach(), lse.detach(), *grads]


def check(case: Case) -> None:
    got, again = compute(case)
    want, plain = specified(case, torch.float64), specified(case, case.query.dtype)
    for name, ours, second, exact, other in zip(NAMES, got, again, want, plain, strict=True):
        assert torch.equal(ours, second), name  # deterministic, and no NaN is left
        if name == "lse":
            empty = exact.isneginf()
            assert torch.equal(ours.isneginf(), empty)
            ours, exact, other = (torch.where(empty, 0.0, t) for t in (ours, exact, other))
        within_budget(name, ours, exact, other, case.query.dtype, case.pattern)


def documents(length: int, *ends: int) -> torch.Tensor:
    bounds = torch.tensor(ends)[:, None]
    return (torch.arange(length)[None] >= bounds).sum(0)[None].cuda()


def padding(length: int) -> torch.Tensor:
    valid = torch.ones(2, length, dtype=torch.bool, device="cuda")
    valid[0, :150], valid[1, 400:] = False, False
    return valid


PATTERNS = {
    "causal": lambda: Pattern(q_len=500, kv_len=500),
    "causal, long": lambda: Pattern(q_len=2200, kv_len=2200),
    "bidirectional": lambda: Pattern(q_len=333, kv_len=333, causal=False),
    "cache": lambda: Pattern(q_len=100, kv_len=777),
    "window": lambda: Pattern(q_len=700, kv_len=700, window=90),
    "sinks": lambda: Pattern(q_len=700, kv_len=700, window=200, num_sink_tokens=4),
    "globals": lambda: Pattern(q_len=700, kv_len=700, window=100, num_global_tokens=70),
    "cut rows": lambda: Pattern(
        q_len=8200, kv_len=8200, window=64, num_global_tokens=3, causal=False
    ),
    "documents": lambda: Pattern(
        q_len=600,
        kv_len=600,
        q_documents=documents(600, 17, 300, 301),
        kv_documents=documents(600, 17, 300, 301),
    ),
    "padding": lambda: Pattern(q_len=600, kv_len=600, key_valid=padding(600), window=128),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str) -> None:
    torch.manual_seed(0)
    pattern = PATTERNS[name]()
    heads = (4, 1) if pattern.q_len > 5000 else (8, 2)
    check(make(pattern, batch=2 if name == "padding" else 1, heads=heads))


@pytest.mark.parametrize("name", PATTERNS)
def test_results_in_float32(name: str) -> None:
    """Parts of a softmax, which ring attention merges: not rounded to 16 bits before."""
    from hf_attn_plugin.ops.triton import hopper
    from hf_attn_plugin.ops.triton.launch import run_backward, run_forward

    torch.manual_seed(0)
    pattern = PATTERNS[name]()
    heads = (4, 1) if pattern.q_len > 5000 else (8, 2)
    case = make(pattern, batch=2 if name == "padding" else 1, heads=heads)
    problem = problem_of(case)
    inputs = (case.query, case.key, case.value)
    want, plain = specified(case, torch.float64), specified(case, case.query.dtype)

    def compute() -> list[torch.Tensor]:
        output, lse = run_forward(problem, torch.float32)
        assert hopper.serves(problem, *inputs, results=(output,))
        rows = (output.to(case.query.dtype), lse, case.grad_output, case.grad_lse)
        return [output, lse, *run_backward(problem, *rows, torch.float32)[:3]]

    for kind, ours, second, exact, other in zip(
        NAMES, compute(), compute(), want, plain, strict=True
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, second)
        if kind == "lse":
            continue
        assert not torch.equal(ours, ours.to(case.query.dtype).float())
        error, rounded = ((t - exact).abs().mean() for t in (ours, ours.to(case.query.dtype)))
        assert error <= rounded
        within_budget(kind, ours, exact, other, case.query.dtype, case.pattern)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_shapes(heads: tuple[int, int], dim: int) -> None:
    """Every kernel that is compiled: groups, sizes, one run or two, long runs or short ones."""
    torch.manual_seed(0)
    for terms in ({}, {"window": 130}, {"window": 130, "num_sink_tokens": 3}):
        pattern = Pattern(q_len=419, kv_len=419, **terms)
        check(make(pattern, batch=2, heads=heads, dim=dim, dtype=torch.float16, sinks=True))
    long = [Pattern(q_len=2100, kv_len=2100), Pattern(q_len=2500, kv_len=2500, window=2100)]
    for pattern in (*long, long[1].replace(num_global_tokens=70)):
        check(make(pattern, heads=heads, dim=dim))


def test_many_items() -> None:
    """More items than programs, so that every program goes on to others."""
    torch.manual_seed(0)
    check(make(Pattern(q_len=1500, kv_len=1500, window=150), batch=4, heads=(16, 4)))


def test_partial_tiles_again_and_again() -> None:
    """What TMA writes for rows beyond the last token needs no memory: it overtakes late reads.

    A forward that released its queries' tile before they were in registers differed in 245 of
    8,971 runs, in single rows of items whose program went on to the last, partial tile.
    """
    from hf_attn_plugin.ops.triton.launch import run_backward, run_forward

    torch.manual_seed(0)
    case = make(Pattern(q_len=1500, kv_len=1500, window=150), batch=4, heads=(16, 4))
    problem = problem_of(case)

    def compute() -> list[torch.Tensor]:
        output, lse = run_forward(problem)
        return [output, lse, *run_backward(problem, output, lse, case.grad_output, case.grad_lse)]

    want = compute()
    for _ in range(600):
        assert all(torch.equal(a, b) for a, b in zip(compute(), want, strict=True))


def test_a_thread_without_a_context() -> None:
    """As autograd's may be: memory comes from the cache, so that descriptors come first."""
    from hf_attn_plugin.ops.triton.launch import run_forward

    torch.manual_seed(0)
    problem = problem_of(make(PATTERNS["window"]()))
    want = run_forward(problem)
    run_forward(problem)
    with ThreadPoolExecutor(1) as threads:
        got = threads.submit(run_forward, problem).result()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_serves() -> None:
    from hf_attn_plugin.ops.triton import hopper

    def served(case: Case, *more: torch.Tensor) -> bool:
        return hopper.serves(problem_of(case), case.query, case.key, case.value, *more)

    causal = Pattern(q_len=64, kv_len=64)
    case = make(causal)
    assert served(case, case.grad_output)
    assert not served(case, torch.ones_like(case.query[..., :1]).expand_as(case.query))
    assert not served(make(causal, dtype=torch.float32))
    assert not served(make(causal, dim=96))
    assert not served(make(Pattern(q_len=64, kv_len=64, window=8, dilation=2)))
    assert not served(make(Pattern(q_len=256, kv_len=256, window=8, stride=4)))
