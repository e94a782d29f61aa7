"""Encoders made longer: what they computed before stays, what they compute beyond is drawn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import (
    additive,
    assert_differs,
    assert_within_budget,
    padding_mask,
    pairs,
    results,
)
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_attn_plugin.cli.main import main
from hf_attn_plugin.convert import plan_long_encoder, tile_positions, to_long_encoder

OLD, NEW, WINDOW, GLOBALS = 24, 70, 24, 2
PAD = 1
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
# Families that number positions from padding_idx + 1 have a table of two rows more than tokens.
OFFSET = dict.fromkeys(
    (
        *("roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm"),
        *("xlm-roberta-xl", "esm"),
    ),
    PAD + 1,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "camembert": {},
    "data2vec-text": {},
    "distilbert": {"dropout": 0.0, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "electra": {"embedding_size": 32},
    "ernie": {},
    "esm": {"token_dropout": False, "mask_token_id": 4},
    "eurobert": {"mask_token_id": 4},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 2},
    "nomic_bert": {},
    "roberta": {},
    "roberta-prelayernorm": {},
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlm-roberta": {},
    "xlm-roberta-xl": {},
}

# ESM multiplies its embeddings with the padding mask, so that none can be drawn for it.
DRAWN = [family for family in FAMILIES if family != "esm"]


def encoder(family: str, auto: Any = AutoModelForMaskedLM, **overrides: Any) -> Any:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    rows = OLD + OFFSET.get(family, 0)
    settings = {**SHAPE, "max_position_embeddings": rows, **FAMILIES.get(family, {}), **overrides}
    config = CONFIG_MAPPING[family](**settings)
    return auto.from_config(config, attn_implementation="eager").eval()


def longer(model: Any, **kwargs: Any) -> Any:
    settings = {"max_positions": NEW, "window": WINDOW, "num_global_tokens": GLOBALS, **kwargs}
    return to_long_encoder(copy.deepcopy(model), **settings)


def batch(length: int, pads: list[int], side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, 64, (len(pads), length), generator=generator)
    valid = padding_mask(length, pads, side)
    return {"input_ids": ids.where(valid.bool(), PAD), "attention_mask": valid}, valid


@pytest.mark.parametrize("family", FAMILIES)
def test_on_inputs_that_fit_the_window_nothing_changes(family: str) -> None:
    model = encoder(family)
    inputs, valid = batch(OLD, [0, 9])
    ours = longer(model)
    # The longer table's rows beyond the first are not used, and have no gradient to compare.
    original = copy.deepcopy(ours)
    original.set_attn_implementation("eager")
    with torch.no_grad():
        before, after = (m(**inputs).logits[valid.bool()] for m in (model, ours))
    torch.testing.assert_close(after, before, atol=3e-4, rtol=1e-3)
    found = assert_within_budget(ours, original, inputs, valid=valid)
    first = results(model, inputs, valid)
    for name, gradient in first.items():
        if gradient.shape != found[name].shape:
            assert "position" in name
            assert not found[name][len(gradient) :].any()
            found[name] = found[name][: len(gradient)]
        scale = max(float(g.abs().max()) for g in first.values())
        torch.testing.assert_close(found[name], gradient, atol=2e-5 * scale, rtol=1e-3)


@pytest.mark.parametrize("family", DRAWN)
def test_longer_inputs_equal_eager_under_a_drawn_mask(family: str) -> None:
    window = 6
    model = encoder(family)
    ours = longer(model, window=window)
    eager = copy.deepcopy(ours)
    eager.set_attn_implementation("eager")
    inputs, valid = batch(NEW, [0, 11])

    def draw(width: int, own: int | None = None) -> Tensor:
        def rule(q: int, k: int) -> bool:
            near = abs(q - k) < width or min(q, k) < GLOBALS
            return near and (own is None or abs(q - k) <= own)

        return additive(pairs(2, NEW, rule, valid=valid))

    def reference(width: int) -> dict[str, Any]:
        mask: Any = draw(width)
        if family == "modernbert":
            mask = {"full_attention": mask, "sliding_attention": draw(width, 8)}
        return {**inputs, "attention_mask": mask}

    found = assert_within_budget(ours, eager, inputs, reference=reference(window), valid=valid)
    assert_differs(found, results(eager, reference(window + 1), valid))


@pytest.mark.parametrize("family", DRAWN)
def test_global_tokens_named_in_the_call(family: str) -> None:
    """What question answering does with the question's tokens; no family may drop it."""
    window = 6
    model = encoder(family)
    ours = longer(model, window=window, num_global_tokens=0)
    eager = copy.deepcopy(ours)
    eager.set_attn_implementation("eager")
    inputs, valid = batch(NEW, [0, 11])
    question = torch.zeros_like(valid)
    question[0, 1:4] = question[1, 30:32] = 1

    def draw(own: int | None = None) -> Tensor:
        mask = pairs(2, NEW, lambda q, k: abs(q - k) < window, valid=valid)[:, 0]
        mask |= (question[:, :, None] | question[:, None]).bool() & valid[:, None].bool()
        if own is not None:
            distance = torch.arange(NEW)[:, None] - torch.arange(NEW)
            mask &= distance.abs() <= own
        return additive(mask[:, None])

    mask: Any = draw()
    if family == "modernbert":
        mask = {"full_attention": mask, "sliding_attention": draw(8)}
    with torch.no_grad():
        found = ours(**inputs, global_attention_mask=question).logits[valid.bool()]
        wanted = eager(inputs["input_ids"], attention_mask=mask).logits[valid.bool()]
        without = ours(**inputs).logits[valid.bool()]
    torch.testing.assert_close(found, wanted, atol=5e-4, rtol=1e-3)
    assert (found - without).abs().max() > 0.01


