"""Ways in which packed documents are told beside plain positions: caches, lengths, other names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import running
from integrations.test_forward_positions import (
    DECODERS,
    DOCUMENTS,
    KOSMOS,
    TOKENS,
    Kosmos2TextConfig,
    Kosmos2TextForCausalLM,
    made,
    packed_and_alone,
)
from tiny import random_ids
from transformers import DynamicCache, StaticCache

from hf_attn_plugin.methods import packing

POSITIONS = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
ENDS = torch.tensor([0, 5, 8, TOKENS], dtype=torch.int32)
LENGTHS = dict(cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS, max_length_q=5, max_length_k=5)
LONG = (torch.arange(20) < TOKENS).long().repeat(2, 1)


def static(model: Any) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=20)


def leak(model: Any, **kwargs: Any) -> float:
    """How far the documents behind the first go when its last token is another."""
    ids = random_ids(1, TOKENS)
    other = ids.clone()
    other[:, DOCUMENTS[0] - 1] = (ids[:, DOCUMENTS[0] - 1] + 7) % 40 + 10
    with torch.no_grad():
        first, second = (model(input_ids=x, **kwargs)[0] for x in (ids, other))
    return float((first - second)[:, DOCUMENTS[0] :].abs().max())


@pytest.mark.parametrize("family", ["granite", "kosmos-2.5", "llama"])
def test_a_mask_of_the_caches_length(family: str) -> None:
    model = DECODERS[family]("flash")
    packed, alone = packed_and_alone(model, attention_mask=LONG, past_key_values=static(model))
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["kosmos-2.5", "llama"])
@pytest.mark.parametrize("kind", ["static", "static and long mask", "dynamic"])
def test_under_compile_with_a_cache(family: str, kind: str) -> None:
    torch._dynamo.reset()
    model = DECODERS[family]("flash")
    alone = packed_and_alone(model)[1]
    cache = DynamicCache(config=model.config) if kind == "dynamic" else static(model)
    kwargs = {"attention_mask": LONG} if "mask" in kind else {}
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        packed = compiled(random_ids(2, TOKENS), position_ids=POSITIONS.repeat(2, 1),
                          past_key_values=cache, **kwargs)  # fmt: skip
    torch.testing.assert_close(packed.logits, alone, rtol=1e-4, atol=1e-4)


def test_chunks_of_padded_rows_under_compile() -> None:
    """Where documents cannot be seen, one that goes on is not cut."""
    torch._dynamo.reset()
    model = DECODERS["llama"]("flash")
    mask = (torch.arange(TOKENS) >= torch.tensor([[0], [9]])).long()
    places, ids = (mask.cumsum(1) - 1).clamp(min=0), random_ids(2, TOKENS)
    compiled: Any = torch.compile(model, backend="eager")
    cache = static(model)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        compiled(ids[:, :7], attention_mask=mask[:, :7], position_ids=places[:, :7],
                 past_key_values=cache)  # fmt: skip
        rest = compiled(ids[:, 7:], attention_mask=mask, position_ids=places[:, 7:],
                        past_key_values=cache).logits  # fmt: skip
    torch.testing.assert_close(rest[:, 2:], whole[:, 9:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["granite", "kosmos-2.5", "llama"])
def test_a_document_that_begins_at_the_border_of_a_cache(family: str) -> None:
    model = DECODERS[family]("flash")
    ids, places = random_ids(1, 10), torch.arange(5)[None]
    for make in (lambda: DynamicCache(config=model.config), lambda: static(model)):
        with torch.no_grad():
            cache = model(ids[:, :5], position_ids=places, past_key_values=make()).past_key_values
            with pytest.raises(ValueError, match="cannot be continued from a cache"):
                model(ids[:, 5:], position_ids=places, past_key_values=cache)


@pytest.mark.parametrize("family", ["granite", "llama"])
def test_a_row_may_begin_behind_padding_that_is_cached(family: str) -> None:
    model = DECODERS[family]("flash")
    mask = (torch.arange(TOKENS) >= torch.tensor([[0], [7]])).long()
    places, ids = (mask.cumsum(1) - 1).clamp(min=0), random_ids(2, TOKENS)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=places).logits
        begun = model(ids[:, :7], attention_mask=mask[:, :7], position_ids=places[:, :7])
        rest = model(ids[:, 7:], attention_mask=mask, position_ids=places[:, 7:],
                     past_key_values=begun.past_key_values).logits  # fmt: skip
    torch.testing.assert_close(rest, whole[:, 7:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["sdpa", "eager"])
def test_a_text_part_with_another_name_keeps_its_documents(part: str) -> None:
    model = running.eager_model("llava")
    model.set_attn_implementation({"": "flash", "text_config": part})
    assert leak(model, position_ids=POSITIONS, use_cache=False) < 1e-5


@pytest.mark.parametrize("architecture", ["stablelm", "nemotron", "llama"])
def test_lengths_alone_tell_documents(architecture: str) -> None:
    model = running.eager_model(architecture)
    model.set_attn_implementation("flash")
    assert leak(model, **LENGTHS) < 1e-4
    assert leak(model) > 0.01  # the control


@pytest.mark.parametrize(
    "architecture", ["jamba", "zamba", "minimax", "recurrent_gemma", "lfm2_moe", "bamba"]
)
@pytest.mark.parametrize("positions", [True, False])
def test_lengths_do_not_tell_recurrent_layers(architecture: str, positions: bool) -> None:
    model = running.eager_model(architecture)
    model.set_attn_implementation("flash")
    told = {"position_ids": POSITIONS} if positions else {}
    with pytest.raises(ValueError, match=r"state runs on from one document.*batch row of its own"):
        leak(model, **told, **LENGTHS)


@pytest.mark.parametrize("given", [("seq_idx",), ("seq_idx", "cu_seq_lens_q"), ()])
@pytest.mark.parametrize("installed", [True, False])
def test_kernels_that_can_tell(
    given: tuple[str, ...], installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "find_spec", lambda name: name if installed else None)
    extra = dict.fromkeys(given, ENDS)
    for architecture, needed in (("bamba", 1), ("qwen3_next", 2), ("jamba", 3)):
        module: Any = running.eager_model(architecture)
        if installed and len(given) >= needed:
            packing.refuse_packed_states("flash", module, extra)
        else:
            with pytest.raises(ValueError, match="state runs on"):
                packing.refuse_packed_states("flash", module, extra)


@pytest.mark.parametrize("family", ["glm5_next_text", "blt"])
def test_models_that_draw_their_own_masks_refuse_lengths(family: str) -> None:
    model = running.eager_model(family)
    model.set_attn_implementation("flash")
    with pytest.raises(ValueError, match="draws masks by itself"):
        leak(model, **LENGTHS)


def test_kosmos_2_reads_lengths_and_refuses_positions_under_compile() -> None:
    torch._dynamo.reset()
    model = made(Kosmos2TextForCausalLM, Kosmos2TextConfig(**KOSMOS))("flash")
    assert leak(model, **LENGTHS) < 1e-4
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="draws masks by itself"):
        leak(compiled, position_ids=POSITIONS)


def test_bridgetower_is_refused() -> None:
    """Its layers that join text and image say that they look back, and do not."""
    eager = running.eager_model("bridgetower")
    for name in ("flash", {"": "eager", "text_config": "flash"}):
        with pytest.raises(ValueError, match="call themselves causal and attend in both"):
            running.build(type(eager), eager.config, name)
