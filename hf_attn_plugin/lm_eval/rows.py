"""Rows of a dataset: from the Hub by its id, or from local files with the same columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

DATASET_FIELDS = ("path", "name", "split", "data_files", "revision")
"""What a `dataset` option may say, as in `datasets.load_dataset`."""


def choose_dataset(
    default: Mapping[str, Any], given: Mapping[str, Any] | None, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """The dataset to load: the task's own, with what the user says differently.

    Args:
        default: The task's own dataset: its ``path`` on the Hub, ``name``, ``split``, …
        given: The option. With a ``path`` it stands alone, but for the default's ``split``: the
            configuration ``name`` of the Hub's dataset means nothing in a local folder.
        extra: Fields besides `DATASET_FIELDS` that the task understands.

    Raises:
        ValueError: The option is no mapping, or has a field that is not known.
    """
    fields = [*DATASET_FIELDS, *extra]
    if given is not None and (not isinstance(given, Mapping) or set(given) - set(fields)):
        raise ValueError(
            f"a dataset is given as {{path, ...}} with any of {', '.join(fields)}; got {given!r}."
        )
    given = given or {}
    kept = ("split", *extra) if "path" in given else default
    return {**{key: default[key] for key in kept if key in default}, **given}


def nested(value: Any, field: str) -> list[Any]:
    """One field of a nested column: a mapping of lists on the Hub, or a list of mappings."""
    return list(value[field] if isinstance(value, Mapping) else [item[field] for item in value])


def load_rows(dataset: Mapping[str, Any], columns: Sequence[str]) -> datasets.Dataset:
    """Load one split of a dataset and check that it has the columns.

    Args:
        dataset: Arguments of `datasets.load_dataset`; ``split`` is among them.
        columns: Columns that the task reads.

    Raises:
        ImportError: `datasets` is not installed.
        OSError: The dataset cannot be reached or read.
        ValueError: A column is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading a dataset needs the datasets package: pip install 'hf_attn_plugin[eval]'"
        ) from error
    try:
        rows = datasets.load_dataset(**dataset)
    except OSError as error:
        raise OSError(
            f"the dataset {dataset['path']!r} cannot be loaded ({error}); without the Hub, give a "
            'local folder of parquet or JSON files with the same columns, "dataset": {"path": '
            '"FOLDER"}, or "files" where the task takes them, among its options.'
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"dataset {dataset['path']!r} has no column {', '.join(map(repr, missing))}; "
            f"it has {', '.join(rows.column_names)}."
        )
    return rows
