"""Sequences spread over part of the processes: meshes, and sub-groups for heads and keys."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hf_attn_plugin.parallel import Layout, Shard, sharded_attention
from hf_attn_plugin.parallel.groups import subgroups, transfer_group
from tests.parallel.processes import run_processes
from tests.parallel.sharding import Case, alone

CASE = Case("causal", {"window": 9}, schedule="gather")


def in_a_mesh(rank: int, schedule: str | None) -> dict[str, torch.Tensor]:
    """Two sequences, each over two processes that are no neighbours."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "dp"))
    group, place, sequence = mesh["cp"].get_group(), *divmod(rank, 2)
    assert dist.get_process_group_ranks(group) == [sequence, sequence + 2]
    shard = Shard(Layout(CASE.length, 2, 2), place, group, schedule=schedule)
    tensors = {
        name: shard.layout.take(tensor * (1 + sequence), place, dim=2)
        for name, tensor in CASE.tensors().items()
    }
    grad = tensors.pop("grad")
    leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    output = sharded_attention(*leaves, CASE.pattern(), shard, scaling=0.3)
    output.backward(grad)
    return {"output": output.detach(), "query": leaves[0].grad, "key": leaves[1].grad}


def test_two_sequences_over_two_processes_each() -> None:
    layout = Layout(CASE.length, 2, 2)
    for schedule in ("gather", "ring", "ulysses"):
        results = run_processes(in_a_mesh, 4, schedule)
        for sequence in range(2):
            expected = alone(Scaled(**dataclasses.asdict(CASE), factor=1 + sequence))
            for name in ("output", "query", "key"):
                whole = layout.join([results[rank][name] for rank in (sequence, sequence + 2)], 2)
                torch.testing.assert_close(whole, expected[name], rtol=1e-12, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class Scaled(Case):
    """A case with larger inputs."""

    factor: int = 1

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor * self.factor for name, tensor in super().tensors().items()}


def made_once(rank: int) -> list[int]:
    shards = [
        Shard(Layout(length, 4, chunks), rank, ulysses=2) for length, chunks in ((32, 2), (64, 1))
    ]
    for shard in shards:
        assert shard.neighbours is subgroups(None, 2)[0]
        assert shard.inner.group is subgroups(None, 2)[1]
        for device in ("cpu", "cuda"):  # gloo transfers by the group itself
            assert transfer_group(shard.group, torch.device(device)) is dist.group.WORLD
            assert transfer_group(shard.neighbours, torch.device(device)) is shard.neighbours
        assert shard.inner.layout == shard.layout.grouped(2)
    own = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    for group in subgroups(None, 2):
        assert group._get_backend(torch.device("cpu")).options._timeout == own
    neighbours, inner = (dist.get_process_group_ranks(group) for group in subgroups(None, 2))
    return [*neighbours, *inner]


def test_sub_groups_are_made_once() -> None:
    assert run_processes(made_once, 4) == [
        [0, 1, 0, 2],
        [0, 1, 1, 3],
        [2, 3, 0, 2],
        [2, 3, 1, 3],
    ]
