"""The cache layer of ``sparq`` against transformers' own dynamic layer."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer

from hf_attn_plugin.integrations.sparq_cache import SparQLayer
from hf_attn_plugin.ops.sparq.state import sparq_state

B, HKV, D, DV = 3, 2, 8, 6


def chunk(length, seed=0, batch=B):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, HKV, length, D, generator=generator)
    # As a model passes them: transposed views.
    values = torch.randn(batch, length, HKV, DV, generator=generator).transpose(1, 2)
    return keys, values


def filled(*lengths, layer=None):
    """Our layer and a plain one that saw the same updates, without gradients."""
    ours, plain = layer or SparQLayer(), DynamicLayer()
    with torch.no_grad():
        for i, length in enumerate(lengths):
            states = chunk(length, seed=i)
            plain.update(*states)
            check(ours, plain, returned=ours.update(*states))
    return ours, plain


def check(ours, plain, returned=None, state=True):
    """Everything the two layers show is equal, and our state fits the keys."""
    for mine, theirs in ((ours.keys, plain.keys), (ours.values, plain.values)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    if returned is not None:
        assert returned[0] is ours.keys
        assert returned[1] is ours.values
    assert ours.get_seq_length() == plain.get_seq_length()
    assert ours.get_mask_sizes(2) == plain.get_mask_sizes(2)
    if state:
        found = sparq_state(ours.keys)
        torch.testing.assert_close(
            found.components.keys_t, plain.keys.transpose(2, 3), rtol=0, atol=0
        )
    else:
        assert sparq_state(ours.keys) is None


def mean_of(keys, values, visible=None):
    """The running mean, and the bytes read for it."""
    sums, read = sparq_state(keys).sums.update(values, visible, None)
    return sums.total[:, :, 0] / sums.seen[:, :, None].clamp_min(1), read


def both(ours, plain, name, *args):
    with torch.no_grad():
        getattr(ours, name)(*args)
        getattr(plain, name)(*args)


def grow(ours, plain, length=1, seed=99):
    states = chunk(length, seed, batch=plain.keys.shape[0])
    with torch.no_grad():
        plain.update(*states)
        check(ours, plain, returned=ours.update(*states))


@pytest.mark.parametrize("lengths", [(1,), (7,), (200,), (5, 1, 1, 1), (60, 1, 300, 1, 90, 1)])
def test_holds_what_a_plain_layer_holds(lengths):
    filled(*lengths)


def test_appending_rarely_moves_the_buffers():
    layer = SparQLayer()
    addresses = set()
    with torch.no_grad():
        layer.update(*chunk(1000))
        for i in range(2000):
            keys, _ = layer.update(*chunk(1, seed=i))
            addresses.add(keys.data_ptr())
    assert keys.shape[2] == 3000
    assert len(addresses) <= 6  # 1250, 1563, 1954, 2443, 3054
    assert keys.untyped_storage().nbytes() <= 1.3 * keys.numel() * keys.element_size()


def test_half_precision_and_component_rows_are_contiguous():
    layer = SparQLayer()
    with torch.no_grad():
        keys, _ = layer.update(*(t.bfloat16() for t in chunk(9)))
    state = sparq_state(keys)
    assert state.components.keys_t.dtype == torch.bfloat16
    assert state.components.keys_t.stride(-1) == 1
    state.components.keys_t.view(B * HKV * D, 9)  # rows can be selected without a copy


def test_what_was_returned_never_changes():
    layer = SparQLayer()
    kept = []
    with torch.no_grad():
        for i in range(12):
            keys, values = layer.update(*chunk(1 + i % 3, seed=i))
            tensors = (keys, values, sparq_state(keys).components.keys_t)
            kept.append((tensors, [t.clone() for t in tensors]))
            if i % 4 == 3:
                layer.crop(-2)
            if i == 6:
                layer.reorder_cache(torch.tensor([2, 0, 0]))
    layer.reset()
    for tensors, snapshot in kept:
        for tensor, expected in zip(tensors, snapshot, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_appending_does_not_invalidate_what_autograd_saved():
    layer = SparQLayer()
    with torch.no_grad():
        keys, _ = layer.update(*chunk(5))
    query = torch.randn(B, HKV, 1, D, requires_grad=True)
    scores = query @ keys.transpose(2, 3)
    with torch.no_grad():
        layer.update(*chunk(1))
    scores.sum().backward()  # "modified by an inplace operation" otherwise
    torch.testing.assert_close(query.grad, keys.sum(dim=2, keepdim=True))


def test_gradients_are_those_of_a_plain_layer():
    gradients = []
    for layer in (SparQLayer(), DynamicLayer()):
        with torch.no_grad():
            layer.update(*chunk(4))
        first, second = ([t.clone().requires_grad_() for t in chunk(n, seed=n)] for n in (3, 2))
        layer.update(*first)
        keys, values = layer.update(*second)
        assert sparq_state(keys) is None
        (keys.square().sum() + values.square().sum()).backward()
        gradients.append([t.grad for t in first + second])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert mine.abs().sum() > 0


def test_moves_between_training_and_generation():
    ours, plain = filled(4)
    states = chunk(3, seed=7)
    check(ours, plain, state=True)
    plain.update(*states)
    check(ours, plain, returned=ours.update(*states), state=False)
    grow(ours, plain, 2)
    grow(ours, plain, 1)


BATCH_CHANGES = {
    "reorder": ("reorder_cache", torch.tensor([2, 0, 0])),
    "repeat": ("batch_repeat_interleave", 2),
    "select": ("batch_select_indices", torch.tensor([2, 1])),
}


@pytest.mark.parametrize("change", BATCH_CHANGES.values(), ids=BATCH_CHANGES.keys())
def test_changes_of_the_batch(change):
    ours, plain = filled(5, 1)
    visible = torch.arange(6) >= torch.tensor([[0], [2], [3]])
    mean_of(ours.keys, ours.values, visible)
    both(ours, plain, *change)
    check(ours, plain)
    address = ours.keys.data_ptr()
    grow(ours, plain)
    assert ours.keys.data_ptr() == address, "the room left was lost"
    name, argument = change
    rows = {
        "reorder_cache": lambda t: t[argument],
        "batch_repeat_interleave": lambda t: t.repeat_interleave(argument, 0),
        "batch_select_indices": lambda t: t[argument],
    }[name](visible)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.bool)], dim=1)
    mean, _ = mean_of(ours.keys, ours.values, rows)
    torch.testing.assert_close(mean, masked_mean(plain.values, rows))


@pytest.mark.parametrize("name", BATCH_CHANGES)
def test_changes_of_the_batch_before_anything_is_cached_or_after_training(name):
    change = BATCH_CHANGES[name]
    getattr(SparQLayer(), change[0])(change[1])
    ours, plain = SparQLayer(), DynamicLayer()
    for layer in (ours, plain):
        layer.update(*chunk(4))
        getattr(layer, change[0])(change[1])
    check(ours, plain, state=False)
    grow(ours, plain)


@pytest.mark.parametrize("removed", [0, -1, -4, -7])
def test_crop(removed):
    ours, plain = filled(6, 1)
    mean_of(ours.keys, ours.values)
    both(ours, plain, "crop", removed)
    check(ours, plain, state=removed == 0)
    grow(ours, plain, 3, seed=50)
    grow(ours, plain, 1, seed=51)
    mean, _ = mean_of(ours.keys, ours.values)
    torch.testing.assert_close(mean, plain.values.mean(dim=2))


def test_crop_before_anything_is_cached():
    layer = SparQLayer()
    layer.crop(0)
    assert layer.get_seq_length() == 0


def test_reset():
    ours, _ = filled(6, 1)
    mean_of(ours.keys, ours.values)
    ours.reset()
    assert ours.get_seq_length() == 0
    assert not ours.is_initialized
    filled(9, 1, layer=ours)  # more than before: the old count must not pass for part of it
    mean, read = mean_of(ours.keys, ours.values)
    torch.testing.assert_close(mean, ours.values.mean(dim=2))
    assert read == ours.values.numel() * 4


def masked_mean(values, visible):
    weights = visible[:, None, :, None].to(values.dtype)
    return (values * weights).sum(2) / weights.sum(2).clamp_min(1)


def test_running_mean_reads_each_value_once_and_leaves_padding_out():
    layer = SparQLayer()
    length, row_bytes = 0, B * HKV * DV * 4
    start = torch.tensor([[0], [4], [9]])  # the last row is padding only until position 9
    for i, new in enumerate([7, 1, 1, 1, 1]):
        keys, values = chunk(new, seed=i)
        values = torch.where(
            (torch.arange(length, length + new) < start)[:, None, :, None], torch.nan, values
        )
        with torch.no_grad():
            keys, values = layer.update(keys, values)
        length += new
        visible = torch.arange(length)[None] >= start
        mean, read = mean_of(keys, values, visible)
        assert read == new * row_bytes
        torch.testing.assert_close(mean, masked_mean(values.nan_to_num(1e9), visible))
        assert mean_of(keys, values, visible)[1] == 0
    assert mean[2].abs().sum() > 0


def test_running_mean_catches_up_with_steps_that_did_not_ask():
    ours, plain = filled(4, 1, 1, 1)
    grow(ours, plain)
    mean, read = mean_of(ours.keys, ours.values, torch.ones(1, 8, dtype=torch.bool))
    torch.testing.assert_close(mean, plain.values.mean(dim=2))
    assert read == plain.values.numel() * 4


def test_running_mean_accumulates_in_float32():
    layer = SparQLayer()
    values = torch.full((1, 1, 5000, 1), 1.0, dtype=torch.bfloat16)
    with torch.no_grad():
        keys, values = layer.update(values.clone(), values)
        for _ in range(20):
            mean_of(keys, values)
            keys, values = layer.update(values[:, :, :1], values[:, :, :1])
    mean, _ = mean_of(keys, values)
    assert mean.dtype == torch.float32
    assert mean.item() == 1.0


def test_deepcopy_is_independent():
    ours, plain = filled(5, 1)
    mean_of(ours.keys, ours.values)
    copied, plain_copy = copy.deepcopy(ours), copy.deepcopy(plain)
    assert sparq_state(copied.keys).sums is copied._sums
    grow(ours, plain, seed=1)
    grow(copied, plain_copy, seed=2)
    check(ours, plain)
    check(copied, plain_copy)
    for layer in (ours, copied):
        mean, _ = mean_of(layer.keys, layer.values)
        torch.testing.assert_close(mean, layer.values.mean(dim=2))


def test_save_and_load():
    ours, plain = filled(5, 1)
    mean_of(ours.keys, ours.values)
    cache = Cache(layers=[ours])
    file = io.BytesIO()
    torch.save({"cache": cache, "keys": ours.keys}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    layer = loaded["cache"].layers[0]
    check(layer, plain)
    torch.testing.assert_close(
        sparq_state(loaded["keys"]).components.keys_t,
        sparq_state(ours.keys).components.keys_t,
        rtol=0,
        atol=0,
    )
    grow(layer, plain)
    mean, _ = mean_of(layer.keys, layer.values)
    torch.testing.assert_close(mean, plain.values.mean(dim=2))


def test_the_layer_is_freed_without_the_garbage_collector():
    ours, _ = filled(5, 1)
    keys, gone = ours.keys, weakref.ref(ours)
    gc.disable()
    try:
        del ours
        assert gone() is None
    finally:
        gc.enable()
    assert sparq_state(keys) is not None


def test_inference_mode_and_out_of_it():
    ours, plain = SparQLayer(), DynamicLayer()
    with torch.inference_mode():
        for layer in (ours, plain):
            layer.update(*chunk(5))
    grow(ours, plain)
    with torch.inference_mode():
        for layer in (ours, plain):
            layer.update(*chunk(1, seed=3))
    check(ours, plain)
    grow(ours, plain)


def test_offload_and_prefetch_take_everything_along():
    """Without a second device: "meta" stands in for the one that computes."""
    ours, plain = filled(5, 1)
    ours.offload()
    ours.prefetch()
    check(ours, plain)
    ours.device = torch.device("meta")
    ours.prefetch()
    for tensor in (ours.keys, ours.values, sparq_state(ours.keys).components.keys_t):
        assert tensor.device.type == "meta"
    SparQLayer().offload()
    SparQLayer().prefetch()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_cache_on_a_gpu():
    layers = [SparQLayer(), SparQLayer()]
    cache, plain = Cache(layers=layers, offloading=True), [DynamicLayer(), DynamicLayer()]
    with torch.no_grad():
        for step in range(6):
            for i in range(2):
                states = [t.cuda() for t in chunk(70 if step == 0 else 1, seed=10 * step + i)]
                keys, values = cache.update(*states, i)
                expected, _ = plain[i].update(*states)
                torch.testing.assert_close(keys, expected, rtol=0, atol=0)
                state = sparq_state(keys)
                torch.testing.assert_close(state.components.keys_t, expected.mT, rtol=0, atol=0)
                mean, _ = mean_of(keys, values)
                torch.testing.assert_close(mean, plain[i].values.mean(dim=2))
                assert layers[i].keys.device.type == "cpu"
