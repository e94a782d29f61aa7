"""The adapters of vendors' kernels, over stand-ins with the vendors' documented signatures."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from hf_attn_plugin.ops import reference_attention
from hf_attn_plugin.ops.vendors import flash_attention_4 as adapter
from hf_attn_plugin.ops.vendors.cudnn import cudnn_attention
from hf_attn_plugin.patterns import Pattern


def mask_of(q_len: int, kv_len: int, causal: bool, window: tuple[int | None, int | None]) -> Tensor:
    """FlashAttention's meaning: the last query beside the last key, keys to its left and right."""
    left, right = window
    distance = torch.arange(q_len)[:, None] + kv_len - q_len - torch.arange(kv_len)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal or right is not None:
        seen &= distance >= -(0 if causal else right or 0)
    return seen if left is None else seen & (distance <= left)


class FakeFlashAttention4:
    """The two functions of `flash_attn.cute`, in plain PyTorch, and what they were called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int | None, int | None],
        learnable_sink: Tensor | None,
        softcap: float,
        deterministic: bool,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        self.calls.append(dict(q=q, k=k, v=v, window=window_size, deterministic=deterministic))
        assert isinstance(softcap, float)
        # As the vendor asserts it.
        known = (torch.float16, torch.bfloat16, torch.float32)
        assert learnable_sink is None or learnable_sink.dtype in known
        mask = mask_of(q.shape[1], k.shape[1], causal, window_size)
        over = Pattern(q_len=q.shape[1], kv_len=k.shape[1], causal=False, dense=mask[None, None])
        output, lse = reference_attention(
            *(t.transpose(1, 2) for t in (q, k, v)),
            over,
            scaling=softmax_scale,
            softcap=softcap or None,
            sinks=learnable_sink,
        )
        return output.transpose(1, 2), lse if return_lse else None

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert q.ndim == k.ndim == v.ndim == 3
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == q.shape[0]
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        parts = [
            self.flash_attn_func(*(t[None, start:stop] for t in (q, k, v)), **options)
            for start, stop in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False)
        ]
        self.calls.append(dict(q=q, k=k, v=v, starts=cu_seqlens_q))
        output = torch.cat([output for output, _ in parts], 1)[0]
        if not options["return_lse"]:
            return output, None
        return output, torch.cat([lse for _, lse in parts if lse is not None], 2)[0]


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFlashAttention4]:
    fake = FakeFlashAttention4()
    module = types.ModuleType("flash_attn.cute")
    module.__dict__.update(
        flash_attn_func=fake.flash_attn_func, flash_attn_varlen_func=fake.flash_attn_varlen_func
    )
    package = types.ModuleType("flash_attn")
    package.__dict__["cute"] = module
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    adapter._vendor.cache_clear()
    yield fake
    adapter._vendor.cache_clear()


def inputs(batch: int, q_len: int, kv_len: int) -> list[Tensor]:
    """As transformers lays them out."""
    torch.manual_seed(q_len + kv_len)
    shapes = ((q_len, 4, 8), (kv_len, 2, 8), (kv_len, 2, 6))
    made = [torch.randn(batch, *shape, dtype=torch.float64).transpose(1, 2) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def documents(*rows: tuple[int, ...]) -> Tensor:
    count = torch.arange(max(map(len, rows)))
    return torch.stack([count[: len(row)].repeat_interleave(torch.tensor(row)) for row in rows])


def packed(*rows: tuple[int, ...], **fields: Any) -> Pattern:
    numbers = documents(*rows)
    length = numbers.shape[1]
    return Pattern(
        q_len=length, kv_len=length, q_documents=numbers, kv_documents=numbers.clone(), **fields
    )


PATTERNS = {
    "causal": Pattern(q_len=20, kv_len=20),
    "causal, more keys": Pattern(q_len=20, kv_len=33),
    "full": Pattern(q_len=20, kv_len=20, causal=False),
    "cross": Pattern(q_len=20, kv_len=11, causal=False),
    "window": Pattern(q_len=20, kv_len=20, window=5),
    "window of one": Pattern(q_len=20, kv_len=20, window=1),
    "window, more keys": Pattern(q_len=20, kv_len=33, window=5),
    "band inside a window": Pattern(q_len=20, kv_len=20, window=9, band=4),
    "band both ways": Pattern(q_len=20, kv_len=20, causal=False, band=4),
    "documents": packed((7, 1, 12)),
    "documents of every row": packed((7, 1, 12), (20,), (10, 10)),
    "documents, window": packed((7, 13), window=3),
    "documents, both ways": packed((7, 13), causal=False),
}


@pytest.mark.parametrize("need_lse", [False, True], ids=["output", "lse"])
@pytest.mark.parametrize("name", PATTERNS)
def test_flash_attention_4_is_told_the_pattern(
    name: str, need_lse: bool, vendor: FakeFlashAttention4
) -> None:
    pattern = PATTERNS[name]
    tensors = inputs(3, pattern.q_len, pattern.kv_len)
    sinks = torch.randn(4, requires_grad=True)
    how: dict[str, Any] = dict(scaling=0.3, softcap=1.5, sinks=sinks)
    got = adapter.flash_attention_4(*tensors, pattern, need_lse=need_lse, **how)
    want = reference_attention(*tensors, pattern, **how)
    assert (got[1] is not None) is need_lse
    results = [*zip(got, want, strict=True)][: 1 + need_lse]
    for ours, exact in results:
        assert ours is not None
        torch.testing.assert_close(ours, exact)
    losses = [functools.reduce(torch.add, [r[i].sin().sum() for r in results]) for i in (0, 1)]
    grads = [torch.autograd.grad(loss, [*tensors, sinks]) for loss in losses]
    torch.testing.assert_close(*grads)


def test_sinks_of_a_dtype_that_the_vendor_refuses(vendor: FakeFlashAttention4) -> None:
    tensors, pattern = inputs(2, 20, 20), PATTERNS["window"]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    got, _ = adapter.flash_attention_4(*tensors, pattern, scaling=0.3, sinks=sinks)
    want, _ = reference_attention(*tensors, pattern, scaling=0.3, sinks=sinks)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(output.sin().sum(), sinks)[0] for output in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_a_wrong_window_would_be_seen(vendor: FakeFlashAttention4) -> None:
    """The control: one key less, and the comparison above fails."""
    tensors = inputs(1, 20, 20)
    got, _ = adapter.flash_attention_4(*tensors, Pattern(q_len=20, kv_len=20, window=4), scaling=1)
    want, _ = reference_attention(*tensors, PATTERNS["window"], scaling=1)
    assert not torch.allclose(got, want)


def test_nothing_is_copied(vendor: FakeFlashAttention4) -> None:
    """Views in, and the output's memory is as models read it."""
    tensors = inputs(2, 20, 20)
    for name in ("causal", "window", "documents"):
        output, _ = adapter.flash_attention_4(*tensors, PATTERNS[name], scaling=1)
        call = vendor.calls[-1]
        for ours, theirs in zip(tensors, (call["q"], call["k"], call["v"]), strict=True):
            assert ours.data_ptr() == theirs.data_ptr(), name
        assert output.shape == (2, 4, 20, 6)
    starts = vendor.calls[-1]["starts"].tolist()
    assert starts == [0, 7, 8, 20, 27, 28, 40]


