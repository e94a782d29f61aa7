"""What the plugin adds to transformers so that no family computes something else silently."""

from __future__ import annotations

import pytest
import torch
from families import running
from families.inputs import tokens
from transformers import AutoModelForCausalLM, masking_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_attn_plugin.integrations import packed_positions
from hf_attn_plugin.integrations.model_source import (
    holds_attention,
    is_language_model_without_attention,
    uses_interface,
)
from hf_attn_plugin.methods import METHODS
from hf_attn_plugin.patterns.documents import restarts


def model_class(architecture: str) -> type:
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[architecture]]


@pytest.mark.parametrize(
    ("architecture", "interface", "attention"),
    [
        ("llama", True, True),
        ("gpt2", True, True),
        ("longcat_flash", True, True),  # its attention is not called so
        ("falcon", False, True),
        ("gptj", False, True),
        ("git", False, True),  # picks a class by name, in a file that also calls the interface
        ("mamba", True, False),
        ("jamba", True, True),
    ],
)
def test_what_a_class_says_of_itself(architecture: str, interface: bool, attention: bool) -> None:
    cls = model_class(architecture)
    assert uses_interface(cls) is interface
    assert holds_attention(cls) is attention
    assert is_language_model_without_attention(cls) is not attention


def test_a_tower_does_not_pass_for_the_models_beside_it() -> None:
    from transformers.models.gemma3n.modeling_gemma3n import (
        Gemma3nAudioEncoder,
        Gemma3nForConditionalGeneration,
        Gemma3nTextModel,
    )

    assert not uses_interface(Gemma3nAudioEncoder)  # its base class names the text model's layers
    assert uses_interface(Gemma3nTextModel)
    assert uses_interface(Gemma3nForConditionalGeneration)
    config = Gemma3nAudioEncoder.config_class(conf_num_hidden_layers=1)
    with pytest.raises(ValueError, match="computes attention by itself"):
        Gemma3nAudioEncoder._from_config(config, attn_implementation="flash")


def test_a_backbone_of_another_family_may_attend() -> None:
    from transformers import ResNetModel, VitPoseForPoseEstimation

    assert holds_attention(VitPoseForPoseEstimation)  # made by load_backbone
    assert not holds_attention(ResNetModel)


def test_a_language_model_without_attention_is_refused() -> None:
    config = CONFIG_MAPPING["mamba"](num_hidden_layers=1, hidden_size=8, vocab_size=16)
    with pytest.raises(ValueError, match="holds no attention"):
        AutoModelForCausalLM.from_config(config, attn_implementation="sliding_window")


def test_recurrent_layers_refuse_packed_documents() -> None:
    eager = running.eager_model("qwen3_next")
    ours = running.build(type(eager), eager.config, "flash")
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        ours(tokens(1))  # a single document is welcome
        with pytest.raises(ValueError, match="'linear_attention' layers"):
            ours(tokens(1), position_ids=positions)


def test_masks_know_packed_documents_while_a_cache_is_made() -> None:
    eager = running.eager_model("persimmon")
    ours = running.build(type(eager), eager.config, "flash")
    ours.load_state_dict(eager.state_dict())
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        alone = eager(tokens(1)[:, 5:]).logits
        packed = ours(tokens(1), position_ids=positions).logits[:, 5:]
        packed_positions.uninstall()
        try:  # the control: without it, the second document sees the first
            leaking = ours(tokens(1), position_ids=positions).logits[:, 5:]
        finally:
            packed_positions.install(frozenset(METHODS))
    torch.testing.assert_close(packed, alone, atol=1e-3, rtol=1e-3)
    assert (leaking - alone).abs().max() > 0.1
    assert hasattr(masking_utils._preprocess_mask_arguments, packed_positions._MARK)


def test_positions_of_images_are_no_restarts() -> None:
    """Text, then an image of 2 x 2 patches, text, and a second document."""
    time = [0, 1, 2, 2, 2, 2, 4, 0, 1]
    rows = [0, 1, 2, 2, 3, 3, 4, 0, 1]
    columns = [0, 1, 2, 3, 2, 3, 4, 0, 1]
    starts = restarts(torch.tensor([time, rows, columns])[:, None])
    assert starts[0].nonzero().tolist() == [[7]]


def test_frames_of_a_video_at_one_moment_are_no_restarts() -> None:
    """All three axes go back at once where frames lie closer than a temporal step."""
    time = [0, 1, 2, 2, 2, 2, 2, 2, 4]
    rows = [0, 1, 2, 2, 2, 2, 2, 2, 4]
    columns = [0, 1, 2, 3, 2, 3, 2, 3, 4]
    axes = torch.tensor([time, rows, columns])[:, None]
    assert not restarts(axes).any()
    text = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])  # four axes: the first numbers the text
    assert restarts(torch.cat([text[None], axes]))[0].nonzero().tolist() == [[5]]
