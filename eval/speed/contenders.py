"""Who is measured: our kernels, and what PyTorch and FlashAttention-4 offer for a pattern."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hf_attn_plugin
from hf_attn_plugin.ops.backend import KERNEL_PACKAGES
from hf_attn_plugin.patterns import Pattern

from .cases import Case
from .numerics import Attention

_STRIP = 4096


@dataclasses.dataclass(frozen=True)
class Contender:
    """An implementation of attention.

    Attributes:
        name: What it is called on the command line and in tables.
        title: In a few words.
        prepare: Makes the call for a case, its pattern and a device.
        refuses: Says why it has no such pattern, or None.
        module: What must be importable.
        distribution: The package to install for it.
        ours: Whether it is this project's.
        chooses: Whether it may call other people's kernels.
    """

    name: str
    title: str
    prepare: Callable[[Case, Pattern, torch.device], Attention]
    refuses: Callable[[Case], str | None]
    module: str = "torch"
    distribution: str = "torch"
    ours: bool = False
    chooses: bool = False

    def missing(self) -> str | None:
        """What is not installed, or None."""
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            needed = "" if self.ours else f": pip install {self.distribution}"
            return f"{self.module} cannot be imported ({error}){needed}"
        return None

    def version(self) -> str:
        """What its speed depends on: a package's version, of ours the sources."""
        if self.ours:
            sources = f"sources {source_hash()}"
            return f"{sources}, {kernel_versions()}" if self.chooses else sources
        try:
            return f"{self.distribution} {importlib.metadata.version(self.distribution)}"
        except importlib.metadata.PackageNotFoundError:  # a source tree on the path
            return f"{self.distribution} without a version"


def contenders() -> dict[str, Contender]:
    """All of them by name, peers first."""
    sdpa = torch.nn.attention.SDPBackend
    found = [
        Contender(
            "sdpa-flash",
            "PyTorch SDPA, FlashAttention-2",
            functools.partial(_sdpa, sdpa.FLASH_ATTENTION),
            _causal_only,
        ),
        Contender(
            "sdpa-cudnn",
            "PyTorch SDPA, cuDNN",
            functools.partial(_sdpa, sdpa.CUDNN_ATTENTION),
            _causal_only,
        ),
        Contender("varlen", "PyTorch varlen_attn, FlashAttention-2", _varlen, _packed_only),
        Contender("flex", "PyTorch FlexAttention, compiled", _flex, lambda case: None),
        Contender(
            "fa4",
            "FlashAttention-4",
            _flash_attention_4,
            _window_or_packed,
            "flash_attn.cute",
            "flash-attn-4",
        ),
        Contender(
            "triton",
            "hf_attn_plugin, Triton",
            _triton,
            lambda case: None,
            "hf_attn_plugin.ops.triton.attention",
            ours=True,
        ),
        Contender(
            "flash",
            "hf_attn_plugin, the choice",
            _choice,
            lambda case: None,
            ours=True,
            chooses=True,
        ),
    ]
    return {contender.name: contender for contender in found}


def _causal_only(case: Case) -> str | None:
    return None if case.is_plain_causal else "plain causal attention only"


def _packed_only(case: Case) -> str | None:
    return None if case.packed else "measured on packed documents only"


def _window_or_packed(case: Case) -> str | None:
    if case.stride is not None:
        return "no stride"
    return "no global tokens" if case.num_global_tokens else None


# -- peers -----------------------------------------------------------------------------------------


def _sdpa(backend: Any, case: Case, pattern: Pattern, device: torch.device) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

    return attention


def _boundaries(case: Case, device: torch.device) -> Tensor:
    """int32 ``[documents + 1]``, where each begins."""
    lengths = torch.tensor([0, *case.document_lengths()])
    return lengths.cumsum(0).to(device, torch.int32)


