"""Own training loops: DDP, FSDP2, plain models and LoRA over replicas × sequences; accelerate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hf_attn_plugin
from tests.parallel.processes import run_processes
from tests.sequence_parallelism.cases import LENGTH
from tests.sequence_parallelism.loops import (
    micro_batch,
    own_loss,
    start,
    trained_alone,
    trained_together,
    uneven_gradients,
    with_accelerator,
)
from tests.tiny import random_ids, tiny_model


@pytest.mark.parametrize("wrapping", ["plain", "ddp", "fsdp2", "ddp and lora"])
def test_a_loop_over_replicas_and_sequences(wrapping: str) -> None:
    ranks = run_processes(trained_together, 4, wrapping, limit_s=120)
    expected = trained_alone("lora" in wrapping)
    before = dict(start("lora" in wrapping, "flash").named_parameters())
    assert len(ranks) == 4
    for found in ranks:
        assert found.keys() == expected.keys()
        for name, exact in expected.items():
            moved = (exact - before[name]).norm()
            assert moved > 0
            assert (found[name] - exact).norm() <= 1e-4 * moved, name


def test_an_accelerator_and_mixed_precision() -> None:
    ranks = run_processes(with_accelerator, 2, limit_s=120)
    exact, alone = (one_process(dtype) for dtype in (None, torch.bfloat16))
    for name, value in exact.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        budget = 2 * (alone[name] - value).norm() + 2**-9 * value.norm()
        assert 0 < (ranks[0][name] - value).norm() <= budget, name


def one_process(dtype: torch.dtype | None) -> dict[str, Any]:
    model = tiny_model("llama", "flash").train()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(**micro_batch(0, 0, 0), use_cache=False).loss
    loss.backward()
    return {"loss": loss, **{n: p.grad for n, p in model.named_parameters()}}


def test_gradients_that_some_ranks_do_not_have() -> None:
    for found in run_processes(uneven_gradients, 2):
        assert found["both"].item() == 1.5
        assert found["one"].item() == 2.0
        assert found["none"] is None


def test_a_loss_of_ones_own() -> None:
    model, ids = tiny_model("llama", "flash"), random_ids(2, LENGTH)
    values = model(ids).logits.logsumexp(-1) ** 2
    loss = values[ids % 3 > 0].mean()
    loss.backward()
    for found, grad in run_processes(own_loss, 2):
        torch.testing.assert_close(found, loss.detach())
        torch.testing.assert_close(grad, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


class _Mesh:
    """Looks like a mesh."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.mesh_dim_names, self.ndim = names, len(names)

    def get_group(self, dimension: Any) -> str:
        return f"group of {dimension}"


def test_an_accelerators_mesh_comes_before_all_its_processes() -> None:
    from hf_attn_plugin.sequence_parallelism.groups import find_group

    def accelerator(own: Any = None, ring: Any = None, state: Any = None) -> Any:
        states = SimpleNamespace(ring_mesh=ring, device_mesh=state)
        return SimpleNamespace(num_processes=1, torch_device_mesh=own, state=states)

    for mesh in ({"own": 1}, {"ring": 1}, {"state": 1}):
        made = {name: _Mesh(("dp", "cp")) for name in mesh}
        for one in made.values():
            one.get_coordinate = lambda: [0, 0]  # type: ignore[attr-defined]
        assert find_group(accelerator(**made)) == "group of cp"
    assert find_group(accelerator(own=_Mesh(("dp", "tp")))) is None
    assert find_group(None) is None


def test_a_mesh_without_the_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dimensions \('dp', 'tp'\).*named 'cp'"):
        run_in_one()


def run_in_one() -> None:
    import tempfile

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
            hf_attn_plugin.sequence_parallel(mesh, tiny_model("llama", "ring"), {})
        finally:
            dist.destroy_process_group()
