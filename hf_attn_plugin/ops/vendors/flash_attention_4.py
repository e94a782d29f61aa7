"""FlashAttention-4 (arXiv 2603.05451), from the package ``flash-attn-4``: forward and backward.

Its tensors are ``[batch, tokens, heads, head_dim]`` of any strides: ours after a transpose, with no
copy. Its log-sum-exp is ours. Packed documents are one long row, and where each of them begins.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.call import Call
from hf_attn_plugin.ops.vendors.built_in import BuiltIn, built_in
from hf_attn_plugin.patterns import Pattern

PACKAGE = "flash-attn-4"
# The oldest whose signature and gradients (of sinks, of the log-sum-exp) this file was written to.
OLDEST = "4.0.0b36"
INSTALL = "pip install 'hf-attn-plugin[fa4]'"

# It does not split keys over programs on Hopper: with few queries most of the GPU would be idle
# (one query over 131,072 keys: 1.32 ms, where others take 0.48).
_MIN_QUERIES = 17
# It takes other multiples of 8 too; these are tested here. 80 is none of them: the gradient of
# queries came out wrong (28 times the error allowed, in some runs and not in others).
_HEAD_DIMS = (64, 96, 128, 256)
# Sinks of other dtypes are refused by an assertion.
_SINK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Beyond it, offsets do not fit 32 bits.
_MAX_ELEMENTS = 2**31


def refuses(pattern: Pattern, call: Call, mask: BuiltIn | str) -> str | None:
    """Why FlashAttention-4 cannot compute a call exactly, or would not be the fastest.

    Its absence comes last, so that it is named only where installing it would help. Of packed
    documents the values are read, once per pattern.

    Args:
        pattern: Of the call.
        call: The rest of it.
        mask: The pattern in a kernel's own terms (`built_in`).
    """
    if call.device_type != "cuda" or call.capability is None:
        return "runs on NVIDIA GPUs"
    if call.capability[0] not in (9, 10):
        return "its backward runs on compute capabilities 9 and 10 only"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return "16-bit dtypes only"
    if isinstance(mask, str):
        return f"no {mask}"
    dims = _refuses_dims(call)
    if dims is not None:
        return dims
    if mask.documents and call.softcap and call.needs_grad:
        return "no gradient through a softcap over packed documents"
    if pattern.q_len < _MIN_QUERIES:
        return "does not split the keys of so few queries"
    if call.elements(pattern) > _MAX_ELEMENTS:
        return "more than 2^31 elements"
    if call.compiling:
        return "torch.compile cannot trace it"
    if PACKAGE not in call.installed:
        return f"not installed ({INSTALL})"
    if mask.documents and document_starts(pattern, call.batch) is None:
        return "documents that are not numbered upwards"
    return None


def _refuses_dims(call: Call) -> str | None:
    dims = (call.head_dim, call.value_dim)
    if dims == (192, 128):
        grouped = call.heads != call.kv_heads and call.needs_grad
        return "no gradient of grouped heads of 192 with values of 128" if grouped else None
    if dims[0] != dims[1] or dims[0] not in _HEAD_DIMS:
        return f"head_dim of {', '.join(map(str, _HEAD_DIMS))}, or 192 with values of 128, only"
    blackwell = call.capability is not None and call.capability[0] == 10
    if blackwell and dims[0] == 256 and (call.softcap or call.sinks or call.need_lse):
        return "plain attention only with heads of 256 on compute capability 10"
    return None


@dataclasses.dataclass(frozen=True)
class DocumentStarts:
    """Where documents begin in a batch laid out as one row.

    Attributes:
        starts: int32 ``[documents + 1]``, the last one the number of all tokens.
        longest: Tokens of the longest document.
    """

    starts: Tensor
    longest: int


def document_starts(pattern: Pattern, batch: int) -> DocumentStarts | None:
    """The documents of a pattern, made once; None where they are not runs of ascending numbers.

    Args:
        pattern: With documents, of as many queries as keys.
        batch: Rows of the call; every row's first token begins a document.
    """
    return pattern.derive(("document starts", batch), lambda: _document_starts(pattern, batch))


def _document_starts(pattern: Pattern, batch: int) -> DocumentStarts | None:
    queries, keys = pattern.q_documents, pattern.kv_documents
    assert queries is not None and keys is not None
    rows = queries.shape[0]
    step = queries.diff(dim=1)
    usable = (step >= 0).all()
    if queries is not keys:
        usable = usable & (queries == keys).all()
    begins = torch.nn.functional.pad(step != 0, (1, 0), value=True).expand(max(rows, batch), -1)
    first = begins.flatten().nonzero()[:, 0]
    starts = torch.nn.functional.pad(first, (0, 1), value=begins.numel()).to(torch.int32)
    told = torch.stack([usable.to(torch.int32), starts.diff().max()])
    fine, longest = told.tolist()
    return DocumentStarts(starts, longest) if fine else None


@functools.cache
def _vendor() -> Any:
    try:
        import flash_attn.cute as vendor
    except ImportError as error:
        raise ImportError(
            f"{PACKAGE} is installed, but cannot be imported ({error}). Repair it ({INSTALL}), or "
            f"remove it (pip uninstall {PACKAGE}) to use the next fastest kernels."
        ) from error
    return vendor


def flash_attention_4(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    need_lse: bool = False,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention by FlashAttention-4, differentiable (log-sum-exp and sinks too).

    Args:
        query: ``[batch, heads, q_len, head_dim]``, float16 or bfloat16, on a GPU.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        pattern: One that `refuses` does not refuse.
        scaling: Factor on the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[heads]``; float64 is rounded to float32.
        need_lse: Whether to return the log-sum-exp.
        deterministic: Whether gradients must be the same bits from run to run, which is slower.

    Returns:
        The output ``[batch, heads, q_len, value_dim]`` (its memory as ``[batch, q_len, heads,
        value_dim]``), and the natural log-sum-exp ``[batch, heads, q_len]`` in float32, or None.

    Raises:
        ImportError: The package is installed and broken.
    """
    mask = built_in(pattern)
    assert isinstance(mask, BuiltIn)
    if sinks is not None:
        sinks = sinks.reshape(-1)
        sinks = sinks if sinks.dtype in _SINK_DTYPES else sinks.float()
    near = None if mask.window is None else mask.window - 1
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": mask.causal,
        "window_size": (near, 0 if mask.causal and near is not None else near),
        "learnable_sink": sinks,
        "softcap": softcap or 0.0,
        "return_lse": need_lse,
        "deterministic": deterministic,
    }
    tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    if not mask.documents:
        output, lse = _vendor().flash_attn_func(*tensors, **options)
        return output.transpose(1, 2), lse if need_lse else None
    batch = query.shape[0]
    documents = document_starts(pattern, batch)
    assert documents is not None
    # Rows one after another are one row; a copy only where rows of a batch lie apart.
    output, lse = _vendor().flash_attn_varlen_func(
        *(tensor.flatten(0, 1) for tensor in tensors),
        cu_seqlens_q=documents.starts,
        cu_seqlens_k=documents.starts,
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        **options,
    )
    output = output.unflatten(0, (batch, -1)).transpose(1, 2)
    if not need_lse:
        return output, None
    return output, lse.unflatten(1, (batch, -1)).transpose(0, 1)
