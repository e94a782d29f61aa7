"""What planning keeps, and what the ranks' GPUs have to do with it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import hf_attn_plugin
from hf_attn_plugin.methods.sharding import WholeRows
from hf_attn_plugin.parallel import Layout, Shapes, Shard, choose_way
from hf_attn_plugin.parallel.choice import MEMORY
from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.sequence_parallelism import context
from tests.parallel.processes import run_processes
from tests.tiny import random_ids, tiny_model


def of_unequal_gpus(rank: int) -> float:
    ids = random_ids(1, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "gpu_bytes", lambda device: 1000 + rank)
        shard = hf_attn_plugin.sequence_parallel(
            None, tiny_model("llama", "ring"), {"input_ids": ids}
        )
    return shard.shard.memory


def test_the_smallest_gpu_decides_on_every_rank() -> None:
    assert run_processes(of_unequal_gpus, 2) == [1000, 1000]


def test_keys_that_do_not_fit_are_passed_on() -> None:
    """Three heads cannot be exchanged between two GPUs."""
    pattern = Pattern(q_len=4096, kv_len=4096)
    layout, shapes = Layout.zigzag(4096, 2), Shapes(3, 3, 128)
    assert choose_way(pattern, layout, shapes, memory=MEMORY).schedule == "gather"
    assert choose_way(pattern, layout, shapes, memory=1e6).schedule == "ring"
    assert Shard(Layout.contiguous(16, 1), 0).memory == MEMORY


@pytest.mark.parametrize("named", [True, False])
def test_patterns_of_batches_that_name_tokens_end_with_them(named: bool) -> None:
    """Methods keep a batch's own tensors with its pattern; others share theirs, for its plans."""
    rows = WholeRows(64, named=named)
    pattern = rows.pattern(False, None, None, torch.device("cpu"))
    assert rows.pattern(False, None, None, torch.device("cpu")) is pattern
    gone = weakref.ref(pattern)
    del rows, pattern
    gc.collect()
    assert (gone() is None) == named
