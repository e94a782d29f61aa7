"""``h2o``'s cache layer: what happens to its state there."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import random_ids, tiny_model
from transformers.cache_utils import DynamicLayer

from hf_attn_plugin import H2OConfig, configure
from hf_attn_plugin.integrations.h2o_cache import H2OLayer
from hf_attn_plugin.ops.h2o import H2OState, h2o_state


def test_what_we_rely_on_in_transformers():
    theirs = {name for name in vars(DynamicLayer) if not name.startswith("_")}
    # Whatever else changes the rows or positions of a layer would have to change the state too.
    harmless = {
        "is_sliding", "is_croppable", "lazy_initialization", "get_mask_sizes", "get_seq_length",
        "get_max_length", "get_max_cache_shape", "offload", "prefetch",
    }  # fmt: skip
    overridden = {name for name in vars(H2OLayer) if not name.startswith("_")}
    assert theirs <= harmless | overridden, f"new: {theirs - harmless - overridden}"


def filled(batch=3, kv_heads=2, length=9, top_k=4):
    """A layer after a prompt and one eviction."""
    generator = torch.Generator().manual_seed(0)
    make = lambda n, heads=kv_heads: torch.randn(batch, heads, n, 4, generator=generator)  # noqa: E731
    layer = H2OLayer()
    keys, values = layer.update(make(length), make(length))
    state = h2o_state(keys)
    state.append(keys)
    state.attend(
        make(length, 2 * kv_heads), keys, values,
        seen=lambda start, stop: torch.ones(length, length).tril().bool()[None, None, start:stop],
    )  # fmt: skip
    state.evict(top_k, 2)
    return layer


CHANGES = {
    "reorder_cache": (torch.tensor([2, 0, 2]), [2, 0, 2]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    "batch_select_indices": (torch.tensor([1, 0]), [1, 0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_state_follows_the_rows(name):
    layer = filled()
    argument, rows = CHANGES[name]
    index, scores = layer._state.kept
    keys = layer.keys
    getattr(layer, name)(argument)
    assert torch.equal(layer.keys, keys[rows])
    assert torch.equal(layer._state.index, index[rows])
    assert torch.equal(layer._state.scores, scores[rows])
    assert not torch.equal(scores[rows][:2], scores[:2])
    keys, _ = layer.update(layer.keys[:, :, :1], layer.values[:, :, :1])
    assert h2o_state(keys) is layer._state


def test_eviction_keeps_recent_and_heavy():
    state = filled()._state
    index, scores = state.kept
    assert index.shape == (3, 2, 4)
    assert state.has_evicted
    assert (index[..., -2:] == torch.tensor([7, 8])).all()
    assert (index.diff(dim=-1) > 0).all()
    everything = filled(top_k=9)._state
    assert not everything.has_evicted
    total = everything.kept[1]
    # All weights were counted: one per query, and two query heads per KV head.
    torch.testing.assert_close(total.sum(-1), torch.full((3, 2), 18.0))
    heavy = total[..., :7].topk(2).values.sort().values
    torch.testing.assert_close(scores[..., :2].sort().values, heavy)


def test_crop_is_refused_and_reset_forgets():
    layer = filled()
    layer.crop(0)
    for removed in (-1, 3):
        with pytest.raises(ValueError, match=r"h2o' cannot remove tokens from its cache"):
            layer.crop(removed)
    layer.reset()
    assert layer._state.counted == 0
    with pytest.raises(ValueError, match="no position has been appended"):
        _ = H2OState().kept


def test_a_copied_cache_goes_on_by_itself():
    """Prefixes are prepared once and copied for every request."""
    model = configure(tiny_model("llama", "h2o"), H2OConfig(top_k=5, local_window=2))
    ids = random_ids(1, 12)

    def go_on(cache):
        with torch.no_grad():
            return [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)]

    with torch.no_grad():
        prefix = model(ids[:, :8], use_cache=True).past_key_values
    one, two = copy.deepcopy(prefix), copy.deepcopy(prefix)
    torch.testing.assert_close(go_on(one), go_on(two), rtol=0, atol=0)
    assert prefix.layers[0]._state.counted == 8
