"""Functions that wikitext_bpc.yaml names."""

from typing import Any

from hf_attn_plugin.lm_eval.bits import wikitext_bpc_documents, wikitext_bpc_score
from hf_attn_plugin.lm_eval.tasks import task_split


def dataset(**metadata: Any) -> dict[str, Any]:
    """The test split, made from lm-eval's metadata."""
    return task_split("wikitext_bpc", wikitext_bpc_documents, metadata)


score = wikitext_bpc_score
