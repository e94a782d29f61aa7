"""Which implementation computes a decoding step of ``sparq``, and why."""

from __future__ import annotations

import dataclasses
import enum

import torch

from hf_attn_plugin.ops.triton.support_sparq import sparq_refuses

_SMALLEST_CAPABILITY = (8, 0)

# Bytes of a layer's keys and values from which choosing among them is faster than reading them all,
# by whether query heads share them, which takes one kernel more, and by how the keys are kept a
# second time. Measured on an H200 by `hf-attn bench decode crossover` (eval/results/speed/sparq.md)
# in bfloat16, r=32, k=128 of 128, beside the fastest dense kernel, the L2 cache cleared. In MiB, of
# 1, 8 and 32 sequences with 8 KV heads for 32 heads: 133, 109, 147 with two copies; of 8 sequences
# 397 with 8 bits, 246 with 4, 186 with one copy. With 32 KV heads: 54, 83, and at 531 keys each 265
# (k of so few are no small part: `_LEAST_KEYS`); of 8 sequences 70 with one copy, with 8 and 4 bits
# more than 128. Rounded up; these two from slower kernels of before (165 and 191).
PAYS_FROM_BYTES = {
    True: {
        "full": 160 * 2**20,
        "int8": 400 * 2**20,
        "int4": 288 * 2**20,
        "none": 208 * 2**20,
    },
    False: {
        "full": 96 * 2**20,
        "int8": 176 * 2**20,
        "int4": 200 * 2**20,
        "none": 80 * 2**20,
    },
}
_LEAST_KEYS = 4  # times k


class SparQBackend(enum.Enum):
    """The implementations of a decoding step."""

    DENSE = "exact attention to every key"
    TRITON = "Triton, scores and choice split over the cache"
    TORCH = "PyTorch, gathers"


@dataclasses.dataclass(frozen=True)
class SparQCall:
    """What the choice may depend on.

    Attributes:
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key/value heads.
        length: Positions of the cache, of a static one all there is room for.
        head_dim: Width of queries and keys.
        value_dim: Width of values.
        dtype: Of query, keys and values.
        device_type: ``"cpu"``, ``"cuda"``, ...
        capability: CUDA compute capability of an NVIDIA GPU, else None.
        installed: As `hf_attn_plugin.ops.backend.installed_packages` finds it.
        top_k: Keys attended to.
        key_copy: How the keys are kept a second time; "none" too where the cache has no copy.
        coverage: Whether fewer keys or components may do.
        mean_block: As in ``SparQConfig``.
        dense_below: As in ``SparQConfig``.
        needs_grad: Whether gradients are wanted.
        counted: Whether the bytes read are counted.
        mixed: Whether keys and values differ in dtype.
        scattered: Whether the elements of a key or a value lie apart in memory.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device_type: str
    capability: tuple[int, int] | None
    installed: frozenset[str]
    top_k: int
    key_copy: str = "full"
    coverage: bool = False
    mean_block: int | None = None
    dense_below: int | None = None
    needs_grad: bool = False
    counted: bool = False
    mixed: bool = False
    scattered: bool = False

    @property
    def grouped(self) -> bool:
        """Whether query heads share keys and values."""
        return self.heads > self.kv_heads

    @property
    def key_bytes(self) -> int:
        """Bytes of one position's keys and values, of all heads and sequences."""
        width = self.head_dim + self.value_dim
        return self.batch * self.kv_heads * width * self.dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        """Bytes of the keys and values."""
        return self.length * self.key_bytes


@dataclasses.dataclass(frozen=True)
class SparQChoice:
    """A backend and the reason for it.

    Attributes:
        backend: What computes the step.
        reason: Why, in words.
        falls_back: Whether something much faster would be used if it could.
        notice: What to tell who asked for ``sparq`` and does not get it, the same for all lengths.
    """

    backend: SparQBackend
    reason: str
    falls_back: bool = False
    notice: str | None = None


def default_dense_below(call: SparQCall) -> int:
    """``SparQConfig.dense_below`` where it is not set; 0 where nothing is fast anyway.

    What was measured is the Triton step, so it binds where that one is taken. At least the bytes of
    `_LEAST_KEYS` times ``top_k`` keys.
    """
    if _refuses(dataclasses.replace(call, counted=False)) is not None:
        return 0
    least_keys = _LEAST_KEYS * call.top_k * call.key_bytes
    return max(PAYS_FROM_BYTES[call.grouped][call.key_copy], least_keys)


def choose_sparq_backend(call: SparQCall) -> SparQChoice:
    """The fastest implementation of what was asked for, or dense attention where that is faster."""
    gpu = call.device_type == "cuda"
    if gpu and call.top_k >= call.length and not call.coverage:
        return SparQChoice(SparQBackend.DENSE, f"top_k={call.top_k} takes all keys there are")
    least = default_dense_below(call) if call.dense_below is None else call.dense_below
    if call.dense_bytes < least:
        # Without the call's own numbers, which are symbols in a graph for any length.
        reason = f"choosing among them pays from {_mebibytes(least)} of keys and values a layer on"
        notice = None
        if call.dense_below is None:
            notice = (
                f"while a layer's keys and values take less than {_mebibytes(least)}, decoding "
                "steps attend to all of them, which is faster; dense_below=0 chooses always"
            )
        return SparQChoice(SparQBackend.DENSE, reason, notice=notice)
    refused = _refuses(call)
    if refused is None:
        return SparQChoice(SparQBackend.TRITON, "reads only what the step needs, in few launches")
    return SparQChoice(SparQBackend.TORCH, refused, falls_back=gpu and not call.counted)


def _refuses(call: SparQCall) -> str | None:
    """Why Triton cannot compute a step, or None."""
    if call.device_type != "cuda":
        return f"Triton's kernels are for GPUs, and this is {call.device_type}"
    if "triton" not in call.installed:
        return "Triton is not installed (pip install triton)"
    if call.capability is None:
        return "Triton's kernels are launched for NVIDIA GPUs"
    if call.capability < _SMALLEST_CAPABILITY:
        return "Triton's kernels run on compute capability 8.0 and newer"
    if call.counted and call.coverage:
        return "how much a coverage reads is counted in PyTorch"
    if call.mixed:
        return "keys and values differ in dtype"
    if call.scattered:
        return "the elements of a key or a value lie apart in memory"
    return sparq_refuses(
        device_type=call.device_type,
        dtype=call.dtype,
        head_dim=call.head_dim,
        value_dim=call.value_dim,
        groups=call.heads // max(call.kv_heads, 1),
        length=call.length,
        top_k=call.top_k,
        mean_block=call.mean_block,
        needs_grad=call.needs_grad,
    )


def _mebibytes(size: int) -> str:
    if torch.compiler.is_compiling():  # numbers may be symbols, which have no format
        return "so many bytes"
    return f"{size / 2**20:,.6g} MiB"
