"""Our lm-eval tasks: where they are, what they are called, and their prompts, built once.

Options come through lm-eval's own ``--metadata``, one JSON object per task::

    --metadata '{"niah": {"lengths": [1024, 4096], "depths": [0, 0.5, 1], "samples": 10},
                 "long_bpb": {"context": 4096, "scored": 128, "files": ["book.txt"]},
                 "sparq_squad": {"dataset": {"path": "folder/of/parquet/files"}}}'

The tokenizer is the evaluated model's: lm-eval merges ``--model_args`` into the metadata. Each
task's module documents its options: `niah`, `bits`, `repetition`, `question_answering`,
`summarization`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import datasets

Documents = Callable[[Mapping[str, Any]], list[dict[str, Any]]]

_SHARED = ("add_bos_token", "max_length")
"""Model arguments that the prompts depend on, besides the tokenizer and the task's own options."""

_built: WeakKeyDictionary[Any, dict[str, datasets.Dataset]] = WeakKeyDictionary()


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


def our_tasks() -> tuple[str, ...]:
    """The names of our tasks and groups: each is the name of its YAML file."""
    return tuple(sorted(path.stem for path in tasks_dir().glob("*/*.yaml")))


def task_split(
    task: str, make: Documents, metadata: Mapping[str, Any], group: str | None = None
) -> dict[str, datasets.Dataset]:
    """What lm-eval wants from a `custom_dataset` function: the documents as the split "test".

    They are kept as long as their tokenizer is: evaluating several methods, or a model again,
    builds them once. Another option, another maximum or a changed text file builds them anew.

    Args:
        task: The task's name.
        make: Makes the documents from the metadata.
        metadata: What lm-eval passes: model arguments and ``--metadata`` together.
        group: A group whose options hold for the task too.
    """
    import datasets

    tokenizer = metadata.get("tokenizer")
    key = _prompt_key(task, metadata, group)
    if tokenizer is None or isinstance(tokenizer, str) or key is None:
        return {"test": datasets.Dataset.from_list(make(metadata))}
    try:
        kept = _built.setdefault(tokenizer, {})
    except TypeError:  # one that compares by value cannot be a key
        kept = {}
    if key not in kept:
        kept[key] = datasets.Dataset.from_list(make(metadata))
    return {"test": kept[key]}


def _prompt_key(task: str, metadata: Mapping[str, Any], group: str | None) -> str | None:
    """What the documents depend on, as text; None where that cannot be told."""
    options: dict[str, Any] = {}
    for owner in (group, task):
        given = metadata.get(owner) or {} if owner is not None else {}
        if not isinstance(given, Mapping):
            return None  # making the documents says what is wrong
        options.update(given)
    dataset = options.get("dataset")
    if isinstance(dataset, Mapping) and (
        "data_files" in dataset or Path(str(dataset.get("path", ""))).exists()
    ):
        return None  # local files, whose changes datasets itself watches
    files = options.get("files") or ()
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return None  # making the documents says what is wrong
    paths = [Path(name) for name in names]
    if not all(path.is_file() for path in paths):
        return None  # likewise
    stamps = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
    shared = {name: metadata.get(name) for name in _SHARED}
    pretrained = metadata.get("pretrained")
    if isinstance(pretrained, str):
        shared["pretrained"] = pretrained  # whose config limits the length
    # A tokenizer may have been given tokens, or told to add a BOS, since.
    tokenizer = metadata.get("tokenizer")
    state = [len(tokenizer), tokenizer("a b")["input_ids"]] if callable(tokenizer) else None
    return json.dumps([task, options, stamps, shared, state], sort_keys=True, default=str)
