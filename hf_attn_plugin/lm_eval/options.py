"""What every task shares: its options, the tokenizer, and the check against the model's maximum."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OptionsT = TypeVar("OptionsT")

MODEL_ARGUMENTS = (
    "tokenizer",
    "pretrained",
    "revision",
    "subfolder",
    "trust_remote_code",
    "add_bos_token",
    "max_length",
)
"""What our tasks read of the metadata besides their options: lm-eval puts model arguments there."""


def check_metadata(metadata: Any, tasks: Sequence[str], ours: Sequence[str]) -> None:
    """Refuse metadata that no task would read.

    Args:
        metadata: What the user passed as ``--metadata``.
        tasks: The tasks that are evaluated.
        ours: The names of our tasks and groups. Where others are evaluated too, plain values may be
            meant for these.
    """
    if not isinstance(metadata, Mapping):
        return
    others = not set(tasks) <= set(ours)
    unread = [
        str(name)
        for name, value in metadata.items()
        if name not in (*ours, *tasks, *MODEL_ARGUMENTS)
        and (isinstance(value, Mapping) or not others)
    ]
    if unread:
        raise ValueError(
            f"no task reads the metadata {', '.join(map(repr, unread))}: options are given as "
            f"{{task: {{option: value}}}}, and our tasks are {', '.join(ours)}."
        )


def parse_options(
    cls: type[OptionsT],
    task: str,
    metadata: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    group: str | None = None,
) -> OptionsT:
    """Read a task's options from lm-eval's metadata, refusing unknown ones by name.

    Args:
        cls: The dataclass of the options.
        task: The task, whose options are ``metadata[task]``.
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.
        defaults: Where this task's defaults differ from those of the dataclass.
        group: A group of tasks; ``metadata[group]`` holds for all of them.
    """
    parsed = dict(defaults or {})
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for owner in (group, task):
        values = metadata.get(owner) or {} if owner is not None else {}
        if not isinstance(values, Mapping):
            raise ValueError(
                f"metadata[{owner!r}] must be a JSON object of options, got {values!r}."
            )
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"the task {owner} has no option {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(known)}."
            )
        parsed.update(values)
    return cls(**typed_fields(cls, task, parsed))


def typed_fields(cls: Any, owner: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values from JSON as the fields of a dataclass have them: tuples for lists or single values.

    Args:
        cls: The dataclass, whose annotations say the types.
        owner: What errors begin with.
        values: By field.

    Raises:
        ValueError: A value of another type. (What a dataset is made of, `choose_dataset` says.)
    """
    hints = typing.get_type_hints(cls)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        kinds = typing.get_args(hints[name]) if _is_union(hints[name]) else (hints[name],)
        if any(typing.get_origin(kind) is tuple for kind in kinds):
            if isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, str | int | float):
                value = (value,)
        if name != "dataset" and not any(_is(value, kind) for kind in kinds):
            wanted = " or ".join(_NAMES[kind] for kind in kinds)
            given = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{owner}: {name} must be {wanted}, got {given!r}.")
        fields[name] = value
    return fields


_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    Mapping[str, Any]: "an object {name: value, ...}",
    tuple[int, ...]: "a list of integers",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "a list of texts",
    types.NoneType: "null",
}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value has the type of an annotation, one of `_NAMES`."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(v, typing.get_args(kind)[0]) for v in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, typing.get_origin(kind) or kind)


def require_positive(task: str, **values: Any) -> None:
    """Refuse options that are not integers of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{task}: {name} must be an integer >= 1, got {value!r}.")


def require_range(task: str, name: str, value: tuple[int, ...]) -> None:
    """Refuse anything but two integers, the first at least 1 and not above the second."""
    if (
        len(value) != 2
        or any(isinstance(end, bool) or not isinstance(end, int) for end in value)
        or not 1 <= value[0] <= value[1]
    ):
        raise ValueError(
            f"{task}: {name} must be [smallest, largest], integers >= 1, got {list(value)!r}."
        )


def task_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer object or the name that lm-eval passes along."""
    named = metadata.get("tokenizer") or metadata.get("pretrained")
    if named is None:
        raise ValueError(
            "the task makes prompts of an exact number of tokens and needs the tokenizer: pass "
            "pretrained=... in --model_args, or tokenizer=... in --metadata."
        )
    if not isinstance(named, str):
        return named
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        named,
        revision=str(metadata.get("revision", "main")),
        subfolder=metadata.get("subfolder", ""),
        trust_remote_code=bool(metadata.get("trust_remote_code", False)),
    )


def adds_special_tokens(metadata: Mapping[str, Any]) -> bool:
    """Whether lm-eval's model lets the tokenizer add its special tokens."""
    return metadata.get("add_bos_token") is not False


def check_fits(metadata: Mapping[str, Any], task: str, tokens: int) -> None:
    """Refuse prompts that lm-eval would cut from the left, needle and all."""
    maximum = metadata.get("max_length")
    pretrained = metadata.get("pretrained")
    if maximum is None and isinstance(pretrained, str):
        from lm_eval.models.utils import resolve_max_length
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            pretrained,
            revision=str(metadata.get("revision", "main")),
            subfolder=metadata.get("subfolder", ""),
            trust_remote_code=bool(metadata.get("trust_remote_code", False)),
        )
        maximum = resolve_max_length(config, default=tokens)
    if maximum is not None and tokens > int(maximum):
        raise ValueError(
            f"{task} asks for {tokens} tokens, but the model takes {maximum}: lm-eval would cut "
            f"the prompt from the left. Ask for fewer, or pass max_length={tokens} (in eval's "
            "--model_args; --max-length in sweep) to evaluate the model beyond its context."
        )
