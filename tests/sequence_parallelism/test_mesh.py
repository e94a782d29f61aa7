"""Loops of one's own through accelerate: rings of processes, each with batches of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import hf_attn_plugin
from tests.parallel.processes import run_processes
from tests.sequence_parallelism.training import Run, as_launched, collate, dataset, fsdp2_on_a_cpu
from tests.tiny import tiny_model

RUN = Run(family="mistral")
STEPS = 3


class Counting(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


def learn(model: Any, optimizer: Any, loader: Any, accelerator: Any, mesh: Any) -> list[float]:
    losses = []
    for _, batch in zip(range(STEPS), loader, strict=False):
        if mesh is None:
            loss = model(**batch).loss
            accelerator.backward(loss)
        else:
            with hf_attn_plugin.sequence_parallel(mesh, model, batch) as shard:
                loss = model(**shard.batch).loss
                accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loop(rank: int, kind: str) -> dict[str, Any]:
    """Losses of a loop as in `ring_mesh`'s docstring, and the batches of other data loaders."""
    from accelerate import Accelerator, ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    from hf_attn_plugin.sequence_parallelism.mesh import ring_mesh

    as_launched(rank, 4)
    rows = DataLoader(dataset(RUN, 8, seed=1), batch_size=1, collate_fn=collate)  # type: ignore[arg-type]
    model = tiny_model("mistral", "flash").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if kind == "ddp":
            accelerator = Accelerator(cpu=True)
        else:
            fsdp2_on_a_cpu(monkeypatch)
            accelerator = Accelerator(
                parallelism_config=ParallelismConfig(cp_size=2, dp_shard_size=2),
                fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2),
            )
        assert accelerator.num_processes == 4
        mesh = None if kind == "accelerate's own" else ring_mesh(accelerator, 2)
        try:
            model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
        except ValueError as error:
            return {"error": str(error)}
        counted = accelerator.prepare(DataLoader(Counting(), batch_size=2))
        return {
            "losses": learn(model, optimizer, rows, accelerator, mesh),
            "counted": torch.cat(list(counted)).tolist(),
        }


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_own_loop_over_two_rings_of_two(kind: str) -> None:
    results = run_processes(loop, 4, kind)
    rows = DataLoader(dataset(RUN, 8, seed=1), batch_size=1, collate_fn=collate)  # type: ignore[arg-type]
    model = tiny_model("mistral", "flash").train()
    # Batches 0 and 1 are the first of the two rings, and so on: their gradients are averaged.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected, batches = [], list(rows)
    for step in range(STEPS):
        losses = [model(**batches[2 * step + ring]).loss for ring in range(2)]
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append([loss.item() for loss in losses])
    for rank, result in enumerate(results):
        ring = [losses[rank // 2] for losses in expected]
        assert result["losses"] == pytest.approx(ring, rel=2e-6)
        assert result["counted"] == ([0, 1, 4, 5] if rank < 2 else [2, 3, 6, 7])


def test_accelerates_own_context_parallelism_refuses_windows() -> None:
    """The control: what `ring_mesh` keeps off the model is really there."""
    for result in run_processes(loop, 4, "accelerate's own"):
        assert "sliding" in result["error"]
