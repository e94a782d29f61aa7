"""``sparq``: dense prefill, then decoding steps that read only part of the KV cache."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_attn_plugin.config import SparQConfig
from hf_attn_plugin.methods.call import AttentionCall, attend, read_call
from hf_attn_plugin.methods.counting import is_counted, record
from hf_attn_plugin.methods.decoding import (
    VisibleKeys,
    decodes_over_the_past,
    visible_keys,
    visible_to_last,
)
from hf_attn_plugin.ops.backend import capability_of, installed_packages
from hf_attn_plugin.ops.reads import CacheReads, nbytes
from hf_attn_plugin.ops.sparq import sparq_decode
from hf_attn_plugin.ops.sparq.decode import refuse_sinks
from hf_attn_plugin.ops.sparq.key_copy import Components, StridedComponents
from hf_attn_plugin.ops.sparq.reads import reads_of_kernels
from hf_attn_plugin.ops.sparq.state import SparQState, sparq_state
from hf_attn_plugin.ops.sparq.sums import BlockSums
from hf_attn_plugin.ops.sparq_backend import (
    SparQBackend,
    SparQCall,
    SparQChoice,
    choose_sparq_backend,
)
from hf_attn_plugin.ops.triton.decode_plan import is_capturing
from hf_attn_plugin.patterns import PatternMask

logger = logging.get_logger(__name__)

_INSTALLED = installed_packages()


class SparQWarning(UserWarning):
    """A decoding step of ``sparq`` on a GPU is computed without a kernel, and why."""


def sparq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PatternMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SparQ Attention (arXiv 2312.04985) where it applies, exact attention elsewhere.

    It applies to one query per sequence over earlier keys. Exact are: prefill and training, the
    checking of several guessed tokens at once (assisted generation, prompt lookup), encoders and
    cross-attention, layers with a window or chunks of their own, and masks that differ from head
    to head.

    Args:
        module: The attention module; its config holds the `SparQConfig`.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``; the cache has left its state on it.
            Without one, all keys are read to find those that matter, and a warning says so once.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        attention_mask: The model's mask.
        **kwargs: Transformers' further arguments.

    Returns:
        ``[batch, q_len, heads, value_dim]`` and None.
    """
    call = read_call("sparq", module, query, key, value, attention_mask, **kwargs)
    parameters = call.parameters(SparQConfig)
    if not decodes_over_the_past(call):
        return attend(call, call.pattern)
    rank = parameters.resolve_rank(query.shape[-1])
    # The cached tensors as they are: autocast's copies of them would have to be made every step.
    state = sparq_state(key)
    _check_state(call, parameters, state)
    if not call.is_decoding:
        if state is not None and parameters.mean_value_reallocation and not _own_mask(call):
            # The values have just been read anyway.
            visible = visible_to_last(call)
            state.sums.update(value, visible, parameters.mean_block, new=query.shape[2])
        return attend(call, call.pattern)
    refuse_sinks(call.sinks, parameters.mean_value_reallocation)
    choice = _choose(call, parameters, key, value, state)
    if choice.backend is SparQBackend.DENSE:
        return attend(call, call.pattern)
    step = _step_in_triton if choice.backend is SparQBackend.TRITON else _step_in_torch
    output, reads = step(call, parameters, rank, key, value, state)
    if reads is not None:
        record(module, "sparq", read=reads.total, dense=reads.dense)
    return output.transpose(1, 2).contiguous(), None


def _step_in_torch(
    call: AttentionCall,
    parameters: SparQConfig,
    rank: int,
    key: Tensor,
    value: Tensor,
    state: SparQState | None,
) -> tuple[Tensor, CacheReads]:
    """The output ``[batch, heads, 1, value_dim]``, and what was read for it."""
    visible = visible_to_last(call)
    sums, added = None, 0
    if state is not None and parameters.mean_value_reallocation:
        if _own_mask(call):
            # What its query sees tells nothing of what later ones will.
            sums, added = BlockSums.of(value, visible, parameters.mean_block), nbytes(value)
        else:
            sums, added = state.sums.update(value, visible, parameters.mean_block)
    output, reads = sparq_decode(
        call.query,
        key,
        value,
        rank=rank,
        top_k=parameters.top_k,
        local_window=parameters.resolve_local_window(),
        mean_value_reallocation=parameters.mean_value_reallocation,
        coverage=parameters.coverage,
        rank_coverage=parameters.rank_coverage,
        mean_block=parameters.mean_block,
        scaling=call.scaling,
        components=_components(call, parameters, key, state),
        sums=sums,
        visible=visible,
        softcap=call.softcap,
        sinks=call.sinks,
    )
    return output, dataclasses.replace(reads, mean=reads.mean + added)


