"""Functions that niah.yaml names."""

from typing import Any

from hf_attn_plugin.lm_eval.tasks import as_test_split, niah_documents, niah_score


def dataset(**metadata: Any) -> dict[str, Any]:
    """The test split, made from lm-eval's metadata."""
    return as_test_split(niah_documents(metadata))


score = niah_score
