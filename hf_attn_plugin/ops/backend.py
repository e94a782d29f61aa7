"""Which implementation computes a call, and why: a pure function of the call."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
from collections.abc import Iterator

import torch

from hf_attn_plugin.ops.triton.support import refuses as triton_refuses
from hf_attn_plugin.ops.triton.support_decode import MAX_QUERIES, decode_refuses
from hf_attn_plugin.ops.vendors import cudnn, flash_attention_4
from hf_attn_plugin.ops.vendors.built_in import BuiltIn, built_in
from hf_attn_plugin.patterns import Pattern

# A boolean mask of this many pairs is cheaper than walking blocks in Python,
_MAX_DENSE_PAIRS = 2048 * 2048
# and of this many than deriving a schedule for a kernel.
_FEW_PAIRS = 512 * 512
# From here on (over batch and heads) our kernels beat FlashAttention-2 on Hopper, although they are
# slower to launch: at 16,384 tokens, 32/8 heads of 128, causal, 17.3 ms against 24.2.
_MANY_PAIRS = 2**28

_VISITS = "visits only the blocks that the pattern needs"

# Optional packages with kernels, each with the oldest version that is known to work.
KERNEL_PACKAGES = {"triton": "3.6", flash_attention_4.PACKAGE: flash_attention_4.OLDEST}


class Backend(enum.Enum):
    """The implementations behind `hf_attn_plugin.ops.attention`."""

    FLASH_ATTENTION_4 = "FlashAttention-4"
    CUDNN_CAUSAL = "cuDNN, causal"
    CUDNN_FULL = "cuDNN, every pair"
    TRITON = "Triton, blocks of the schedule"
    TRITON_DECODE = "Triton, keys split over programs"
    SDPA_CAUSAL = "PyTorch SDPA, causal"
    SDPA_FULL = "PyTorch SDPA, every pair"
    SDPA_MASK = "PyTorch SDPA, dense mask"
    BLOCKED = "blocks of the schedule in PyTorch"
    DENSE = "dense and traceable"


@dataclasses.dataclass(frozen=True)
class PassedOver:
    """A faster backend that was not taken, and why not."""

    backend: Backend
    reason: str

    def __str__(self) -> str:
        return f"{self.backend.value}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend and the reason for it.

    Attributes:
        backend: The fastest that computes exactly the call.
        reason: Why it is this one.
        passed_over: The faster ones, fastest first.
        warning: What to warn of: the call is slower by an order than a kernel would be. Or None.
    """

    backend: Backend
    reason: str
    passed_over: tuple[PassedOver, ...] = ()
    warning: str | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """What the choice may depend on, besides the pattern.

    Attributes:
        batch: Batch size.
        dtype: Of query, key and value.
        device_type: ``"cpu"``, ``"cuda"``, ...
        softcap: Whether scores are capped.
        sinks: Whether there are attention sinks.
        need_lse: Whether the caller wants the log-sum-exp.
        compiling: Whether ``torch.compile`` is tracing.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Of queries and keys.
        value_dim: Of values.
        needs_grad: Whether a backward pass may follow.
        deterministic: Whether gradients must be the same bits from run to run.
        capability: CUDA compute capability of an NVIDIA GPU, else None.
        installed: Which of the optional packages with kernels there are: ``"triton"``,
            ``"flash-attn-4"``.
    """

    batch: int
    dtype: torch.dtype
    device_type: str
    softcap: bool
    sinks: bool
    need_lse: bool
    compiling: bool
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    value_dim: int = 64
    needs_grad: bool = False
    deterministic: bool = False
    capability: tuple[int, int] | None = None
    installed: frozenset[str] = frozenset()

    def pairs(self, pattern: Pattern) -> int:
        """Pairs of queries and keys, visible or not, over batch and heads."""
        return self.batch * self.heads * pattern.q_len * pattern.kv_len

    def elements(self, pattern: Pattern) -> int:
        """Elements of the largest of query, key, value and output."""
        tokens = max(self.heads * pattern.q_len, self.kv_heads * pattern.kv_len)
        return self.batch * tokens * max(self.head_dim, self.value_dim)


def installed_packages() -> frozenset[str]:
    """The optional packages with kernels that this Python has, in versions that are known here."""
    from packaging.version import Version

    found = set()
    for name, oldest in KERNEL_PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(version) >= Version(oldest):
            found.add(name)
    return frozenset(found)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None of other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def choose_backend(pattern: Pattern, call: Call) -> Choice:
    """The fastest implementation that computes exactly this call."""
    if 0 in (call.batch, pattern.q_len, pattern.kv_len):
        backend = Backend.DENSE if call.compiling else Backend.BLOCKED
        return Choice(backend, "nothing to attend to")
    passed_over: list[PassedOver] = []
    for backend, refusal, reason in _candidates(pattern, call):
        if refusal is None:
            warning = _warning(backend, pattern, call, passed_over)
            return Choice(backend, reason, tuple(passed_over), warning)
        passed_over.append(PassedOver(backend, refusal))
    raise AssertionError("the last candidate takes every call")


