"""Shapes, refusals and memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_attn_plugin.ops import attention
from hf_attn_plugin.patterns import Pattern

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("pattern", [dict(), dict(window=4096), dict(causal=False)])
def test_fast_paths_equal_the_blocks(pattern: dict, heads: int) -> None:
    """What SDPA computes is what the blocked kernel computes (asking for the lse selects it)."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 100, 16)
    k, v = torch.randn(2, heads, 100, 16), torch.randn(2, heads, 100, 16)
    over = Pattern(q_len=100, kv_len=100, **pattern)
    fast, none = attention(q, k, v, over, need_lse=False)
    exact, lse = attention(q, k, v, over)
    assert none is None
    assert lse is not None
    torch.testing.assert_close(fast, exact, atol=2e-6, rtol=2e-6)


def test_compiled_whole() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 8) for _ in range(3))
    pattern = Pattern(q_len=24, kv_len=24, window=5, num_sink_tokens=2)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(q, k, v):
        return attention(q, k, v, pattern)[0]

    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, pattern)[0])


def test_autocast_does_not_round_the_scores() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 80, 16) * 3 for _ in range(3))
    pattern = Pattern(q_len=80, kv_len=80, window=9)
    with torch.autocast("cpu", torch.bfloat16):
        under, _ = attention(q, k, v, pattern)
    plain, _ = attention(q, k, v, pattern)
    assert torch.equal(under, plain)


def test_second_derivative_is_refused_and_not_wrong() -> None:
    q = torch.randn(1, 1, 8, 4, requires_grad=True)
    out, _ = attention(q, q, q, Pattern(q_len=8, kv_len=8, window=2))
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 5, 8)), "must agree"),
        (((1, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8)), "must agree"),
        (((1, 2, 4, 8), (1, 2, 4, 6), (1, 2, 4, 8)), "one head_dim"),
        (((1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "divide"),
        (((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)), "pattern is for"),
        (((2, 4, 8), (2, 4, 8), (2, 4, 8)), "batch, heads"),
    ],
)
def test_wrong_shapes_are_refused(shapes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*(torch.randn(s) for s in shapes), Pattern(q_len=4, kv_len=4))


def test_wrong_dtypes_and_batches_are_refused() -> None:
    x = torch.randn(2, 1, 4, 8)
    with pytest.raises(ValueError, match="share a float dtype"):
        attention(x, x.half(), x.half(), Pattern(q_len=4, kv_len=4))
    documents = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="batch of 3"):
        attention(
            x, x, x, Pattern(q_len=4, kv_len=4, q_documents=documents, kv_documents=documents)
        )
    with pytest.raises(ValueError, match="one logit per query head"):
        attention(x, x, x, Pattern(q_len=4, kv_len=4), sinks=torch.zeros(3))


def test_memory_of_a_long_window() -> None:
    """32768 tokens, window 1024: far under a score matrix (4.3 GB), by the README's command."""
    command = [sys.executable, str(ROOT / "eval" / "scaling.py"), "--lengths", "32768", "--json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    extra = float(printed.split('"extra_mb": ')[1].split("}")[0])
    assert extra < 400


def test_wrong_mask_heads_and_softcap_are_refused() -> None:
    q, kv = torch.randn(1, 4, 8, 4), torch.randn(1, 2, 8, 4)
    mask = torch.ones(1, 2, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="1 or 4 heads"):
        attention(q, kv, kv, Pattern(q_len=8, kv_len=8, dense=mask))
    for softcap in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="softcap must be above 0"):
            attention(q, kv, kv, Pattern(q_len=8, kv_len=8), softcap=softcap)
