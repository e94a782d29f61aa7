"""Packed documents under torch.compile, where no value may be looked at until the graph runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import running
from families.inputs import tokens
from tiny import counted_positions, pack_positions, padding_mask, random_ids, tiny_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hf_attn_plugin import SlidingWindowConfig, configure
from hf_attn_plugin.compat import chunks_begin_anew
from hf_attn_plugin.integrations import packed_positions
from hf_attn_plugin.patterns import documents, refusal

FIRST, NEW = 6, 8
PACKED = pack_positions([[3, 5]])
_CHUNKED = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size_mlp": 48,
    "moe_layers": [],
    "no_rope_layers": [1, 0],
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)


def begun(model: Any, kind: str, rows: int, mask: Tensor | None = None) -> Any:
    """A cache that holds one document."""
    if kind == "dynamic":
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=FIRST + NEW)
    model(random_ids(rows, FIRST), attention_mask=mask, past_key_values=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])  # mistral's caches roll
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_packed_rows_over_a_cache_are_refused(kind: str, family: str) -> None:
    model = tiny_model(family, "flash")
    ids = random_ids(1, NEW, seed=3)
    graph = compiled(model)
    whole = {"position_ids": torch.arange(FIRST, FIRST + NEW)[None]}
    found = graph(ids, past_key_values=begun(model, kind, 1), **whole).logits
    wanted = model(ids, past_key_values=begun(model, kind, 1), **whole).logits
    torch.testing.assert_close(found, wanted)
    for positions in (FIRST + PACKED, PACKED, torch.arange(NEW)[None]):
        for run in (graph, model):
            with pytest.raises(ValueError, match="cannot be continued from a cache"):
                run(ids, position_ids=positions, past_key_values=begun(model, kind, 1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prefill_in_chunks_goes_on(kind: str) -> None:
    """Padding only before a row's first token, which begins at 0 over a cache that has begun."""
    model = tiny_model("llama", "flash")
    mask = padding_mask(FIRST + NEW, [0, FIRST + 1], "left")
    positions = counted_positions(mask)[:, FIRST:]
    ids = random_ids(2, NEW, seed=3)
    results = []
    for run in (compiled(model), model):
        cache = begun(model, kind, 2, mask[:, :FIRST])
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        results.append(run(ids, **given).logits[mask[:, FIRST:].bool()])
    torch.testing.assert_close(results[0], results[1])


@torch.no_grad()
def test_recurrent_layers_look_when_the_graph_runs() -> None:
    eager = running.eager_model("bamba")
    ours = running.build(type(eager), eager.config, "flash")
    ours.load_state_dict(eager.state_dict())
    graph = torch.compile(ours, backend="eager")
    ids = tokens(1)
    torch.testing.assert_close(graph(ids).logits, eager(ids).logits, atol=1e-3, rtol=1e-3)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with pytest.raises(ValueError, match="'linear_attention' layers"):
        graph(ids, position_ids=positions)
    cache = ours(ids).past_key_values
    with pytest.raises(ValueError, match="cannot be continued from a cache"):
        graph(ids, position_ids=positions, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("family", ["modernbert", "bert"])
def test_encoders_take_positions_for_positions(family: str) -> None:
    model = tiny_model(family, "flash")
    ids, positions = random_ids(1, NEW), PACKED
    found = torch.compile(model, backend="eager")(ids, position_ids=positions).logits
    torch.testing.assert_close(found, model(ids, position_ids=positions).logits)
    alone = model(ids[:, 3:], position_ids=positions[:, 3:]).logits
    assert (found[:, 3:] - alone).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_first_tokens_of_documents_that_look_both_ways(use_cache: bool, compiling: bool) -> None:
    model = tiny_model("gemma3_text", "sliding_window", use_bidirectional_attention=True)
    configure(model, SlidingWindowConfig(window=2, num_sink_tokens=1))
    ids = random_ids(1, 24)
    positions = pack_positions([[10, 14]])
    run = compiled(model) if compiling else model
    packed = run(ids, position_ids=positions, use_cache=use_cache).logits
    alone = [model(part).logits for part in ids.split([10, 14], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    configure(model, SlidingWindowConfig(window=2, num_sink_tokens=0))  # the control
    without = model(ids[:, 10:]).logits
    assert (without - alone[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_chunks_begin_anew_in_every_document(use_cache: bool) -> None:
    model = tiny_model("llama4_text", "flash", attention_chunk_size=4, **_CHUNKED)
    ids, positions = random_ids(1, 13), pack_positions([[6, 7]])
    run = torch.compile(model, backend="eager")
    static = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(ValueError, match="attention_chunk_size"):
        run(ids, position_ids=positions, past_key_values=static)
    if not chunks_begin_anew():
        with pytest.raises(ValueError, match="attention_chunk_size"):
            run(ids, position_ids=positions, use_cache=use_cache)
        return
    packed = run(ids, position_ids=positions, use_cache=use_cache).logits
    alone = [model(part).logits for part in ids.split([6, 7], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["flash", "sliding_window"])
@pytest.mark.parametrize("compiling", [False, True])
def test_documents_of_one_token(name: str, compiling: bool) -> None:
    model = tiny_model("llama", name)
    ids, zeros = random_ids(1, 4), torch.zeros(1, 4, dtype=torch.long)
    run = compiled(model) if compiling else model
    packed = run(ids, position_ids=zeros).logits
    alone = [model(token).logits for token in ids.split(1, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


def test_zeros_that_number_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decision Transformer gives its GPT-2 zeros for positions."""
    with running.double_precision(torch.float64):
        eager = running.eager_model("decision_transformer")
        ours = running.build(type(eager), eager.config, "flash")
        ours.load_state_dict(eager.state_dict())
        inputs = running.model_inputs(eager)
        with torch.no_grad():
            expected = running.run(eager, inputs)
            assert running.errors(running.run(ours, inputs), expected)[0] < 1e-8
            monkeypatch.setattr(packed_positions, "numbers_tokens", lambda config: True)
            assert running.errors(running.run(ours, inputs), expected)[0] > 1e-3
    assert documents.numbers_tokens(ours.config) is False


@pytest.mark.parametrize("compiling", [False, True])
def test_a_refusal_that_depends_on_values(compiling: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return refusal.refuse_where(x < 0, "no negative numbers", x) + 1

    run = torch.compile(function, backend="aot_eager", fullgraph=True) if compiling else function
    torch.testing.assert_close(run(torch.ones(3)), 2 * torch.ones(3))
    with pytest.raises(ValueError, match="no negative numbers"):
        run(-torch.ones(3))
