"""The attention layers of a model, from a forward pass on the meta device, and their backends."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_attn_plugin.config import (
    METHOD_CONFIGS,
    LongformerConfig,
    SlidingWindowConfig,
    SparQConfig,
    StridedConfig,
    parameters_of,
)
from hf_attn_plugin.doctor.environment import Target
from hf_attn_plugin.integrations.attention_calls import InterfaceCall, intercept_attention
from hf_attn_plugin.methods import METHODS
from hf_attn_plugin.ops.backend import choose_backend
from hf_attn_plugin.ops.call import Call
from hf_attn_plugin.ops.linear_backend import LinearCall, choose_linear_backend
from hf_attn_plugin.ops.sparq_backend import (
    SparQBackend,
    SparQCall,
    SparQChoice,
    choose_sparq_backend,
)
from hf_attn_plugin.patterns import Pattern, PatternMask

_SLOW = "; may be slower than a kernel by an order of magnitude"
_READS_A_PART = "reads a part of the cache; see the table below"
# Arguments by which methods refuse a call, besides sinks.
_TELLING = ("softcap", "position_bias", "indices", "block_indices", "is_causal", "sliding_window")


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One attention call of a forward pass over a prompt.

    Attributes:
        name: The module.
        module: Itself, without weights.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Of queries and keys.
        value_dim: Of values.
        pattern: What the model itself lets attend.
        softcap: Of the scores, or None.
        sinks: Whether there are attention sinks.
        cross: Whether queries and keys are of two sequences.
        cached_dims: Elements that the cache keeps per token (keys and values, all heads), or None
            where the layer caches nothing.
        arguments: What else the attention function is called with and may refuse.
    """

    name: str
    module: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    pattern: Pattern
    softcap: float | None
    sinks: bool
    cross: bool
    cached_dims: int | None
    arguments: dict[str, Any]

    @property
    def window(self) -> int | None:
        """The layer's own window, in keys; None where it attends to all."""
        return self.pattern.band

    @property
    def latent(self) -> bool:
        """Whether the cache holds something else than this layer's keys and values (MLA)."""
        own = self.kv_heads * (self.head_dim + self.value_dim)
        return self.cached_dims is not None and self.cached_dims != own

    @property
    def kind(self) -> str:
        """In words."""
        words = ["cross-attention"] if self.cross else []
        if not self.pattern.causal:
            words.append("bidirectional")
        if self.pattern.dense is not None:
            words.append("a mask of the model's own")
        words.append("all tokens" if self.window is None else f"window {self.window}")
        words.append(f"{self.heads}/{self.kv_heads} heads of {self.head_dim}")
        words += ["softcap"] if self.softcap else []
        words += ["sinks"] if self.sinks else []
        words += ["latent cache"] if self.latent else []
        return ", ".join(words)


def sample_call(layer: Layer, attn: str) -> None:
    """Call a method as this layer would, on two random tokens.

    Raises:
        ValueError: The method refuses such layers; the message says why.
    """
    query = torch.randn(1, layer.heads, 2, layer.head_dim)
    key = torch.randn(1, layer.kv_heads, 2, layer.head_dim)
    value = torch.randn(1, layer.kv_heads, 2, layer.value_dim)
    sinks = {"s_aux": torch.zeros(layer.heads)} if layer.sinks else {}
    # ring computes what flash does, and refuses to outside of sequence_parallel.
    method = METHODS["flash" if attn == "ring" else attn]
    with torch.no_grad():
        method(layer.module, query, key, value, None, **layer.arguments, **sinks)


def build_model(model_class: Any, config: Any, attn: str, dtype: torch.dtype) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation=attn, dtype=dtype).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the others look at values
    return model


def read_layers(model: Any, length: int) -> list[Layer]:
    """Every attention layer, by a forward pass over ``length`` tokens that computes nothing.

    Raises:
        ValueError: The model cannot be run without values.
    """
    calls: list[InterfaceCall] = []

    def note(call: InterfaceCall) -> tuple[Tensor, None]:
        calls.append(call)
        batch, heads, q_len, _ = call.query.shape
        return call.query.new_empty(batch, q_len, heads, call.value.shape[-1]), None

    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no input_ids")
    name = model.config.get_text_config()._attn_implementation
    try:
        if name == "linear":  # its cache holds no keys to tell the model's from
            model.set_attn_implementation("flash")
        with torch.no_grad(), _PlainRow(), intercept_attention(model.modules(), note):
            output = model(**inputs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} cannot be run without weights: {error}") from None
    finally:
        if name == "linear":
            model.set_attn_implementation(name)
    names = {id(module): name for name, module in model.named_modules()}
    cache = getattr(output, "past_key_values", None)
    return [_layer(call, names[id(call.module)], cache, length) for call in calls]


class _PlainRow(TorchFunctionMode):
    """Answers what mask functions ask of values that are not there: no padding, one document."""

    ANSWERS: ClassVar[dict[Any, bool]] = {
        Tensor.any: False,
        torch.any: False,
        Tensor.all: True,
        torch.all: True,
    }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        whole = func in self.ANSWERS and len(args) == 1 and not kwargs
        if whole and args[0].device.type == "meta":
            return torch.tensor(self.ANSWERS[func], device="cpu")
        return func(*args, **(kwargs or {}))