def _step_in_triton(
    call: AttentionCall,
    parameters: SparQConfig,
    rank: int,
    key: Tensor,
    value: Tensor,
    state: SparQState | None,
) -> tuple[Tensor, CacheReads | None]:
    """`_step_in_torch` by kernels; what is read is only counted where somebody asks."""
    from hf_attn_plugin.ops.triton.sparq import triton_sparq

    length = None if state is None else state.length
    visible, local_window = visible_keys(call, length), parameters.resolve_local_window()
    value_sum = value_count = recent = None
    if parameters.mean_value_reallocation:
        value_sum, value_count = _value_sum(call, value, state, visible)
    if visible.seen is not None:
        recent = _window_start(call, visible, local_window)
    components = None if state is None else state.components
    compiling = torch.compiler.is_compiling()
    # A model may be spread over GPUs, and kernels start on the current one.
    with contextlib.nullcontext() if compiling else torch.cuda.device_of(key):
        output = triton_sparq(
            call.query.to(key.dtype),
            key,
            value,
            rank=rank,
            top_k=parameters.top_k,
            local_window=local_window,
            mean_value_reallocation=parameters.mean_value_reallocation,
            coverage=parameters.coverage,
            rank_coverage=parameters.rank_coverage,
            scaling=call.scaling,
            components=components,
            value_sum=value_sum,
            value_count=value_count,
            stop=visible.stop,
            visible=visible.seen,
            recent=recent,
            softcap=call.softcap,
            sinks=call.sinks,
        )
    reads = None
    if is_counted(call.module):
        reads = reads_of_kernels(
            key,
            value,
            visible=_counts(visible, key),
            rank=rank,
            top_k=parameters.top_k,
            components=components,
            mean=value_sum is not None,
            summed=state is None or _own_mask(call),
        )
    return output.to(call.query.dtype), reads


def _value_sum(
    call: AttentionCall, value: Tensor, state: SparQState | None, visible: VisibleKeys
) -> tuple[Tensor, Tensor]:
    """The sum of the visible values, float32 ``[batch, kv_heads, value_dim]``, and their number."""
    seen = visible.seen
    if state is not None and not _own_mask(call):
        count = None
        if seen is not None:
            count = _once(call, "seen", functools.partial(seen.sum, -1))
        return state.sums.follow(value, seen, count)
    if seen is None and visible.stop is not None:
        seen = (torch.arange(value.shape[2], device=value.device) < visible.stop)[None]
    sums = BlockSums.of(value, seen, None)
    return sums.total[:, :, 0], sums.seen[:, 0]


def _window_start(call: AttentionCall, visible: VisibleKeys, window: int) -> Tensor:
    """Where the last ``window`` visible keys begin, int64 ``[batch or 1]``."""
    from hf_attn_plugin.ops.triton.sparq_append import window_start

    seen = visible.seen
    assert seen is not None
    return _once(call, ("window start", window), lambda: window_start(seen, visible.stop, window))


