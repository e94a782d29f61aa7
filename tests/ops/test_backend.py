"""The choice of a backend: a pure function, rule by rule, each with a call that it lets through."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import hf_attn_plugin
from hf_attn_plugin.ops import Backend, attention, choose_backend, reference_attention
from hf_attn_plugin.ops.backend import KERNEL_PACKAGES
from hf_attn_plugin.ops.call import Call
from hf_attn_plugin.ops.vendors.built_in import BuiltIn, built_in
from hf_attn_plugin.patterns import Pattern
from tests.oracle import oracle_mask

dispatch = sys.modules["hf_attn_plugin.ops.attention"]

ALL = frozenset(KERNEL_PACKAGES)
TRITON = frozenset({"triton"})
HOPPER = Call(
    batch=1,
    heads=32,
    kv_heads=8,
    head_dim=128,
    value_dim=128,
    dtype=torch.bfloat16,
    device_type="cuda",
    capability=(9, 0),
    softcap=False,
    sinks=False,
    need_lse=False,
    needs_grad=True,
    compiling=False,
    installed=ALL,
)
CPU = dataclasses.replace(HOPPER, device_type="cpu", capability=None, dtype=torch.float32)


def pattern(**changes: Any) -> Pattern:
    return Pattern(**(dict(q_len=16384, kv_len=16384) | changes))


def documents(*lengths: int, order: int = 1) -> dict[str, torch.Tensor]:
    numbers = torch.arange(len(lengths))[::order] if order > 0 else -torch.arange(len(lengths))
    numbers = numbers.repeat_interleave(torch.tensor(lengths))[None]
    return dict(q_len=sum(lengths), kv_len=sum(lengths), q_documents=numbers, kv_documents=numbers)


PACKED = documents(5000, 3000, 8384)
PADDED = dict(key_valid=torch.ones(1, 16384, dtype=torch.bool))
DIMS_80 = dict(installed=TRITON, head_dim=80, value_dim=80)
DIMS_256 = dict(installed=TRITON, head_dim=256, value_dim=256)
B = Backend


@pytest.mark.parametrize(
    ("fields", "changes", "wanted"),
    [
        # FlashAttention-4 takes all that it has kernels for ...
        ({}, {}, B.FLASH_ATTENTION_4),
        (dict(causal=False), {}, B.FLASH_ATTENTION_4),
        (dict(window=4096), {}, B.FLASH_ATTENTION_4),
        (dict(band=4096, causal=False), {}, B.FLASH_ATTENTION_4),
        (PACKED, {}, B.FLASH_ATTENTION_4),
        (PACKED | dict(window=100), {}, B.FLASH_ATTENTION_4),
        (dict(q_len=8192), {}, B.FLASH_ATTENTION_4),
        (dict(q_len=2048, kv_len=2048), {}, B.FLASH_ATTENTION_4),
        (dict(q_len=17), {}, B.FLASH_ATTENTION_4),
        ({}, dict(softcap=True), B.FLASH_ATTENTION_4),
        (dict(window=1024), dict(softcap=True), B.FLASH_ATTENTION_4),
        ({}, dict(sinks=True), B.FLASH_ATTENTION_4),
        ({}, dict(need_lse=True), B.FLASH_ATTENTION_4),
        ({}, dict(deterministic=True), B.FLASH_ATTENTION_4),
        ({}, dict(dtype=torch.float16), B.FLASH_ATTENTION_4),
        ({}, dict(head_dim=192, kv_heads=32), B.FLASH_ATTENTION_4),
        ({}, dict(head_dim=192, needs_grad=False), B.FLASH_ATTENTION_4),
        ({}, dict(head_dim=256, value_dim=256), B.FLASH_ATTENTION_4),
        ({}, dict(capability=(10, 0)), B.FLASH_ATTENTION_4),
        (dict(window=1024), dict(capability=(10, 0)), B.FLASH_ATTENTION_4),
        (dict(window=1024), dict(head_dim=96, value_dim=96), B.FLASH_ATTENTION_4),
        (dict(window=1024), dict(head_dim=80, value_dim=80), B.TRITON),
        # ... and leaves the rest to others.
        (dict(window=1024), {}, B.TRITON),
        (dict(q_len=1024, kv_len=1024), {}, B.SDPA_CAUSAL),
        (PACKED, dict(softcap=True), B.TRITON),
        (PACKED, dict(softcap=True, needs_grad=False), B.FLASH_ATTENTION_4),
        (documents(5000, 11384, order=-1), {}, B.TRITON),
        (dict(window=4096, num_sink_tokens=4), {}, B.TRITON),
        (dict(window=4096, num_global_tokens=4), {}, B.TRITON),
        (dict(window=4096, dilation=2), {}, B.TRITON),
        (dict(window=4096, stride=64), {}, B.TRITON),
        (PADDED, {}, B.TRITON),
        (dict(q_len=8192, q_offset=0), {}, B.TRITON),
        ({}, dict(dtype=torch.float32, kv_heads=32), B.SDPA_CAUSAL),
        # SDPA has no kernel for grouped heads of these: it would write out their scores, 32 GiB.
        ({}, dict(dtype=torch.float32), B.TRITON),
        ({}, dict(dtype=torch.float32, compiling=True), B.TRITON),
        ({}, dict(dtype=torch.float32, installed=frozenset()), B.SDPA_CAUSAL),
        ({}, dict(head_dim=576, value_dim=512, installed=TRITON), B.SDPA_CAUSAL),
        ({}, dict(dtype=torch.float64), B.BLOCKED),
        ({}, dict(dtype=torch.float64, kv_heads=32), B.BLOCKED),
        ({}, dict(dtype=torch.float32, head_dim=258, value_dim=258), B.BLOCKED),
        (dict(q_len=64, kv_len=64), dict(dtype=torch.float64), B.SDPA_CAUSAL),
        (dict(q_len=1, kv_len=99), dict(dtype=torch.float32, needs_grad=False), B.TRITON_DECODE),
        (dict(q_len=2048, kv_len=2048, window=9), dict(installed=frozenset()), B.SDPA_MASK),
        ({}, dict(head_dim=576, value_dim=512, kv_heads=32, installed=TRITON), B.SDPA_CAUSAL),
        (dict(q_len=1024, kv_len=1024), dict(dtype=torch.float32), B.SDPA_CAUSAL),
        # ... and of many rows under a mask.
        (dict(q_len=512, kv_len=512, window=100, num_sink_tokens=1), {}, B.SDPA_MASK),
        (dict(q_len=512, kv_len=512, window=100, num_sink_tokens=1), dict(batch=64), B.TRITON),
        (dict(window=4096), dict(dtype=torch.float32), B.TRITON),
        (dict(window=4096), dict(dtype=torch.float64), B.BLOCKED),
        ({}, dict(head_dim=100, value_dim=100), B.TRITON),
        ({}, dict(head_dim=64), B.TRITON),
        ({}, dict(batch=2048), B.TRITON),
        (dict(window=4096), dict(compiling=True), B.TRITON),
        (dict(window=4096), dict(capability=(8, 0)), B.TRITON),
        (dict(window=4096), dict(capability=(12, 0)), B.TRITON),
        (dict(window=4096), dict(capability=None), B.TRITON),
        ({}, dict(capability=(10, 0), head_dim=256, value_dim=256, sinks=True), B.TRITON),
        # Without it: our kernels where there are such for Hopper, else cuDNN for large plain calls.
        ({}, dict(installed=TRITON), B.TRITON),
        ({}, dict(installed=frozenset()), B.CUDNN_CAUSAL),
        ({}, DIMS_80, B.CUDNN_CAUSAL),
        (dict(causal=False), DIMS_80, B.CUDNN_FULL),
        ({}, DIMS_80 | dict(compiling=True), B.CUDNN_CAUSAL),
        ({}, dict(compiling=True), B.TRITON),
        (dict(window=16384), DIMS_80, B.CUDNN_CAUSAL),
        (dict(window=16383), DIMS_80, B.TRITON),
        (dict(q_len=8192), DIMS_80, B.TRITON),
        (dict(q_len=8192, causal=False), DIMS_80, B.CUDNN_FULL),
        (PACKED, DIMS_80, B.TRITON),
        ({}, DIMS_80 | dict(softcap=True), B.TRITON),
        ({}, DIMS_80 | dict(sinks=True), B.TRITON),
        ({}, DIMS_80 | dict(need_lse=True), B.TRITON),
        ({}, DIMS_80 | dict(deterministic=True), B.TRITON),
        (dict(q_len=4096, kv_len=4096), DIMS_80, B.TRITON),
        (dict(q_len=3000, kv_len=3000), DIMS_80, B.TRITON),
        (dict(q_len=2048, kv_len=2048), DIMS_80, B.SDPA_CAUSAL),
        (dict(q_len=4096, kv_len=4096), DIMS_256, B.SDPA_CAUSAL),
        (dict(q_len=4096, kv_len=4096), DIMS_256 | dict(needs_grad=False), B.TRITON),
        ({}, dict(installed=TRITON, head_dim=256, value_dim=256), B.CUDNN_CAUSAL),
        ({}, dict(head_dim=192), B.CUDNN_CAUSAL),
        ({}, dict(head_dim=192, need_lse=True), B.TRITON),
        (
            {},
            dict(installed=TRITON, head_dim=256, value_dim=256, deterministic=True),
            B.SDPA_CAUSAL,
        ),
        ({}, dict(installed=TRITON, capability=(10, 0)), B.CUDNN_CAUSAL),
        (
            {},
            dict(installed=TRITON, head_dim=256, value_dim=256, capability=(10, 0)),
            B.SDPA_CAUSAL,
        ),
        ({}, dict(installed=TRITON, capability=(8, 0)), B.SDPA_CAUSAL),
        # Few queries without gradients: the keys are split.
        (dict(q_len=1), dict(needs_grad=False), B.TRITON_DECODE),
        (dict(q_len=16, window=99), dict(needs_grad=False), B.TRITON_DECODE),
        (dict(q_len=1, kv_len=4096), dict(needs_grad=False), B.SDPA_FULL),
        (dict(q_len=1, kv_len=4096, window=99), dict(needs_grad=False), B.TRITON_DECODE),
        (dict(q_len=1, kv_len=4096), dict(needs_grad=False, softcap=True), B.TRITON_DECODE),
        (dict(q_len=1), dict(needs_grad=False, installed=frozenset()), B.SDPA_FULL),
        (dict(q_len=1), {}, B.SDPA_FULL),
        # Small calls are not worth a schedule.
        (dict(q_len=64, kv_len=64, window=4), dict(dtype=torch.float32), B.SDPA_MASK),
        (dict(q_len=64, kv_len=64, window=4), dict(dtype=torch.float32, sinks=True), B.TRITON),
        # Nothing to do.
        (dict(q_len=0), {}, B.BLOCKED),
        ({}, dict(batch=0), B.BLOCKED),
    ],
)
def test_choice_on_a_gpu(fields: dict, changes: dict, wanted: Backend) -> None:
    choice = choose_backend(pattern(**fields), dataclasses.replace(HOPPER, **changes))
    assert choice.backend is wanted, choice
    assert choice.reason
    passed_over = [passed.backend for passed in choice.passed_over]
    assert len({wanted, *passed_over}) == 1 + len(passed_over)


@pytest.mark.parametrize(
    ("fields", "changes", "repeats"),
    [
        ({}, {}, False),
        ({}, dict(dtype=torch.float32), True),
        ({}, dict(dtype=torch.float32, kv_heads=32), False),
        ({}, dict(head_dim=576, value_dim=512), True),
        ({}, dict(head_dim=192), True),
        ({}, dict(capability=(7, 5), dtype=torch.float16), True),
        (dict(q_len=512, kv_len=512, window=9), {}, True),  # FlashAttention-2 takes no mask
        (dict(q_len=512, kv_len=512, window=9), dict(kv_heads=32), False),
        ({}, dict(dtype=torch.float32, device_type="cpu", capability=None), False),
    ],
)
def test_grouped_heads_never_reach_the_kernel_that_writes_scores(
    fields: dict, changes: dict, repeats: bool
) -> None:
    """On GPUs only FlashAttention-2 of SDPA's kernels knows groups of heads."""
    call = dataclasses.replace(HOPPER, **dict(capability=(8, 0), installed=frozenset()) | changes)
    choice = choose_backend(pattern(**fields), call)
    assert choice.backend in (B.SDPA_CAUSAL, B.SDPA_MASK), choice
    assert choice.repeats_heads is repeats
    assert ("repeated" in choice.reason) is repeats
    assert choice.warning is None


