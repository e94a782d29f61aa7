"""Parameters out of range, names that nobody knows, and families that go their own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import tiny_config, tiny_model
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_attn_plugin
from hf_attn_plugin import config as parameters

from .case import Case

AREA = "Parameters of the methods"


def refused(cls: str, instead: str, **values: Any) -> Case:
    """A dataclass that does not take these values."""
    line = ", ".join(f"{name}={value!r}" for name, value in values.items())
    last = list(values)[-1]
    return Case(
        AREA,
        f"{cls}({line})",
        lambda folder: getattr(parameters, cls)(**values),
        (cls, last),
        (instead,),
    )


def edited_config(folder: Path, attn_params: Any) -> Any:
    """A config.json with this edited into it, loaded."""
    tiny_config("llama").save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_params": attn_params}))
    return AutoConfig.from_pretrained(folder)


def saved_model(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder)
    return folder


def bypassing(family: str, **shape: Any) -> Any:
    config = CONFIG_MAPPING[family](vocab_size=64, **shape)
    return AutoModel.from_config(config, attn_implementation="flash")


def set_on_bypassing() -> None:
    config = CONFIG_MAPPING["bloom"](hidden_size=32, n_layer=1, n_head=4, vocab_size=64)
    AutoModel.from_config(config).set_attn_implementation("longformer")


CASES = [
    refused("SlidingWindowConfig", "an integer >= 1", window=0),
    refused("SlidingWindowConfig", "an integer >= 1", window="4096"),
    refused("SlidingWindowConfig", "an integer >= 1", window=True),
    refused("SlidingWindowConfig", "an integer >= 0", num_sink_tokens=-1),
    refused("LongformerConfig", "an integer >= 1", window=2.5),
    refused("LongformerConfig", "an integer >= 0", num_global_tokens=-2),
    refused("LongformerConfig", "an integer >= 1", dilation=0),
    refused("StridedConfig", "an integer >= 1", stride=0),
    refused("StridedConfig", "an integer >= 1", window=None),
    refused("SparQConfig", "an integer >= 1", rank=0),
    refused("SparQConfig", "an integer >= 1", top_k=0),
    refused("SparQConfig", "from 0 to 8", top_k=8, local_window=9),
    refused("SparQConfig", "True or False", mean_value_reallocation="yes"),
    refused("SparQConfig", "above 0 and at most 1", coverage=0),
    refused("SparQConfig", "above 0 and at most 1", coverage=90),
    refused("SparQConfig", "above 0 and at most 1", rank_coverage="0.9"),
    refused("SparQConfig", "'full', 'int8', 'int4', 'none'", key_copy="fp8"),
    refused("SparQConfig", "mean_value_reallocation=True", mean_block=64),
    refused("SparQConfig", "an integer >= 0", dense_below=-1),
    refused("ExactTopKConfig", "an integer >= 1", top_k=-5),
    refused("H2OConfig", "from 1 to 128", local_window=0),
    refused("LMInfiniteConfig", "an integer >= 1", window=0),
    refused("LinearConfig", "'elu', 'favor'", feature_map="relu"),
    refused("LinearConfig", "feature_map='favor'", num_features=64),
    Case(
        AREA,
        'configure(model, {"rank": 32})',
        lambda folder: hf_attn_plugin.configure(tiny_config("llama"), {"rank": 32}),  # type: ignore[arg-type]
        ("dict",),
        ("SparQConfig", "LongformerConfig"),
    ),
    Case(
        AREA,
        'configure("my-model", SparQConfig())',
        lambda folder: hf_attn_plugin.configure("my-model", hf_attn_plugin.SparQConfig()),  # type: ignore[arg-type]
        ("str",),
        ("a transformers model or config",),
    ),
    Case(
        AREA,
        "configure(model_with_head_dim_8, SparQConfig(rank=16))",
        lambda folder: hf_attn_plugin.configure(
            tiny_config("llama"), hf_attn_plugin.SparQConfig(rank=16)
        ),
        ("SparQConfig", "rank", "16"),
        ("from 1 to 8",),
    ),
    Case(
        AREA,
        'config.json: "attn_params": ["sparq"]',
        lambda folder: edited_config(folder, ["sparq"]),
        ("attn_params", "['sparq']"),
        ("{method: {parameter: value}}",),
    ),
    Case(
        AREA,
        'config.json: "attn_params": {"sparc": {}}',
        lambda folder: edited_config(folder, {"sparc": {}}),
        ("'sparc'",),
        ("known are", "sparq"),
    ),
    Case(
        AREA,
        'config.json: "attn_params": {"sparq": {"rnak": 32}}',
        lambda folder: edited_config(folder, {"sparq": {"rnak": 32}}),
        ("'rnak'",),
        ("it has rank, top_k",),
    ),
    Case(
        AREA,
        'config.json: "attn_params": {"sparq": 32}',
        lambda folder: edited_config(folder, {"sparq": 32}),
        ("attn_params['sparq']", "32"),
        ("must be a dictionary",),
    ),
    Case(
        AREA,
        'from_pretrained(..., attn_params={"longformer": {"windows": 512}})',
        lambda folder: AutoModel.from_pretrained(
            saved_model(folder), attn_params={"longformer": {"windows": 512}}
        ),
        ("LongformerConfig", "'windows'"),
        ("it has window, num_global_tokens, dilation",),
    ),
    Case(
        "Families that compute attention by themselves",
        'AutoModel.from_config(bloom, attn_implementation="flash")',
        lambda folder: bypassing("bloom", hidden_size=32, n_layer=1, n_head=4),
        ("BloomModel", "'flash'"),
        ("Llama, Mistral",),
    ),
    Case(
        "Families that compute attention by themselves",
        'AutoModel.from_config(falcon, attn_implementation="flash")',
        lambda folder: bypassing(
            "falcon", hidden_size=32, num_hidden_layers=1, num_attention_heads=4
        ),
        ("FalconModel", "'flash'"),
        ("Llama, Mistral",),
    ),
    Case(
        "Families that compute attention by themselves",
        'bloom.set_attn_implementation("longformer")',
        lambda folder: set_on_bypassing(),
        ("BloomModel", "'longformer'"),
        ("Llama, Mistral",),
    ),
]
