"""Every decoder architecture of transformers is converted rightly, or refused by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gqa_families import Outcome, model_types, outcome

# One of each kind: what they are here for, and what is expected of both methods.
CONVERTED = {
    "llama": "equal",
    "phi3": "equal",  # fused queries, keys, values
    "qwen2": "equal",  # biases
    "glm": "equal",  # side by side, partial rotation
    "phi": "equal",  # halves, partial rotation
    "mixtral": "equal",  # experts
    "gpt_oss": "equal",  # sinks
    "olmo2": "equal (keys averaged)",  # a norm over all heads together
    "qwen3": "equal (keys averaged)",  # a norm per head
    "gemma3": "equal (keys averaged)",  # the text tower of several
    "llava": "equal",
    "zamba": "equal (keys averaged)",  # one attention layer, used twice
}
REFUSED_BY_ALIGNED = {
    "qwen3_next": "beside its projections|as many rows as heads",
    "gemma4_text": "serve as values|beside its projections",
    "dbrx": "clips queries, keys and values",  # the number of heads in a part of the config
    "diffllama": "beside its projections",
}
REFUSED = {
    "gpt2": "gpt2 has no `num_key_value_heads`",
    "bart": "encoder-decoder",
    "deepseek_v3": "no weight of deepseek_v3",
    "doge": r"self_attn\.A, self_attn\.dt_proj\.weight",
    "jetmoe": "jetmoe cannot be",
    "gpt_bigcode": "has but 1 key/value head",
}


@pytest.mark.parametrize("family", [*CONVERTED, *REFUSED_BY_ALIGNED, *REFUSED])
def test_families(family: str) -> None:
    result = outcome(family)
    check(result)
    assert not result.unbuilt
    if family in CONVERTED:
        assert (result.mean, result.aligned) == ("equal", CONVERTED[family])
    elif family in REFUSED_BY_ALIGNED:
        assert result.mean == "equal"
        assert re.search(REFUSED_BY_ALIGNED[family], result.aligned)
    else:
        assert re.search(REFUSED[family], result.mean)


@pytest.mark.families
@pytest.mark.parametrize("family", model_types())
def test_all_families(family: str) -> None:
    result = outcome(family)
    if result.unbuilt:
        pytest.skip(f"no tiny model: {result.unbuilt}")
    check(result)


def check(result: Outcome) -> None:
    """Equal or refused, and nothing else."""
    assert not result.error
    assert result.unbuilt or result.mean
