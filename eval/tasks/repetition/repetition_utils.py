"""Functions that repetition.yaml names."""

from typing import Any

from hf_attn_plugin.lm_eval.repetition import repetition_documents, repetition_score
from hf_attn_plugin.lm_eval.tasks import task_split


def dataset(**metadata: Any) -> dict[str, Any]:
    """The test split, made from lm-eval's metadata."""
    return task_split("repetition", repetition_documents, metadata)


score = repetition_score
