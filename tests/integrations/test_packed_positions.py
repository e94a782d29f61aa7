"""Documents start where positions do not go up, with a cache and without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_ids, tiny_model
from transformers import DynamicCache, StaticCache

from hf_attn_plugin import SlidingWindowConfig, configure

JUMPS = torch.tensor([[0, 1, 2, 10, 11, 12, 13, 20, 30, 31, 0, 1, 5, 6]])  # two documents
STARTS = 10


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids, **kwargs).logits
    return result


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["flash", "sliding_window", "linear"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_may_jump_ahead_inside_a_document(use_cache: bool, name: str, rows: int) -> None:
    model = configure(tiny_model("llama", name), SlidingWindowConfig(4, num_sink_tokens=1))
    ids = random_ids(rows, JUMPS.shape[1])
    parts = (slice(None, STARTS), slice(STARTS, None))
    alone = [logits(model, ids[:, part], position_ids=JUMPS[:, part])
             for part in parts]  # fmt: skip
    packed = logits(model, ids, position_ids=JUMPS, use_cache=use_cache)
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    if not use_cache:  # what transformers alone takes for documents
        other = tiny_model("llama", "sdpa")
        cut = logits(other, ids, position_ids=JUMPS, use_cache=False)
        whole = [logits(other, ids[:, part], position_ids=JUMPS[:, part], use_cache=True)
                 for part in parts]  # fmt: skip
        assert (cut - torch.cat(whole, 1)).abs().max() > 0.01


def test_compiled_masks_are_told_the_same_documents() -> None:
    model = tiny_model("llama", "flash")
    ids = random_ids(2, JUMPS.shape[1])
    compiled = torch.compile(model, backend="eager")
    expected = logits(model, ids, position_ids=JUMPS, use_cache=False)
    torch.testing.assert_close(logits(compiled, ids, position_ids=JUMPS, use_cache=False), expected)


@torch.no_grad()
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_after_packed_documents_are_refused(kind: str, compiling: bool) -> None:
    torch.compiler.reset()  # graphs of other tests count towards its limit
    model = tiny_model("llama", "flash")
    ids, more = random_ids(1, JUMPS.shape[1]), random_ids(1, 2, seed=5)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiling else model

    def cache() -> Any:
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=20)

    packed = cache()
    model(ids, position_ids=JUMPS, past_key_values=packed)
    for count in (1, 2):
        with pytest.raises(ValueError, match=f"the first has {STARTS} tokens"):
            run(more[:, :count], past_key_values=packed)
    if kind == "dynamic":  # what is left is one document
        packed.crop(STARTS - JUMPS.shape[1])
    else:
        packed.reset()
        model(ids[:, :STARTS], position_ids=JUMPS[:, :STARTS], past_key_values=packed)
    one = cache()
    model(ids[:, :STARTS], position_ids=JUMPS[:, :STARTS], past_key_values=one)
    # The second call over the cropped cache comes after more than was one document.
    for tokens in (more, more[:, :1]) if kind == "dynamic" else (more,):
        found, wanted = (run(tokens, past_key_values=each).logits for each in (packed, one))
        torch.testing.assert_close(found, wanted)


def test_a_packed_prompt_is_not_generated_from() -> None:
    model = tiny_model("llama", "flash")
    with pytest.raises(ValueError, match="the cache holds packed documents"):
        model.generate(
            random_ids(1, JUMPS.shape[1]), position_ids=JUMPS, max_new_tokens=2, do_sample=False
        )
