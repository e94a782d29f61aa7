"""What we rely on inside transformers: these fail when a new version changes it."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, cache_utils, masking_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_attn_plugin.integrations import (
    attn_params,
    cache_layers,
    flash_name,
    forward_positions,
    packed_positions,
    quantized_cache,
    registry,
    window_cache,
)
from hf_attn_plugin.methods import METHODS, call

# Every keyword that models pass to the function, and what becomes of it.
COMPUTED = {"dropout", "scaling", "softcap", "s_aux", "sinks", "sliding_window", "is_causal",
            "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "attention_mask", "query", "key",
            "value"}  # fmt: skip
REFUSED = {"position_bias", "indices", "block_indices", "output_attentions"}
# These say nothing about which pairs attend or with what weight.
HARMLESS = {
    "max_length_q",  # follows from cu_seq_lens
    "max_length_k",
    "deterministic",  # about FlashAttention's backward pass
}


def modeling_files() -> list[Path]:
    root = Path(transformers.__file__).parent / "models"
    return sorted(root.glob("*/modeling_*.py"))


def interface_calls(source: str) -> Iterator[ast.Call]:
    """Calls of what models name ``attention_interface``."""
    if "attention_interface(" not in source:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "attention_interface":
            yield node


@pytest.fixture(scope="module")
def keywords() -> dict[str, str]:
    """Each keyword that some model passes, with one file that does."""
    found: dict[str, str] = {}
    count = 0
    for path in modeling_files():
        for node in interface_calls(path.read_text()):
            count += 1
            for keyword in node.keywords:
                if keyword.arg is not None:
                    found.setdefault(keyword.arg, path.name)
    assert count > 200, "the scan finds no calls any more"
    return found


def test_every_argument_of_every_model_is_accounted_for(keywords: dict[str, str]) -> None:
    unknown = {k: v for k, v in keywords.items() if k not in COMPUTED | REFUSED | HARMLESS}
    assert not unknown, "new arguments: read what they mean, then compute or refuse them"


def test_the_scan_would_notice_an_argument() -> None:
    source = "attention_interface(self, q, k, v, mask, temperature=2.0, **kwargs)"
    (node,) = interface_calls(source)
    assert [k.arg for k in node.keywords] == ["temperature", None]


@pytest.mark.parametrize("name", ["dropout", "scaling", "softcap", "s_aux"])
def test_what_changes_results_is_named_in_the_reader(name: str, keywords: dict[str, str]) -> None:
    assert name in inspect.signature(call.read_call).parameters
    assert name in keywords, f"no model passes {name!r} any more"


def test_refused_arguments_are_still_passed_by_some_model(keywords: dict[str, str]) -> None:
    assert set(call._REFUSED) <= set(keywords) | {"block_indices"}
    assert set(call._REFUSED) <= REFUSED


@pytest.mark.parametrize("method", METHODS)
def test_models_call_by_these_names(method: str) -> None:
    names = list(inspect.signature(METHODS[method]).parameters)
    assert names == ["module", "query", "key", "value", "attention_mask", "kwargs"]


def test_the_check_of_names_has_its_signature() -> None:
    wrapped = PreTrainedModel._check_and_adjust_attn_implementation
    original = wrapped._hf_attn_plugin_original
    parameters = inspect.signature(original).parameters
    assert list(parameters)[:3] == ["self", "attn_implementation", "is_init_check"]
    assert inspect.signature(wrapped) == inspect.signature(original)
    source = inspect.getsource(transformers.modeling_utils)
    assert "self.config._attn_implementation_internal = self._check_and_adjust_attn" in source


def test_bypassing_families_are_found_by_this_method() -> None:
    from transformers import BloomModel, LlamaForCausalLM

    assert LlamaForCausalLM._can_set_attn_implementation() is True
    assert BloomModel._can_set_attn_implementation() is False


def closure(function: Any) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return dict(zip(names, (cell.cell_contents for cell in function.__closure__), strict=True))


DOCUMENTS = torch.tensor([[0, 0, 1]])
MAKERS: dict[str, tuple[Any, set[str]]] = {
    "sliding_window_overlay": ((3,), {"sliding_window"}),
    "sliding_window_bidirectional_overlay": ((3,), {"sliding_window"}),
    "chunked_overlay": ((3, torch.zeros(1)), {"chunk_size", "left_padding"}),
    "packed_sequence_mask_function": ((DOCUMENTS,), {"packed_sequence_mask"}),
    "and_masks": ((masking_utils.causal_mask_function,), {"mask_functions"}),
    "remap_positions_for_packed_sequence": (
        (masking_utils.causal_mask_function, DOCUMENTS),
        {"mask_function", "position_ids"},
    ),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_mask_makers_hold_what_we_read(maker: str) -> None:
    if not hasattr(masking_utils, maker):
        assert maker == "remap_positions_for_packed_sequence", f"{maker} is gone"
        pytest.skip("positions are not remapped in this version")
    arguments, names = MAKERS[maker]
    made = getattr(masking_utils, maker)(*arguments)
    assert set(closure(made)) == names
    assert made.__module__ == masking_utils.__name__
    assert made.__qualname__.split(".")[0] == maker
    assert made.__code__ in getattr(masking_utils, maker).__code__.co_consts


def test_known_masks_are_made_of_known_parts() -> None:
    for made in (
        masking_utils.sliding_window_causal_mask_function(3),
        masking_utils.sliding_window_bidirectional_mask_function(3),
        masking_utils.chunked_causal_mask_function(3, torch.zeros(1)),
    ):
        assert made.__qualname__.split(".")[0] == "and_masks"
        parts = [part.__qualname__.split(".")[0] for part in closure(made)["mask_functions"]]
        known = {*MAKERS, "causal_mask_function", "bidirectional_mask_function"}
        assert set(parts) <= known


def test_the_mask_interface_passes_these_arguments() -> None:
    source = inspect.getsource(masking_utils.create_causal_mask)
    for name in ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function",
                 "attention_mask", "device"):  # fmt: skip
        assert f"{name}=" in source
    parameters = inspect.signature(masking_utils.sdpa_mask).parameters
    assert {"allow_is_causal_skip", "allow_is_bidirectional_skip"} <= set(parameters)
    assert any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_caches_are_made_through_the_wrapped_function() -> None:
    source = inspect.getsource(cache_utils)
    assert source.count("get_layer_types_and_kwargs(") >= 3, "someone makes layers another way"
    assert hasattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING")
    assert hasattr(cache_utils, "STATIC_LAYER_TYPE_MAPPING")


# Look back without transformers' masks, and read no text that could hold several documents.
AUDIO_AND_IMAGES = {
    f"modeling_{name}"
    for name in ("audioflamingo3", "exaone4_5", "lightglue", "mimi", "pocket_tts_audio_tokenizer",
                 "qwen2_audio", "voxtral")
}  # fmt: skip
# Its recurrent layers refuse packed documents.
RECURRENT = {"modeling_recurrent_gemma"}


def draws_its_own_masks(source: str) -> bool:
    """Whether a modeling file has causal attention and takes no causal mask of transformers."""
    if "attention_interface(" not in source or "position_ids" not in source:
        return False
    makers = r"(?<!def )create_(causal_mask|masks_for_generate|sliding_window_causal_mask)\b"
    causal = r"is_causal = (True|is_causal\b|.*is_decoder)|is_causal=True"
    return not re.search(makers, source) and bool(re.search(causal, source))


def test_which_models_draw_their_own_masks() -> None:
    """Documents would leak in one that is not known: `forward_positions` cannot tell it them."""
    found = {path.stem for path in modeling_files() if draws_its_own_masks(path.read_text())}
    found |= {"modeling_blt"}  # beside transformers' masks
    assert found - AUDIO_AND_IMAGES - RECURRENT == forward_positions.OWN_MASKS


def test_models_hand_the_2d_mask_to_the_makers_of_masks_as_it_is() -> None:
    """Documents travel on it where `position_ids` do not reach the masks."""
    from transformers.models.clip.modeling_clip import CLIPTextModel
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridModel
    from transformers.models.kosmos2_5.modeling_kosmos2_5 import Kosmos2_5TextTransformer

    for cls in (CLIPTextModel, GraniteMoeHybridModel, Kosmos2_5TextTransformer):
        source = inspect.getsource(cls.forward)
        assert re.search(r"""attention_mask"?[=:] ?attention_mask""", source)
        assert not re.search(r"attention_mask = (?!create_)", source)