def test_determinism_is_passed_on(vendor: FakeFlashAttention4) -> None:
    tensors = inputs(1, 20, 20)
    for wanted in (False, True):
        adapter.flash_attention_4(*tensors, PATTERNS["causal"], scaling=1, deterministic=wanted)
        assert vendor.calls[-1]["deterministic"] is wanted


def test_documents_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = packed((7, 13))
    first = adapter.document_starts(pattern, 2)
    assert first is not None
    assert (first.starts.tolist(), first.longest) == ([0, 7, 20, 27, 40], 13)
    assert adapter.document_starts(pattern, 2) is first


@pytest.mark.parametrize(
    "numbers",
    [
        [[0, 0, 1, 1, 0]],  # goes on later
        [[2, 2, 1, 1, 0]],
        [[0, 0, 1, 1, 2], [0, 1, 1, 0, 0]],
    ],
)
def test_documents_that_are_no_runs(numbers: list[list[int]]) -> None:
    told = torch.tensor(numbers)
    pattern = Pattern(q_len=5, kv_len=5, q_documents=told, kv_documents=told)
    assert adapter.document_starts(pattern, len(numbers)) is None


def test_queries_of_other_documents_than_their_keys() -> None:
    told = torch.tensor([[0, 0, 1, 1, 2]])
    pattern = Pattern(q_len=5, kv_len=5, q_documents=told, kv_documents=told + 1)
    assert adapter.document_starts(pattern, 1) is None


def test_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    adapter._vendor.cache_clear()
    with pytest.raises(ImportError, match=r"installed, but cannot be imported.*pip uninstall"):
        adapter.flash_attention_4(*inputs(1, 20, 20), PATTERNS["causal"], scaling=1)


def test_cudnn_comes_before_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is in force inside, grouped heads are not expanded, and it is put back after."""
    seen: dict[str, Any] = {}
    real = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.update(options, order=torch._C._get_sdp_priority_order(), key=key)
        return real(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    before = torch._C._get_sdp_priority_order()
    query, key, _ = inputs(2, 20, 20)
    value = key.detach().cos()
    output = cudnn_attention(query, key, value, causal=True, scaling=0.3)
    assert seen["order"][0] == SDPBackend.CUDNN_ATTENTION.value
    assert before[0] != SDPBackend.CUDNN_ATTENTION.value  # the control
    assert torch._C._get_sdp_priority_order() == before
    assert seen["key"] is key
    assert (seen["is_causal"], seen["scale"], seen["enable_gqa"]) == (True, 0.3, True)
    want, _ = reference_attention(query, key, value, PATTERNS["causal"], scaling=0.3)
    torch.testing.assert_close(output, want)