def _layer(call: InterfaceCall, name: str, cache: Any, length: int) -> Layer:
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    pattern = call.mask.pattern if isinstance(call.mask, PatternMask) else None
    if pattern is None:
        causal = call.kwargs.get("is_causal")
        causal = getattr(call.module, "is_causal", True) if causal is None else causal
        pattern = Pattern(
            q_len=q_len, kv_len=kv_len, causal=bool(causal), band=call.kwargs.get("sliding_window")
        )
    return Layer(
        name=name,
        module=call.module,
        heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        head_dim=call.key.shape[3],
        value_dim=call.value.shape[3],
        pattern=pattern,
        softcap=call.kwargs.get("softcap"),
        sinks=call.kwargs.get("s_aux") is not None or call.kwargs.get("sinks") is not None,
        cross=not getattr(call.module, "is_causal", True) and _is_decoders(call.module),
        cached_dims=_cached_dims(call.module, cache),
        arguments={k: v for k, v in call.kwargs.items() if v is not None and k in _TELLING},
    )


def _is_decoders(module: nn.Module) -> bool:
    return bool(getattr(module, "is_decoder", False))


def _cached_dims(module: nn.Module, cache: Any) -> int | None:
    """Elements that a cache holds per token of this layer."""
    index = getattr(module, "layer_idx", None)
    if hasattr(cache, "self_attention_cache"):  # of an encoder-decoder's decoder
        crosses = not getattr(module, "is_causal", True)
        if not _is_decoders(module):
            return None
        cache = cache.cross_attention_cache if crosses else cache.self_attention_cache
    layers = getattr(cache, "layers", None)
    if layers is None or index is None or index >= len(layers):
        return None
    keys, values = getattr(layers[index], "keys", None), getattr(layers[index], "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        return None
    return keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3]


@dataclasses.dataclass(frozen=True)
class LayerBackend:
    """What computes layers of one kind, and why nothing faster does.

    Attributes:
        layers: Their numbers, as in ``"0-3,5"``, or how many there are.
        kind: What they are like.
        prefill: What computes the prompt.
        prefill_reason: Why it is that.
        training: What computes it where gradients are wanted.
        training_reason: Why it is that.
        decoding: What computes a step with one new token; None in encoders.
        decoding_reason: Why it is that.
        prefill_passed_over: Faster backends that were not taken, each with the reason.
        training_passed_over: The same of training.
        decoding_passed_over: The same of the step.
    """

    layers: str
    kind: str
    prefill: str
    prefill_reason: str
    training: str
    training_reason: str
    decoding: str | None
    decoding_reason: str | None
    prefill_passed_over: tuple[str, ...] = ()
    training_passed_over: tuple[str, ...] = ()
    decoding_passed_over: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Found:
    """One line of the report."""

    backend: str
    reason: str
    passed_over: tuple[str, ...] = ()


