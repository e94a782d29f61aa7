"""Vendors' kernels on a GPU, each against the reference in float64: outputs, lse and gradients."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_plugin.ops import attention, reference_attention
from hf_attn_plugin.ops.backend import capability_of
from hf_attn_plugin.ops.backend import installed_packages as installed
from hf_attn_plugin.ops.call import Call
from hf_attn_plugin.ops.vendors.built_in import built_in
from hf_attn_plugin.ops.vendors.cudnn import cudnn_attention
from hf_attn_plugin.ops.vendors.flash_attention_4 import PACKAGE, flash_attention_4, refuses
from hf_attn_plugin.patterns import Pattern

CAPABILITY = capability_of(torch.device("cuda")) if torch.cuda.is_available() else None
HOPPER = CAPABILITY is not None and CAPABILITY[0] in (9, 10)
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of Hopper or Blackwell")
needs_fa4 = pytest.mark.skipif(
    PACKAGE not in installed() or importlib.util.find_spec("flash_attn") is None,
    reason=f"needs {PACKAGE}",
)


def inputs(
    shape: tuple[int, int, int, int, int, int, int], dtype: torch.dtype, sinks: bool = False
) -> list[Tensor]:
    """Query, key, value (as transformers lays them out) and sinks."""
    batch, heads, kv_heads, q_len, kv_len, dim, value_dim = shape
    torch.manual_seed(q_len + dim)
    made = [
        torch.randn(batch, tokens, h, d, device="cuda", dtype=dtype).transpose(1, 2)
        for tokens, h, d in (
            (q_len, heads, dim),
            (kv_len, kv_heads, dim),
            (kv_len, kv_heads, value_dim),
        )
    ]
    made += [torch.randn(heads, device="cuda")] if sinks else []
    return [tensor.detach().requires_grad_() for tensor in made]


def documents(*lengths: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].cuda()


def results(compute: Any, tensors: list[Tensor], need_lse: bool) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients; both of the former have a gradient of their own."""
    output, lse = compute(*tensors)
    torch.manual_seed(1)
    loss = (output.double() * torch.randn(output.shape, device="cuda")).sum()
    found = {"output": output}
    if need_lse:
        loss = loss + (lse.double() * torch.randn(lse.shape, device="cuda")).sum()
        found["lse"] = lse
    grads = torch.autograd.grad(loss, tensors)
    found |= {f"gradient {i}": grad for i, grad in enumerate(grads)}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def judge(compute: Any, plain: Any, tensors: list[Tensor], need_lse: bool) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus rounding."""
    got, usual = (results(how, tensors, need_lse) for how in (compute, plain))
    exact = results(plain, [t.detach().double().requires_grad_() for t in tensors], need_lse)
    eps = torch.finfo(tensors[0].dtype).eps
    for name, want in exact.items():
        budget = 2 * (usual[name] - want).norm() + eps * want.norm()
        assert (got[name] - want).norm() <= budget, name


def compare(
    compute: Any, tensors: list[Tensor], pattern: Pattern, need_lse: bool, **how: Any
) -> None:
    """`judge` a kernel by plain attention over a pattern."""

    def plain(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Any:
        sinks = None if sinks is None else sinks.to(query.dtype)
        return reference_attention(query, key, value, pattern, sinks=sinks, **how)

    judge(compute, plain, tensors, need_lse)


CAUSAL = dict(q_len=300, kv_len=300)
FA4_CASES: dict[str, tuple[dict, dict]] = {
    "causal": (CAUSAL, {}),
    "full": (dict(CAUSAL, causal=False), {}),
    "more keys, causal": (dict(q_len=100, kv_len=517), {}),
    "cross": (dict(q_len=100, kv_len=77, causal=False), {}),
    "window": (dict(CAUSAL, window=65), {}),
    "window of one": (dict(CAUSAL, window=1), {}),
    "window both ways": (dict(CAUSAL, causal=False, band=33), {}),
    "window, more keys": (dict(q_len=100, kv_len=517, window=70), {}),
    "softcap": (CAUSAL, dict(softcap=2.0)),
    "sinks": (CAUSAL, dict(sinks=True)),
    "sinks, window": (dict(CAUSAL, window=65), dict(sinks=True)),
    **{f"heads of {dim}": (CAUSAL, dict(dims=(dim, dim))) for dim in (64, 96, 256)},
    "heads of 256, window": (dict(CAUSAL, window=65), dict(dims=(256, 256))),
    "heads of 192 and 128": (CAUSAL, dict(dims=(192, 128), kv_heads=4)),
    "one KV head": (CAUSAL, dict(kv_heads=1)),
    "a KV head each": (CAUSAL, dict(kv_heads=4)),
    "documents": (CAUSAL, dict(lengths=(130, 1, 40, 129))),
    "documents, full": (dict(CAUSAL, causal=False), dict(lengths=(130, 1, 40, 129))),
    "documents, window, sinks": (
        dict(CAUSAL, window=20),
        dict(lengths=(130, 1, 40, 129), sinks=True),
    ),
    "float16": (CAUSAL, dict(dtype=torch.float16)),
    "deterministic": (CAUSAL, dict(deterministic=True)),
}


@needs_fa4
@pytest.mark.parametrize(
    ("case", "need_lse"),
    [
        *((case, True) for case in FA4_CASES),
        *((case, False) for case in ("causal", "window", "sinks", "documents")),
    ],
)
def test_flash_attention_4(case: str, need_lse: bool) -> None:
    fields, options = FA4_CASES[case]
    dims = options.get("dims", (128, 128))
    heads, kv_heads = 4, options.get("kv_heads", 2)
    dtype = options.get("dtype", torch.bfloat16)
    pattern = Pattern(**fields)
    if "lengths" in options:
        numbers = documents(*options["lengths"])
        pattern = pattern.replace(q_documents=numbers, kv_documents=numbers)
    how = {"scaling": 0.3 if case == "full" else dims[0] ** -0.5}
    if "softcap" in options:
        how["softcap"] = options["softcap"]
    tensors = inputs(
        (2, heads, kv_heads, pattern.q_len, pattern.kv_len, *dims), dtype, "sinks" in options
    )
    call = Call(
        batch=2,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dims[0],
        value_dim=dims[1],
        dtype=dtype,
        device_type="cuda",
        capability=CAPABILITY,
        softcap="softcap" in how,
        sinks="sinks" in options,
        need_lse=need_lse,
        needs_grad=True,
        compiling=False,
        deterministic="deterministic" in options,
        installed=frozenset({PACKAGE}),
    )
    assert refuses(pattern, call, built_in(pattern)) is None

    def compute(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None):
        return flash_attention_4(
            query,
            key,
            value,
            pattern,
            sinks=sinks,
            need_lse=need_lse,
            deterministic=call.deterministic,
            **how,
        )

    compare(compute, tensors, pattern, need_lse, **how)
    if call.deterministic:
        first, second = (results(compute, tensors, need_lse) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@needs_fa4
def test_documents_in_a_batch_that_lies_apart() -> None:
    """Rows that are no run of one tensor are copied, and gradients find their way back."""
    pattern = Pattern(q_len=64, kv_len=64)
    numbers = documents(20, 44)
    pattern = pattern.replace(q_documents=numbers, kv_documents=numbers)
    tensors = [
        torch.randn(2, h, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (4, 2, 2)
    ]

    def compute(query: Tensor, key: Tensor, value: Tensor):
        return flash_attention_4(query, key, value, pattern, scaling=0.1, need_lse=True)

    compare(compute, tensors, pattern, need_lse=True, scaling=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["transformers", "contiguous", "fused"])
@pytest.mark.parametrize(("causal", "q_len"), [(True, 300), (False, 300), (False, 77)])
@pytest.mark.parametrize("dims", [(80, 80), (128, 128), (192, 128), (256, 256)], ids=str)
def test_cudnn(
    dims: tuple[int, int], causal: bool, q_len: int, layout: str, dtype: torch.dtype
) -> None:
    tensors = inputs((2, 4, 2, q_len, 300, *dims), dtype)
    if layout == "contiguous":
        tensors = [tensor.detach().contiguous().requires_grad_() for tensor in tensors]
    if layout == "fused":  # parts of one projection's output
        tensors = [
            torch.cat([t.detach().transpose(1, 2)] * 2, 2)[:, :, : t.shape[1]].transpose(1, 2)
            for t in tensors
        ]
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    pattern = Pattern(q_len=q_len, kv_len=300, causal=causal)

    def compute(query: Tensor, key: Tensor, value: Tensor):
        return cudnn_attention(query, key, value, causal=causal, scaling=0.2), None

    compare(compute, tensors, pattern, need_lse=False, scaling=0.2)


@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (256, 256)], ids=str)
def test_cudnn_itself_computes_what_is_not_refused(dims: tuple[int, int]) -> None:
    """And not one of those that PyTorch would take in its place."""
    tensors = inputs((1, 16, 4, 8192, 8192, *dims), torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        cudnn_attention(*tensors, causal=True, scaling=0.1)
    names = {event.key for event in profile.key_averages()}
    assert any("cudnn_attention" in name for name in names), names


def test_autocast_changes_nothing() -> None:
    tensors = inputs((1, 4, 2, 64, 64, 64, 64), torch.float32)
    pattern = Pattern(q_len=64, kv_len=64)
    plain, _ = attention(*tensors, pattern, need_lse=False)
    with torch.autocast("cuda", torch.bfloat16):
        under, _ = attention(*tensors, pattern, need_lse=False)
    assert under.dtype == torch.float32
    assert torch.equal(under, plain)


@pytest.mark.parametrize(
    "vendor", ["cudnn", pytest.param("flash_attention_4", marks=needs_fa4), "attention"]
)
def test_keys_that_all_rows_share(vendor: str) -> None:
    """Expanded views: a batch stride of 0, and gradients that are sums."""
    query, *shared = inputs((2, 4, 2, 300, 300, 64, 64), torch.bfloat16)
    tensors = [query, *(tensor[:1].detach().requires_grad_() for tensor in shared)]
    pattern = Pattern(q_len=300, kv_len=300)

    def compute(query: Tensor, key: Tensor, value: Tensor):
        key, value = key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1)
        if vendor == "cudnn":
            return cudnn_attention(query, key, value, causal=True, scaling=0.125), None
        if vendor == "attention":
            return attention(query, key, value, pattern, need_lse=False)
        return flash_attention_4(query, key, value, pattern, scaling=0.125)

    def plain(query: Tensor, key: Tensor, value: Tensor):
        key, value = key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1)
        return reference_attention(query, key, value, pattern)

    judge(compute, plain, tensors, need_lse=False)
