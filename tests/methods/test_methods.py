"""The attention functions called as transformers calls them: shapes, strides, layouts, refusals."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from hf_attn_plugin import SlidingWindowConfig, configure
from hf_attn_plugin.methods import METHODS
from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.patterns import Pattern, PatternMask

ALONE = [name for name in METHODS if name != "ring"]  # which insists on being one of several
SOFTMAX = [name for name in ALONE if name != "linear"]


def layer(**attributes: Any) -> nn.Module:
    module = nn.Module()
    module.config = LlamaConfig(num_hidden_layers=1)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def tensors(q_len: int = 7, kv_len: int = 7, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, heads, q_len, 8),
        torch.randn(2, kv_heads, kv_len, 8),
        torch.randn(2, kv_heads, kv_len, 8),
    ]


def specification(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **kwargs: Any) -> Tensor:
    output, _ = reference_attention(q.double(), k.double(), v.double(), pattern, **kwargs)
    return output.transpose(1, 2).float()


@pytest.mark.parametrize("name", SOFTMAX)
def test_output_is_laid_out_as_models_reshape_it(name: str) -> None:
    q, k, v = tensors()
    output, weights = METHODS[name](layer(), q, k, v, None, scaling=0.3)
    assert weights is None
    assert output.shape == (2, 7, 4, 8)
    assert output.is_contiguous()
    pattern = Pattern(q_len=7, kv_len=7)  # every default window is wider
    torch.testing.assert_close(output, specification(q, k, v, pattern, scaling=0.3))


@pytest.mark.parametrize("name", SOFTMAX)
def test_values_may_be_narrower_than_keys(name: str) -> None:
    q, k, v = tensors()
    output, _ = METHODS[name](layer(), q, k, v[..., :5], None)
    pattern = Pattern(q_len=7, kv_len=7)
    torch.testing.assert_close(output, specification(q, k, v[..., :5], pattern))


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_views_of_a_fused_projection(name: str, kv_heads: int) -> None:
    """Strided views give what contiguous copies give, and are not written to."""
    torch.manual_seed(0)
    fused = torch.randn(2, 7, (4 + 2 * kv_heads) * 8)
    saved = fused.clone()
    q, k, v = fused.split([32, 8 * kv_heads, 8 * kv_heads], -1)
    views = [t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v)]
    output, _ = METHODS[name](layer(), *views, None)
    copies = [view.contiguous() for view in views]
    torch.testing.assert_close(output, METHODS[name](layer(), *copies, None)[0])
    torch.testing.assert_close(output, specification(*copies, Pattern(q_len=7, kv_len=7)))
    assert torch.equal(fused, saved)


@pytest.mark.parametrize(
    ("attribute", "argument", "causal"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_causality_is_the_arguments_before_the_modules(
    attribute: bool, argument: bool | None, causal: bool
) -> None:
    q, k, v = tensors()
    output, _ = METHODS["flash"](layer(is_causal=attribute), q, k, v, None, is_causal=argument)
    pattern = Pattern(q_len=7, kv_len=7, causal=causal)
    torch.testing.assert_close(output, specification(q, k, v, pattern))


def test_a_padding_mask_that_came_without_our_mask_function() -> None:
    q, k, v = tensors()
    valid = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    output, _ = METHODS["flash"](layer(), q, k, v, valid)
    pattern = Pattern(q_len=7, kv_len=7, key_valid=valid.bool())
    torch.testing.assert_close(output, specification(q, k, v, pattern))
    assert not output[0, 0].any(), "a query that sees nothing must return 0"


def test_empty_rows_have_no_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in tensors())
    valid = torch.zeros(2, 7, dtype=torch.long)
    valid[1] = 1
    for window in (None, 2):
        module = layer()
        name = "flash" if window is None else "sliding_window"
        if window:
            configure(module.config, SlidingWindowConfig(window=window))
        output, _ = METHODS[name](module, q, k, v, valid)
        gradients = torch.autograd.grad(output.sum(), (q, k, v))
        for gradient in gradients:
            assert not gradient[0].any()
            assert gradient.isfinite().all()


def test_fewer_queries_sit_at_the_last_keys() -> None:
    q, k, v = tensors(q_len=3, kv_len=9)
    output, _ = METHODS["flash"](layer(), q, k, v, None, sliding_window=4)
    pattern = Pattern(q_len=3, kv_len=9, band=4, q_offset=6)
    torch.testing.assert_close(output, specification(q, k, v, pattern))


def test_softcap_and_sinks_by_either_name() -> None:
    q, k, v = tensors()
    sinks = torch.randn(4)
    wanted = specification(q, k, v, Pattern(q_len=7, kv_len=7), softcap=1.5, sinks=sinks.double())
    for name in ("s_aux", "sinks"):
        output, _ = METHODS["flash"](layer(), q, k, v, None, softcap=1.5, **{name: sinks})
        torch.testing.assert_close(output, wanted)


def test_one_mask_serves_all_layers() -> None:
    """What is derived from the pattern is made once, and a method's terms do not leak."""
    q, k, v = tensors()
    mask = PatternMask(Pattern(q_len=7, kv_len=7), batch_size=2)
    outputs = {}
    for window in (2, 5, 2):
        module = layer()
        configure(module.config, SlidingWindowConfig(window=window))
        outputs.setdefault(window, []).append(METHODS["sliding_window"](module, q, k, v, mask)[0])
    assert torch.equal(outputs[2][0], outputs[2][1])
    assert not torch.equal(outputs[2][0], outputs[5][0])
    dense, _ = METHODS["flash"](layer(), q, k, v, mask)
    torch.testing.assert_close(dense, specification(q, k, v, Pattern(q_len=7, kv_len=7)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "no attention dropout"),
        ({"output_attentions": True}, "never holds the attention weights"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"indices": torch.zeros(1)}, "DeepSeek"),
        ({"block_indices": torch.zeros(1)}, "key blocks"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_done_is_refused_by_name(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        METHODS[name](layer(), *tensors(), None, **arguments)
    assert f"attn_implementation={name!r}" in str(error.value)
    assert "eager" in str(error.value) or "sdpa" in str(error.value), "no way out is named"


@pytest.mark.parametrize("name", ALONE)
def test_harmless_arguments_change_nothing(name: str) -> None:
    q, k, v = tensors()
    plain, _ = METHODS[name](layer(), q, k, v, None)
    extra = {"use_cache": True, "output_attentions": False, "position_bias": None, "my_own": 3}
    assert torch.equal(METHODS[name](layer(), q, k, v, None, **extra)[0], plain)


@pytest.mark.parametrize("name", METHODS)
def test_a_mask_for_other_lengths_is_refused(name: str) -> None:
    mask = PatternMask(Pattern(q_len=6, kv_len=7), batch_size=2)
    with pytest.raises(ValueError, match="from 7 queries to 7 keys"):
        METHODS[name](layer(), *tensors(), mask)


def test_modules_without_a_config_have_defaults() -> None:
    q, k, v = tensors()
    output, _ = METHODS["sliding_window"](nn.Module(), q, k, v, None)
    torch.testing.assert_close(output, specification(q, k, v, Pattern(q_len=7, kv_len=7)))


def test_every_method_is_documented() -> None:
    for function in METHODS.values():
        assert isinstance(function, types.FunctionType)
        assert "Args:" in (inspect.getdoc(function) or "")