HEADS = [
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
]


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
def test_any_head_is_saved_and_loaded(family: str, auto: Any, tmp_path: Path) -> None:
    ours = longer(encoder(family, auto), window=6)
    inputs, _ = batch(NEW, [0, 11])
    ours.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.max_position_embeddings == NEW + OFFSET.get(family, 0)
    assert config.attn_params["longformer"] == {
        "window": 6,
        "num_global_tokens": GLOBALS,
        "dilation": 1,
    }
    again = auto.from_pretrained(tmp_path, attn_implementation="longformer")
    stock = auto.from_pretrained(tmp_path)
    assert type(again) is type(ours)
    with torch.no_grad():
        wanted, found, dense = (m(**inputs)[0] for m in (ours, again, stock))
        question = torch.zeros_like(inputs["input_ids"]).index_fill(1, torch.arange(30, 36), 1)
        asked = again(**inputs, global_attention_mask=question)[0]
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)
    assert (dense - found).abs().max() > 1e-3
    assert (asked - found).abs().max() > 1e-3, "this head drops global_attention_mask"


def test_positions_are_copied_and_roberta_keeps_its_first_rows() -> None:
    model = encoder("roberta")
    table = model.roberta.embeddings.position_embeddings.weight.detach()
    ours = longer(model).roberta.embeddings
    new = ours.position_embeddings.weight
    assert new.shape == (NEW + 2, 32)
    assert ours.position_embeddings.num_embeddings == NEW + 2
    torch.testing.assert_close(new[: OLD + 2], table, atol=0, rtol=0)
    for position in range(NEW):
        assert torch.equal(new[position + 2], table[position % OLD + 2])
    assert new.requires_grad
    assert ours.position_ids.tolist() == [list(range(NEW + 2))]
    assert ours.token_type_ids.tolist() == [[0] * (NEW + 2)]
    plan = plan_long_encoder(type(model), model.config, NEW)
    assert (plan.old_positions, plan.new_positions, plan.offset) == (OLD, NEW, 2)
    assert plan.tables == ("roberta.embeddings.position_embeddings",)


def test_tiling_by_hand() -> None:
    weight = torch.arange(5.0)[:, None]
    assert tile_positions(weight, 7, 2)[:, 0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 2]
    assert tile_positions(weight, 7)[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_rotary_models_only_change_their_config() -> None:
    model = encoder("modernbert")
    plan = plan_long_encoder(type(model), model.config, NEW)
    assert plan.tables == ()
    ours = longer(model)
    for (name, before), (_, after) in zip(
        model.named_parameters(), ours.named_parameters(), strict=True
    ):
        assert torch.equal(before, after), name
    assert ours.config.max_position_embeddings == NEW


def test_it_trains_and_attention_dropout_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    model = encoder("roberta", attention_probs_dropout_prob=0.1)
    state = copy.deepcopy(model.state_dict())
    transformers.logging.enable_propagation()
    try:
        ours = longer(model, window=6)
    finally:
        transformers.logging.disable_propagation()
    assert "attention_probs_dropout_prob was 0.1" in caplog.text
    assert ours.config.attention_probs_dropout_prob == 0.0
    inputs, _ = batch(NEW, [0, 11])
    ours.train()
    ours.gradient_checkpointing_enable()
    ours(**inputs, labels=inputs["input_ids"]).loss.backward()
    table = ours.roberta.embeddings.position_embeddings.weight
    assert table.grad.shape == table.shape
    assert table.grad[OLD + 2 :].abs().sum() > 0
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_modes_and_dtype_stay() -> None:
    model = encoder("bert").to(torch.bfloat16).train()
    model.bert.embeddings.eval()
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    ours = longer(model)
    table = ours.bert.embeddings.position_embeddings.weight
    assert (table.dtype, table.requires_grad) == (torch.bfloat16, False)
    assert ours.training
    assert not ours.bert.embeddings.training
    assert ours.bert.encoder.training


def test_a_result_from_before_does_not_disturb_training() -> None:
    model = encoder("bert")
    inputs, _ = batch(OLD, [0])
    before = model(**inputs).logits
    to_long_encoder(model, NEW, WINDOW)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    table = model.bert.embeddings.position_embeddings
    assert table.weight.grad.shape == table.weight.shape == (table.num_embeddings, 32)
    assert before.grad_fn is not None


def test_the_present_length_only_changes_the_attention() -> None:
    model = encoder("bert")
    ours = longer(model, max_positions=OLD)
    assert ours.config._attn_implementation == "longformer"
    before = model.bert.embeddings.position_embeddings.weight
    assert torch.equal(ours.bert.embeddings.position_embeddings.weight, before)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("bert", {}, {"max_positions": OLD - 1}, "takes 24 tokens already"),
    ("bert", {}, {"max_positions": 40.0}, "must be an integer, got 40.0"),
    ("bert", {}, {"window": 0}, "window must be an integer >= 1, got 0"),
    ("bert", {}, {"num_global_tokens": -1}, "num_global_tokens must be"),
    ("bert", {"is_decoder": True}, {}, "is a decoder"),
    ("deberta-v2", {}, {}, "DebertaV2ForMaskedLM computes attention by itself"),
    ("mpnet", {}, {}, "MPNetForMaskedLM computes attention by itself"),
    ("roformer", {}, {}, "RoFormerForMaskedLM computes attention by itself"),
    ("longformer", {"attention_window": 4}, {}, "computes attention by itself"),
    ("fnet", {}, {}, "holds no attention"),
]


