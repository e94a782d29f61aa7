"""Pooling of key/value heads: against tensors pooled by hand, logits before and after, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_attn_plugin.convert import plan_gqa, pool_heads, to_gqa

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
NO_KV: dict[str, object] = {"num_key_value_heads": None, "head_dim": None}
FAMILIES = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
    "phi": {},
    "starcoder2": {},
    "smollm3": {},
}


def make(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = SIZES | FAMILIES.get(family, {}) | changes
    config = AutoConfig.for_model(family, **{k: v for k, v in sizes.items() if v is not None})
    return AutoModelForCausalLM.from_config(config).eval()


def make_multimodal() -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3",
        text_config=SIZES | {"sliding_window": 4, "initializer_range": 0.5},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config).eval()


def projections(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(("k_proj", "v_proj")) and "vision" not in name
    }


def randomize_biases(model: PreTrainedModel) -> None:
    for linear in projections(model).values():
        if linear.bias is not None:
            nn.init.normal_(linear.bias)


def make_heads_equal_in_groups(model: PreTrainedModel, heads: int, new_heads: int) -> None:
    for linear in projections(model).values():
        for parameter in linear.parameters():
            groups = parameter.data.unflatten(0, (new_heads, heads // new_heads, -1))
            groups[:] = groups[:, :1].clone()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(1, 25).reshape(2, 12)
    return model(input_ids=ids).logits


def test_pool_heads_by_hand() -> None:
    # Four heads of two rows each.
    weight = torch.tensor([[1.0], [2.0], [3.0], [6.0], [0.0], [0.0], [8.0], [-4.0]])
    assert pool_heads(weight, 4, 2).tolist() == [[2.0], [4.0], [4.0], [-2.0]]
    assert pool_heads(weight, 4, 2, "first").tolist() == [[1.0], [2.0], [0.0], [0.0]]
    assert pool_heads(weight, 4, 1).tolist() == [[3.0], [1.0]]
    assert pool_heads(weight[:, 0], 4, 2).tolist() == [2.0, 4.0, 4.0, -2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_heads_pool_to_themselves_in_any_dtype(dtype: torch.dtype) -> None:
    head = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    pooled = pool_heads(head.repeat(3, 1), 3, 1)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, head)


def test_first_head_is_a_copy() -> None:
    weight = torch.ones(4, 1)
    pool_heads(weight, 4, 4, "first").zero_()
    assert weight.sum() == 4


def test_pool_heads_refusals() -> None:
    with pytest.raises(ValueError, match="one of 1, 2, 3, 6"):
        pool_heads(torch.zeros(12, 2), 6, 4)
    with pytest.raises(ValueError, match="not a whole number for each of 6 heads"):
        pool_heads(torch.zeros(13, 2), 6, 3)
    with pytest.raises(ValueError, match=r"torch\.int8 cannot be pooled"):
        pool_heads(torch.zeros(12, 2, dtype=torch.int8), 6, 3)
    with pytest.raises(ValueError, match="must be mean or first"):
        pool_heads(torch.zeros(12, 2), 6, 3, "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_heads_keep_the_logits(family: str) -> None:
    model = make(family)
    randomize_biases(model)
    make_heads_equal_in_groups(model, 12, 4)
    before = logits(model)
    assert to_gqa(model, 4) is model
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4 * before.abs().max())

    groups = [m.num_key_value_groups for m in model.modules() if hasattr(m, "num_key_value_groups")]
    assert groups == [3, 3]
    assert model.config.num_key_value_heads == 4
    assert [linear.out_features for linear in projections(model).values()] == [32] * 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", [4, 1])
def test_save_and_load(family: str, heads: int, tmp_path: Path) -> None:
    model = to_gqa(make(family), heads)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.num_key_value_heads == heads
    assert torch.equal(logits(loaded), logits(model))
    # Nothing is left behind that only a freshly built model has right.
    for module, fresh in zip(model.modules(), loaded.modules(), strict=True):
        expected = {key: value for key, value in vars(fresh).items() if type(value) is int}
        assert {key: vars(module)[key] for key in expected} == expected


@pytest.mark.parametrize("method", ["mean", "first"])
def test_weights_and_biases_are_pooled(method: str) -> None:
    model = make("llama")
    randomize_biases(model)
    before = copy.deepcopy(projections(model))
    others = {n: p.clone() for n, p in model.named_parameters() if "k_proj" not in n}
    to_gqa(model, 3, method)  # type: ignore[arg-type]
    for name, linear in projections(model).items():
        for new, old in zip(linear.parameters(), before[name].parameters(), strict=True):
            heads = old.reshape(3, 4, 8, *old.shape[1:])
            expected = heads.mean(1) if method == "mean" else heads[:, 0]
            torch.testing.assert_close(new, expected.flatten(0, 1))
    for name, parameter in model.named_parameters():
        if "k_proj" not in name and "v_proj" not in name:
            assert torch.equal(parameter, others[name])


def test_random_heads_are_the_initializers() -> None:
    one, two, other = (
        projections(to_gqa(make("qwen2"), 6, "random", seed=seed)) for seed in (1, 1, 2)
    )
    weights = torch.stack([linear.weight for linear in one.values()])
    assert weights.std().item() == pytest.approx(0.5, rel=0.05)
    assert all(torch.equal(one[name].weight, two[name].weight) for name in one)
    assert not any(torch.equal(one[name].weight, other[name].weight) for name in one)
    assert not torch.equal(weights[0], weights[1])
    assert all(not linear.bias.any() for linear in one.values())

    model = make("llama")
    state = torch.get_rng_state()
    to_gqa(model, 6, "random")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_same_number_of_heads_changes_nothing(method: str) -> None:
    model = make("llama", num_key_value_heads=4)
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    config = model.config.to_dict()
    to_gqa(model, 4, method)  # type: ignore[arg-type]
    assert model.config.to_dict() == config
    for name, parameter in model.named_parameters():
        same, pointer, values = before[name]
        assert parameter is same
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, values)


def test_shared_heads_can_be_shared_further() -> None:
    once, twice = make("llama"), make("llama")
    to_gqa(once, 2)
    to_gqa(to_gqa(twice, 6), 2)
    torch.testing.assert_close(logits(once), logits(twice), rtol=1e-4, atol=1e-4)


def test_ties_dtype_and_requires_grad_stay() -> None:
    model = make("llama", tie_word_embeddings=True).to(torch.bfloat16)
    model.model.layers[0].self_attn.k_proj.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    to_gqa(model, 4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_converted_model_trains_and_generates() -> None:
    model = to_gqa(make("llama"), 4)
    ids = torch.arange(1, 13)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(linear.weight.grad.any() for linear in projections(model).values())
    cache = model(input_ids=ids).past_key_values
    assert cache.layers[0].keys.shape == (1, 4, 12, 8)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 16)


def test_nested_text_config(tmp_path: Path) -> None:
    model = make_multimodal()
    make_heads_equal_in_groups(model, 12, 4)
    vision = {n: p.clone() for n, p in model.named_parameters() if "vision" in n}
    before = logits(model)
    to_gqa(model, 4)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4 * before.abs().max())
    assert model.config.text_config.num_key_value_heads == 4
    assert model.config.vision_config.num_attention_heads == 4
    assert all(torch.equal(p, vision[n]) for n, p in model.named_parameters() if "vision" in n)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))


def test_plan_needs_no_weights_and_counts_the_cache() -> None:
    model = make("llama")
    config = copy.deepcopy(model.config)
    plan = plan_gqa(type(model), config, 3)
    assert plan.cache_elements() == (2 * 2 * 12 * 8, 2 * 2 * 3 * 8)
    assert config.to_dict() == model.config.to_dict()
    assert ("model.layers.1.self_attn", "num_key_value_groups", 4) in plan.attributes


@pytest.mark.parametrize("heads", [5, 0, -1, 24, 13, 2.0, True, "4"])
def test_numbers_that_do_not_divide_are_refused(heads: object) -> None:
    check_refused(make("llama"), "must be one of 1, 2, 3, 4, 6, 12", heads)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", NO_KV, "gpt2 has no `num_key_value_heads`"),
        ("gpt_neox", NO_KV, "gpt_neox has no `num_key_value_heads`"),
        (
            "opt",
            NO_KV | {"word_embed_proj_dim": 48, "ffn_dim": 32},
            "opt has no `num_key_value_heads`",
        ),
        ("deepseek_v3", {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}, "no weight of"),
        ("bart", NO_KV | {"d_model": 48}, "bart is an encoder-decoder|bart has no"),
        ("doge", {}, r"because self_attn\.A, self_attn\.dt_proj\.weight depends on"),
    ],
)
def test_families_are_refused_by_name(
    family: str, changes: dict[str, object], message: str
) -> None:
    error = check_refused(make(family, **changes), message, heads=2)
    assert "supported are" in error


def test_fused_projections_keep_their_queries() -> None:
    model = make("phi3")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    old = model.get_parameter(name).detach().clone()
    to_gqa(model, 3)
    queries, keys, values = model.get_parameter(name).split((96, 24, 24))
    assert torch.equal(queries, old[:96])
    for new, rows in ((keys, old[96:192]), (values, old[192:])):
        torch.testing.assert_close(new, rows.view(3, 4, 8, 48).mean(1).flatten(0, 1))


def test_norms_over_heads_are_pooled() -> None:
    whole, per_head = make("olmo2"), make("cohere", use_qk_norm=True)
    for model, shape in ((whole, (96,)), (per_head, (12, 8))):
        norms = model.model.layers[0].self_attn
        nn.init.normal_(norms.k_norm.weight)
        old_key, old_query = norms.k_norm.weight.clone(), norms.q_norm.weight.clone()
        assert old_key.shape == shape
        to_gqa(model, 4)
        pooled = old_key.view(4, 3, 8).mean(1)
        torch.testing.assert_close(norms.k_norm.weight.view(4, 8), pooled)
        assert torch.equal(norms.q_norm.weight, old_query)


def test_layers_with_different_numbers_of_heads(tmp_path: Path) -> None:
    """Gemma 4 has fewer key/value heads in its full layers; those that have few enough stay."""
    sizes = {"num_key_value_heads": 6, "num_global_key_value_heads": 2, "attention_k_eq_v": True}
    more = {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    kinds = ["sliding_attention", "full_attention"]
    model = make("gemma4_text", **sizes, **more, layer_types=kinds, vocab_size_per_layer_input=64)
    full = model.model.layers[1].self_attn.k_proj.weight
    before = full.clone()
    with pytest.raises(
        ValueError, match=r"2, 6 key/value heads cannot become 4: .* one of 1, 2, 3, 6"
    ):
        to_gqa(model, 4)
    plan = plan_gqa(type(model), model.config, 2)
    assert [(layer.heads, layer.new_heads) for layer in plan.layers] == [(6, 2)]
    to_gqa(model, 2)
    assert torch.equal(full, before)
    layers = model.config.per_layer_config
    assert [layers[i].num_key_value_heads for i in (0, 1)] == [2, 2]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))
    to_gqa(model, 1)
    assert [layers[i].num_key_value_heads for i in (0, 1)] == [1, 1]


def test_numbers_that_the_code_derives() -> None:
    """MiMo-V2-Flash's window layers have twice the heads that its config names."""
    kinds = ["full_attention", "sliding_attention"]
    model = make("mimo_v2_flash", num_key_value_heads=6, n_routed_experts=4, layer_types=kinds)
    plan = plan_gqa(type(model), model.config, 2)
    assert [(layer.heads, layer.new_heads) for layer in plan.layers] == [(6, 2), (12, 4)]