def _varlen(case: Case, pattern: Pattern, device: torch.device) -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    taken = inspect.signature(varlen_attn).parameters
    longest = max(case.document_lengths())
    # torch 2.11 took is_causal; later versions say it by the window.
    options: dict[str, Any] = {"is_causal": True}
    if "window_size" in taken:
        options = {"window_size": (-1, 0)}
    if "enable_gqa" in taken:
        options["enable_gqa"] = True
    starts = _boundaries(case, device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        output: Any = varlen_attn(q, k, v, starts, starts, longest, longest, **options)
        return output.transpose(0, 1)[None]

    return attention


def _flex(case: Case, pattern: Pattern, device: torch.device) -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # else the limit on recompilations is reached, and it runs uncompiled
    mask = block_mask(case, pattern, device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Any = compiled(query, key, value, block_mask=mask, enable_gqa=True)
        return output

    return attention


def block_mask(case: Case, pattern: Pattern, device: torch.device) -> Any:
    """FlexAttention's block mask, made by itself from `mask_function` a strip of queries at a time.

    Compiling that (``_compile=True``) takes minutes in a fresh process; uncompiled, a whole mask of
    131,072 tokens does not fit into memory.
    """
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    mask, parts = mask_function(case, pattern), []
    for start in range(0, case.length, _STRIP):

        def strip(
            batch: Tensor, head: Tensor, query: Tensor, key: Tensor, start: int = start
        ) -> Tensor:
            return mask(batch, head, query + start, key)

        rows = min(_STRIP, case.length - start)
        part = create_block_mask(strip, None, None, rows, case.length, device=device)
        parts.append(part)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], 2)

    return BlockMask.from_kv_blocks(
        joined("kv_num_blocks"),
        joined("kv_indices"),
        joined("full_kv_num_blocks"),
        joined("full_kv_indices"),
        mask_mod=mask,
        seq_lengths=(case.length, case.length),
    )


def mask_function(case: Case, pattern: Pattern) -> Callable[..., Tensor]:
    """The case as a FlexAttention ``mask_mod``."""
    window, first, stride, documents = (
        case.window,
        case.num_global_tokens,
        case.stride,
        None if pattern.q_documents is None else pattern.q_documents[0].int(),
    )

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            kept = key > query - window
            if first:
                kept = kept | (key < first)
            if stride is not None:
                kept = kept | (key % stride == query % stride)
            seen = seen & kept
        if documents is not None:
            seen = seen & (documents[query] == documents[key])
        return seen

    return mask


def _flash_attention_4(case: Case, pattern: Pattern, device: torch.device) -> Attention:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if case.packed:
        starts = _boundaries(case, device)
        longest = max(case.document_lengths())

        def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output, *_ = flash_attn_varlen_func(
                *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
                cu_seqlens_q=starts,
                cu_seqlens_k=starts,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                causal=True,
            )
            return output.transpose(0, 1)[None]

        return packed
    window = (None, None) if case.window is None else (case.window - 1, 0)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, *_ = flash_attn_func(
            *(tensor.transpose(1, 2) for tensor in (query, key, value)),
            causal=True,
            window_size=window,
        )
        return output.transpose(1, 2)

    return attention


# -- ours ------------------------------------------------------------------------------------------


def _triton(case: Case, pattern: Pattern, device: torch.device) -> Attention:
    from hf_attn_plugin.ops.triton.attention import triton_attention

    scaling = case.head_dim**-0.5

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return triton_attention(query, key, value, pattern, scaling=scaling)[0]

    return attention


def _choice(case: Case, pattern: Pattern, device: torch.device) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return hf_attn_plugin.attention(query, key, value, pattern, need_lse=False)[0]

    return attention


@functools.cache
def source_hash() -> str:
    """A digest of the files that our speed depends on."""
    package = Path(inspect.getfile(hf_attn_plugin)).parent
    return _digest([*(package / "ops").rglob("*.py"), *(package / "patterns").rglob("*.py")])


@functools.cache
def bench_hash() -> str:
    """A digest of the files that say what is measured, and how."""
    names = ("cases.py", "contenders.py", "numerics.py", "timing.py")
    return _digest([Path(__file__).with_name(name) for name in names])


def kernel_versions() -> str:
    """Versions of other people's kernels that ours may choose."""
    found = [f"cuDNN {torch.backends.cudnn.version() or 'none'}"]
    for name in sorted(set(KERNEL_PACKAGES) - {"triton"}):  # which every row names
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} none")
    return ", ".join(found)


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
