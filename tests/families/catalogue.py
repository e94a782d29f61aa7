"""Every architecture in transformers' auto mappings, and how to make a tiny one of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from families.odd import NOT_BUILT, OVERRIDES, TEXT_TOWERS
from families.shrink import few_layers, tiny_config
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Which of an architecture's classes is compared: the first one that has a head over tokens.
_TASKS = [
    "FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "FOR_MASKED_LM",
    "FOR_CAUSAL_LM",
    "FOR_IMAGE_TEXT_TO_TEXT",
    "FOR_MULTIMODAL_LM",
    "FOR_SPEECH_SEQ_2_SEQ",
    "FOR_TEXT_TO_WAVEFORM",
    "",
]
_LARGEST = 30_000_000  # parameters; more would not be tiny


class CannotBuildError(Exception):
    """No tiny model of an architecture could be made; says what each attempt ran into."""


def _mappings() -> dict[str, Any]:
    names = [n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("_MAPPING")]
    return {name: getattr(modeling_auto, name) for name in sorted(names)}


def architectures() -> list[str]:
    """The model types that some auto class makes a model of, in alphabetical order."""
    names = [n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("_NAMES")]
    return sorted({key for name in names for key in getattr(modeling_auto, name)})


def causal_language_models() -> list[str]:
    """The model types that ``AutoModelForCausalLM`` makes."""
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_classes(model_type: str) -> list[Any]:
    """The classes to try for an architecture, best first."""
    config_class = CONFIG_MAPPING[model_type]
    mappings = _mappings()
    wanted = [f"MODEL_{task}_MAPPING" if task else "MODEL_MAPPING" for task in _TASKS]
    if config_class.sub_configs:  # the whole of a composite comes before its text part
        wanted.remove("MODEL_FOR_CAUSAL_LM_MAPPING")
        wanted.insert(len(wanted) - 1, "MODEL_FOR_CAUSAL_LM_MAPPING")
    wanted += [name for name in mappings if name not in wanted]
    found: list[Any] = []
    for name in wanted:
        mapping = mappings.get(name)
        if mapping is None or model_type not in _names(name):
            continue
        try:
            made = mapping[config_class]
        except (ValueError, AttributeError):  # a class that is named and not there
            continue
        for cls in made if isinstance(made, list | tuple) else (made,):
            if cls is not None and cls not in found:
                found.append(cls)
    return found


def _names(mapping: str) -> Any:
    return getattr(modeling_auto, f"{mapping}_NAMES", {})


def attempts(model_type: str) -> Iterator[tuple[Any, Any]]:
    """Model classes and configs to try in turn: small ones, then ones that only have few layers."""
    if model_type in NOT_BUILT:
        raise CannotBuildError(NOT_BUILT[model_type])
    tower = TEXT_TOWERS.get(model_type)
    if tower in CONFIG_MAPPING:
        yield from attempts(tower)
        return
    overrides = OVERRIDES.get(model_type, {})
    makers = [
        lambda: tiny_config(model_type, overrides),
        lambda: tiny_config(model_type, overrides, kv_heads=4),
        lambda: few_layers(model_type, overrides),
    ]
    errors = []
    for maker in makers:
        try:
            config = maker()
        except Exception as error:  # whatever a config's own checks raise
            errors.append(error)
            continue
        if tower is not None:
            yield _named_class(model_type, tower), config.get_text_config()
            continue
        for cls in model_classes(model_type)[:3]:
            yield cls, config
    if len(errors) == len(makers):
        raise CannotBuildError(one_line(errors[0]))


def _named_class(model_type: str, name: str) -> Any:
    """A class that no auto class makes, from the file of the architecture."""
    return getattr(inspect.getmodule(model_classes(model_type)[0]), name)


def parameter_count(cls: Any, config: Any) -> int:
    """How many parameters the model has, found without allocating them."""
    import copy

    import torch

    with torch.device("meta"):
        model = cls._from_config(copy.deepcopy(config), attn_implementation="eager")
    return sum(parameter.numel() for parameter in model.parameters())


def is_tiny(cls: Any, config: Any) -> bool:
    """Whether a model is small enough to be compared."""
    return parameter_count(cls, config) <= _LARGEST


def forward_arguments(model: Any) -> set[str]:
    """The names of the parameters of a model's forward pass."""
    return set(inspect.signature(model.forward).parameters)


def one_line(error: BaseException | str, length: int = 200) -> str:
    """An error's message on one line."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
