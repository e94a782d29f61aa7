"""Functions that cnn_dailymail.yaml names."""

from typing import Any

from hf_attn_plugin.lm_eval.summarization import cnn_dailymail_documents, cnn_dailymail_score
from hf_attn_plugin.lm_eval.tasks import task_split


def dataset(**metadata: Any) -> dict[str, Any]:
    """The test split, made from lm-eval's metadata."""
    return task_split("cnn_dailymail", cnn_dailymail_documents, metadata)


score = cnn_dailymail_score