def test_what_no_kernel_takes_is_said() -> None:
    call = dataclasses.replace(HOPPER, dtype=torch.float64)
    choice = choose_backend(pattern(), call)
    assert "SDPA writes all scores out in torch.float64" in choice.reason
    assert "SDPA writes all scores out in torch.float64" in (choice.warning or "")


@pytest.mark.parametrize(
    ("fields", "changes", "wanted"),
    [
        ({}, {}, B.SDPA_CAUSAL),
        (dict(causal=False), {}, B.SDPA_FULL),
        (dict(window=16384), {}, B.SDPA_CAUSAL),
        (dict(window=16383), {}, B.BLOCKED),
        (dict(band=64), {}, B.BLOCKED),
        (dict(q_len=1), {}, B.SDPA_FULL),
        (dict(q_len=1, q_offset=7), {}, B.SDPA_MASK),
        (dict(q_len=16, kv_len=64), {}, B.SDPA_MASK),
        (dict(q_len=64, kv_len=64, window=4), {}, B.SDPA_MASK),
        ({}, dict(softcap=True), B.BLOCKED),
        ({}, dict(sinks=True), B.BLOCKED),
        ({}, dict(need_lse=True), B.BLOCKED),
        ({}, dict(compiling=True), B.SDPA_CAUSAL),
        (dict(window=4), dict(compiling=True), B.DENSE),
        (PADDED, dict(compiling=True), B.DENSE),
    ],
)
def test_choice_on_a_cpu(fields: dict, changes: dict, wanted: Backend) -> None:
    choice = choose_backend(pattern(**fields), dataclasses.replace(CPU, **changes))
    assert choice.backend is wanted, choice
    assert choice.reason
    assert choice.warning is None
    assert not any("GPU" in str(passed) for passed in choice.passed_over)


