"""Rings of neighbouring processes, and accelerate's data loaders feeding every ring one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate.accelerator import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

REPLICAS = "dp_replicate"
RING = "cp"
ON_A_CPU = (
    "`accelerate launch --cpu --num_processes N` starts one process only; on a CPU use "
    "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N SCRIPT`, or "
    "`torchrun --nproc_per_node N SCRIPT` with Accelerator(cpu=True) or --use_cpu"
)


def check_ring_size(size: int, processes: int) -> None:
    """Refuse a number of processes per sequence that the job's processes do not make up.

    Raises:
        ValueError: If `size` is no integer of at least 2, or `processes` no multiple of it.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(
            "a sequence is spread over at least 2 processes, asked for "
            f"{size!r} in a job of {processes}: {ON_A_CPU}"
        )
    if processes < size:
        raise ValueError(
            f"a sequence was to be spread over {size} processes, but this job has {processes}: "
            f"start at least {size}. {ON_A_CPU}"
        )
    if processes % size:
        raise ValueError(
            f"{processes} processes do not make up rings of {size}: start a multiple of {size}, or "
            "spread sequences over a divisor of the number of processes"
        )


def ring_mesh(accelerator: Accelerator, size: int | None = None) -> DeviceMesh:
    """Group an accelerator's processes into rings, each of which gets the same batches.

    Call it before `accelerator.prepare`. From then on data loaders that are prepared give all
    processes of a ring the same batch, and every ring another. Models are prepared as if there were
    no rings: DDP and FSDP2 average gradients over all processes, which is what the loss inside
    `sequence_parallel` expects. Where the accelerator has a `ParallelismConfig` with a `cp_size`,
    its mesh is taken, and its own context parallelism kept off the model (it drops masks, and
    refuses models with windows)::

        accelerator = Accelerator()
        mesh = ring_mesh(accelerator, 2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            with hf_attn_plugin.sequence_parallel(mesh, model, batch) as shard:
                accelerator.backward(model(**shard.batch).loss)

    Args:
        accelerator: In a job of several processes.
        size: Processes per sequence. By default the `cp_size` of the accelerator's
            `ParallelismConfig`, or all processes.

    Returns:
        The mesh, whose dimension `cp` runs through the processes of a ring: neighbours, so that
        rings stay inside a machine where they fit.

    Raises:
        ValueError: If the job's processes do not make up such rings, or the accelerator spreads
            models in a way that is not supported here (DeepSpeed, Megatron, tensor parallelism).
    """
    from torch.distributed.device_mesh import init_device_mesh

    config = accelerator.parallelism_config
    configured = config.cp_size if config is not None else 1
    processes = accelerator.num_processes
    if size is None:
        size = configured if configured > 1 else processes
    check_ring_size(size, processes)
    _check_accelerator(accelerator)
    if configured > 1:
        if size != configured:
            raise ValueError(
                f"sequences were to be spread over {size} processes, but the accelerator's "
                f"ParallelismConfig says cp_size={configured}: give one of the two, or both alike"
            )
        # What it would do in prepare() is for its own context parallelism alone.
        accelerator._prepare_cp = lambda *args: args
        mesh = accelerator.torch_device_mesh
    else:
        shape = (processes // size, size)
        mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=(REPLICAS, RING))
        # Only data loaders ask for it. As `accelerator.state.device_mesh` it would also be what
        # FSDP2 shards over, which has to be all processes.
        accelerator._prepare_device_mesh = lambda: mesh
    # Process 0 would otherwise read iterable data sets and cut what it read for all processes.
    accelerator.dataloader_config.dispatch_batches = False
    accelerator.state.ring_mesh = mesh
    return mesh


def _check_accelerator(accelerator: Accelerator) -> None:
    from accelerate.utils import DistributedType

    config = accelerator.parallelism_config
    kinds = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
    asked = None
    if accelerator.distributed_type in kinds:
        asked = str(accelerator.distributed_type.value)
    elif config is not None and config.tp_size > 1:
        asked = f"tensor parallelism (tp_size={config.tp_size})"
    elif config is not None and config.sp_size > 1:
        asked = f"DeepSpeed's sequence parallelism (sp_size={config.sp_size})"
    elif accelerator.dataloader_config.dispatch_batches:
        asked = "dispatch_batches=True, by which every process gets a batch of its own"
    if asked is not None:
        raise ValueError(
            f"sequences cannot be spread over processes beside {asked}: use DDP or FSDP2, and "
            "leave data loaders to accelerate's defaults"
        )
