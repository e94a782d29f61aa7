"""What a method cannot do is refused by name, with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, LENGTH, random_ids, tiny_model, twin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

import hf_attn_plugin
from hf_attn_plugin import LongformerConfig, SlidingWindowConfig, SparQConfig, StridedConfig

NAMES = sorted(hf_attn_plugin.implementations())
ALONE = [name for name in NAMES if name != "ring"]  # which insists on being one of several
SPARSE = ["sliding_window", "longformer", "strided"]

# Families whose attention never asks transformers for the function of the name.
BYPASSING = {
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 64},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "deberta-v2": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 1, "num_heads": 4,
                "attention_types": [[["global"], 1]]},
    "longformer": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                   "attention_window": 4},
}  # fmt: skip


def bypassing(family: str, **kwargs: Any) -> Any:
    config = CONFIG_MAPPING[family](**{"vocab_size": 64, **BYPASSING[family]})
    return MODEL_MAPPING[type(config)]._from_config(config, **kwargs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", BYPASSING)
def test_families_that_ignore_the_name_are_refused(family: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"computes attention by itself") as error:
        bypassing(family, attn_implementation=name)
    assert "Model" in str(error.value).split()[0], "the message does not start with the class"


@pytest.mark.parametrize("name", NAMES)
def test_position_bias_is_refused(name: str) -> None:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = T5Model._from_config(config, attn_implementation=name).eval()
    with pytest.raises(ValueError, match="position_bias"):
        model(random_ids(1, 5), decoder_input_ids=random_ids(1, 3))


@pytest.mark.parametrize("name", ALONE)
def test_attention_dropout_is_refused_in_training_only(name: str) -> None:
    model = tiny_model("llama", name, attention_dropout=0.1)
    model(random_ids(1, LENGTH))
    model.train()
    with pytest.raises(ValueError, match=r"dropout.*attention_dropout=0\.0"):
        model(random_ids(1, LENGTH))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_are_refused(family: str) -> None:
    model = tiny_model(family, "flash")
    with pytest.raises(ValueError, match="output_attentions"):
        model(random_ids(1, LENGTH), output_attentions=True)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_attention_weights_are_refused_where_the_request_is_not_passed_on(family: str) -> None:
    shape = {"gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "attn_pdrop": 0.0},
             "opt": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                     "ffn_dim": 48, "word_embed_proj_dim": 32}}[family]  # fmt: skip
    config = CONFIG_MAPPING[family](vocab_size=64, **shape)
    model = MODEL_MAPPING[type(config)]._from_config(config, attn_implementation="flash").eval()
    with pytest.raises(ValueError, match="output_attentions"):
        model(random_ids(1, LENGTH), output_attentions=True)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_biased_mask_is_refused(family: str) -> None:
    model = tiny_model(family, "flash")
    bias = torch.zeros(2, 1, LENGTH, LENGTH)
    bias[0, 0, 3, 1] = -0.5
    with pytest.raises(ValueError, match="bias"):
        model(random_ids(2, LENGTH), attention_mask=bias)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.long),
        torch.ones(2, 1, LENGTH - 1, LENGTH, dtype=torch.bool),
        torch.ones(2, 1, LENGTH, LENGTH - 1, dtype=torch.bool),
        torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool),
        torch.ones(2, LENGTH, LENGTH, dtype=torch.bool),
    ],
    ids=["integers", "short of a query", "short of a key", "other batch", "3D"],
)
@pytest.mark.parametrize("name", ["flash", "sliding_window"])
def test_masks_of_the_wrong_shape_or_type_are_refused(name: str, mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="mask"):
        tiny_model("llama", name)(random_ids(2, LENGTH), attention_mask=mask)


@pytest.mark.parametrize("shape", [(2, LENGTH - 1), (2, 1, LENGTH), (3, LENGTH)])
def test_global_attention_mask_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    model = tiny_model("llama", "longformer")
    with pytest.raises(ValueError, match=r"global_tokens|global_attention_mask"):
        model(random_ids(2, LENGTH), global_attention_mask=torch.ones(shape))


@pytest.mark.parametrize("name", SPARSE)
def test_cross_attention_is_refused_where_distance_means_nothing(name: str) -> None:
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )  # fmt: skip
    model = BartModel._from_config(config, attn_implementation=name).eval()
    with pytest.raises(ValueError, match=r"cross-attention.*flash"):
        model(random_ids(1, 5), decoder_input_ids=random_ids(1, 3))


@pytest.mark.parametrize("name", ALONE)
def test_continuing_packed_documents_is_refused(name: str) -> None:
    model = tiny_model("llama", name)
    first = model(random_ids(1, 6))
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="packed documents"):
        model(random_ids(1, 5), past_key_values=first.past_key_values, position_ids=positions)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4"])
@pytest.mark.parametrize(
    ("config", "field"),
    [
        (SlidingWindowConfig, "window"),
        (LongformerConfig, "window"),
        (LongformerConfig, "dilation"),
        (StridedConfig, "window"),
        (StridedConfig, "stride"),
        (SparQConfig, "rank"),
        (SparQConfig, "top_k"),
    ],
)
def test_wrong_values_are_refused_with_the_valid_range(
    config: Any, field: str, value: object
) -> None:
    with pytest.raises(ValueError, match=rf"{config.__name__}: {field} must be an integer >= 1"):
        config(**{field: value})


@pytest.mark.parametrize("value", [-1, False, 1.5, "many"])
@pytest.mark.parametrize(
    ("config", "field"),
    [
        (SlidingWindowConfig, "num_sink_tokens"),
        (LongformerConfig, "num_global_tokens"),
        (SparQConfig, "local_window"),
    ],
)
def test_wrong_counts_are_refused(config: Any, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be an integer"):
        config(**{field: value})


def test_what_belongs_together_is_checked_together() -> None:
    with pytest.raises(ValueError, match="local_window must be an integer from 0 to 8"):
        SparQConfig(top_k=8, local_window=9)
    with pytest.raises(ValueError, match="True or False"):
        SparQConfig(mean_value_reallocation=1)  # type: ignore[arg-type]


def test_an_error_leaves_the_model_usable() -> None:
    model = tiny_model("llama", "flash")
    ids = random_ids(2, LENGTH)
    before = model(ids).logits
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    assert torch.equal(model(ids).logits, before)
    torch.testing.assert_close(twin(model, "eager")(ids).logits, before, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["sliding_window", "longformer"])
def test_first_tokens_under_a_mask_of_the_callers_are_refused(name: str) -> None:
    """A 4D mask does not tell where sequences start, so their first tokens are unknown."""
    model = tiny_model("llama", name)
    hf_attn_plugin.configure(model, hf_attn_plugin.SlidingWindowConfig(4, num_sink_tokens=1))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    with pytest.raises(ValueError, match="does not tell where sequences start"):
        model(random_ids(1, LENGTH), attention_mask=mask)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"cu_seq_lens_q": [0, 5, LENGTH]}, "belong together"),
        ({"cu_seq_lens_q": [0, 5, 9], "cu_seq_lens_k": [0, 5, 9]}, "must ascend from 0"),
        ({"cu_seq_lens_q": [2, LENGTH], "cu_seq_lens_k": [2, LENGTH]}, "must ascend from 0"),
        ({"cu_seq_lens_q": [0, 9, 5, LENGTH], "cu_seq_lens_k": [0, 9, 5, LENGTH]}, "must ascend"),
    ],
)
def test_wrong_cumulative_lengths_are_refused(lengths: dict[str, list[int]], message: str) -> None:
    model = tiny_model("llama", "flash")
    given = {name: torch.tensor(values, dtype=torch.int32) for name, values in lengths.items()}
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, LENGTH), **given, max_length_q=LENGTH, max_length_k=LENGTH)
