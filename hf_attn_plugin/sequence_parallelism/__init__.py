"""Sequences that are spread over several GPUs, through transformers and accelerate."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_attn_plugin.sequence_parallelism.context import SequenceParallel, sequence_parallel
    from hf_attn_plugin.sequence_parallelism.faults import watch_processes
    from hf_attn_plugin.sequence_parallelism.mesh import ring_mesh
    from hf_attn_plugin.sequence_parallelism.trainer import (
        SequenceParallelTrainer,
        SequenceParallelTrainerMixin,
    )

__all__ = [
    "SequenceParallel",
    "SequenceParallelTrainer",
    "SequenceParallelTrainerMixin",
    "ring_mesh",
    "sequence_parallel",
    "watch_processes",
]

_LAZY = {
    "SequenceParallel": "hf_attn_plugin.sequence_parallelism.context",
    "SequenceParallelTrainer": "hf_attn_plugin.sequence_parallelism.trainer",
    "SequenceParallelTrainerMixin": "hf_attn_plugin.sequence_parallelism.trainer",
    "ring_mesh": "hf_attn_plugin.sequence_parallelism.mesh",
    "sequence_parallel": "hf_attn_plugin.sequence_parallelism.context",
    "watch_processes": "hf_attn_plugin.sequence_parallelism.faults",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
