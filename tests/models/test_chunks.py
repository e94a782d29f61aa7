"""Llama 4: layers that attend within chunks, beside first tokens and packed documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import running
from tiny import random_ids, twin
from transformers import GenerationConfig

import hf_attn_plugin
from hf_attn_plugin import LongformerConfig, SlidingWindowConfig
from hf_attn_plugin.methods import METHODS
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


@pytest.mark.parametrize("new", [[8, 3, 9], [1, 1, 1], [5, 1, 4]], ids=["all", "a step", "some"])
@pytest.mark.parametrize("layer", [0, 1], ids=["chunked", "full"])
def test_sequences_side_by_side_whose_queries_go_on(new: list[int], layer: int) -> None:
    """Chunks count from each sequence's start, also where only its last tokens are queries."""
    attention = model_of("flash").model.layers[layer].self_attn
    size = attention.config.attention_chunk_size if layer == 0 else 100
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, sum(new), 8, generator=generator)
    key, value = torch.randn(2, 1, 2, sum(DOCUMENTS), 8, generator=generator)
    lengths = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (new, DOCUMENTS)]
    found, _ = METHODS["flash"](
        attention, query, key, value, None, cu_seq_lens_q=lengths[0], cu_seq_lens_k=lengths[1]
    )
    places = [(doc, i) for doc, n in enumerate(DOCUMENTS) for i in range(n)]
    asking = [(doc, i) for doc, i in places if i >= DOCUMENTS[doc] - new[doc]]
    sees = [
        [d == doc and j <= i and j // size == i // size for d, j in places] for doc, i in asking
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.tensor(sees), enable_gqa=True
    )
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


def test_continuous_batching_has_no_chunks() -> None:
    """Transformers itself refuses, rather than to let every query see all of its sequence."""
    with pytest.raises(ValueError, match=r"Invalid (layer|group) type: chunked_attention"):
        model_of("flash").generate_batch(
            inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2)
        )
