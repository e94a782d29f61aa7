"""Llama 4: layers that attend within chunks, beside first tokens and packed documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import running
from tiny import random_ids, twin

import hf_attn_plugin
from hf_attn_plugin import LongformerConfig, SlidingWindowConfig
from hf_attn_plugin.verification import verify

DOCUMENTS = [8, 3, 9]


def model_of(name: str) -> Any:
    eager = running.eager_model("llama4_text")
    assert eager.config.attention_chunk_size < DOCUMENTS[0]
    return twin(eager, name)


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids, **kwargs).logits
    return result


@pytest.mark.parametrize(
    "parameters", [SlidingWindowConfig(3, num_sink_tokens=1), LongformerConfig(3)]
)
@pytest.mark.parametrize("sizes", [(7, 1, 1, 1, 1, 1, 1, 1), (4, 4, 6), (9, 5)])
def test_a_chunk_has_no_first_tokens_of_its_own(
    parameters: SlidingWindowConfig | LongformerConfig, sizes: tuple[int, ...]
) -> None:
    """In decoding, the first chunk is not in the cache any more: both have to agree."""
    model = hf_attn_plugin.configure(model_of(parameters.name), parameters)
    ids = random_ids(1, sum(sizes))
    cache, parts = None, []
    with torch.no_grad():
        for part in ids.split(sizes, 1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(
        torch.cat(parts, 1), logits(model, ids, use_cache=False), rtol=1e-4, atol=1e-4
    )
    report = verify(model, ids)
    assert report.ok, str(report)


@pytest.mark.parametrize("told", ["positions", "lengths", "both"])
@pytest.mark.parametrize("name", ["flash", "sliding_window"])
def test_every_document_has_chunks_and_first_tokens_of_its_own(name: str, told: str) -> None:
    parameters = SlidingWindowConfig(3, num_sink_tokens=1)
    model = hf_attn_plugin.configure(model_of(name), parameters)
    ids = random_ids(1, sum(DOCUMENTS))
    ends = torch.tensor([0, *DOCUMENTS]).cumsum(0).to(torch.int32)
    batch: dict[str, Any] = {
        "position_ids": torch.cat([torch.arange(n) for n in DOCUMENTS])[None],
    }
    if told != "positions":
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9,
                  "max_length_k": 9}  # fmt: skip
    if told == "lengths":
        batch["attention_mask"] = torch.ones_like(ids)
    alone = torch.cat([logits(model, part) for part in ids.split(DOCUMENTS, 1)], 1)
    for use_cache in (True, False):
        packed = logits(model, ids, use_cache=use_cache, **batch)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    report = verify(model, {"input_ids": ids, **batch})
    assert report.ok, str(report)