WRAPPED = [
    (PreTrainedModel, "_check_and_adjust_attn_implementation"),
    (PreTrainedModel, "set_attn_implementation"),
    (masking_utils, "is_flash_attention_requested"),
    (masking_utils, "_preprocess_mask_arguments"),
    (cache_utils, "get_layer_types_and_kwargs"),
    (cache_utils.DynamicCache, "__init__"),
    (cache_utils.QuantizedCache, "__init__"),
]


def uninstall() -> None:
    for gap in (flash_name, packed_positions, cache_layers, quantized_cache, window_cache):
        gap.uninstall()
    attn_params.uninstall()


def test_wrappers_go_back_to_what_was_there(registries: None) -> None:
    wrappers = [getattr(owner, name) for owner, name in WRAPPED]
    originals = [wrapper._hf_attn_plugin_original for wrapper in wrappers]
    assert not any(hasattr(original, "_hf_attn_plugin_original") for original in originals)
    for _ in range(2):  # twice is once
        uninstall()
        assert [getattr(owner, name) for owner, name in WRAPPED] == originals
        assert "attn_params" not in vars(PreTrainedConfig)
    for _ in range(2):
        registry.register()
        again = [getattr(owner, name) for owner, name in WRAPPED]
        assert not set(again) & set(originals)
        assert [wrapper._hf_attn_plugin_original for wrapper in again] == originals
    assert isinstance(vars(PreTrainedConfig)["attn_params"], property)


def test_somebody_elses_wrappers_stay(registries: None) -> None:
    theirs = []
    for owner, name in WRAPPED:
        ours = getattr(owner, name)
        theirs.append(
            functools.wraps(ours)(lambda *args, ours=ours, **kwargs: ours(*args, **kwargs))
        )
        setattr(owner, name, theirs[-1])
    uninstall()
    registry.register()
    assert [getattr(owner, name) for owner, name in WRAPPED] == theirs


def test_registries_are_where_we_look() -> None:
    assert "sdpa" in AttentionInterface._global_mapping
    assert "sdpa" in AttentionMaskInterface._global_mapping
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping is (
        AttentionMaskInterface._global_mapping
    )
