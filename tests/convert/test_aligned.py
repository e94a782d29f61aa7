"""`method="aligned"`: turning heads is exact, merging them best, grouping finds pairs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_attn_plugin.convert import to_gqa
from hf_attn_plugin.convert.gqa_aligned import (
    LayerHeads,
    RotaryPlanes,
    group_heads,
    merge_heads,
)
from hf_attn_plugin.convert.gqa_calibration import input_covariances
from hf_attn_plugin.convert.gqa_layers import Conversion
from hf_attn_plugin.convert.gqa_plan import plan_gqa
from hf_attn_plugin.convert.gqa_rotary import rotary_planes

HALVES = RotaryPlanes(torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([2, 5]))


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_layer(heads: int = 8, kv_heads: int = 4, seed: int = 0) -> LayerHeads:
    return LayerHeads(
        randn(heads, 6, 9, seed=seed),
        randn(kv_heads, 6, 9, seed=seed + 1),
        randn(kv_heads, 5, 9, seed=seed + 2),
        randn(heads, 7, 5, seed=seed + 3),
    )


def rotation(position: int) -> Tensor:
    """The rotary embedding of HALVES at a position."""
    matrix = torch.eye(6, dtype=torch.float64)
    for a, b, frequency in ((0, 3, 1.0), (1, 4, 0.3)):
        angle = torch.tensor(position * frequency, dtype=torch.float64)
        matrix[a, a] = matrix[b, b] = angle.cos()
        matrix[a, b], matrix[b, a] = -angle.sin(), angle.sin()
    return matrix


def scores(layer: LayerHeads, distance: int) -> Tensor:
    """Every query head's score as a matrix between two inputs at a distance."""
    share = len(layer.query) // len(layer.key)
    keys = layer.key.repeat_interleave(share, 0)
    return layer.query.mT @ rotation(distance) @ keys


def outputs(layer: LayerHeads) -> Tensor:
    """Every query head's map from input to output."""
    share = len(layer.query) // len(layer.value)
    return layer.output @ layer.value.repeat_interleave(share, 0)


def turned(layer: LayerHeads, seed: int = 9) -> LayerHeads:
    """The same layer in other bases."""
    share = len(layer.query) // len(layer.key)
    query, key = layer.query.clone(), layer.key.clone()
    mix = torch.eye(5) + 0.4 * randn(len(key), 5, 5, seed=seed)
    value = mix @ layer.value
    output = layer.output @ mix.inverse().repeat_interleave(share, 0)
    for plane, (a, b) in enumerate(((0, 3), (1, 4))):
        parts = randn(2, len(key), 1, seed=seed + plane + 1)
        factor = torch.complex(parts[0], parts[1])
        k = factor * torch.complex(layer.key[:, a], layer.key[:, b])
        back = (1 / factor.conj()).repeat_interleave(share, 0)
        q = back * torch.complex(layer.query[:, a], layer.query[:, b])
        key[:, a], key[:, b], query[:, a], query[:, b] = k.real, k.imag, q.real, q.imag
    mix = torch.eye(2) + 0.4 * randn(len(key), 2, 2, seed=seed + 5)
    rest = [2, 5]
    key[:, rest] = mix @ layer.key[:, rest]
    query[:, rest] = mix.inverse().mT.repeat_interleave(share, 0) @ layer.query[:, rest]
    return LayerHeads(query, key, value, output)


