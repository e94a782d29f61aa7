"""A method's parameters live in the model's config and travel with it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import running
from tiny import LENGTH, random_ids, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, LlamaConfig

import hf_attn_plugin
from hf_attn_plugin import (
    FlashConfig,
    LongformerConfig,
    SlidingWindowConfig,
    SparQConfig,
    StridedConfig,
    configure,
)
from hf_attn_plugin.config import head_dim_of, parameters_of
from hf_attn_plugin.integrations import attn_params

ALL = [
    FlashConfig(),
    SlidingWindowConfig(window=5, num_sink_tokens=2),
    LongformerConfig(window=3, num_global_tokens=0, dilation=2),
    StridedConfig(window=2, stride=7),
    SparQConfig(rank=3, top_k=6, local_window=2, mean_value_reallocation=True),
]


def nested_config() -> Gemma3Config:
    text = tiny_config("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


@pytest.mark.parametrize("parameters", ALL, ids=lambda p: p.name)
def test_round_trip_through_a_folder(parameters: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", parameters.name)
    assert configure(model, parameters) is model
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["attn_params"]
    assert written == {parameters.name: parameters.to_dict()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=parameters.name)
    assert parameters_of(loaded.config, type(parameters)) == parameters
    assert parameters_of(AutoConfig.from_pretrained(tmp_path), type(parameters)) == parameters
    ids = random_ids(1, LENGTH)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_parameters_change_what_is_computed() -> None:
    """The control: the stored window is the one that is used."""
    model = tiny_model("llama", "sliding_window")
    ids = random_ids(1, LENGTH)
    logits = [
        configure(model, SlidingWindowConfig(window=window))(ids).logits for window in (4, 5, 4)
    ]
    assert (logits[0] - logits[1]).abs().max() > 0.05
    assert torch.equal(logits[0], logits[2])


def test_methods_do_not_overwrite_each_other() -> None:
    config = LlamaConfig()
    for parameters in ALL:
        configure(config, parameters)
    for parameters in ALL:
        assert parameters_of(config, type(parameters)) == parameters
    configure(config, SparQConfig(top_k=9))
    assert parameters_of(config, SparQConfig) == SparQConfig(top_k=9)
    assert parameters_of(config, StridedConfig) == ALL[3]


def test_a_config_without_parameters_is_left_alone(tmp_path: Path) -> None:
    config = LlamaConfig()
    assert config.attn_params is None
    assert "attn_params" not in config.to_dict()
    assert "attn_params" not in config.to_diff_dict()
    assert parameters_of(config, SparQConfig) == SparQConfig()
    config.save_pretrained(tmp_path)
    assert "attn_params" not in (tmp_path / "config.json").read_text()


def test_overriding_at_load(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    given = {"sliding_window": {"window": 4}}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sliding_window", attn_params=given
    )
    assert parameters_of(model.config, SlidingWindowConfig).window == 4
    assert AutoConfig.from_pretrained(tmp_path, attn_params=given).attn_params == given
    model.save_pretrained(tmp_path)
    other = AutoConfig.from_pretrained(tmp_path, attn_params={"sparq": {"rank": 2}})
    assert other.attn_params == {"sparq": {"rank": 2}}
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.attn_params == given


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_their_own(copied: Any) -> None:
    config = configure(LlamaConfig(), SparQConfig(rank=5))
    other = copied(config)
    assert other.attn_params == config.attn_params
    configure(other, SparQConfig(rank=6))
    assert parameters_of(config, SparQConfig).rank == 5


def test_nested_configs_get_them(tmp_path: Path) -> None:
    config = configure(nested_config(), SparQConfig(rank=2))
    for part in (config, config.text_config, config.vision_config):
        assert parameters_of(part, SparQConfig).rank == 2
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert parameters_of(again.text_config, SparQConfig).rank == 2
    given = {"sparq": {"rank": 3}}
    overridden = AutoConfig.from_pretrained(tmp_path, attn_params=given)
    assert parameters_of(overridden.text_config, SparQConfig).rank == 3
    assert parameters_of(overridden, SparQConfig).rank == 3


def test_nested_configs_get_them_at_construction() -> None:
    given = {"sparq": {"rank": 3}}
    config = nested_config()
    built = Gemma3Config(
        text_config=config.text_config.to_dict(),
        vision_config=config.vision_config.to_dict(),
        attn_params=given,
    )
    assert parameters_of(built.text_config, SparQConfig).rank == 3


def test_one_part_alone_keeps_its_own(tmp_path: Path) -> None:
    config = nested_config()
    configure(config.text_config, SparQConfig(rank=2))
    assert config.attn_params is None
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert parameters_of(again.text_config, SparQConfig).rank == 2
    configure(again, StridedConfig(stride=9))
    assert parameters_of(again.text_config, StridedConfig).stride == 9
    assert parameters_of(again.text_config, SparQConfig).rank == 2, "another method's were lost"


def test_parameters_reach_the_text_layers_of_a_multimodal_model() -> None:
    from transformers import Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration._from_config(
        nested_config(),
        attn_implementation={"text_config": "sliding_window", "vision_config": "eager"},
    ).eval()
    ids = random_ids(1, LENGTH)
    wide = configure(model, SlidingWindowConfig(window=5))(ids).logits
    narrow = configure(model, SlidingWindowConfig(window=1))(ids).logits
    assert (wide - narrow).abs().max() > 1e-3


def test_a_peft_model_is_configured_through_its_wrapper() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", "sliding_window")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert configure(wrapped, SlidingWindowConfig(window=4)) is wrapped
    assert parameters_of(model.config, SlidingWindowConfig).window == 4
    with hf_attn_plugin.count_reads(wrapped) as reads:
        wrapped(input_ids=random_ids(1, LENGTH))
    assert reads.calls == {"sliding_window": 2}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"spark": {}}, "unknown method 'spark'; known are"),
        ({"sparq": {"r": 8}}, "has no parameter 'r'; it has rank, top_k"),
        ({"sparq": {"rank": 0}}, "rank must be an integer >= 1, got 0"),
        ({"sparq": {"rank": "8"}}, "rank must be an integer >= 1, got '8'"),
        ({"sparq": 8}, r"attn_params\['sparq'\] must be a dictionary, got 8"),
        ({"flash": {"window": 4}}, "FlashConfig has no parameter 'window'; it has none"),
        ([], "attn_params must be a dictionary"),
        ("sparq", "attn_params must be a dictionary"),
    ],
)
def test_wrong_parameters_are_refused_wherever_they_come_from(
    value: Any, message: str, tmp_path: Path
) -> None:
    config = LlamaConfig()
    with pytest.raises(ValueError, match=message):
        config.attn_params = value
    assert config.attn_params is None
    with pytest.raises(ValueError, match=message):
        LlamaConfig(attn_params=value)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, attn_params=value)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_params": value}))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_rank_above_head_dim_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", "sparq")
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 8, got 9"):
        configure(model, SparQConfig(rank=9))
    assert model.config.attn_params is None
    configure(model, SparQConfig(rank=8))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sparq", attn_params={"sparq": {"rank": 9}}
    )
    with pytest.raises(ValueError, match="from 1 to 8, got 9"):
        loaded(random_ids(1, 4))


@pytest.mark.parametrize("wrong", [{"window": 4}, SparQConfig, "sparq", None])
def test_configure_takes_our_dataclasses_only(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"configure\(\) takes one of hf_attn_plugin's Flash"):
        configure(LlamaConfig(), wrong)


def test_configure_takes_models_and_configs_only() -> None:
    with pytest.raises(ValueError, match="takes a transformers model or config; got Linear"):
        configure(torch.nn.Linear(2, 2), FlashConfig())  # type: ignore[arg-type]


def test_uninstalling_takes_the_property_away(registries: None) -> None:
    attn_params.install()
    attn_params.install()
    attn_params.uninstall()
    assert not hasattr(LlamaConfig(), "attn_params")
    attn_params.uninstall()
    attn_params.install()
    assert LlamaConfig(attn_params={"sparq": {"rank": 2}}).attn_params == {"sparq": {"rank": 2}}


def test_a_parts_own_parameters_survive_saving(tmp_path) -> None:
    from transformers import AutoConfig, Gemma3Config

    config = Gemma3Config(text_config=tiny_config("gemma3_text").to_dict())
    hf_attn_plugin.configure(config, hf_attn_plugin.SlidingWindowConfig(window=100))
    hf_attn_plugin.configure(config.text_config, hf_attn_plugin.SlidingWindowConfig(window=7))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.attn_params["sliding_window"]["window"] == 100
    assert loaded.text_config.attn_params["sliding_window"]["window"] == 7


def test_the_rank_of_latent_attention_may_reach_the_whole_query() -> None:
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(qk_nope_head_dim=128, qk_rope_head_dim=64)
    hf_attn_plugin.configure(config, hf_attn_plugin.SparQConfig(rank=192))
    with pytest.raises(ValueError, match="from 1 to 192"):
        hf_attn_plugin.configure(config, hf_attn_plugin.SparQConfig(rank=193))


def test_layers_may_differ_in_head_dim() -> None:
    """Gemma 4: transformers refuses to say one head_dim for all of its layers."""
    eager = running.eager_model("gemma4_text")
    widths = [layer.head_dim for layer in eager.config.per_layer_config]
    assert len(set(widths)) == 2
    assert head_dim_of(eager.config) == min(widths)
    model = running.build(type(eager), eager.config, "sparq")
    with pytest.raises(ValueError, match=rf"rank must be an integer from 1 to {min(widths)}"):
        hf_attn_plugin.configure(model, SparQConfig(rank=min(widths) + 1))
    ids = torch.arange(3, 19)[None]

    def step(rank: int | None) -> Any:
        hf_attn_plugin.configure(model, SparQConfig(rank=rank, top_k=4))
        cache = model(ids[:, :-1]).past_key_values
        return model(ids[:, -1:], past_key_values=cache).logits

    with torch.no_grad():
        assert not torch.equal(step(1), step(None))  # None: a quarter of each layer's own