def _candidates(pattern: Pattern, call: Call) -> Iterator[tuple[Backend, str | None, str]]:
    """Backends from fast to slow, each with why it cannot (None if it can) and why it would be it.

    The order is that of measurements on one H200. What only GPUs have is no candidate elsewhere.
    """
    gpu = call.device_type == "cuda"
    if gpu and pattern.q_len <= MAX_QUERIES and not call.needs_grad:
        refusal = _triton_lacks(call) or decode_refuses(pattern, call)
        yield Backend.TRITON_DECODE, refusal, "few queries over the keys of a cache"
    mask: BuiltIn | str
    if call.compiling and pattern.tensors():
        mask = "tensors in a pattern under torch.compile"
    else:
        mask = built_in(pattern)
    words = _in_words(mask, pattern)
    causal = mask.causal if isinstance(mask, BuiltIn) else pattern.causal
    sdpa = Backend.SDPA_CAUSAL if causal else Backend.SDPA_FULL
    if gpu:
        refusal = flash_attention_4.refuses(pattern, call, mask)
        yield Backend.FLASH_ATTENTION_4, refusal, words
        vendor = Backend.CUDNN_CAUSAL if causal else Backend.CUDNN_FULL
        yield vendor, cudnn.refuses(pattern, call, mask), words
    plain = isinstance(mask, BuiltIn) and mask.unrestricted
    late = gpu and _triton_beats_sdpa(pattern, call)
    if plain and not late:
        yield sdpa, _sdpa_refuses(pattern, call, causal), words
    if gpu:
        refusal = _triton_lacks(call) or triton_refuses(pattern, call)
        small = call.compiling or _mask_refuses(pattern, call, _FEW_PAIRS)
        if refusal is None and small is None:
            yield Backend.SDPA_MASK, None, _few(pattern)
        yield Backend.TRITON, refusal, _VISITS
    if plain and late:
        yield sdpa, _sdpa_refuses(pattern, call, causal), words
    if call.compiling:
        yield Backend.DENSE, None, "torch.compile is tracing, which the schedule cannot follow"
        return
    yield Backend.SDPA_MASK, _mask_refuses(pattern, call, _MAX_DENSE_PAIRS), _few(pattern)
    yield Backend.BLOCKED, None, _sdpa_lacks(call) or _VISITS


def _in_words(mask: BuiltIn | str, pattern: Pattern) -> str:
    if isinstance(mask, str):
        return mask
    if mask.unrestricted and not mask.causal:
        return "every key lies before the queries" if pattern.causal else "every pair is visible"
    words = ["causal"] if mask.causal else []
    words += [] if mask.window is None else [f"window {mask.window}"]
    words += ["packed documents"] if mask.documents else []
    return "plain causal attention" if words == ["causal"] else ", ".join(words)


def _few(pattern: Pattern) -> str:
    return f"{pattern.q_len * pattern.kv_len} pairs are few enough for a mask"


def _sdpa_lacks(call: Call) -> str | None:
    if call.softcap:
        return "SDPA has no softcap"
    if call.sinks:
        return "SDPA has no attention sinks"
    if call.need_lse:
        return "SDPA does not return the log-sum-exp"
    return None


def _triton_beats_sdpa(pattern: Pattern, call: Call) -> bool:
    """Whether SDPA without cuDNN (FlashAttention-2, or the memory-efficient kernel) is slower."""
    half = call.dtype in (torch.float16, torch.bfloat16)
    hopper = call.capability is not None and call.capability >= (9, 0)
    large = hopper and call.pairs(pattern) >= _MANY_PAIRS
    return half and (large or call.head_dim != call.value_dim)


def _sdpa_refuses(pattern: Pattern, call: Call, causal: bool) -> str | None:
    if causal and pattern.q_len != pattern.kv_len:
        return "its causal mask starts at the first key, whatever the number of queries"
    return _sdpa_lacks(call)


def _mask_refuses(pattern: Pattern, call: Call, most: int) -> str | None:
    pairs = pattern.q_len * pattern.kv_len * (call.batch if pattern.tensors() else 1)
    return _sdpa_lacks(call) or (f"{pairs} pairs make a large mask" if pairs > most else None)


def _triton_lacks(call: Call) -> str | None:
    if call.capability is not None and call.capability < (8, 0):
        return "runs on compute capability 8.0 and newer"
    return None if "triton" in call.installed else "not installed (pip install triton)"


def _warning(
    backend: Backend, pattern: Pattern, call: Call, passed_over: list[PassedOver]
) -> str | None:
    """What to say of a call on a GPU that no kernel computes, though one could."""
    slow = backend is Backend.BLOCKED or (backend is Backend.DENSE and pattern.q_len > MAX_QUERIES)
    if not slow or call.device_type != "cuda":
        return None
    reasons = "; ".join(map(str, passed_over))
    return (
        f"attention on a GPU is computed by {backend.value!r}, which may be slower than a kernel "
        f"by an order of magnitude. Faster ones cannot: {reasons}."
    )
