"""Parameters of every method: one frozen, validated dataclass each, kept in the model's config.

The parameters live in ``config.attn_params`` as plain JSON, ``{"sparq": {"rank": 16, ...}}``, so
that ``save_pretrained`` writes them to ``config.json`` and ``from_pretrained`` reads them back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def _require_int(owner: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    valid = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{owner}: {name} must be {valid}, got {value!r}.")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{owner}: {name} must be {valid}, got {value}.")


def _require_share(owner: str, name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:
        raise ValueError(f"{owner}: {name} must be a number above 0 and at most 1, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """Base of the parameter classes.

    Attributes:
        name: The ``attn_implementation`` it belongs to.
        decode_only: Whether the method acts in decoding only, on top of a dense prefill. One
            forward pass over a text then measures dense attention, not the method.
    """

    name: ClassVar[str]
    decode_only: ClassVar[bool] = False
    __match_args__: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        return dataclasses.asdict(self)

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise ``ValueError`` for parameters that this model's shape cannot take."""


@dataclasses.dataclass(frozen=True)
class FlashConfig(MethodConfig):
    """``flash`` is exact and has nothing to set."""

    name: ClassVar[str] = "flash"


@dataclasses.dataclass(frozen=True)
class RingConfig(MethodConfig):
    """``ring`` is ``flash`` inside ``sequence_parallel`` and has nothing to set."""

    name: ClassVar[str] = "ring"


@dataclasses.dataclass(frozen=True)
class SlidingWindowConfig(MethodConfig):
    """Parameters of ``sliding_window`` (arXiv 2004.05150; sinks: arXiv 2309.17453).

    Attributes:
        window: Keys seen by each query, itself included: key j is seen by query i when
            ``i - window < j <= i`` (in encoders ``|i - j| < window``). None takes the model's own
            ``sliding_window``, or 4096 tokens where the model has none.
        num_sink_tokens: First tokens of every sequence that every query sees besides.
    """

    name: ClassVar[str] = "sliding_window"
    DEFAULT_WINDOW: ClassVar[int] = 4096

    window: int | None = None
    num_sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.window is not None:
            _require_int("SlidingWindowConfig", "window", self.window, 1)
        _require_int("SlidingWindowConfig", "num_sink_tokens", self.num_sink_tokens, 0)


@dataclasses.dataclass(frozen=True)
class LongformerConfig(MethodConfig):
    """Parameters of ``longformer``, local and global attention (arXiv 2004.05150).

    Attributes:
        window: Keys seen on each side, the query included: ``0 <= i - j < window * dilation`` in
            decoders, ``|i - j| < window * dilation`` in encoders, at multiples of ``dilation``.
        num_global_tokens: First tokens of every sequence; they are seen by all queries and see all
            keys (in decoders, up to themselves). A forward call may name others besides with
            ``global_attention_mask`` (batch, tokens), non-zero where a token is global.
        dilation: Distance between neighbouring keys of the window.
    """

    name: ClassVar[str] = "longformer"

    window: int = 512
    num_global_tokens: int = 1
    dilation: int = 1

    def __post_init__(self) -> None:
        _require_int("LongformerConfig", "window", self.window, 1)
        _require_int("LongformerConfig", "num_global_tokens", self.num_global_tokens, 0)
        _require_int("LongformerConfig", "dilation", self.dilation, 1)


@dataclasses.dataclass(frozen=True)
class StridedConfig(MethodConfig):
    """Parameters of ``strided``, the strided pattern of Sparse Transformers (arXiv 1904.10509).

    Attributes:
        window: Keys seen next to the query, itself included.
        stride: Besides these, every key whose distance to the query is a multiple of ``stride``.
    """

    name: ClassVar[str] = "strided"

    window: int = 512
    stride: int = 64

    def __post_init__(self) -> None:
        _require_int("StridedConfig", "window", self.window, 1)
        _require_int("StridedConfig", "stride", self.stride, 1)


