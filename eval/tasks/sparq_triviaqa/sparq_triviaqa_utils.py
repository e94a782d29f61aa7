"""Functions that sparq_triviaqa.yaml names."""

from typing import Any

from hf_attn_plugin.lm_eval.question_answering import triviaqa_documents, triviaqa_score
from hf_attn_plugin.lm_eval.tasks import task_split


def dataset(**metadata: Any) -> dict[str, Any]:
    """The test split, made from lm-eval's metadata."""
    return task_split("sparq_triviaqa", triviaqa_documents, metadata)


score = triviaqa_score
