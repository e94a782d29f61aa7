"""Functions that sparq_squad.yaml names."""

from typing import Any

from hf_attn_plugin.lm_eval.question_answering import squad_documents, squad_score
from hf_attn_plugin.lm_eval.tasks import task_split


def dataset(**metadata: Any) -> dict[str, Any]:
    """The test split, made from lm-eval's metadata."""
    return task_split("sparq_squad", squad_documents, metadata)


score = squad_score
