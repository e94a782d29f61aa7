"""Which implementation computes a call, and why: a pure function of the call."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
from collections.abc import Iterator

import torch

from hf_attn_plugin.ops.call import Call
from hf_attn_plugin.ops.triton.support import refuses as triton_refuses
from hf_attn_plugin.ops.triton.support_decode import MAX_QUERIES, decode_refuses
from hf_attn_plugin.ops.vendors import cudnn, flash_attention_4, sdpa
from hf_attn_plugin.ops.vendors.built_in import BuiltIn, built_in
from hf_attn_plugin.patterns import Pattern

# A boolean mask of this many pairs is cheaper than walking blocks in Python,
_MAX_DENSE_PAIRS = 2048 * 2048
# and of this many than deriving a schedule for a kernel.
_FEW_MASKED = 512 * 512
# Pairs over batch and heads. A forward and backward keeps the host busy for 0.2 ms with SDPA, 0.6
# with FlashAttention-4, 0.65 with Triton. With 32 heads of 128, causal, these three took 0.2, 0.5,
# 1.5 ms at 1,024 tokens, 0.64, 0.5, 1.5 at 2,048 and 1.9, 0.97, 1.4 at 4,096, when Triton still
# took the host 1.5 ms; of the last, 0.9 ms were in its kernels.
_FEW_PAIRS = 2**27
_MANY_PAIRS = 2**28
# From here on the kernels decide, not their launches.
_LARGE_PAIRS = 2**29
# Elements of keys or values. A step over fewer is bound by its launch too: with 32/8 heads of 128,
# SDPA takes 0.05 ms and Triton 0.09 over 4,096 keys, 0.15 and 0.13 over 131,072.
_SHORT_CACHE = 2**23
# What the warp-specialised kernels of ops/triton/hopper.py were measured with.
_HOPPER_DIMS = (128, 128)
_NARROW_WINDOW = 1024

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


_SDPA = (Backend.SDPA_CAUSAL, Backend.SDPA_FULL, Backend.SDPA_MASK)


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
        repeats_heads: Whether SDPA gets keys and values of its own for every query head.
    """

    backend: Backend
    reason: str
    passed_over: tuple[PassedOver, ...] = ()
    warning: str | None = None
    repeats_heads: bool = False


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
    for backend in _order(pattern, call):
        if any(passed.backend is backend for passed in passed_over):
            continue
        refusal = refuses(backend, pattern, call)
        if refusal is None:
            reason = _reason(backend, pattern, call)
            warning = _warning(backend, pattern, call, passed_over)
            repeats = backend in _SDPA and _repeats_heads(backend, call)
            if repeats:
                reason += "; keys and values are repeated, its kernel knows no groups of heads"
            return Choice(backend, reason, tuple(passed_over), warning, repeats)
        passed_over.append(PassedOver(backend, refusal))
    raise AssertionError("the last one takes every call")


def _order(pattern: Pattern, call: Call) -> Iterator[Backend]:
    """Backends from fast to slow, by measurements on one H200; the last takes every call.

    What only GPUs have is not named elsewhere. One may come twice; its first place counts.
    """
    gpu = call.device_type == "cuda"
    decoding = gpu and pattern.q_len <= MAX_QUERIES and not call.needs_grad
    large = call.elements(pattern) > _SHORT_CACHE or _repeats_heads(Backend.SDPA_FULL, call)
    if decoding and (pattern.tensors() or large):
        yield Backend.TRITON_DECODE  # first, since it needs no value of an offset that is a tensor
    terms = _terms(pattern, call)
    causal = pattern.causal if isinstance(terms, str) else terms.causal
    plain = isinstance(terms, BuiltIn) and terms.unrestricted
    sdpa = [Backend.SDPA_CAUSAL if causal else Backend.SDPA_FULL] if plain else []
    mask = [] if call.compiling else [Backend.SDPA_MASK]
    if decoding:
        yield from [*sdpa, Backend.TRITON_DECODE]
    if gpu:
        # Of a batch with many heads, a mask costs more than a schedule: every pair is computed.
        few = call.pairs(pattern) < _FEW_PAIRS
        masked = few and pattern.q_len * pattern.kv_len <= _FEW_MASKED
        triton = [*mask, Backend.TRITON] if masked else [Backend.TRITON]
        hopper = _has_hopper_kernels(pattern, call)
        if few:
            yield from sdpa
        if hopper and _is_narrow(terms):
            yield from triton
        yield Backend.FLASH_ATTENTION_4
        if hopper:
            yield from triton
        yield Backend.CUDNN_CAUSAL if causal else Backend.CUDNN_FULL
        yield from [*triton, *sdpa] if _triton_beats_sdpa(pattern, call) else [*sdpa, *triton]
    yield from sdpa
    yield from mask
    yield Backend.DENSE if call.compiling else Backend.BLOCKED


def _terms(pattern: Pattern, call: Call) -> BuiltIn | str:
    """The pattern in vendors' terms, or why not."""
    if call.compiling and pattern.tensors():
        return "tensors in a pattern under torch.compile"
    return built_in(pattern)


