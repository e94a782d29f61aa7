"""Models that take position_ids for their embeddings alone: documents are kept apart even so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import running
from peft import LoraConfig, get_peft_model
from tiny import random_ids, tiny_model
from transformers import (
    BertConfig,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    RobertaConfig,
    RobertaForCausalLM,
)
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridForCausalLM,
)
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextConfig, Kosmos2TextForCausalLM
from transformers.models.kosmos2_5.modeling_kosmos2_5 import (
    Kosmos2_5TextConfig,
    Kosmos2_5TextForCausalLM,
)

from hf_attn_plugin.integrations import flash_name
from hf_attn_plugin.methods import METHODS

DOCUMENTS = [5, 3, 4]
TOKENS = sum(DOCUMENTS)
SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=32, max_position_embeddings=32, initializer_range=0.5,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
KOSMOS = dict(vocab_size=64, embed_dim=32, layers=2, attention_heads=4, ffn_dim=32, dropout=0.0,
              attention_dropout=0.0, max_position_embeddings=64, init_std=0.5)  # fmt: skip


def made(cls: Any, config: Any) -> Callable[[str], Any]:
    def make(name: str) -> Any:
        torch.manual_seed(0)
        return cls._from_config(config, attn_implementation=name).eval()

    return make


def granite(name: str, kinds: tuple[str, ...] = ("full_attention",) * 2) -> Any:
    config = running.eager_model("granitemoehybrid").config
    config.layer_types = list(kinds)
    config.position_embedding_type = "rope"
    torch.manual_seed(0)
    model = running.build(GraniteMoeHybridForCausalLM, config, name)
    running._randomize(model, 1.5)
    return model


DECODERS: dict[str, Callable[[str], Any]] = {
    "granite": granite,
    "bert": made(BertLMHeadModel, BertConfig(**SIZES, is_decoder=True)),
    "roberta": made(RobertaForCausalLM, RobertaConfig(**SIZES, is_decoder=True)),
    "bert-generation": made(
        BertGenerationDecoder, BertGenerationConfig(**SIZES, is_decoder=True)
    ),
    "kosmos-2.5": made(Kosmos2_5TextForCausalLM, Kosmos2_5TextConfig(**KOSMOS)),
    "clip": made(CLIPTextModel, CLIPTextConfig(**SIZES)),
    "llama": lambda name: tiny_model("llama", name),
}  # fmt: skip


KEEPING = ("granite", "kosmos-2.5", "clip")
"""Those that hand their positions on to no mask and no attention."""


def packed_and_alone(model: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    def run(**inputs: Any) -> torch.Tensor:
        output = model(**inputs)
        result: torch.Tensor = output[0] if "logits" not in output else output.logits
        return result

    ids = random_ids(2, TOKENS)
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS]).repeat(2, 1)
    with torch.no_grad():
        alone = [
            run(input_ids=part, position_ids=place.contiguous())
            for part, place in zip(
                ids.split(DOCUMENTS, 1), positions.split(DOCUMENTS, 1), strict=True
            )
        ]
        return run(input_ids=ids, position_ids=positions, **kwargs), torch.cat(alone, 1)


def assert_apart(model: Any, **kwargs: Any) -> None:
    torch.testing.assert_close(*packed_and_alone(model, **kwargs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flash", "sliding_window", "linear"])
@pytest.mark.parametrize("family", DECODERS)
def test_documents_are_kept_apart(family: str, name: str, registries: None) -> None:
    model = DECODERS[family](name)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    caches = [{}] if family == "clip" else [{}, {"use_cache": False}]
    for kwargs in (*caches, {"attention_mask": mask}):
        assert_apart(model, **kwargs)
    assert not vars(mask)
    if family in KEEPING:
        flash_name.uninstall()  # the control
        leaking, alone = packed_and_alone(model)
        flash_name.install(frozenset(METHODS))
        assert (leaking - alone).abs().max() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_beside_documents(side: str) -> None:
    model = DECODERS["granite"]("flash")
    ids = random_ids(1, TOKENS)
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    pad, place = torch.zeros(1, 2, dtype=torch.long), slice(2, None)
    parts = [(pad, ids), (pad, positions), (pad, torch.ones_like(ids))]
    if side == "right":
        parts, place = [(b, a) for a, b in parts], slice(0, -2)
    names = ("input_ids", "position_ids", "attention_mask")
    inputs = {name: torch.cat(pair, 1) for name, pair in zip(names, parts, strict=True)}
    with torch.no_grad():
        padded = model(**inputs).logits[:, place]
        whole = model(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(padded, whole, rtol=1e-4, atol=1e-4)


def test_encoders_attend_to_the_whole_row() -> None:
    """There `position_ids` mean positions alone: documents are told by cu_seq_lens."""
    config = BertConfig(**SIZES)
    eager, ours = (made(BertModel, config)(name) for name in ("eager", "flash"))
    packed, alone = packed_and_alone(ours)
    torch.testing.assert_close(packed, packed_and_alone(eager)[0], rtol=1e-4, atol=1e-4)
    assert (packed - alone).abs().max() > 0.01
    lengths = torch.tensor([0, 5, 8, TOKENS], dtype=torch.int32)
    ids = random_ids(2, TOKENS)[:1]
    with torch.no_grad():
        told = ours(
            input_ids=ids,
            position_ids=torch.cat([torch.arange(n) for n in DOCUMENTS])[None],
            cu_seq_lens_q=lengths,
            cu_seq_lens_k=lengths,
        ).last_hidden_state
    torch.testing.assert_close(told, alone[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["granite", "kosmos-2.5"])
def test_the_name_may_be_given_later(family: str) -> None:
    model = DECODERS[family]("sdpa")
    model.set_attn_implementation("flash")
    assert_apart(model)
    assert_apart(model.base_model)


def test_a_part_may_be_named() -> None:
    model = running.eager_model("kosmos-2.5")
    model.set_attn_implementation({"text_config": "flash"})
    text = model.text_model
    assert text.config._attn_implementation == "flash"
    assert_apart(text.double() if text.dtype == torch.float64 else text)


def test_encoders_under_compile() -> None:
    torch._dynamo.reset()
    model = made(BertModel, BertConfig(**SIZES))("flash")
    expected = packed_and_alone(model)[0]
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS]).repeat(2, 1)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        packed = compiled(random_ids(2, TOKENS), position_ids=positions)
    torch.testing.assert_close(packed.last_hidden_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["granite", "kosmos-2.5", "llama"])
@pytest.mark.parametrize("masked", [False, True])
def test_under_compile(family: str, masked: bool) -> None:
    """Where no value may be looked at."""
    torch._dynamo.reset()
    model = DECODERS[family]("flash")
    alone = packed_and_alone(model)[1]
    kwargs = {"attention_mask": torch.ones(2, TOKENS, dtype=torch.long)} if masked else {}
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS]).repeat(2, 1)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        packed = compiled(random_ids(2, TOKENS), position_ids=positions, use_cache=False, **kwargs)
    torch.testing.assert_close(packed.logits, alone, rtol=1e-4, atol=1e-4)


def test_under_peft() -> None:
    assert_apart(get_peft_model(granite("flash"), LoraConfig(target_modules=["q_proj"])))


def test_recurrent_layers_refuse_packed_documents() -> None:
    model = granite("flash", ("linear_attention", "full_attention"))
    with pytest.raises(ValueError, match="state runs on from one document into"):
        packed_and_alone(model)


@pytest.mark.parametrize("family", ["kosmos-2", "glm5_next_text", "blt"])
def test_models_that_draw_their_own_masks_refuse_packed_documents(family: str) -> None:
    if family == "kosmos-2":
        model = made(Kosmos2TextForCausalLM, Kosmos2TextConfig(**KOSMOS))("flash")
    else:
        eager = running.eager_model(family)
        model = running.build(type(eager), eager.config, "flash")
    with pytest.raises(ValueError, match=r"draws masks by itself.*batch row of its own"):
        packed_and_alone(model)
    ids = random_ids(2, TOKENS)
    one = torch.arange(TOKENS).repeat(2, 1)
    mask = (one >= torch.tensor([[0], [3]])).long()
    padded = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate() numbers them
    with torch.no_grad():
        model(input_ids=ids, position_ids=one)
        model(input_ids=ids, position_ids=padded, attention_mask=mask)
