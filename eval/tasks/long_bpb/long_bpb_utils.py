"""Functions that long_bpb.yaml names."""

from typing import Any

from hf_attn_plugin.lm_eval.tasks import as_test_split, long_bpb_documents, long_bpb_score


def dataset(**metadata: Any) -> dict[str, Any]:
    """The test split, made from lm-eval's metadata."""
    return as_test_split(long_bpb_documents(metadata))


score = long_bpb_score
