"""Training loops of one's own, around models that something else wraps."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

import hf_attn_plugin
from tests.sequence_parallelism.cases import LENGTH
from tests.tiny import pack_positions, random_ids, tiny_model

STEPS, MICRO_STEPS, REPLICAS = 3, 2, 2


def micro_batch(step: int, micro: int, replica: int) -> dict[str, Tensor]:
    """Packed rows, of which every one has another number of labels."""
    seed = 100 * step + 10 * micro + replica
    ids = random_ids(1, LENGTH, seed)
    labels = ids.clone()
    labels[:, : 5 + seed % 7] = -100
    positions = pack_positions([[13 + seed % 11, LENGTH - 13 - seed % 11]])
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def trained_alone(lora: bool = False) -> dict[str, Tensor]:
    """Parameters after some steps of one process that sees the batches of all replicas."""
    model = start(lora, "flash")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for step in range(STEPS):
        for micro in range(MICRO_STEPS):
            for replica in range(REPLICAS):
                loss = model(**micro_batch(step, micro, replica), use_cache=False).loss
                (loss / (MICRO_STEPS * REPLICAS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


def start(lora: bool, attn: str) -> Any:
    model = tiny_model("mistral", attn).train()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        names = ["q_proj", "v_proj", "down_proj"]
        lora_config = LoraConfig(r=4, target_modules=names, init_lora_weights=False)
        model = get_peft_model(model, lora_config)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trained ones, whole, by name."""
    return {
        name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p)
        .detach()
        .clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def trained_together(rank: int, wrapping: str) -> dict[str, Tensor]:
    """The same of four processes, each two of which share the sequences of a replica."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (REPLICAS, 2), mesh_dim_names=("dp", "cp"))
    replica = mesh.get_local_rank("dp")
    model = start("lora" in wrapping, "ring")
    if "ddp" in wrapping:
        model = DistributedDataParallel(model)
    if "fsdp2" in wrapping:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for step in range(STEPS):
        for micro in range(MICRO_STEPS):
            batch = micro_batch(step, micro, replica)
            where = mesh if wrapping != "fsdp2" else mesh["cp"].get_group()
            with hf_attn_plugin.sequence_parallel(where, model, batch) as shard:
                assert (shard.ranks, shard.rank) == (2, mesh.get_local_rank("cp"))
                (model(**shard.batch).loss / MICRO_STEPS).backward()
        if wrapping == "plain":  # over the ranks of a sequence, then over replicas
            shard.average_gradients(model)
            for parameter in trainable(model):
                torch.distributed.all_reduce(parameter.grad, group=mesh.get_group("dp"))
                parameter.grad /= REPLICAS
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


def with_accelerator(rank: int) -> dict[str, Any]:
    """Two processes, with the group that an Accelerator without a mesh has, and in 16 bits."""
    from accelerate import Accelerator

    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in told.items()}  # what a launcher says
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    assert accelerator.num_processes == 2
    model = accelerator.prepare(tiny_model("llama", "ring").train())
    batch = micro_batch(0, 0, 0)
    with hf_attn_plugin.sequence_parallel(accelerator, model, batch) as shard:
        output = model(**shard.batch)
        accelerator.backward(output.loss)
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {"loss": output.loss.detach(), **copy.deepcopy(grads)}


def uneven_gradients(rank: int) -> dict[str, Tensor | None]:
    """What averaging makes of parameters that have gradients on one rank only, or on none."""
    model = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("both", "one", "none")})
    model["both"].weight.grad = torch.full((1, 1), 1.0 + rank)
    if rank:
        model["one"].weight.grad = torch.full((1, 1), 4.0)
    from hf_attn_plugin.sequence_parallelism.gradients import average_gradients

    average_gradients(model, torch.distributed.group.WORLD)
    return {name: part.weight.grad for name, part in model.items()}


def own_loss(rank: int) -> tuple[Tensor, Tensor]:
    """A loss of one's own over the valid tokens, and its gradient."""
    model, batch = tiny_model("llama", "ring"), {"input_ids": random_ids(2, LENGTH)}
    with hf_attn_plugin.sequence_parallel(None, model, batch) as shard:
        logits = model(**shard.batch).logits
        loss = shard.mean(logits.logsumexp(-1) ** 2, shard.batch["input_ids"] % 3 > 0)
        loss.backward()
    shard.average_gradients(model)
    return loss.detach(), model.lm_head.weight.grad