def test_absence_is_named_only_where_installing_helps() -> None:
    def passed(changes: dict, **fields: Any) -> str:
        choice = choose_backend(pattern(**fields), dataclasses.replace(HOPPER, **changes))
        return "; ".join(map(str, choice.passed_over))

    absent = "FlashAttention-4: not installed (pip install 'hf-attn-plugin[fa4]')"
    assert absent in passed(dict(installed=TRITON))
    assert absent in passed(dict(installed=TRITON), window=4096)
    assert absent in passed(dict(installed=frozenset()), window=7)
    assert "Triton, blocks of the schedule: not installed (pip install triton)" in passed(
        dict(installed=frozenset()), window=7
    )
    assert "FlashAttention-4: no sink tokens" in passed(
        dict(installed=TRITON), window=7, num_sink_tokens=1
    )
    assert "not installed" not in passed(dict(installed=TRITON, capability=(8, 0)))
    assert passed({}) == ""


def random_patterns() -> list[dict]:
    found = []
    for q_len, kv_len, q_offset in (
        (6, 6, None),
        (4, 9, None),
        (4, 9, 2),
        (1, 7, None),
        (7, 4, None),
    ):
        for causal in (True, False):
            for window in (None, 1, 3, 9, 20):
                for band in (None, 2, 30):
                    for extra in ({}, dict(num_sink_tokens=1), dict(dilation=2)):
                        fields = dict(causal=causal, window=window, band=band, q_offset=q_offset)
                        found.append(dict(q_len=q_len, kv_len=kv_len) | fields | extra)
    return found


