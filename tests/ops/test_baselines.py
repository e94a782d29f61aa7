"""`exact_topk_decode`, `attend_to` and `H2OState` on tensors: accuracy, shapes, empty rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_attn_plugin.ops.baselines import attend_to, exact_topk_decode
from hf_attn_plugin.ops.choice import most_recent
from hf_attn_plugin.ops.h2o import H2OState


def topk(query, keys, values, visible=None, **options):
    return exact_topk_decode(query, keys, values, top_k=1000, visible=visible, **options)


def given(query, keys, values, visible=None, **options):
    index = torch.arange(keys.shape[2])[None, None]
    kept = None if visible is None else visible[:, None]
    return attend_to(query, keys, values, index, kept=kept, **options)


def h2o(query, keys, values, visible=None, **options):
    state = H2OState()
    state.append(keys, visible)
    seen = torch.ones(1, keys.shape[2], dtype=torch.bool) if visible is None else visible
    return state.attend(query, keys, values, seen=lambda *_: seen[:, None, None], **options)


STEPS = {"exact_topk": topk, "attend_to": given, "h2o": h2o}


def tensors(dtype=torch.float32, batch=2, heads=6, kv_heads=2, length=129, dim=80, value_dim=48):
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        # A view into something wider, as of a fused projection.
        wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
        return wide.to(dtype)[..., : shape[-1]]

    return (
        make(batch, heads, 1, dim),
        make(batch, kv_heads, length, dim),
        make(batch, kv_heads, length, value_dim),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_all_keys_are_dense_attention(step, dtype):
    query, keys, values = tensors(dtype)
    exact, plain = (
        F.scaled_dot_product_attention(
            *(t.to(kind) for t in (query, keys, values)), enable_gqa=True
        )
        for kind in (torch.float64, dtype)
    )
    output, read = step(query, keys, values)
    assert output.dtype == dtype
    budget = 2 * (plain.double() - exact).norm() + 8 * torch.finfo(dtype).eps * exact.norm()
    assert (output.double() - exact).norm() <= budget
    assert read == (keys.numel() + values.numel()) * keys.element_size()


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_padding_softcap_sinks_and_scaling(step):
    query, keys, values = (t.double() for t in tensors())
    visible = torch.rand(2, 129, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[1] = False
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(2)).double()
    output, _ = step(query, keys, values, visible, scaling=0.4, softcap=3.0, sinks=sinks)
    scores = 0.4 * query @ keys.repeat_interleave(3, 1).mT
    scores = 3 * torch.tanh(scores / 3)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    scores = torch.cat([scores, sinks.view(1, 6, 1, 1).expand(2, -1, -1, -1)], dim=-1)
    expected = scores.softmax(-1)[..., :-1] @ values.repeat_interleave(3, 1)
    torch.testing.assert_close(output, expected)
    assert (output[1] == 0).all()  # it sees nothing
    without, _ = step(query, keys, values, visible)
    assert (without[0] - output[0]).abs().max() > 1e-2
    assert (without[1] == 0).all()


@pytest.mark.parametrize("local_window", [0, 3, 5])
def test_the_keys_chosen_are_the_largest(local_window):
    query, keys, values = (t.double() for t in tensors(heads=2, kv_heads=1, batch=1, length=40))
    output, read = exact_topk_decode(query, keys, values, top_k=5, local_window=local_window)
    mass = ((query @ keys.mT) * 80**-0.5).softmax(-1).sum(1)[0, 0]
    local = list(range(40 - local_window, 40))
    rest = [j for j in mass.argsort(descending=True).tolist() if j not in local]
    chosen = [*local, *rest[: 5 - local_window]]
    expected = F.scaled_dot_product_attention(
        query, keys[:, :, chosen], values[:, :, chosen], enable_gqa=True
    )
    torch.testing.assert_close(output, expected)
    assert read == 8 * (40 * 80 + 5 * 48)


def test_most_recent():
    seen = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    expected = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    assert torch.equal(most_recent(seen, 2), expected)
    assert not most_recent(seen, 0).any()


def test_wrong_numbers_are_refused():
    for top_k, local_window in ((0, 0), (3, 4), (3, -1)):
        with pytest.raises(ValueError, match=r"top_k must be at least 1 and local_window 0 to"):
            exact_topk_decode(*tensors(), top_k=top_k, local_window=local_window)


def test_padding_is_never_kept():
    _, keys, _ = tensors(length=9)
    visible = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 1]]).bool()
    state = H2OState()
    state.append(keys, visible)
    state.evict(4, 2)
    index, scores = state.kept
    assert (scores > -torch.inf).all()
    assert (index[0] >= 3).all()
    assert (index[1, :, -2:] == torch.tensor([6, 8])).all()
