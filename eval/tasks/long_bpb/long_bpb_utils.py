"""Functions that long_bpb.yaml names."""

from typing import Any

from hf_attn_plugin.lm_eval.bits import long_bpb_documents, long_bpb_score
from hf_attn_plugin.lm_eval.tasks import task_split


def dataset(**metadata: Any) -> dict[str, Any]:
    """The test split, made from lm-eval's metadata."""
    return task_split("long_bpb", long_bpb_documents, metadata)


score = long_bpb_score
