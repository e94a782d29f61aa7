"""Which processes share a sequence: found in an Accelerator, a DeviceMesh or a ProcessGroup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

DIMENSION = "cp"
"""The dimension of a mesh over which sequences are spread, by accelerate's name for it."""


def find_group(where: Any) -> ProcessGroup | None:
    """The group of this process.

    Args:
        where: A ``ProcessGroup``; a ``DeviceMesh`` of one dimension or with one named ``cp``; an
            ``Accelerator``, whose mesh is taken if it has that dimension, and all its processes if
            not; None for all processes.

    Returns:
        The group, or None where there is one process and no group.

    Raises:
        ValueError: It is none of these, or this process is not in it.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if where is not None and not dist.is_available():
        raise ValueError("sequence_parallel: this PyTorch is built without torch.distributed.")
    if isinstance(where, DeviceMesh):
        return _of_mesh(where)
    if isinstance(where, dist.ProcessGroup):
        if dist.get_rank(where) < 0:
            raise ValueError("sequence_parallel: this process is not in the process group given.")
        return where
    if where is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group returns there
        raise ValueError("sequence_parallel: this process is not in the process group given.")
    if where is None or hasattr(where, "num_processes"):
        mesh = None if where is None else _mesh_of(where)
        if mesh is not None:
            return _of_mesh(mesh)
        return dist.group.WORLD if dist.is_initialized() else None
    raise ValueError(
        "sequence_parallel takes an Accelerator, a DeviceMesh, a ProcessGroup or None (all "
        f"processes); got a {type(where).__name__}."
    )


def _of_mesh(mesh: DeviceMesh) -> ProcessGroup:
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and DIMENSION not in names:
        raise ValueError(
            f"sequence_parallel: the mesh has the dimensions {names or mesh.ndim}, and none is "
            f"named {DIMENSION!r}. Name the one over which sequences are spread so "
            f"(init_device_mesh(..., mesh_dim_names=('dp', {DIMENSION!r}))), or pass it alone."
        )
    if mesh.get_coordinate() is None:
        raise ValueError("sequence_parallel: this process is not in the mesh given.")
    return mesh.get_group(DIMENSION if mesh.ndim > 1 else 0)


def _mesh_of(accelerator: Any) -> DeviceMesh | None:
    """The accelerator's mesh, if sequences are spread over a part of its processes."""
    state = getattr(accelerator, "state", None)
    for mesh in (
        getattr(accelerator, "torch_device_mesh", None),
        getattr(state, "ring_mesh", None),
        getattr(state, "device_mesh", None),
    ):
        if mesh is not None and DIMENSION in (mesh.mesh_dim_names or ()):
            return mesh
    return None
