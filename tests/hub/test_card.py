"""Model cards, read back by huggingface_hub."""

import pytest
from huggingface_hub import ModelCard

from hf_attn_plugin.hub import CardContent, CardFigure, Measurement, write_model_card

MEASUREMENTS = (
    Measurement("niah", "exact_match", 0.98, "sdpa", "standard library", 1.0),
    Measurement("niah", "exact_match", 0.97, "sparq (rank 8)", "standard library", 0.25),
    Measurement("long_bpb", "bits_per_byte", 2.125, "sdpa", "standard library"),
)


def content(**changes):
    values = {
        "title": "Tiny long Llama",
        "method": "sparq",
        "parameters": {"rank": 8, "top_k": 32},
        "command": "hf-attn quickstart --out 'my model'",
        "base_model": "org/base-model",
        "summary": "Fine-tuned at **four times** its context.",
        "measurements": MEASUREMENTS,
        "losses": {"before conversion": 2.1, "after conversion": 3.25, "after uptraining": 2.2},
        "figures": (CardFigure("figures/needles.png", "Needles found"),),
        "datasets": ("org/data",),
        "license": "apache-2.0",
        "language": ("en",),
        "tags": ("quickstart", "sparq"),
        "limitations": ("It is tiny.",),
    }
    return CardContent(**{**values, **changes})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "needles.png").write_bytes(b"png")
    return tmp_path


def test_the_front_matter_is_read_back(folder):
    path = write_model_card(folder, content())
    assert path == folder / "README.md"
    data = ModelCard.load(path).data
    assert data.base_model == "org/base-model"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.license == "apache-2.0"
    assert data.language == ["en"]
    assert data.datasets == ["org/data"]
    assert data.tags == ["hf-attn-plugin", "long-context", "sparq", "quickstart"]


def test_the_model_index_holds_every_measurement(folder):
    data = ModelCard.load(write_model_card(folder, content())).data
    assert data.model_name == "Tiny long Llama"
    found = {
        (result.dataset_type, result.metric_type, result.metric_name, result.metric_value)
        for result in data.eval_results
    }
    assert found == {
        ("niah", "exact_match", "exact_match, sdpa", 0.98),
        ("niah", "exact_match", "exact_match, sparq (rank 8)", 0.97),
        ("long_bpb", "bits_per_byte", "bits_per_byte, sdpa", 2.125),
    }
    assert {result.dataset_name for result in data.eval_results} == {
        "niah (standard library)",
        "long_bpb (standard library)",
    }


def test_the_text_tells_what_was_done(folder):
    text = ModelCard.load(write_model_card(folder, content())).text
    assert "# Tiny long Llama" in text
    assert 'attn_implementation="sparq"' in text
    assert "| top_k | 32 |" in text
    assert (
        "| niah (standard library) | exact_match | sparq (rank 8) | 0.9700 | 25.0% of dense |"
        in text
    )
    assert "| after conversion | 3.2500 |" in text
    assert "![Needles found](figures/needles.png)" in text
    assert "hf-attn quickstart --out 'my model'" in text
    assert "- It is tiny." in text


def test_what_is_not_known_is_left_out(folder):
    bare = CardContent(title="Bare", method="flash", command="make")
    card = ModelCard.load(write_model_card(folder, bare))
    front = card.data.to_dict()
    assert not {"base_model", "license", "datasets", "language", "model-index"} & set(front)
    for heading in ("Measured", "Conversion", "Limitations"):
        assert heading not in card.text


def test_an_absolute_path_becomes_relative(folder):
    figures = (CardFigure(folder / "figures" / "needles.png", "Needles"),)
    text = write_model_card(folder, content(figures=figures)).read_text()
    assert "](figures/needles.png)" in text


def test_figures_that_would_not_be_published_are_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "a.png"
    outside.write_bytes(b"png")
    with pytest.raises(ValueError, match="outside the model's folder"):
        write_model_card(folder, content(figures=(CardFigure(outside, "a"),)))
    with pytest.raises(ValueError, match="does not exist"):
        write_model_card(folder, content(figures=(CardFigure("absent.png", "a"),)))
    with pytest.raises(NotADirectoryError, match="save the model there first"):
        write_model_card(folder / "absent", content())
