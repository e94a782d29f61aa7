"""What the lm-eval tasks `niah` and `long_bpb` consist of: options, documents, scores.

Options come through lm-eval's own ``--metadata``, one JSON object per task::

    --metadata '{"niah": {"lengths": [1024, 4096], "depths": [0, 0.5, 1], "samples": 10},
                 "long_bpb": {"context": 4096, "scored": 128, "files": ["book.txt"]}}'

The tokenizer is the evaluated model's: lm-eval merges ``--model_args`` into the metadata.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_attn_plugin.lm_eval.needle import NeedleTemplate, make_needle_case
from hf_attn_plugin.lm_eval.texts import encode_texts, iterate_texts

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

ANSWER_ROOM = 8
"""Tokens kept free for the answer; `max_gen_toks` in niah.yaml, so that nothing is truncated."""

_SHIFTS = 200


@dataclasses.dataclass(frozen=True)
class NiahOptions:
    """Options of the task `niah`.

    Attributes:
        lengths: Context lengths in tokens: prompt and room for the answer (8 tokens) together.
            A chat template's own tokens come on top.
        depths: Where the needle sits, 0 (start of the haystack) to 1 (end).
        samples: Cases per length and depth.
        files: Text files that the haystack is cut from.
        dataset: A dataset to cut it from instead, see `texts.iterate_texts`. With neither, the
            Python standard library's sources.
        template: Fields of `NeedleTemplate` that differ from its defaults.
        distractors: Needles of other keys hidden as well.
        seed: Another seed draws other cases.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    files: tuple[str, ...] | None = None
    dataset: Mapping[str, Any] | None = None
    template: Mapping[str, Any] | None = None
    distractors: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lengths", "depths"):
            values = getattr(self, name)
            if not values or not all(isinstance(value, int | float) for value in values):
                raise ValueError(f"niah: {name} must be a list of numbers, got {values!r}.")
        _require_positive("niah", samples=self.samples, **{"each length": min(self.lengths)})


@dataclasses.dataclass(frozen=True)
class LongBpbOptions:
    """Options of the task `long_bpb`.

    Attributes:
        context: Tokens that the model reads before it is scored.
        scored: Tokens that are scored after them.
        samples: Pieces of text, one after the other from the start.
        files: Text files, held out from training.
        dataset: A dataset instead, see `texts.iterate_texts`. With neither, the Python standard
            library's sources.
    """

    context: int = 1024
    scored: int = 64
    samples: int = 16
    files: tuple[str, ...] | None = None
    dataset: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _require_positive(
            "long_bpb", context=self.context, scored=self.scored, samples=self.samples
        )


OptionsT = TypeVar("OptionsT", NiahOptions, LongBpbOptions)


def _require_positive(task: str, **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{task}: {name} must be an integer >= 1, got {value!r}.")


def parse_options(cls: type[OptionsT], task: str, metadata: Mapping[str, Any]) -> OptionsT:
    """Read a task's options from lm-eval's metadata, refusing unknown ones by name."""
    values = metadata.get(task) or {}
    if not isinstance(values, Mapping):
        raise ValueError(f"metadata[{task!r}] must be a JSON object of options, got {values!r}.")
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"the task {task} has no option {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(known)}."
        )
    parsed = dict(values)
    for name in ("lengths", "depths", "files"):
        value = parsed.get(name)
        if value is not None:
            alone = isinstance(value, str | int | float)
            parsed[name] = (value,) if alone else tuple(value)
    return cls(**parsed)