@pytest.mark.parametrize(("family", "overrides", "arguments", "message"), REFUSED)
def test_refusals_leave_the_model_alone(
    family: str, overrides: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    model = encoder(family, **overrides)
    config, state = model.config.to_dict(), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        to_long_encoder(model, **{"max_positions": NEW, "window": WINDOW, **arguments})
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("llama", "LlamaForCausalLM", "is a decoder"),
        ("gpt2", "GPT2LMHeadModel", "is a decoder"),
        ("t5", "T5ForConditionalGeneration", "is an encoder-decoder"),
        ("splinter", "SplinterModel", "no attention modules that hold"),
        ("clip_text_model", "CLIPTextModel", "first token does not see the last"),
        ("layoutlm", "LayoutLMModel", "4D attention_mask does not tell"),
        ("clip", "CLIPModel", "model of several parts"),
    ],
)
def test_other_models_are_refused(family: str, name: str, message: str) -> None:
    small = {"text_config": SHAPE} if family == "clip" else {**SHAPE, "max_position_embeddings": 24}
    config = CONFIG_MAPPING[family](**small)
    if family == "clip":
        config.vision_config.num_hidden_layers = 1
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
    with pytest.raises(ValueError, match=message):
        to_long_encoder(model, NEW, WINDOW)
    assert not hasattr(model.config, "attn_params") or model.config.attn_params is None


def test_what_is_no_plain_model_is_refused() -> None:
    model = encoder("bert")
    with pytest.raises(ValueError, match="takes a transformers model, got Sequential"):
        to_long_encoder(torch.nn.Sequential(model), NEW, WINDOW)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="meta device"):
        to_long_encoder(empty, NEW, WINDOW)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    encoder("roberta").to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{i}": i for i in range(64)}
    inner = Tokenizer(models.WordLevel(words))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=OLD)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    line = ["convert-long", str(source), "--max-positions", str(NEW), "--out", str(out)]
    assert main([*line, "--window", "6", "--global-tokens", "2"]) == 0
    printed = capsys.readouterr().out
    rows = {row[:32].strip(): row[32:].split() for row in printed.splitlines()}
    assert rows["tokens"] == [str(OLD), str(NEW)]
    before, after = (int(n.replace(",", "")) for n in rows["parameters"])
    assert after - before == (NEW - OLD) * 32
    assert AutoTokenizer.from_pretrained(out).model_max_length == NEW
    found = AutoModelForMaskedLM.from_pretrained(out, attn_implementation="longformer")
    assert found.dtype == torch.bfloat16
    wanted = to_long_encoder(AutoModelForMaskedLM.from_pretrained(source), NEW, 6, 2)
    inputs, _ = batch(NEW, [0, 11])
    with torch.no_grad():
        assert torch.equal(found(**inputs).logits, wanted(**inputs).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-positions", "8"], "takes 24 tokens already"),
        (["--max-positions", "70", "--window", "0"], "window must be"),
    ],
)
def test_the_command_refuses_before_it_reads_weights(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    folder = tmp_path / "weightless"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    (folder / "model.safetensors").write_text("not weights")
    assert main(["convert-long", str(folder), *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
