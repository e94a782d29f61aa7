"""``flash`` in transformers' continuous batching, which is its paged attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import random_ids, tiny_model, twin
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hf_attn_plugin

PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 11, 7, 17)]
NEW = 8


def settings() -> GenerationConfig:
    return GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)


def batch(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    # Small pages: every prompt takes several, and the sliding layers give some back.
    page = next(n for n in ("page_size", "block_size") if hasattr(ContinuousBatchingConfig, n))
    small = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=32, **{page: 4})
    results = model.generate_batch(
        inputs=prompts, generation_config=settings(), continuous_batching_config=small
    )
    ordered = sorted(results.items(), key=lambda item: int(item[0].rpartition("_")[2]))
    return [list(output.generated_tokens) for _, output in ordered]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_flash_equals_one_prompt_at_a_time(family: str) -> None:
    eager = tiny_model(family)
    ours = twin(eager, "flash")
    expected = [
        eager.generate(torch.tensor([p]), generation_config=settings())[0, len(p) :].tolist()
        for p in PROMPTS
    ]
    with hf_attn_plugin.count_reads(ours) as reads:
        found = batch(ours, PROMPTS)
    assert found == expected
    assert set(reads.calls) == {"flash"}
    assert reads.calls["flash"] >= NEW * eager.config.num_hidden_layers


@pytest.mark.parametrize("method", ["sliding_window", "longformer", "strided", "sparq"])
def test_other_methods_are_refused(method: str) -> None:
    model = tiny_model("llama", method)
    if Version(transformers.__version__) >= Version("5.19"):
        with pytest.raises(ValueError, match=method):
            batch(model, PROMPTS[:1])
    else:  # there the error ends the worker thread and is logged
        assert not any(batch(model, PROMPTS[:1])), "something was generated"
