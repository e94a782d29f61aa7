"""Functions that the YAML files of this folder name."""

from typing import Any

from hf_attn_plugin.lm_eval.niah import GROUP, documents_of, niah_recall, niah_score
from hf_attn_plugin.lm_eval.tasks import task_split


def _dataset(task: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return task_split(task, documents_of(task), metadata, GROUP)


def single(**metadata: Any) -> dict[str, Any]:
    """The test split of `niah`, made from lm-eval's metadata."""
    return _dataset("niah", metadata)


def multikey(**metadata: Any) -> dict[str, Any]:
    """The test split of `niah_multikey`."""
    return _dataset("niah_multikey", metadata)


def multivalue(**metadata: Any) -> dict[str, Any]:
    """The test split of `niah_multivalue`."""
    return _dataset("niah_multivalue", metadata)


def multiquery(**metadata: Any) -> dict[str, Any]:
    """The test split of `niah_multiquery`."""
    return _dataset("niah_multiquery", metadata)


score = niah_score
recall = niah_recall
