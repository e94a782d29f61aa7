"""Plans of the decoding kernel: numbers, without Triton."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_attn_plugin.ops.triton import decode_plan, support_decode
from hf_attn_plugin.ops.triton.decode_plan import make_plan
from hf_attn_plugin.patterns import Pattern
from tests.test_structure import imported


@pytest.mark.parametrize("dynamic", [None, True])
def test_plans_are_traced(dynamic: bool | None) -> None:
    """Whatever is a number and whatever a symbol: without a break of the graph."""

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="eager")
    def step(key: torch.Tensor, offset: torch.Tensor | int) -> torch.Tensor:
        pattern = Pattern(
            q_len=1, kv_len=key.shape[2], q_offset=offset, window=200, num_sink_tokens=4
        )
        return key.new_full((), make_plan(pattern, key.device, 64).keys)

    for keys in (300, 400, 100):
        key = torch.zeros(1, 1, keys, 1)
        assert step(key, torch.tensor(20)) == min(keys, 204)
        assert step(key, keys // 2) == min(keys // 2 + 1, 204)


@pytest.mark.parametrize("module", [decode_plan, support_decode])
def test_planning_imports_no_triton(module) -> None:
    names = imported(Path(module.__file__))
    assert not [name for name in names if name.split(".")[0] == "triton"]
