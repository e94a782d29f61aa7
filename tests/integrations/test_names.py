"""The names are there whatever is imported first, cost nothing, and reach our functions."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import _EXPERTS, LENGTH, from_config, random_ids, tiny_config, tiny_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedModel,
    cache_utils,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_attn_plugin
from hf_attn_plugin.integrations.masks import pattern_mask
from hf_attn_plugin.methods import METHODS

NAMES = ["flash", "ring", "sliding_window", "longformer", "strided", "sparq"]
NAMES += ["exact_topk", "h2o", "lm_infinite", "linear"]
ALONE = [name for name in NAMES if name != "ring"]  # which insists on being one of several
EXTRAS = ["triton", "peft", "datasets", "accelerate", "lm_eval", "matplotlib"]


def fresh(code: str, *arguments: str) -> str:
    """The output of ``code`` in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    return path


def test_every_name_is_listed_with_a_line() -> None:
    listed = hf_attn_plugin.implementations()
    assert list(listed) == NAMES
    assert all(line and "\n" not in line for line in listed.values())
    listed.clear()
    assert list(hf_attn_plugin.implementations()) == NAMES, "the caller's copy is ours"


@pytest.mark.parametrize("name", NAMES)
def test_both_interfaces_know_the_name(name: str) -> None:
    assert AttentionInterface._global_mapping[name] is METHODS[name]
    assert AttentionMaskInterface._global_mapping[name] is pattern_mask


def test_registering_again_changes_nothing(registries: None) -> None:
    def state() -> list[Any]:
        return [
            dict(AttentionInterface._global_mapping),
            dict(AttentionMaskInterface._global_mapping),
            dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING),
            cache_utils.get_layer_types_and_kwargs,
            PreTrainedModel._check_and_adjust_attn_implementation,
        ]

    before = state()
    hf_attn_plugin.integrations.registry.register()
    importlib.reload(hf_attn_plugin)
    assert state() == before


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, hf_attn_plugin; hf_attn_plugin.implementations();"
        "print(*sorted(m for m in sys.modules if '.' not in m))"
    )
    loaded = set(fresh(code).split())
    assert "hf_attn_plugin" in loaded
    assert not loaded & {"torch", "transformers", "numpy", *EXTRAS}


def test_registering_loads_no_extra() -> None:
    """Whatever transformers itself loads, the plugin adds no optional package to it."""
    code = (
        "import sys; {}import transformers.modeling_utils;"
        "print(*sorted(m for m in sys.modules if '.' not in m))"
    )
    without = set(fresh(code.format("")).split())
    added = set(fresh(code.format("import hf_attn_plugin; ")).split()) - without
    assert not added & set(EXTRAS)


def test_import_is_quick() -> None:
    """Under 0.2 s on top of ``import transformers``: the best of three, timed inside."""
    code = (
        "import time, transformers; start = time.perf_counter(); import hf_attn_plugin;"
        "print(time.perf_counter() - start)"
    )
    assert min(float(fresh(code)) for _ in range(3)) < 0.2


ORDERS = {
    "plugin first": "import hf_attn_plugin, torch, transformers",
    "plugin last": "import transformers, torch, hf_attn_plugin",
    "plugin after the model class": "from transformers import AutoModelForCausalLM, LlamaModel;"
    "import hf_attn_plugin",
}


@pytest.mark.parametrize("order", ORDERS)
def test_loading_by_name_in_a_fresh_process(order: str, saved: Path) -> None:
    code = f"""{ORDERS[order]}
import sys, torch
from transformers import AutoModelForCausalLM
for name in {ALONE}:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation=name)
    with hf_attn_plugin.count_reads(model) as reads:
        model(torch.arange(3, 12)[None])
    print(name, dict(reads.calls) == {{name: 2}}, model.config._attn_implementation)
"""
    lines = fresh(code, str(saved)).splitlines()
    assert lines == [f"{name} True {name}" for name in ALONE]


