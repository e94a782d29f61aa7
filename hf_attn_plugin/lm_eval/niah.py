"""Needles in a haystack as lm-eval tasks: `niah`, and with several keys or values.

The variants are those of RULER (arXiv 2404.06654): `niah_multikey` hides needles of other keys as
well, `niah_multivalue` hides several values of one key and asks for all of them, and
`niah_multiquery` asks for the values of several keys.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_attn_plugin.lm_eval.needle import NeedleTemplate, make_needle_case
from hf_attn_plugin.lm_eval.options import (
    adds_special_tokens,
    check_fits,
    parse_options,
    require_positive,
    task_tokenizer,
    typed_fields,
)
from hf_attn_plugin.lm_eval.texts import encode_texts, iterate_texts

GROUP = "niah_all"
"""All tasks of this module; options under this name hold for each of them."""

ANSWER_ROOM = 8
"""Tokens kept free for one value; `max_gen_toks` in niah.yaml, so that nothing is truncated."""

ANSWERS_ROOM = 32
"""The same where several values are asked for: niah_multivalue.yaml and niah_multiquery.yaml."""


@dataclasses.dataclass(frozen=True)
class NiahOptions:
    """Options of `niah`, `niah_multikey`, `niah_multivalue` and `niah_multiquery`.

    Attributes:
        lengths: Context lengths in tokens: prompt and room for the answer (8 tokens, 32 where
            several values are asked for) together. A chat template's own tokens come on top.
        depths: Where the needle sits, 0 (start of the haystack) to 1 (end); where several values
            are asked for, the first of them.
        samples: Cases per length and depth.
        files: Text files that the haystack is cut from.
        dataset: A dataset to cut it from instead, see `texts.iterate_texts`. With neither, the
            Python standard library's sources.
        template: Fields of `NeedleTemplate` that differ from its defaults.
        distractors: Needles of other keys hidden as well; 3 in `niah_multikey`.
        num_values: Values per key, all asked for; 4 in `niah_multivalue`, 1 in `niah` and
            `niah_multikey`.
        num_queries: Keys that are asked for; 4 in `niah_multiquery`, 1 in `niah` and
            `niah_multikey`.
        seed: Another seed draws other cases.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    files: tuple[str, ...] | None = None
    dataset: Mapping[str, Any] | None = None
    template: Mapping[str, Any] | None = None
    distractors: int = 0
    num_values: int = 1
    num_queries: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lengths", "depths"):
            if not getattr(self, name):
                raise ValueError(f"niah: {name} must be a list of numbers, got an empty one.")
        require_positive(
            "niah",
            samples=self.samples,
            num_values=self.num_values,
            num_queries=self.num_queries,
            **{"each length": min(self.lengths)},
        )


TASKS: dict[str, dict[str, int]] = {
    "niah": {},
    "niah_multikey": {"distractors": 3},
    "niah_multivalue": {"num_values": 4},
    "niah_multiquery": {"num_queries": 4},
}
"""The tasks of this module, with their own defaults."""


def documents_of(task: str) -> Callable[[Mapping[str, Any]], list[dict[str, Any]]]:
    """The function that makes the documents of one of the `TASKS`."""
    return functools.partial(niah_documents, task=task)


def niah_documents(metadata: Mapping[str, Any], task: str = "niah") -> list[dict[str, Any]]:
    """The documents of a task: one per length, depth and sample.

    Args:
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.
        task: One of `TASKS`.

    Raises:
        ValueError: Wrong options, too little text, or lengths beyond the model's maximum.
    """
    options = parse_options(NiahOptions, task, metadata, TASKS[task], GROUP)
    several = task in ("niah_multivalue", "niah_multiquery")
    if not several and options.num_values * options.num_queries > 1:
        raise ValueError(
            f"{task} asks for one value: use niah_multivalue for several values of a key, and "
            "niah_multiquery for several keys."
        )
    tokenizer = task_tokenizer(metadata)
    check_fits(metadata, task, max(options.lengths))
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
            answer_room=ANSWERS_ROOM if several else ANSWER_ROOM,
            num_distractors=options.distractors,
            num_values=options.num_values,
            num_queries=options.num_queries,
            add_special_tokens=adds_special_tokens(metadata),
        )
        documents.append(
            {
                "context": case.context,
                "question": case.question,
                "value": case.value,
                "key": case.key,
                "values": list(case.values),
                "keys": list(case.keys),
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


def niah_recall(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The share of the hidden values that the generated text names, in any order."""
    named = set(re.findall(r"\w+", results[0]))
    values = document["values"]
    return {"recall": sum(value in named for value in values) / len(values)}


def _template_values(values: Mapping[str, Any] | None) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(NeedleTemplate)]
    unknown = sorted(set(values or {}) - set(known))
    if unknown:
        raise ValueError(
            f"niah: template has no field {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(known)}."
        )
    return typed_fields(NeedleTemplate, "niah: template", values or {})