def assert_same_layer(actual: LayerHeads, expected: LayerHeads) -> None:
    torch.testing.assert_close(outputs(actual), outputs(expected), rtol=1e-8, atol=1e-8)
    for distance in (0, 1, 7):
        torch.testing.assert_close(
            scores(actual, distance), scores(expected, distance), rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("calibrated", [False, True])
def test_groups_of_one_head_are_the_same_layer(calibrated: bool) -> None:
    inputs = randn(40, 9, seed=5)
    covariance = inputs.mT @ inputs if calibrated else None
    layer = random_layer()
    merged = merge_heads(layer, 4, HALVES, covariance)
    assert_same_layer(merged, layer)
    assert not torch.allclose(merged.value, layer.value)
    # The control: without its planes the embedding does not commute with what was done.
    wrong = RotaryPlanes(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([4, 5]))
    other = merge_heads(turned(layer), 4, wrong, covariance)
    torch.testing.assert_close(outputs(other), outputs(layer), rtol=1e-8, atol=1e-8)
    mixed = merge_heads(LayerHeads(*map(_doubled, _parts(turned(layer)))), 4, wrong, covariance)
    assert not torch.allclose(scores(mixed, 7)[::2], scores(layer, 7), rtol=0.1, atol=0.1)


def _parts(layer: LayerHeads) -> tuple[Tensor, ...]:
    return layer.query, layer.key, layer.value, layer.output


def _doubled(heads: Tensor) -> Tensor:
    return heads.repeat_interleave(2, 0)


@pytest.mark.parametrize("calibrated", [False, True])
def test_heads_that_are_turned_copies_merge_exactly(calibrated: bool) -> None:
    inputs = randn(40, 9, seed=5)
    covariance = inputs.mT @ inputs if calibrated else None
    layer = random_layer()
    layer.key[2:], layer.value[2:] = layer.key[:2], layer.value[:2]
    changed = turned(layer)
    assert_same_layer(changed, layer)
    order = group_heads(changed, 2, HALVES, covariance)
    assert order == [0, 2, 1, 3]
    merged = merge_heads(changed.reorder(order), 2, HALVES, covariance)
    assert len(merged.key) == len(merged.value) == 2
    assert_same_layer(merged, layer.reorder(order))
    # The control: averaging them is far from it.
    averaged = LayerHeads(
        changed.query,
        changed.key.view(2, 2, 6, 9).mean(1),
        changed.value.view(2, 2, 5, 9).mean(1),
        changed.output,
    )
    assert not torch.allclose(outputs(averaged), outputs(layer), rtol=0.1, atol=0.1)


def test_the_order_is_the_best_of_all() -> None:
    def loss(layer: LayerHeads, order: list[int]) -> float:
        again = layer.reorder(order)
        merged = merge_heads(again, 2, HALVES)
        return float((outputs(merged) - outputs(again)).square().sum())

    chosen, natural = [], []
    for seed in range(6):
        layer = random_layer(4, 4, seed=10 * seed)
        # Keys play no part in this measure: make them equal.
        layer.key[:] = layer.key[0]
        partners = [[0, p, *(h for h in (1, 2, 3) if h != p)] for p in (1, 2, 3)]
        losses = [loss(layer, order) for order in partners]
        found = loss(layer, group_heads(layer, 2, HALVES))
        chosen.append(found / min(losses))
        natural.append(losses[0] / min(losses))
    assert max(chosen) < 1 + 1e-9
    assert max(natural) > 1.01


def test_nothing_nearby_is_better() -> None:
    """The shared value head has the least error that any nearby head has."""
    layer = random_layer()
    merged = merge_heads(layer, 2, HALVES)
    wanted = outputs(layer)

    def error(value: Tensor) -> float:
        shared = value.repeat_interleave(4, 0)  # [8, 5, 9]
        # The best output projection for these values, by least squares.
        fitted = wanted @ torch.linalg.pinv(shared)
        return float((fitted @ shared - wanted).square().sum())

    least = error(merged.value)
    own = float((outputs(merged) - wanted).square().sum())
    assert own == pytest.approx(least)
    for seed in range(20):
        assert error(merged.value + 0.01 * randn(2, 5, 9, seed=seed)) > least


def test_order_does_not_depend_on_chance() -> None:
    layer = random_layer(16, 16)
    orders = [group_heads(layer, groups, HALVES) for groups in (8, 8, 2, 1, 16)]
    assert orders[0] == orders[1]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert orders[3] == orders[4] == list(range(16))


def test_heads_without_energy() -> None:
    layer = random_layer()
    for part in (layer.key, layer.value, layer.output):
        part[:2] = 0
    merged = merge_heads(layer, 2, HALVES)
    assert all(torch.isfinite(part).all() for part in _parts(merged))


def make(family: str = "llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0,
        "max_position_embeddings": 64, "initializer_range": 0.5, "attention_bias": True,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


IDS = torch.arange(1, 41).view(2, 20)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


EXTRA: dict[str, Any] = {
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 1, "vocab_size_per_layer_input": 64},
    "qwen3_next": {"layer_types": ["full_attention"] * 2},
}


@pytest.mark.parametrize("family", ["llama", "phi", "glm", "cohere", "gpt_oss", "qwen3", "olmo2"])
def test_equal_heads_anywhere_in_a_layer(family: str) -> None:
    """Biases, norms, sinks and grouped queries move with the heads."""
    model = make(family, **EXTRA.get(family, {}))
    for name, rows in plan_gqa(type(model), model.config, 2).rows.items():
        for run in rows:
            part = model.get_parameter(name).data[run.start : run.stop]
            halves = part.unflatten(0, (2, 2, run.head_dim))
            halves[1] = halves[0]
    before = logits(model)
    mean = logits(to_gqa(copy.deepcopy(model), 2))
    aligned = logits(to_gqa(model, 2, "aligned"))
    torch.testing.assert_close(aligned, before, rtol=0, atol=2e-4 * float(before.abs().max()))
    assert float((mean - before).norm() / before.norm()) > 0.05


def test_calibration_fits_what_the_model_sees() -> None:
    """Its error on the inputs is smaller than that of weights alone, which is below the mean's."""
    model = make(num_hidden_layers=1)
    before = attention_output(model)
    batches = [{"input_ids": IDS}]
    found = {
        "mean": to_gqa(copy.deepcopy(model), 2),
        "aligned": to_gqa(copy.deepcopy(model), 2, "aligned"),
        "calibrated": to_gqa(copy.deepcopy(model), 2, "aligned", calibration=batches),
    }
    errors = {n: float((attention_output(m) - before).norm()) for n, m in found.items()}
    assert errors["calibrated"] < errors["aligned"] < errors["mean"]


@torch.no_grad()
def attention_output(model: PreTrainedModel) -> Tensor:
    seen: list[Tensor] = []
    layer = model.model.layers[0].self_attn
    hook = layer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    model(input_ids=IDS)
    hook.remove()
    return seen[0]


def test_covariances_leave_padding_out() -> None:
    model = make()
    plan = plan_gqa(type(model), model.config, 2)
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    padded = input_covariances(model, plan, [{"input_ids": IDS, "attention_mask": mask}])
    first, second = (
        input_covariances(model, plan, [{"input_ids": ids[None]}]) for ids in (IDS[0, 7:], IDS[1])
    )
    name = "model.layers.0.self_attn"
    torch.testing.assert_close(
        padded[name], (13 * first[name] + 20 * second[name]) / 33, rtol=1e-4, atol=1e-5
    )
    assert padded[name].shape == (49, 49)
    assert padded[name][-1, -1] == 1
    assert not model.training


def test_refusals_and_what_they_leave() -> None:
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="calibration is for method='aligned'"):
        to_gqa(model, 2, "mean", calibration=[{"input_ids": IDS}])
    with pytest.raises(ValueError, match="never reach"):
        to_gqa(model, 2, "aligned", calibration=[])
    for family, reason in (
        ("qwen3_next", "has not just projections|beside its projections"),
        ("bitnet", "attn_sub_norm"),
        ("gemma3n_text", "use the keys and values of others"),
    ):
        other = make(family, **EXTRA.get(family, {}))
        with pytest.raises(ValueError, match=reason) as error:
            to_gqa(other, 2, "aligned")
        assert "use method='mean'" in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p.grad_fn for p in model.parameters())