def test_built_in_terms_say_the_same_pairs() -> None:
    """Drawn as vendors define them: the last query beside the last key, windows to both sides."""
    said = refused = 0
    for fields in random_patterns():
        terms = built_in(Pattern(**fields))
        if isinstance(terms, str):
            refused += 1
            continue
        said += 1
        q_len, kv_len = fields["q_len"], fields["kv_len"]
        distance = torch.arange(q_len)[:, None] + kv_len - q_len - torch.arange(kv_len)
        mask = torch.ones(q_len, kv_len, dtype=torch.bool)
        if terms.causal:
            mask &= distance >= 0
        if terms.window is not None:
            mask &= distance.abs() < terms.window
        spec = {name: v for name, v in fields.items() if name not in ("q_len", "kv_len")}
        spec = {name: v for name, v in spec.items() if v is not None}
        assert torch.equal(mask, oracle_mask(1, q_len, kv_len, spec)[0]), fields
        assert mask.any(1).all(), fields
    assert said > 100
    assert refused > 50


def test_documents_are_built_in_where_queries_are_the_keys() -> None:
    numbers = documents(3, 5)
    assert built_in(Pattern(**numbers)) == BuiltIn(causal=True, window=None, documents=True)
    later = numbers | dict(q_len=5, q_documents=numbers["q_documents"][:, 3:])
    assert built_in(Pattern(**later)) == "packed documents over a cache"


