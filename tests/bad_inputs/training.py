"""Texts and rows for training, conversion, and packages that are not installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import random_ids, tiny_config, tiny_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hf_attn_plugin.convert import extend_context, to_gqa, to_long_encoder
from hf_attn_plugin.data import (
    TextArguments,
    collate_packed,
    load_texts,
    pack_documents,
    pack_texts,
)
from hf_attn_plugin.hub.figures import needle_heatmaps
from hf_attn_plugin.verification import VerifyCallback

from .case import Case

AREA = "Texts and packed rows"
CONVERSION = "Conversion"
EXTRAS = "Packages that are not installed"


def row(length: int) -> dict[str, list[int]]:
    numbers = list(range(length))
    return {"input_ids": numbers, "position_ids": numbers, "labels": numbers}


def packed(*documents: Any, length: Any = 4) -> Any:
    return list(pack_documents(documents, length))


def text_in(folder: Path, content: str) -> Path:
    path = folder / "text.txt"
    path.write_text(content)
    return path


class Words:
    """A tokenizer: a token per word."""

    eos_token_id = None

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def rows_of(folder: Path, **options: Any) -> Any:
    file = text_in(folder, "a word " * 50)
    return TextArguments(text=[str(file)], **options).load_rows(Words(), 8)  # type: ignore[arg-type]


def jsonl(folder: Path) -> str:
    (folder / "rows.jsonl").write_text('{"content": "a"}\n')
    return str(folder)


def extended(family: str = "llama", **options: Any) -> Any:
    values = {"length": 256, **options}
    return extend_context(tiny_config(family), **values)


def scaled_twice() -> Any:
    config = tiny_config("llama")
    extend_context(config, 256, "linear")
    return extend_context(config, 512, "yarn")


def untold_rope() -> Any:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_theta": 10000.0}
    return extend_context(config, 256)


def model_of(family: str, **shape: Any) -> Any:
    config = CONFIG_MAPPING[family](vocab_size=64, **shape)
    return MODEL_MAPPING[type(config)]._from_config(config)


def gqa(heads: Any, *, method: Any = "mean", family: str = "llama", **overrides: Any) -> Any:
    return to_gqa(tiny_model(family, **overrides), heads, method)


def gpt2() -> Any:
    return model_of("gpt2", n_embd=32, n_layer=1, n_head=4)


def without(package: str, written: str, run: Callable[[Path], Any], extra: str) -> Case:
    return Case(
        EXTRAS,
        written,
        run,
        (package,),
        (f"pip install 'hf_attn_plugin[{extra}]'",),
        ImportError,
        (package.replace("-", "_"),),
    )


CASES = [
    Case(AREA, "pack_documents(documents, 1)", lambda f: packed([1, 2], length=1),
         ("got 1",), ("at least 2 tokens",)),
    Case(AREA, 'pack_documents(documents, "512")', lambda f: packed([1, 2], length="512"),
         ("'512'",), ("at least 2 tokens",)),
    Case(AREA, "pack_documents with an empty document", lambda f: packed([1], []),
         ("document 1 is empty",), ("leave empty ones out",)),
    Case(AREA, "pack_documents of texts", lambda f: packed("a text"),
         ("document 0", "'a text'"), ("pack_texts",)),
    Case(AREA, "pack_documents of a batch of ids (two dimensions)",
         lambda f: packed(random_ids(2, 9)),
         ("document 0", "Tensor"), ("one row of token ids",)),
    Case(AREA, "pack_documents of numbers that are not whole", lambda f: packed([0.5, 1.5]),
         ("document 0", "0.5"), ("token ids",)),
    Case(AREA, "collate_packed([])", lambda f: collate_packed([]),
         ("got none",), ("at least one row",)),
    Case(AREA, "collate_packed of rows of 8 and 6 tokens",
         lambda f: collate_packed([row(8), row(6)]),
         ("6, 8 tokens",), ("pack_documents",)),
    Case(AREA, "collate_packed of rows without position_ids",
         lambda f: collate_packed([{k: v for k, v in row(4).items() if k != "position_ids"}]),
         ("position_ids is missing",), ("one document per row",)),
    Case(AREA, "load_texts() of nothing", lambda f: load_texts(),
         ("not neither",), ("text files or a dataset",)),
    Case(AREA, "load_texts of files and a dataset",
         lambda f: load_texts([text_in(f, "a")], "allenai/c4"),
         ("not both",), ("text files or a dataset",)),
    Case(AREA, 'load_texts("book.txt")', lambda f: load_texts("book.txt"),
         ("'book.txt'",), ("['book.txt']",)),
    Case(AREA, 'load_texts(["missing.txt"])', lambda f: load_texts(["missing.txt"]),
         ("missing.txt",), ("there is no text file",), FileNotFoundError),
    Case(AREA, "load_texts of an empty file", lambda f: load_texts([text_in(f, "")]),
         ("text.txt is empty",), ("at least one token",)),
    Case(AREA, "load_texts of a dataset without the column text",
         lambda f: load_texts(dataset=jsonl(f)),
         ("'text'",), ("only content",)),
    Case(AREA, 'pack_texts("one text", tokenizer, 8)',
         lambda f: pack_texts("one text", Words(), 8),  # type: ignore[arg-type]
         ("one string",), ("a list of strings",)),
    Case(AREA, "pack_texts of too little text",
         lambda f: pack_texts(["a few words"], Words(), 512),  # type: ignore[arg-type]
         ("3 tokens", "512"), ("more text or a shorter length",)),
    Case(AREA, "TextArguments(eval_fraction=0)", lambda f: rows_of(f, eval_fraction=0.0),
         ("eval_fraction 0.0",), ("another fraction",)),
    Case(AREA, "TextArguments(eval_fraction=1.5)", lambda f: rows_of(f, eval_fraction=1.5),
         ("eval_fraction 1.5",), ("another fraction",)),
    Case(AREA, "VerifyCallback(max_tokens=1)", lambda f: VerifyCallback(max_tokens=1),
         ("max_tokens", "got 1"), ("at least 2",)),
    Case(CONVERSION, 'extend_context(config, 8192, "ntk")',
         lambda f: extended(scaling="ntk"), ("'ntk'",), ("yarn, linear or none",)),
    Case(CONVERSION, "extend_context(config, 0)", lambda f: extended(length=0),
         ("got 0",), ("an integer >= 1",)),
    Case(CONVERSION, "extend_context(config, 8192.0)", lambda f: extended(length=8192.0),
         ("8192.0",), ("an integer >= 1",)),
    Case(CONVERSION, 'extend_context(config, "128k")', lambda f: extended(length="128k"),
         ("'128k'",), ("an integer >= 1",)),
    Case(CONVERSION, "extend_context(model, 8192)",
         lambda f: extend_context(tiny_model("llama"), 8192),
         ("LlamaForCausalLM",), ("AutoConfig.from_pretrained",)),
    Case(CONVERSION, "extend_context(bert_config, 8192)",
         lambda f: extended("bert", length=8192), ("bert", "8192"), ("no rotary positions",)),
    Case(CONVERSION, "extend_context(mamba_config, 8192)",
         lambda f: extend_context(CONFIG_MAPPING["mamba"](), 8192),
         ("mamba", "8192"), ("max_position_embeddings",)),
    Case(CONVERSION, "yarn on top of linear scaling", lambda f: scaled_twice(),
         ("yarn", "linear"), ("use 'none'",)),
    Case(CONVERSION, "extend_context of rope_parameters without a type", lambda f: untold_rope(),
         ("rope_theta",), ("scaling='none'",)),
    Case(CONVERSION, "to_gqa(model_with_4_kv_heads, 3)",
         lambda f: gqa(3, num_key_value_heads=4), ("cannot become 3",), ("one of 1, 2, 4",)),
    Case(CONVERSION, "to_gqa(model_with_2_kv_heads, 4)", lambda f: gqa(4),
         ("cannot become 4",), ("one of 1, 2",)),
    Case(CONVERSION, "to_gqa(model, 0)", lambda f: gqa(0), ("cannot become 0",), ("one of 1, 2",)),
    Case(CONVERSION, 'to_gqa(model, 1, method="median")', lambda f: gqa(1, method="median"),
         ("'median'",), ("mean, first",)),
    Case(CONVERSION, 'to_gqa(model, 1, method="mean", calibration=batches)',
         lambda f: to_gqa(tiny_model("llama"), 1, "mean", calibration=[{}]),
         ("method='mean'", "calibration"), ("method='aligned'",)),
    Case(CONVERSION, "to_gqa(gpt2, 1)", lambda f: to_gqa(gpt2(), 1), ("gpt2",), ("Llama",)),
    Case(CONVERSION, "to_gqa(torch.nn.Linear(2, 2), 1)",
         lambda f: to_gqa(torch.nn.Linear(2, 2), 1),  # type: ignore[arg-type]
         ("Linear",), ("a transformers model",)),
    Case(CONVERSION, "to_long_encoder(llama, 512)",
         lambda f: to_long_encoder(tiny_model("llama"), 512, 64), ("llama",), ("extend_context",)),
    Case(CONVERSION, "to_long_encoder(bert, 64) of a model with 128 positions",
         lambda f: to_long_encoder(tiny_model("bert"), 64, 16),
         ("got 64",), ("at least that",)),
    without("datasets", "load_texts(...) without datasets",
            lambda f: load_texts([text_in(f, "a")]), "train"),
    without("matplotlib", "show_pattern(pattern, path) without matplotlib",
            lambda f: _show_png(f), "plot"),
    without("matplotlib", "needle_heatmaps(...) without matplotlib",
            lambda f: _heatmap(f), "plot"),
    without("lm-eval", "lm_eval.evaluate(...) without lm-eval",
            lambda f: _evaluate(f), "eval"),
]  # fmt: skip


def _show_png(folder: Path) -> None:
    from hf_attn_plugin.patterns import Pattern
    from hf_attn_plugin.patterns.picture import show_pattern

    show_pattern(Pattern(q_len=4, kv_len=4), folder / "pattern.png")


def _heatmap(folder: Path) -> None:
    from hf_attn_plugin.lm_eval.run import NeedleGrid

    grid = NeedleGrid([8], [0.5], {(8, 0.5): (1, 1)})
    needle_heatmaps({"flash": grid}, folder / "needles.png")


def _evaluate(folder: Path) -> None:
    from hf_attn_plugin.lm_eval.run import evaluate

    evaluate(tiny_model("llama"), Words(), tasks=["niah"])