def niah_documents(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of `niah`: one per length, depth and sample.

    Args:
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.

    Raises:
        ValueError: Wrong options, too little text, or lengths beyond the model's maximum.
    """
    options = parse_options(NiahOptions, "niah", metadata)
    tokenizer = _tokenizer(metadata)
    _check_fits(metadata, "niah", max(options.lengths))
    template = NeedleTemplate(**_template_values(options.template))
    # Four times the longest, so that the samples of a cell see different pieces of text.
    haystack = encode_texts(
        tokenizer, iterate_texts(options.files, options.dataset), 4 * max(options.lengths)
    )
    documents = []
    # Samples outermost: with lm-eval's --limit the first documents still cover every cell.
    for sample, length, depth in itertools.product(
        range(options.samples), options.lengths, options.depths
    ):
        case = make_needle_case(
            tokenizer,
            haystack,
            length,
            depth,
            random.Random(f"{options.seed} {length} {depth} {sample}"),
            template,
            answer_room=ANSWER_ROOM,
            num_distractors=options.distractors,
            add_special_tokens=metadata.get("add_bos_token") is not False,
        )
        documents.append(
            {
                "context": case.context,
                "question": case.question,
                "value": case.value,
                "key": case.key,
                "length": length,
                "depth": float(depth),
                "prompt_tokens": len(case.prompt_ids),
                "needle_start": case.needle_start,
            }
        )
    return documents


def niah_score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 when the generated text begins with the hidden number or word, and no longer one."""
    value = str(document["value"])
    found = re.match(r"\W*(\d+)" if value.isdecimal() else r"\W*(\w+)", results[0])
    return {"exact_match": float(found is not None and found[1] == value)}


def long_bpb_documents(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of `long_bpb`: a context and the text that follows it in the source.

    Args:
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.

    Raises:
        ValueError: Wrong options, too little text, or more tokens than the model's maximum.
    """
    options = parse_options(LongBpbOptions, "long_bpb", metadata)
    tokenizer = _tokenizer(metadata)
    special = metadata.get("add_bos_token") is not False
    window = options.context + options.scored
    _check_fits(metadata, "long_bpb", window)
    ids = encode_texts(
        tokenizer,
        iterate_texts(options.files, options.dataset),
        options.samples * (window + _SHIFTS),
    )
    if len(ids) < options.samples * window:
        raise ValueError(
            f"long_bpb needs {options.samples} x {window} tokens of text and found {len(ids)}: "
            "give more text, or fewer samples or tokens."
        )
    spacing = (len(ids) - window) // max(options.samples - 1, 1)
    return [
        _cut_continuation(tokenizer, ids, index * spacing, options, special)
        for index in range(options.samples)
    ]


def _cut_continuation(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    start: int,
    options: LongBpbOptions,
    special: bool,
) -> dict[str, Any]:
    """A piece of text near `start` that lm-eval's tokenisation splits exactly as asked.

    lm-eval encodes the context, and the context with its continuation, and moves blanks at the
    context's end over to the continuation; pieces where this shifts a token are passed by.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    extra = len(encode(""))
    window = options.context + options.scored
    for shift in range(_SHIFTS):
        # Backwards where the text ends.
        first = start + shift if start + shift + window <= len(ids) else start - shift
        if first < 0:
            break
        middle = first + options.context - extra
        context = decode(ids[first:middle])
        text = decode(ids[first : middle + options.scored])
        continuation = text[len(context) :]
        if context != context.rstrip() or not text.startswith(context) or "\ufffd" in text:
            continue
        context_ids, text_ids = encode(context), encode(text)
        if (
            len(context_ids) == options.context
            and len(text_ids) == window
            and text_ids[: options.context] == context_ids
        ):
            return {
                "context": context,
                "continuation": continuation,
                "bytes": len(continuation.encode("utf-8")),
                "context_tokens": options.context,
                "scored_tokens": options.scored,
                "start": first,
            }
    raise ValueError(
        f"long_bpb found no piece of text of exactly {options.context} + {options.scored} tokens "
        f"near token {start}: give other text, or a tokenizer that encodes what it decodes."
    )


def long_bpb_score(
    document: Mapping[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, tuple[float, int]]:
    """Log-likelihood (nats) and bytes; lm-eval's aggregation makes bits per byte of their sums."""
    log_likelihood, _ = results[0]
    return {"bits_per_byte": (log_likelihood, document["bytes"])}


def as_test_split(documents: list[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    """Documents in the form in which lm-eval wants them from a `custom_dataset` function."""
    import datasets

    return {"test": datasets.Dataset.from_list(documents)}


def tasks_dir() -> Path:
    """The folder with our tasks, for lm-eval's ``--include_path``.

    In an installed wheel it lies inside the package, in a checkout beside it.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "eval_tasks", package.parent / "eval" / "tasks"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"the evaluation tasks are in neither {package / 'eval_tasks'} nor "
        f"{package.parent / 'eval' / 'tasks'}: install hf_attn_plugin again."
    )


def _template_values(values: Mapping[str, Any] | None) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(NeedleTemplate)]
    unknown = sorted(set(values or {}) - set(known))
    if unknown:
        raise ValueError(
            f"niah: template has no field {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(known)}."
        )
    parsed = dict(values or {})
    for name in ("keys", "values"):
        if name in parsed:
            parsed[name] = tuple(parsed[name])
    return parsed


def _tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
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


def _check_fits(metadata: Mapping[str, Any], task: str, tokens: int) -> None:
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