def test_a_failure_changes_nothing() -> None:
    model = make("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[3, 3] = torch.nan
    check_refused(model, r"layers\.1\.self_attn\.v_proj\.weight holds values that are not finite")


def test_wrong_method_is_refused() -> None:
    with pytest.raises(ValueError, match="one of mean, first, random, aligned, got 'median'"):
        to_gqa(make("llama"), 4, "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", ["a", 2**70, -1, True, 1.5])
def test_wrong_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\*\*32 - 1, got"):
        to_gqa(make("llama"), 4, "random", seed=seed)


def test_a_result_from_before_does_not_disturb_training() -> None:
    model = make("llama", tie_word_embeddings=True)
    weight = model.model.layers[0].self_attn.k_proj.weight
    ids = torch.arange(1, 13)[None]
    before = model(input_ids=ids).logits
    to_gqa(model, 4)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(
        linear.weight.grad.shape == linear.weight.shape for linear in projections(model).values()
    )
    before.sum().backward()  # what was computed before belongs to the old weights
    assert weight.grad.shape == weight.shape


def test_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["k_proj", "v_proj"])
    check_refused(peft.get_peft_model(make("llama"), adapter), "merge them first")
    model = make("llama")
    model.add_adapter(adapter)
    check_refused(model, "merge them first")


