"""``linear`` in whole models, against the quadratic definition under masks drawn by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import (
    additive,
    assert_differs,
    assert_within_budget,
    counted_positions,
    document_numbers,
    drawn_masks,
    pack_positions,
    padding_mask,
    pairs,
    random_ids,
    results,
    tiny_config,
    tiny_model,
    twin,
)
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    BartConfig,
    BartModel,
    MllamaForCausalLM,
    T5Config,
    T5Model,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from hf_attn_plugin import LinearConfig, configure, count_reads
from hf_attn_plugin.ops.linear import reference_linear_attention
from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.ops.torch.linear_features import EluFeatures, FavorFeatures
from hf_attn_plugin.patterns import Pattern

LENGTH = 20
REFERENCE = "quadratic linear attention"
CONFIGS = {"elu": LinearConfig(), "favor": LinearConfig("favor", num_features=12, seed=1)}
configs = pytest.mark.parametrize("parameters", CONFIGS.values(), ids=CONFIGS)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen3": {},
    "gemma3_text": {},  # mixed: its layer with a window stays softmax attention
}
models = pytest.mark.parametrize("family", MODELS)


def quadratic(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The definition under the 4D mask that the test passes in."""
    assert attention_mask is not None
    pattern = Pattern(
        q_len=query.shape[2], kv_len=key.shape[2], causal=False, dense=attention_mask == 0
    )
    if sliding_window is not None:
        output, _ = reference_attention(query, key, value, pattern, scaling=scaling)
    else:
        values = module.config.attn_params["linear"]
        features: Any = EluFeatures()
        if values["feature_map"] == "favor":
            features = FavorFeatures(values["num_features"], values["seed"], 0, module.layer_idx)
        output = reference_linear_attention(
            query, key, value, pattern, feature_map=features, scaling=scaling
        )
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def _reference(registries: None) -> None:
    AttentionInterface.register(REFERENCE, quadratic)


def pair(family: str, parameters: LinearConfig) -> tuple[Any, Any]:
    """A model with ``linear``, and the same one computing the definition."""
    model = tiny_model(family, "eager", **MODELS.get(family, {}))
    configure(model, parameters)
    return twin(model, "linear"), twin(model, REFERENCE)


def always(query: int, key: int) -> bool:
    return True


@models
@configs
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_decoders(family: str, parameters: LinearConfig, side: str) -> None:
    ours, reference = pair(family, parameters)
    ids = random_ids(2, LENGTH)
    valid = None if side == "none" else padding_mask(LENGTH, [0, 7], side)
    positions = torch.arange(LENGTH)[None] if valid is None else counted_positions(valid)
    inputs = {"input_ids": ids, "attention_mask": valid, "position_ids": positions}
    drawn = {**inputs, "attention_mask": drawn_masks(reference, 2, LENGTH, always, valid)}
    result = assert_within_budget(ours, reference, inputs, reference=drawn, valid=valid)
    softmax = results(twin(ours, "flash"), inputs, valid)
    assert_differs(result, softmax)


@models
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_do_not_mix(family: str, use_cache: bool) -> None:
    ours, reference = pair(family, CONFIGS["elu"])
    rows = [[9, 11], [1, 6, 13]]
    inputs = {
        "input_ids": random_ids(2, LENGTH),
        "position_ids": pack_positions(rows),
        "use_cache": use_cache,
    }
    masks = drawn_masks(reference, 2, LENGTH, always, documents=document_numbers(rows))
    result = assert_within_budget(
        ours, reference, inputs, reference={**inputs, "attention_mask": masks}
    )
    mixed = {**inputs, "position_ids": torch.arange(LENGTH)[None]}
    assert_differs(result, results(ours, mixed))