@dataclasses.dataclass(frozen=True)
class SparQConfig(MethodConfig):
    """Parameters of ``sparq``, decoding that reads part of the KV cache (arXiv 2312.04985).

    Attributes:
        rank: Query components r used to find the keys that matter, 1 to head_dim. None takes
            head_dim / 4.
        top_k: Keys k attended to exactly at every decoding step.
        local_window: The most recent keys l that are always among the k. None takes top_k / 4.
        mean_value_reallocation: Give the attention mass of the keys left out to the mean value.
            The paper uses it for models with as many KV heads as query heads, and leaves it out
            for Llama 3 and Mistral.
        coverage: Share of the approximate attention mass, above 0 and at most 1, that the keys
            attended to must have: each sequence and KV head takes as few keys as reach it, at
            least the local window and at most ``top_k``. None takes ``top_k`` always.
        rank_coverage: Share of ‖q‖₁, above 0 and at most 1, that the components used must have:
            each sequence and KV head takes as few as reach it, at most ``rank``. None takes
            ``rank`` always.
        key_copy: How the cache keeps the keys a second time, component by component, which is what
            makes r components of all keys cheap to read: "full" (in their dtype), "int8" or "int4"
            (quantised; the approximate scores come from it, the attention from the keys), or
            "none": no copy; components are picked out of the keys, and all of the memory around
            them is read.
        mean_block: With ``mean_value_reallocation``: one mean value per block of so many positions
            of the cache, padding included, of the keys not attended to, each with the approximate
            mass of just these keys. None is the paper's single mean over all visible values.
        dense_below: Bytes of a layer's keys and values, the whole batch together, below which a
            decoding step attends to all of them: so little is read faster than chosen from. In a
            static cache all positions that it has room for count. 0 chooses always. None takes what
            was measured (`hf_attn_plugin.ops.sparq_backend`): 0 on a CPU.
    """

    name: ClassVar[str] = "sparq"
    decode_only: ClassVar[bool] = True
    KEY_COPIES: ClassVar[tuple[str, ...]] = ("full", "int8", "int4", "none")

    rank: int | None = None
    top_k: int = 128
    local_window: int | None = None
    mean_value_reallocation: bool = False
    coverage: float | None = None
    rank_coverage: float | None = None
    key_copy: str = "full"
    mean_block: int | None = None
    dense_below: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            _require_int("SparQConfig", "rank", self.rank, 1)
        _require_int("SparQConfig", "top_k", self.top_k, 1)
        if self.local_window is not None:
            _require_int("SparQConfig", "local_window", self.local_window, 0, self.top_k)
        if not isinstance(self.mean_value_reallocation, bool):
            raise ValueError(
                "SparQConfig: mean_value_reallocation must be True or False, "
                f"got {self.mean_value_reallocation!r}."
            )
        for name in ("coverage", "rank_coverage"):
            if getattr(self, name) is not None:
                _require_share("SparQConfig", name, getattr(self, name))
        if self.key_copy not in self.KEY_COPIES:
            raise ValueError(
                f"SparQConfig: key_copy must be one of {', '.join(map(repr, self.KEY_COPIES))}, "
                f"got {self.key_copy!r}."
            )
        if self.mean_block is not None:
            _require_int("SparQConfig", "mean_block", self.mean_block, 1)
            if not self.mean_value_reallocation:
                raise ValueError(
                    "SparQConfig: mean_block divides the mean value into blocks, and there is none "
                    "without mean_value_reallocation=True."
                )
        if self.dense_below is not None:
            _require_int("SparQConfig", "dense_below", self.dense_below, 0)

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values, ``dense_below`` only where it is set.

        It changes nothing about the method, and settings are told apart by what is here.
        """
        values = super().to_dict()
        if self.dense_below is None:
            del values["dense_below"]
        return values

    def check_model(self, config: PreTrainedConfig) -> None:
        """Refuse a rank above the model's head_dim, the smallest where layers differ in it."""
        head_dim = head_dim_of(config)
        if head_dim is not None and self.rank is not None:
            _require_int("SparQConfig", "rank", self.rank, 1, head_dim)

    def resolve_rank(self, head_dim: int) -> int:
        """The rank for this head_dim; ``ValueError`` when it is above it."""
        rank = max(1, head_dim // 4) if self.rank is None else self.rank
        _require_int("SparQConfig", "rank", rank, 1, head_dim)
        return rank

    def resolve_local_window(self) -> int:
        """The number of most recent keys that are always attended to."""
        return self.top_k // 4 if self.local_window is None else self.local_window


@dataclasses.dataclass(frozen=True)
class ExactTopKConfig(MethodConfig):
    """Parameters of ``exact_topk``, FlexGen's sparse attention (arXiv 2303.06865).

    Attributes:
        top_k: Keys k attended to at every decoding step, those with the largest exact scores.
        local_window: The most recent keys that are always among the k.
    """

    name: ClassVar[str] = "exact_topk"
    decode_only: ClassVar[bool] = True

    top_k: int = 128
    local_window: int = 0

    def __post_init__(self) -> None:
        _require_int("ExactTopKConfig", "top_k", self.top_k, 1)
        _require_int("ExactTopKConfig", "local_window", self.local_window, 0, self.top_k)


@dataclasses.dataclass(frozen=True)
class H2OConfig(MethodConfig):
    """Parameters of ``h2o``, the heavy-hitter oracle (arXiv 2306.14048).

    Attributes:
        top_k: Keys k that are kept, the new one included; all others are dropped for good.
        local_window: How many of these k are the most recent ones, the new one included; the others
            are those that have drawn the most attention so far. None takes top_k / 2, as the paper.
    """

    name: ClassVar[str] = "h2o"
    decode_only: ClassVar[bool] = True

    top_k: int = 128
    local_window: int | None = None

    def __post_init__(self) -> None:
        _require_int("H2OConfig", "top_k", self.top_k, 1)
        if self.local_window is not None:
            _require_int("H2OConfig", "local_window", self.local_window, 1, self.top_k)

    def resolve_local_window(self) -> int:
        """The number of most recent keys that are always kept."""
        return max(1, self.top_k // 2) if self.local_window is None else self.local_window


@dataclasses.dataclass(frozen=True)
class LMInfiniteConfig(MethodConfig):
    """Parameters of ``lm_infinite`` (LM-Infinite: arXiv 2308.16137; StreamingLLM: 2309.17453).

    Attributes:
        window: The last tokens that a decoding step sees, the new one included.
        num_sink_tokens: The first tokens of the sequence that it sees besides.
    """

    name: ClassVar[str] = "lm_infinite"
    decode_only: ClassVar[bool] = True

    window: int = 1020
    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        _require_int("LMInfiniteConfig", "window", self.window, 1)
        _require_int("LMInfiniteConfig", "num_sink_tokens", self.num_sink_tokens, 0)


@dataclasses.dataclass(frozen=True)
class LinearConfig(MethodConfig):
    """Parameters of ``linear``, attention with features in place of softmax.

    Attributes:
        feature_map: "elu" is elu(x) + 1 (arXiv 2006.16236); "favor" are positive orthogonal random
            features, which approximate softmax (arXiv 2009.14794).
        num_features: Of favor; None takes head_dim * log(head_dim). More are closer to softmax. The
            state of a KV head holds num_features * (value_dim + 1) numbers.
        seed: The random features of favor follow from it, and are stored nowhere else.
        redraw: How often they were drawn anew: `redraw_features` counts it up.
    """

    name: ClassVar[str] = "linear"
    FEATURE_MAPS: ClassVar[tuple[str, ...]] = ("elu", "favor")

    feature_map: str = "elu"
    num_features: int | None = None
    seed: int = 0
    redraw: int = 0

    def __post_init__(self) -> None:
        if self.feature_map not in self.FEATURE_MAPS:
            raise ValueError(
                "LinearConfig: feature_map must be one of "
                f"{', '.join(map(repr, self.FEATURE_MAPS))}, got {self.feature_map!r}."
            )
        if self.num_features is not None:
            _require_int("LinearConfig", "num_features", self.num_features, 1)
        _require_int("LinearConfig", "seed", self.seed, 0)
        _require_int("LinearConfig", "redraw", self.redraw, 0)
        random = (self.num_features, self.seed, self.redraw) != (None, 0, 0)
        if self.feature_map == "elu" and random:
            raise ValueError(
                "LinearConfig: num_features, seed and redraw belong to feature_map='favor'; 'elu' "
                "has one feature per component, and none is random."
            )


METHOD_CONFIGS: dict[str, type[MethodConfig]] = {
    cls.name: cls
    for cls in (
        FlashConfig,
        RingConfig,
        SlidingWindowConfig,
        LongformerConfig,
        StridedConfig,
        SparQConfig,
        ExactTopKConfig,
        H2OConfig,
        LMInfiniteConfig,
        LinearConfig,
    )
}

ConfigT = TypeVar("ConfigT", bound=MethodConfig)


def head_dim_of(config: PreTrainedConfig) -> int | None:
    """The width of one attention head, or None where the config does not tell.

    The smallest where layers differ in it (Gemma 4).
    """
    text: Any = config.get_text_config()
    if text.is_heterogeneous:  # what layers differ in can only be read layer by layer
        return min((dim for dim in map(head_dim_of, text.per_layer_config) if dim), default=None)
    # Multi-head latent attention: what configs call head_dim is then only the part that RoPE turns.
    latent = [getattr(text, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if all(latent):
        return sum(int(part) for part in latent if part is not None)
    head_dim = getattr(text, "head_dim", None)
    if head_dim is not None:
        return int(head_dim)
    hidden = getattr(text, "hidden_size", None)
    heads = getattr(text, "num_attention_heads", None)
    return hidden // heads if hidden and heads else None


def parse_parameters(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Build ``cls`` from plain values, refusing unknown keys by name."""
    known = list(cls.__match_args__)  # the fields; dataclasses.fields() cannot be traced
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no parameter {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(known) or 'none'}."
        )
    return cls(**values)


def validate_attn_params(values: Any) -> dict[str, dict[str, Any]]:
    """Check a whole ``attn_params`` value, ``{method name: {parameter: value}}``."""
    if not isinstance(values, dict):
        raise ValueError(
            f"attn_params must be a dictionary {{method: {{parameter: value}}}}, got {values!r}."
        )
    for name, parameters in values.items():
        if name not in METHOD_CONFIGS:
            raise ValueError(
                f"attn_params names the unknown method {name!r}; "
                f"known are {', '.join(sorted(METHOD_CONFIGS))}."
            )
        if not isinstance(parameters, dict):
            raise ValueError(f"attn_params[{name!r}] must be a dictionary, got {parameters!r}.")
        parse_parameters(METHOD_CONFIGS[name], parameters)
    return values


def configure(
    model_or_config: PreTrainedModel | PreTrainedConfig, parameters: MethodConfig
) -> PreTrainedModel | PreTrainedConfig:
    """Set a method's parameters on a model, so that they are used and saved with it.

    Args:
        model_or_config: A model or its config. With nested configs (multimodal models) every
            part gets them.
        parameters: For example ``SparQConfig(rank=32, top_k=128)``.

    Returns:
        What was passed in.

    Raises:
        ValueError: ``parameters`` is not one of our dataclasses, or the model cannot take it
            (for example a SparQ rank above head_dim).
    """
    if type(parameters) not in METHOD_CONFIGS.values():
        known = ", ".join(cls.__name__ for cls in METHOD_CONFIGS.values())
        kind = f"{type(parameters).__module__}.{type(parameters).__qualname__}"
        raise ValueError(f"configure() takes one of hf_attn_plugin's {known}; got a {kind}.")
    config: Any = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "get_text_config"):
        raise ValueError(
            "configure() takes a transformers model or config; "
            f"got {type(model_or_config).__name__}."
        )
    parameters.check_model(config)
    for part in _parts(config):
        current = getattr(part, "attn_params", None) or {}
        # Past the property that hands a value down: every part keeps what it has of other methods.
        part.__dict__["attn_params"] = {**current, parameters.name: parameters.to_dict()}
    return model_or_config


def _parts(config: Any) -> Iterator[Any]:
    """A config and those nested in it."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if hasattr(part, "sub_configs"):
            yield from _parts(part)


def parameters_of(config: PreTrainedConfig | None, cls: type[ConfigT]) -> ConfigT:
    """A method's parameters as kept in ``config``, or its defaults.

    Args:
        config: The config of the layer that attends (``module.config``); None has no parameters.
        cls: The method's dataclass.
    """
    stored = (getattr(config, "attn_params", None) or {}).get(cls.name, {})
    return parse_parameters(cls, stored)


def redraw_features(
    model_or_config: PreTrainedModel | PreTrainedConfig,
) -> PreTrainedModel | PreTrainedConfig:
    """Draw the random features of ``linear`` anew; they are used from the next call on.

    The draw's number goes into the config and is saved with it. Caches filled before are refused.

    Args:
        model_or_config: A model or its config, with ``LinearConfig(feature_map="favor")``.

    Returns:
        What was passed in.

    Raises:
        ValueError: Its features are not random.
    """
    config: Any = getattr(model_or_config, "config", model_or_config)
    parameters = parameters_of(config, LinearConfig)
    if parameters.feature_map != "favor":
        raise ValueError(
            f"redraw_features: feature_map={parameters.feature_map!r} has no random features; "
            "configure(model, LinearConfig(feature_map='favor')) has."
        )
    return configure(model_or_config, dataclasses.replace(parameters, redraw=parameters.redraw + 1))