def test_models_without_their_weights_are_refused() -> None:
    model = make("llama")
    model.model.layers[1].self_attn.v_proj.to("meta")
    check_refused(model, r"layers\.1\.self_attn\.v_proj\.weight has no data \(meta device\)")


def test_quantized_models_are_refused() -> None:
    model = make("llama")
    model.is_quantized = True
    check_refused(model, "quantized")

    class PackedLinear(nn.Linear):
        """Stands for the linear layers of quantization libraries."""

    model = make("llama")
    model.model.layers[0].self_attn.k_proj = PackedLinear(48, 96)
    check_refused(model, r"layers\.0\.self_attn\.k_proj\.weight is in a PackedLinear")


def test_wrapped_models_are_refused() -> None:
    with pytest.raises(ValueError, match="takes a transformers model, got Sequential"):
        to_gqa(nn.Sequential(make("llama")), 4)  # type: ignore[arg-type]


def check_refused(model: PreTrainedModel, message: str, heads: object = 4) -> str:
    """The conversion raises ValueError and leaves the model as it was."""
    config: PreTrainedConfig = model.config
    before = {name: (p.shape, p.data_ptr()) for name, p in model.named_parameters()}
    settings = copy.deepcopy(config.to_dict())
    with pytest.raises(ValueError, match=message) as error:
        to_gqa(model, heads)  # type: ignore[arg-type]
    assert {name: (p.shape, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert config.to_dict() == settings
    return str(error.value)