def layer_backends(
    layers: Sequence[Layer], attn: str, dtype: torch.dtype, target: Target
) -> list[LayerBackend]:
    """The backends of every kind of layer under ``attn``, in the order of the layers."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    found = []
    for kind, members in groups.items():
        layer = members[0]
        prefill, training = (
            _prompt(layer, attn, dtype, target, needs_grad) for needs_grad in (False, True)
        )
        causal = layer.pattern.causal or layer.pattern.dense is not None
        decoding = _decoding(layer, attn, dtype, target) if causal else None
        found.append(
            LayerBackend(
                layers=_numbers(members),
                kind=kind,
                prefill=prefill.backend,
                prefill_reason=prefill.reason,
                training=training.backend,
                training_reason=training.reason,
                decoding=decoding.backend if decoding else None,
                decoding_reason=decoding.reason if decoding else None,
                prefill_passed_over=prefill.passed_over,
                training_passed_over=training.passed_over,
                decoding_passed_over=decoding.passed_over if decoding else (),
            )
        )
    return found


def _prompt(
    layer: Layer, attn: str, dtype: torch.dtype, target: Target, needs_grad: bool
) -> _Found:
    if attn not in METHODS:
        return _Found(f"transformers' {attn}", "not one of this package's methods")
    if attn == "linear":
        return _linear(layer, dtype, target)
    return _chosen(layer, _sparse(layer, attn), dtype, target, needs_grad)


def _linear(layer: Layer, dtype: torch.dtype, target: Target) -> _Found:
    choice = choose_linear_backend(
        LinearCall(
            dtype=dtype,
            device_type=target.type,
            capability=target.capability,
            installed=target.installed,
            head_dim=layer.head_dim,
            value_dim=layer.value_dim,
        )
    )
    reason = choice.reason + (_SLOW if choice.falls_back else "")
    return _Found(f"linear attention: {choice.backend.value}", reason)


def sparq_choice(
    layer: Layer, parameters: SparQConfig, dtype: torch.dtype, target: Target
) -> SparQChoice:
    """What computes a step of one sequence whose cache holds the prompt."""
    return choose_sparq_backend(
        SparQCall(
            batch=1,
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            length=layer.pattern.kv_len,
            head_dim=layer.head_dim,
            value_dim=layer.value_dim,
            dtype=dtype,
            device_type=target.type,
            capability=target.capability,
            installed=target.installed,
            top_k=parameters.top_k,
            key_copy="none" if layer.latent else parameters.key_copy,
            coverage=parameters.coverage is not None or parameters.rank_coverage is not None,
            mean_block=parameters.mean_block,
            dense_below=parameters.dense_below,
        )
    )


def _sparq(layer: Layer, dtype: torch.dtype, target: Target) -> _Found:
    parameters = parameters_of(getattr(layer.module, "config", None), SparQConfig)
    choice = sparq_choice(layer, parameters, dtype, target)
    if choice.backend is SparQBackend.DENSE:
        last = Pattern(q_len=1, kv_len=layer.pattern.kv_len, causal=layer.pattern.causal)
        found = _chosen(layer, last, dtype, target, needs_grad=False)
        return dataclasses.replace(found, reason=f"sparq attends to all keys: {choice.reason}")
    reason = choice.reason + (_SLOW if choice.falls_back else "")
    if target.type != "cuda":
        reason = _READS_A_PART
    return _Found(f"sparq's own step: {choice.backend.value}", reason)


def _decoding(layer: Layer, attn: str, dtype: torch.dtype, target: Target) -> _Found:
    if attn not in METHODS:
        return _Found(f"transformers' {attn}", "not one of this package's methods")
    if attn == "linear":
        return _Found("linear attention's recurrent state", "reads no keys")
    if attn == "sparq" and layer.window is None and not layer.cross:
        return _sparq(layer, dtype, target)
    if METHOD_CONFIGS[attn].decode_only and layer.window is None and not layer.cross:
        return _Found(f"{attn}'s own step in PyTorch", _READS_A_PART)
    kv_len = layer.pattern.kv_len
    if layer.window is not None:
        kv_len = min(kv_len, layer.window)  # a window layer's cache holds no more
    last = Pattern(q_len=1, kv_len=kv_len, causal=layer.pattern.causal)
    pattern = _sparse(layer, attn, last)
    if not pattern.is_sparse or (target.type == "cuda" and pattern.stride is None):
        return _chosen(layer, pattern, dtype, target, needs_grad=False)
    seen = int(pattern.visible("cpu").any(1).sum())
    rest = Pattern(q_len=1, kv_len=seen, causal=False)  # all of these are seen
    found = _chosen(layer, rest, dtype, target, needs_grad=False)
    reason = f"over the {seen:,} of {kv_len:,} cached keys that are seen: {found.reason}"
    return dataclasses.replace(found, reason=reason)


def _chosen(
    layer: Layer, pattern: Pattern, dtype: torch.dtype, target: Target, needs_grad: bool
) -> _Found:
    call = Call(
        batch=1,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        value_dim=layer.value_dim,
        dtype=dtype,
        device_type=target.type,
        capability=target.capability,
        softcap=bool(layer.softcap),
        sinks=layer.sinks,
        need_lse=False,
        needs_grad=needs_grad,
        compiling=False,
        installed=target.installed,
    )
    choice = choose_backend(pattern, call)
    passed_over = tuple(map(str, choice.passed_over))
    reason = choice.reason + ("" if choice.warning is None else _SLOW)
    return _Found(choice.backend.value, reason, passed_over)


def _sparse(layer: Layer, attn: str, pattern: Pattern | None = None) -> Pattern:
    """The layer's pattern with the method's terms."""
    pattern = layer.pattern if pattern is None else pattern
    config: Any = getattr(layer.module, "config", None)
    if attn == "sliding_window":
        sliding = parameters_of(config, SlidingWindowConfig)
        own = getattr(config, "sliding_window", None)
        window = sliding.window or (own and own + (not layer.pattern.causal))
        return pattern.replace(
            window=window or SlidingWindowConfig.DEFAULT_WINDOW,
            num_sink_tokens=sliding.num_sink_tokens,
        )
    if attn == "longformer":
        longformer = parameters_of(config, LongformerConfig)
        return pattern.replace(
            window=longformer.window,
            dilation=longformer.dilation,
            num_global_tokens=longformer.num_global_tokens,
        )
    if attn == "strided":
        strided = parameters_of(config, StridedConfig)
        return pattern.replace(window=strided.window, stride=strided.stride)
    return pattern


def _numbers(layers: Sequence[Layer]) -> str:
    """Layer numbers in ranges, or a count where modules have none."""
    numbers = [getattr(layer.module, "layer_idx", None) for layer in layers]
    known = sorted({number for number in numbers if isinstance(number, int)})
    if len(known) != len(numbers):
        return f"{len(numbers)} layers"
    ranges: list[list[int]] = []  # first and last number
    for number in known:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in ranges]
    return f"{','.join(words[:4])},… ({len(known)})" if len(words) > 6 else ",".join(words)
