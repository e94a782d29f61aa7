"""Which implementation a decoding step of ``sparq`` is given."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_attn_plugin import SparQConfig
from hf_attn_plugin.ops.sparq_backend import (
    PAYS_FROM_BYTES,
    SparQBackend,
    SparQCall,
    choose_sparq_backend,
    default_dense_below,
)

LONG = SparQCall(
    batch=1,
    heads=32,
    kv_heads=8,
    length=131072,
    head_dim=128,
    value_dim=128,
    dtype=torch.bfloat16,
    device_type="cuda",
    capability=(9, 0),
    installed=frozenset({"triton"}),
    top_k=128,
)


def choose(call=LONG, **changes):
    return choose_sparq_backend(dataclasses.replace(call, **changes))


def test_long_caches_on_a_gpu_are_read_by_kernels():
    choice = choose()
    assert choice.backend is SparQBackend.TRITON
    assert not choice.falls_back
    assert choice.notice is None


def test_on_a_cpu_everything_is_as_ever():
    for length in (2, 100, 131072):
        choice = choose(device_type="cpu", capability=None, length=length)
        assert choice.backend is SparQBackend.TORCH
        assert not choice.falls_back, "nobody expects speed here"
    assert choose(device_type="cpu", capability=None, dense_below=2**40).backend is (
        SparQBackend.DENSE
    )


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("key_copy", SparQConfig.KEY_COPIES)
def test_from_the_measured_size_on_it_pays(key_copy, grouped):
    heads = 32 if grouped else 8
    call = dataclasses.replace(LONG, key_copy=key_copy, heads=heads, length=1000)
    least = PAYS_FROM_BYTES[grouped][key_copy]
    per_key = call.dense_bytes // 1000
    pays = -(-least // per_key)
    below, above = choose(call, length=pays - 1), choose(call, length=pays)
    assert (below.backend, above.backend) == (SparQBackend.DENSE, SparQBackend.TRITON)
    assert "dense_below=0" in below.notice
    assert choose(call, length=pays - 2).notice == below.notice, "said once, not every step"
    # As many bytes in a batch.
    assert choose(call, length=(pays - 1) // 4, batch=4).backend is below.backend
    assert choose(call, length=pays // 4 + 1, batch=4).backend is above.backend
    assert choose(call, length=pays - 1, dense_below=0).backend is SparQBackend.TRITON
    own = choose(call, length=pays, dense_below=least * 2)
    assert own.backend is SparQBackend.DENSE
    assert own.notice is None, "who asked for it need not be told"


def test_few_keys_are_read_whole_however_many_sequences():
    """Of less than 4 k keys, k are too large a part."""
    many = dataclasses.replace(LONG, batch=512)
    assert choose(many, length=511).backend is SparQBackend.DENSE
    assert choose(many, length=512).backend is SparQBackend.TRITON
    assert choose(many, length=512, top_k=129).backend is SparQBackend.DENSE
    assert choose(many, length=300, dense_below=0).backend is SparQBackend.TRITON


def test_all_keys_are_taken_when_there_are_no_more():
    assert choose(length=128, dense_below=0).backend is SparQBackend.DENSE
    assert choose(length=129, dense_below=0).backend is SparQBackend.TRITON
    assert choose(length=128, dense_below=0, coverage=True).backend is SparQBackend.TRITON


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"installed": frozenset()}, "pip install triton"),
        ({"capability": None}, "NVIDIA"),
        ({"capability": (7, 5)}, "8.0"),
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 576}, "576"),
        ({"mean_block": 64}, "mean_block"),
        ({"needs_grad": True}, "backward"),
        ({"mixed": True}, "dtype"),
        ({"scattered": True}, "apart in memory"),
        ({"counted": True, "coverage": True}, "counted"),
    ],
    ids=str,
)
def test_what_kernels_refuse_goes_on_in_pytorch(changes, said):
    choice = choose(**changes)
    assert choice.backend is SparQBackend.TORCH
    assert said in choice.reason
    assert choice.falls_back is ("counted" not in changes)


def test_counting_does_not_make_a_step_sparse_or_dense():
    short = dataclasses.replace(LONG, length=1000, coverage=True)
    assert default_dense_below(dataclasses.replace(short, counted=True)) > 0
    assert choose(short, counted=True).backend is choose(short).backend is SparQBackend.DENSE