def test_planes_are_those_of_the_model() -> None:
    for family, planes, rest in (
        ("llama", [(0, 4), (1, 5), (2, 6), (3, 7)], []),
        ("cohere", [(0, 1), (2, 3), (4, 5), (6, 7)], []),
        ("glm", [(0, 1), (2, 3)], [4, 5, 6, 7]),
        ("phi", [(0, 2), (1, 3)], [4, 5, 6, 7]),
    ):
        model = make(family)
        (attention, *_) = (m for m in model.modules() if type(m).__name__.endswith("Attention"))
        found = rotary_planes(attention, model.config, 8)
        assert found is not None
        assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == planes
        assert found.rest.tolist() == rest


def test_no_planes_where_rotations_are_not_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def sheared(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q + q.roll(1, -1), k

    attention = make().model.layers[0].self_attn
    assert rotary_planes(attention, make().config, 8) is not None
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", sheared)
    assert rotary_planes(attention, make().config, 8) is None


def test_aligned_conversion_is_deterministic_and_trains() -> None:
    one, two = (to_gqa(make(), 2, "aligned") for _ in range(2))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    one(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in one.parameters() if p.requires_grad)
    assert one.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 23)


def test_what_changes_is_said_beforehand() -> None:
    model = make()
    conversion = Conversion(type(model), model.config, 2, "aligned")
    old = {name: p.clone() for name, p in model.named_parameters()}
    to_gqa(model, 2, "aligned")
    changed = {
        name
        for name, p in model.named_parameters()
        if p.shape != old[name].shape or not torch.equal(p, old[name])
    }
    named = set(itertools.chain(*conversion.parameters.values()))
    assert changed == named
    assert {name: conversion.new_shape(name) for name in named} == {
        name: model.get_parameter(name).shape for name in named
    }
    assert dataclasses.is_dataclass(conversion.plan)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", ["q_proj.weight", "k_proj.weight", "v_proj.bias", "o_proj.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(heads: int, name: str, value: float) -> None:
    model = make()
    name = f"model.layers.1.self_attn.{name}"
    model.get_parameter(name).data[0] = value
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"{name} holds values that are not finite"):
        to_gqa(model, heads, "aligned")
    assert all(p.equal(before[n]) for n, p in model.named_parameters() if n != name)
    assert model.config.num_key_value_heads == 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_losses_that_are_not_finite_do_not_hang(value: float) -> None:
    layer = random_layer()
    layer.key[0, 0, 0] = value
    keys_alone = dataclasses.replace(HALVES, rest=torch.tensor([], dtype=torch.int64))
    assert sorted(group_heads(layer, 2, keys_alone)) == [0, 1, 2, 3]


@pytest.mark.parametrize("heads", [1, 2])
def test_calibration_that_overflows_is_refused(heads: int) -> None:
    model = make()
    model.model.layers[1].input_layernorm.weight.data.fill_(1e30)
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\.self_attn.*not finite"):
        to_gqa(model, heads, "aligned", calibration=[{"input_ids": IDS}])
    assert model.config.num_key_value_heads == 4


def test_calibration_leaves_every_module_in_its_mode() -> None:
    model = make().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    to_gqa(model, 2, "aligned", calibration=[{"input_ids": IDS}])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


@pytest.mark.parametrize("calibration", [[IDS], {"input_ids": IDS}, IDS, [("input_ids", IDS)]])
def test_calibration_that_is_no_batches_is_refused(calibration: Any) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"mapping of arguments .* such as \[\{'input_ids': ids"):
        to_gqa(model, 2, "aligned", calibration=calibration)
    assert model.config.num_key_value_heads == 4
    assert not any(module._forward_pre_hooks for module in model.modules())