@configs
@pytest.mark.parametrize("side", ["none", "right"])
def test_encoders_look_both_ways(parameters: LinearConfig, side: str) -> None:
    ours, reference = pair("bert", parameters)
    valid = None if side == "none" else padding_mask(LENGTH, [0, 7], side)
    inputs = {"input_ids": random_ids(2, LENGTH), "attention_mask": valid}
    mask = additive(pairs(2, LENGTH, always, valid))
    drawn = {**inputs, "attention_mask": mask}
    assert_within_budget(ours, reference, inputs, reference=drawn, valid=valid)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, _ = pair("llama", CONFIGS["favor"])
    inputs = {"input_ids": random_ids(2, LENGTH)}
    expected = results(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    found = results(model, inputs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_cross_attention() -> None:
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, decoder_ffn_dim=32,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, init_std=0.5,
        dropout=0.0, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartModel._from_config(config, attn_implementation="linear").eval()
    ids, decoder_ids = random_ids(2, 11), random_ids(2, 7, seed=4)
    mask = padding_mask(11, [0, 4], "right")
    with count_reads(model) as reads:
        whole = model(ids, attention_mask=mask, decoder_input_ids=decoder_ids).last_hidden_state
    assert reads.calls == {"linear": 6}
    alone = model(ids[1:, :7], decoder_input_ids=decoder_ids[1:]).last_hidden_state
    torch.testing.assert_close(whole[1:], alone, rtol=1e-4, atol=1e-4)
    # Step by step, with the cache that transformers makes for two kinds of attention.
    cache, steps = None, []
    encoded = model.encoder(ids, attention_mask=mask)
    for i in range(7):
        out = model(
            attention_mask=mask,
            encoder_outputs=encoded,
            decoder_input_ids=decoder_ids[:, i : i + 1],
            past_key_values=cache,
        )
        cache = out.past_key_values
        steps.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_favor_draws_other_features_for_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[FavorFeatures] = []
    original = FavorFeatures.log

    def log(self: FavorFeatures, x: Tensor, scaling: float) -> Tensor:
        drawn.append(self)
        return original(self, x, scaling)

    monkeypatch.setattr(FavorFeatures, "log", log)
    model = tiny_model("llama", "linear")
    configure(model, LinearConfig("favor", seed=5, redraw=1))
    model(random_ids(1, 4))
    assert set(drawn) == {FavorFeatures(None, 5, 1, layer) for layer in (0, 1)}


def test_under_autocast() -> None:
    model, _ = pair("llama", CONFIGS["elu"])
    ids = random_ids(2, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids).logits
        generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, LENGTH + 3)
    exact = model(ids).logits
    assert (rounded - exact).norm() < 0.05 * exact.norm()


# -- refusals ----------------------------------------------------------------------------------


def refused(family: str, message: str, inputs: dict[str, Any] | None = None, **kwargs: Any) -> None:
    model = tiny_model(family, "linear", **kwargs)
    with pytest.raises(ValueError, match=message):
        model(**(inputs or {"input_ids": random_ids(2, 6)}))


def test_what_the_scores_of_softmax_would_be_needed_for() -> None:
    refused("gemma2", r"caps its scores \(softcap\).*'flash'")
    refused("gpt_oss", r"attention sinks.*'flash'")
    with pytest.raises(ValueError, match=r"position bias.*'sdpa' or 'eager'"):
        config = T5Config(d_model=32, d_ff=32, d_kv=8, num_heads=4, num_layers=1, vocab_size=64)
        T5Model._from_config(config, attn_implementation="linear").eval()(
            random_ids(1, 5), decoder_input_ids=random_ids(1, 3)
        )
    model = tiny_model("llama", "linear", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"no attention dropout"):
        model(random_ids(1, 5))


def test_masks_of_the_callers_own() -> None:
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    refused(
        "llama",
        r"4D attention_mask.*'flash'",
        dict(input_ids=random_ids(2, 6), attention_mask=mask),
    )


def test_sequences_with_more_keys_than_queries() -> None:
    lengths = dict(cu_seq_lens_q=torch.tensor([0, 3, 6]), cu_seq_lens_k=torch.tensor([0, 2, 6]))
    refused("llama", "numbers queries and keys apart", dict(input_ids=random_ids(1, 6), **lengths))


def test_compiled_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.compile every mask is a dense one."""
    model = tiny_model("llama", "linear")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"do not compile.*'flash'"):
        model(random_ids(1, 6))


def test_latent_attention_has_no_keys_to_sum() -> None:
    model = tiny_model(
        "deepseek_v3", "linear", num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, first_k_dense_replace=2,
    )  # fmt: skip
    ids = random_ids(1, 6)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="multi-head latent attention"):
        model(ids[:, :1], past_key_values=cache)
    model(ids, use_cache=False).logits.sum().backward()  # training needs no cache


def test_cross_attention_layers_come_back_to_their_keys() -> None:
    """Mllama asks the cache whether a cross-attention layer holds keys already."""
    config = MllamaTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, cross_attention_layers=[1],
        initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = MllamaForCausalLM._from_config(config, attn_implementation="linear").eval()
    ids = random_ids(1, 6)
    cache = model(ids[:, :4]).past_key_values
    stepwise = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (4, 5)]
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(stepwise, 1), whole[:, 4:], rtol=1e-4, atol=1e-4)


def test_favor_needs_to_know_the_layer() -> None:
    model = tiny_model("distilbert", "linear", dim=32, hidden_dim=32, n_layers=1, n_heads=4,
                       attention_dropout=0.0)  # fmt: skip
    model(random_ids(1, 5))
    configure(model, LinearConfig("favor"))
    with pytest.raises(ValueError, match=r"layer_idx.*feature_map='elu'"):
        model(random_ids(1, 5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"feature_map": "relu"}, "must be one of 'elu', 'favor', got 'relu'"),
        ({"feature_map": "favor", "num_features": 0}, "num_features must be an integer >= 1"),
        ({"feature_map": "favor", "seed": -1}, "seed must be an integer >= 0"),
        ({"feature_map": "favor", "redraw": 1.5}, "redraw must be an integer >= 0"),
        ({"num_features": 32}, "belong to feature_map='favor'"),
        ({"seed": 1}, "belong to feature_map='favor'"),
    ],
)
def test_parameters(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearConfig(**values)


def test_layers_with_a_window_stay_exact() -> None:
    """All layers of such a Mistral; so it equals ``flash``."""
    model = tiny_model("mistral", "linear")
    assert model.config.sliding_window
    ids = random_ids(2, LENGTH)
    assert torch.equal(model(ids).logits, twin(model, "flash")(ids).logits)
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = twin(model, "flash").generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)


def test_configs_are_left_alone() -> None:
    config = tiny_config("llama")
    before = copy.deepcopy(config).to_dict()
    configure(config, LinearConfig("favor", 7))
    stored = config.attn_params["linear"]
    assert stored == {"feature_map": "favor", "num_features": 7, "seed": 0, "redraw": 0}
    del config.attn_params["linear"]
    assert {k: v for k, v in config.to_dict().items() if k != "attn_params"} == before