def refuses(backend: Backend, pattern: Pattern, call: Call) -> str | None:
    """Why a backend cannot compute the call exactly; None if it can."""
    if backend is Backend.FLASH_ATTENTION_4:
        return flash_attention_4.refuses(pattern, call, _terms(pattern, call))
    if backend in (Backend.CUDNN_CAUSAL, Backend.CUDNN_FULL):
        return cudnn.refuses(pattern, call, _terms(pattern, call))
    if backend is Backend.TRITON_DECODE:
        return _triton_lacks(call) or decode_refuses(pattern, call)
    if backend is Backend.TRITON:
        return _triton_lacks(call) or triton_refuses(pattern, call)
    if backend is Backend.SDPA_CAUSAL and pattern.q_len != pattern.kv_len:
        return "its causal mask starts at the first key, whatever the number of queries"
    if backend in (Backend.SDPA_CAUSAL, Backend.SDPA_FULL):
        return _sdpa_lacks(backend, pattern, call)
    if backend is Backend.SDPA_MASK:
        pairs = pattern.q_len * pattern.kv_len * (call.batch if pattern.tensors() else 1)
        large = f"{pairs} pairs make a large mask" if pairs > _MAX_DENSE_PAIRS else None
        return _sdpa_lacks(backend, pattern, call) or large
    return None


def _reason(backend: Backend, pattern: Pattern, call: Call) -> str:
    """Why a backend that refuses nothing is the right one."""
    if backend is Backend.TRITON_DECODE:
        return "few queries over the keys of a cache"
    terms = _terms(pattern, call)
    if backend is Backend.TRITON and isinstance(terms, str):
        return _VISITS
    if backend is Backend.SDPA_MASK:
        return f"{pattern.q_len * pattern.kv_len} pairs are few enough for a mask"
    if backend is Backend.BLOCKED:
        return _sdpa_lacks(Backend.SDPA_FULL, pattern, call) or _VISITS
    if backend is Backend.DENSE:
        return "torch.compile is tracing, which the schedule cannot follow"
    return _in_words(terms, pattern)


def _in_words(mask: BuiltIn | str, pattern: Pattern) -> str:
    if isinstance(mask, str):
        return mask
    if mask.unrestricted and not mask.causal:
        return "every key lies before the queries" if pattern.causal else "every pair is visible"
    words = ["causal"] if mask.causal else []
    words += [] if mask.window is None else [f"window {mask.window}"]
    words += ["packed documents"] if mask.documents else []
    return "plain causal attention" if words == ["causal"] else ", ".join(words)


def _sdpa_lacks(backend: Backend, pattern: Pattern, call: Call) -> str | None:
    if call.softcap:
        return "SDPA has no softcap"
    if call.sinks:
        return "SDPA has no attention sinks"
    if call.need_lse:
        return "SDPA does not return the log-sum-exp"
    if call.pairs(pattern) >= _FEW_PAIRS:
        return sdpa.writes_scores(call, masked=backend is Backend.SDPA_MASK)
    return None


def _repeats_heads(backend: Backend, call: Call) -> bool:
    return sdpa.repeats_heads(call, masked=backend is Backend.SDPA_MASK)


def _triton_beats_sdpa(pattern: Pattern, call: Call) -> bool:
    """Whether SDPA without cuDNN is slower: FlashAttention-2, or keys and values repeated for it.

    Plain causal, 32/8 heads, forward and backward (forward alone): of 128 at 16,384 tokens 13.1 ms,
    FlashAttention-2 23.7; at 8,192 tokens of 80 3.8 (0.8) and 5.9 (1.5), of 96 4.2 (1.0) and 5.6
    (1.4), of 256 forward alone 2.2 and 3.8. The gradients of 256 are not measured with the present
    tiles; with those before, 21.5 and 14.8.
    """
    half = call.dtype in (torch.float16, torch.bfloat16)
    hopper = call.capability is not None and call.capability >= (9, 0)
    measured = call.head_dim <= 128 or not call.needs_grad
    large = hopper and measured and call.pairs(pattern) >= _MANY_PAIRS
    other = half and (large or call.head_dim != call.value_dim)
    return other or _repeats_heads(Backend.SDPA_FULL, call)


def _has_hopper_kernels(pattern: Pattern, call: Call) -> bool:
    """Whether Triton has warp-specialised kernels for the call, which is worth their launches.

    Forward and backward, 32/8 heads of 128: plain causal at 16,384 tokens 14.6 ms, of them 13.2 in
    kernels (FlashAttention-4 12.6, cuDNN 14.1 and 80 for its plan), a window of 1024 at 131,072
    tokens 18.0 (FlashAttention-4 18.4), of 4096 62 (55), 64 documents 25 (22.7).
    """
    half = call.dtype in (torch.float16, torch.bfloat16)
    dims = (call.head_dim, call.value_dim)
    served = half and dims == _HOPPER_DIMS and not call.softcap and call.capability == (9, 0)
    return served and call.pairs(pattern) >= _LARGE_PAIRS


def _is_narrow(terms: BuiltIn | str) -> bool:
    """Whether it is a window so narrow that FlashAttention-4's tiles reach far beyond it."""
    window = None if isinstance(terms, str) or terms.documents else terms.window
    return window is not None and window <= _NARROW_WINDOW


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
