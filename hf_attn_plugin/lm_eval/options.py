"""What every task shares: its options, the tokenizer, and the check against the model's maximum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OptionsT = TypeVar("OptionsT")

_TUPLES = ("lengths", "depths", "files", "characters")


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
    for name in _TUPLES:
        value = parsed.get(name)
        if value is not None:
            alone = isinstance(value, str | int | float)
            parsed[name] = (value,) if alone else tuple(value)
    return cls(**parsed)


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
            f"the prompt from the left. Ask for fewer, or pass max_length={tokens} in "
            "--model_args to evaluate the model beyond its context."
        )