def test_offsets_that_are_tensors() -> None:
    assert isinstance(built_in(Pattern(q_len=2, kv_len=8, q_offset=torch.tensor(6))), BuiltIn)
    rows = Pattern(q_len=2, kv_len=8, q_offset=torch.tensor([[6], [5]]))
    assert built_in(rows) == "positions of its own for every row"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made for a GPU without kernels; what it names runs on the CPU as well."""

    def choose(over: Pattern, call: Call) -> Any:
        wanted = dataclasses.replace(call, device_type="cuda", capability=(9, 0))
        return choose_backend(over, dataclasses.replace(wanted, installed=frozenset()))

    monkeypatch.setattr(dispatch, "choose_backend", choose)
    dispatch._warn.cache_clear()


@pytest.mark.usefixtures("on_a_gpu")
def test_slow_calls_warn_once_per_reason() -> None:
    q = torch.randn(1, 2, 40, 8)

    def said(**how: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attention(q, q, q, Pattern(q_len=40, kv_len=40, window=5), **how)
        assert {warning.category for warning in caught} <= {hf_attn_plugin.SlowAttentionWarning}
        assert {warning.filename for warning in caught} <= {__file__}
        return [str(warning.message) for warning in caught]

    (message,) = said()
    assert "blocks of the schedule in PyTorch" in message
    assert "Triton, blocks of the schedule: not installed (pip install triton)" in message
    assert "FlashAttention-4: 16-bit dtypes only" in message
    assert said() == []
    (message,) = said(softcap=3.0)
    assert "softcap" in message
    assert said(need_lse=False) == []  # a mask is no slower


def test_no_warning_on_a_cpu() -> None:
    q = torch.randn(1, 2, 40, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, q, q, Pattern(q_len=40, kv_len=40, window=5))


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("window", [None, 5])
def test_repeated_heads_change_nothing(
    kv_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients; PyTorch is called with as many heads of keys as of queries."""
    heads = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> Any:
        heads.append((key.shape[1], value.shape[1], how["enable_gqa"]))
        assert kv_heads > 1 or key.stride(1) == 0  # a view, no copy
        return real(query, key, value, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    torch.manual_seed(0)
    shapes = ((2, 4, 40, 8), (2, kv_heads, 40, 8), (2, kv_heads, 40, 12))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    over = Pattern(q_len=40, kv_len=40, window=window)
    got, _ = attention(*inputs, over, need_lse=False)
    assert heads == [(4, 4, False)]
    want, _ = reference_attention(*inputs, over)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    grads = torch.autograd.grad(got, inputs, grad)
    torch.testing.assert_close(grads, torch.autograd.grad(want, inputs, grad))


@pytest.mark.usefixtures("on_a_gpu")
def test_the_warning_does_not_break_a_graph() -> None:
    q = torch.randn(1, 2, 40, 8)
    over = Pattern(q_len=40, kv_len=40, window=5)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(q: torch.Tensor) -> torch.Tensor:
        return attention(q, q, q, over, need_lse=False)[0]

    with pytest.warns(hf_attn_plugin.SlowAttentionWarning, match="dense and traceable"):
        output = compiled(q)
    torch.testing.assert_close(output, reference_attention(q, q, q, over)[0])


def test_imports_no_kernels() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import hf_attn_plugin.ops; "
        "assert not {'triton', 'flash_attn', 'torch._dynamo'} & (sys.modules.keys() - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_chosen_once_per_pattern_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(over: Pattern, call: Call) -> Any:
        calls.append(call)
        return choose_backend(over, call)

    monkeypatch.setattr(dispatch, "choose_backend", counting)
    q = torch.randn(1, 2, 40, 8)
    over = Pattern(q_len=40, kv_len=40)
    for _ in range(3):
        attention(q, q, q, over, need_lse=False)
    assert len(calls) == 1
    attention(q.requires_grad_(), q, q, over, need_lse=False)
    with torch.no_grad():
        attention(q, q, q, over, need_lse=False)
    assert [call.needs_grad for call in calls] == [False, True]
    with pytest.raises(ValueError, match="pattern is for"):
        attention(q[:, :, :9], q, q, over, need_lse=False)


def test_the_log_sum_exp_is_returned_when_asked_for_only() -> None:
    q = torch.randn(1, 2, 40, 8)
    for over in (Pattern(q_len=40, kv_len=40, window=5), Pattern(q_len=40, kv_len=40)):
        assert attention(q, q, q, over, need_lse=False)[1] is None
        assert attention(q, q, q, over, need_lse=True)[1] is not None
    assert attention(q, q, q, over, softcap=2.0, need_lse=False)[1] is None


def test_autocast_rounds_nothing() -> None:
    q = torch.randn(1, 2, 40, 8)
    over = Pattern(q_len=40, kv_len=40)
    plain, _ = attention(q, q, q, over, need_lse=False)
    with torch.autocast("cpu", torch.bfloat16):
        under, _ = attention(q, q, q, over, need_lse=False)
        (product,) = {(q @ q.mT).dtype}
    assert product == torch.bfloat16  # the control: autocast was on
    assert torch.equal(under, plain)


def test_no_key_value_heads_are_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="KV heads must divide query heads"):
        attention(q, q[:, :0], q[:, :0], Pattern(q_len=4, kv_len=4))


def test_a_sink_of_minus_infinity_has_no_gradient() -> None:
    """Nor where a row sees nothing, in the reference as in what is chosen."""
    q = torch.randn(1, 2, 6, 8)
    over = Pattern(q_len=6, kv_len=6, key_valid=torch.arange(6)[None] >= 3)
    sinks = torch.tensor([float("-inf"), 0.5], requires_grad=True)
    grads = []
    for function in (attention, reference_attention):
        output, _ = function(q, q, q, over, sinks=sinks)
        grads += torch.autograd.grad(output.sin().sum(), sinks)
    torch.testing.assert_close(*grads)
    assert grads[0][0] == 0 and grads[0][1] != 0


@pytest.mark.parametrize("scaling", [-0.3, 0.0])
def test_scaling_of_any_sign(scaling: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    for over in (Pattern(q_len=40, kv_len=40, window=5), Pattern(q_len=40, kv_len=40)):
        got, _ = attention(q, k, v, over, scaling=scaling, need_lse=False)
        want, _ = reference_attention(q, k, v, over, scaling=scaling)
        torch.testing.assert_close(got, want)