def _once(call: AttentionCall, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` returns, for all layers of a forward; in a captured graph for each by itself.

    A replay must compute it anew, and may be given a pattern that was used before.
    """
    captured = not torch.compiler.is_compiling() and is_capturing(call.query.device)
    return make() if captured else call.pattern.derive((key, str(call.query.device)), make)


def _counts(visible: VisibleKeys, key: Tensor) -> list[int]:
    """How many keys every row sees; a traced graph must not look at values and takes all."""
    batch, length = key.shape[0], key.shape[2]
    if torch.compiler.is_compiling():
        return [length] * batch
    if visible.seen is not None:
        return [int(count) for count in visible.seen.sum(-1).expand(batch).tolist()]
    return [length if visible.stop is None else int(visible.stop)] * batch


def _choose(
    call: AttentionCall,
    parameters: SparQConfig,
    key: Tensor,
    value: Tensor,
    state: SparQState | None,
) -> SparQChoice:
    """What computes the step, chosen once for all layers of a shape and said once."""
    copied = "none" if state is None or state.components is None else state.key_copy
    counted = is_counted(call.module)
    tensors = (call.query, key, value)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def choose() -> SparQChoice:
        choice = choose_sparq_backend(
            SparQCall(
                batch=key.shape[0],
                heads=call.query.shape[1],
                kv_heads=key.shape[1],
                length=key.shape[2],
                head_dim=key.shape[3],
                value_dim=value.shape[3],
                dtype=key.dtype,
                device_type=key.device.type,
                capability=capability_of(key.device),
                installed=_INSTALLED,
                top_k=parameters.top_k,
                key_copy=copied,
                coverage=parameters.coverage is not None or parameters.rank_coverage is not None,
                mean_block=parameters.mean_block,
                dense_below=parameters.dense_below,
                needs_grad=needs_grad,
                counted=counted,
                mixed=key.dtype != value.dtype,
                scattered=key.stride(3) != 1 or value.stride(3) != 1,
            )
        )
        if choice.falls_back:
            _warn_once(f"{choice.backend.value}: {choice.reason}")
        if choice.notice is not None:
            _say_once(choice.notice)
        return choice

    shapes = (call.query.shape, key.shape, value.shape, key.dtype, value.dtype, key.device)
    told = (parameters, copied, counted, needs_grad, key.stride(3), value.stride(3))
    return call.pattern.derive(("sparq choice", *shapes, *told), choose)


def _own_mask(call: AttentionCall) -> bool:
    """Whether a mask of the caller's own, drawn for this call, is the whole truth."""
    return call.pattern.dense is not None and not torch.compiler.is_compiling()


def _check_state(call: AttentionCall, parameters: SparQConfig, state: SparQState | None) -> None:
    """Refuse a cache made for other parameters; warn where there is no state to read less by."""
    if state is not None and state.key_copy != parameters.key_copy:
        raise ValueError(
            f"sparq: this cache was made with key_copy={state.key_copy!r} and the model now has "
            f"key_copy={parameters.key_copy!r}. Start with a new cache."
        )
    missing = state is None and (
        parameters.key_copy != "none" or parameters.mean_value_reallocation
    )
    if missing and call.is_decoding and not torch.compiler.is_compiling():
        warnings.warn(
            f"sparq: {type(call.module).__name__} decodes from a cache that keeps no second copy "
            "of the keys, so every key is read to find those that matter. Where the cache was made "
            "as DynamicCache(), make it as DynamicCache(config=model.config), and decode under "
            "torch.no_grad(). Models that cache latents in place of keys (multi-head latent "
            "attention), and layers that keep keys and a recurrent state together (Falcon-H1, "
            "Zamba2), always read them all.",
            stacklevel=2,
        )


def _components(
    call: AttentionCall, parameters: SparQConfig, key: Tensor, state: SparQState | None
) -> Components | None:
    """The keys by component."""
    if parameters.key_copy == "none":
        return StridedComponents(key, counted=is_counted(call.module))
    return None if state is None else state.components


@functools.cache
def _say(text: str) -> None:
    logger.warning("attn_implementation='sparq': %s.", text)


def _say_once(text: str) -> None:
    """Log, at most once per text; under torch.compile while it traces."""
    _say(text)


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(f"attn_implementation='sparq': {text}.", SparQWarning, stacklevel=5)


def _warn_once(text: str) -> None:
    """Warn, at most once per text; under torch.compile while it traces."""
    _warn(text)


# What torch.compiler.assume_constant_result does, without importing Dynamo and with it Triton.
for _function in (_say_once, _warn_once):
    _function.__dict__["_dynamo_marked_constant"] = True