@pytest.mark.parametrize("name", ALONE)
def test_changing_a_model_by_name(name: str) -> None:
    model = tiny_model("llama", "sdpa")
    for wanted in (name, "eager", name):
        model.set_attn_implementation(wanted)
        with hf_attn_plugin.count_reads(model) as reads:
            model(random_ids(1, LENGTH))
        assert reads.calls == {wanted: 2}


@pytest.mark.parametrize("name", ["flsh", "sliding-window", "flash_attention_9", "flash2", "x"])
def test_unknown_names_are_upstreams_business(name: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=name):
        AutoModelForCausalLM.from_pretrained(saved, attn_implementation=name)


@pytest.mark.parametrize("name", ["eager", "sdpa", None])
def test_other_names_still_work(name: str | None, saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=name)
    assert model.config._attn_implementation == (name or "sdpa")


# Models that redirect any name with "flash" in it to a kernel of their own.
_REDIRECTING: dict[str, dict[str, Any]] = {
    "gpt_oss": {},
    "granite_swa": {"num_key_value_heads": 2},
    "granitemoe_swa": {"num_key_value_heads": 2, **_EXPERTS},
    "flint": {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 2,
              "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "mimo_v2_flash": {"num_key_value_heads": 2, "head_dim": 8, "v_head_dim": 4,
                      "n_routed_experts": 2, "num_experts_per_tok": 2,
                      "moe_intermediate_size": 16},
    "openai_privacy_filter": {"num_key_value_heads": 2, "head_dim": 8, **_EXPERTS},
}  # fmt: skip


@pytest.mark.parametrize("family", _REDIRECTING)
def test_flash_is_never_redirected(family: str, registries: None) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = tiny_config(family, sliding_window=6, **_REDIRECTING[family])
    eager = from_config(config, "eager")
    ours = from_config(config, "flash")
    ours.load_state_dict(eager.state_dict())
    assert type(ours)._compatible_flash_implementations
    changed = from_config(config, "sdpa" if eager._supports_sdpa else "eager")
    changed.load_state_dict(eager.state_dict())
    changed.set_attn_implementation("flash")
    calls = []

    def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return METHODS["flash"](module, *args, **kwargs)

    AttentionInterface.register("flash", spy)
    ids = random_ids(2, LENGTH)
    valid = torch.ones(2, LENGTH, dtype=torch.long)
    valid[1, :6] = 0
    with torch.no_grad():
        for model in (ours, changed):
            assert model.config._attn_implementation == "flash"
            calls.clear()
            found = model(ids, attention_mask=valid)[0]
            assert len(calls) == config.num_hidden_layers
            expected = eager(ids, attention_mask=valid)[0]
            torch.testing.assert_close(
                found[valid.bool()], expected[valid.bool()], atol=5e-4, rtol=1e-3
            )


def test_a_part_of_a_multimodal_model_by_name() -> None:
    from transformers import Gemma3Config

    text = tiny_config("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    from transformers import Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation={"text_config": "sparq", "vision_config": "eager"}
    ).eval()
    assert model.config.text_config._attn_implementation == "sparq"
    assert model.config.vision_config._attn_implementation == "eager"
    with hf_attn_plugin.count_reads(model) as reads:
        model(random_ids(1, LENGTH))
    assert reads.calls["sparq"] == 2


@pytest.mark.parametrize("family", ["bloom", "mpt", "deberta-v2"])
def test_changing_a_model_that_bypasses_the_interface_is_refused(family: str) -> None:
    """Transformers only logs a warning here, and keeps the attention that the model had."""
    model = from_config(tiny_config(family), "eager")
    with pytest.raises(ValueError, match="computes attention by itself"):
        model.set_attn_implementation("sparq")
    model.set_attn_implementation("eager")


def test_a_dictionary_of_names_is_checked_too() -> None:
    model = from_config(tiny_config("bloom"), "eager")
    with pytest.raises(ValueError, match="computes attention by itself"):
        model.set_attn_implementation({"": "flash"})
