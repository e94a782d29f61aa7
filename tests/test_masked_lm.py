"""Rows for masked language modelling, and the recipe that makes an encoder longer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hf_attn_plugin.masked_lm import MaskingCollator, encoder_rows, mask_rows, special_ids

RECIPE = Path(__file__).parent.parent / "recipes" / "train_long_encoder.py"
STEPS = 6


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(5, 64))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        cls_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def test_rows_by_hand() -> None:
    documents = [[10, 11, 12], [], [13], [14, 15, 16, 17, 18]]
    rows = [row["input_ids"] for row in encoder_rows(documents, 6, 0, 2)]
    assert rows == [[0, 10, 11, 12, 2, 2], [0, 13, 2, 14, 15, 2]]
    with pytest.raises(ValueError, match="at least 3"):
        list(encoder_rows(documents, 2, 0, 2))


def test_masks_are_drawn_once_or_every_time() -> None:
    tokenizer = tokenizer_of_words()
    rows = [{"input_ids": [0, *range(5, 60), 2]} for _ in range(8)]
    state = torch.get_rng_state()
    masked = mask_rows(rows, tokenizer, 0.3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again = mask_rows(rows, tokenizer, 0.3, seed=1)
    other = mask_rows(rows, tokenizer, 0.3, seed=2)
    ids = torch.tensor(rows[0]["input_ids"])
    for row, same in zip(masked, again, strict=True):
        assert torch.equal(row["input_ids"], same["input_ids"])
        wanted = row["labels"] != -100
        assert not wanted[0]
        assert not wanted[-1]
        assert torch.equal(row["labels"][wanted], ids[wanted])
        assert torch.equal(row["input_ids"][~wanted], ids[~wanted])
    assert any(
        not torch.equal(a["labels"], b["labels"]) for a, b in zip(masked, other, strict=True)
    )
    share = sum(int((row["labels"] != -100).sum()) for row in masked) / (8 * 55)
    assert 0.2 < share < 0.4
    collate = MaskingCollator(tokenizer, 0.3)
    assert torch.equal(collate(masked)["labels"], torch.stack([row["labels"] for row in masked]))
    rows[0] = {"input_ids": [0, *range(6, 61), 2]}
    one, same, turned = collate(rows), collate(rows), collate(rows[::-1])
    assert torch.equal(one["labels"], same["labels"])
    assert not torch.equal(one["labels"], turned["labels"].flip(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    tokenizer = tokenizer_of_words()
    assert special_ids(tokenizer) == (0, 2)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="mask_token"):
        special_ids(tokenizer)


def start(folder: Path, out: Path) -> str:
    line = [
        *(sys.executable, str(RECIPE), "--model", str(folder / "model")),
        *("--text", str(folder / "text.txt"), "--out", str(out), "--max_positions", "64"),
        *("--window", "8", "--max_steps", str(STEPS), "--save_steps", "3", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "2", "--learning_rate", "5e-3", "--use_cpu"),
        *("--disable_tqdm", "true", "--eval_fraction", "0.2", "--report_to", "none"),
    ]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(RECIPE.parent.parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    answer = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return answer.stdout


def test_the_recipe_goes_on_where_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=18,
        initializer_range=0.2,
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "model")
    tokenizer_of_words().save_pretrained(tmp_path / "model")
    text = " ".join(f"w{5 + i * i % 59}" for i in range(2000))
    (tmp_path / "text.txt").write_text(text)

    whole = tmp_path / "whole"
    start(tmp_path, whole)
    losses = json.loads((whole / "long_encoder_results.json").read_text())
    names = [
        *("before_conversion_at_16", "after_conversion_at_16", "after_conversion_at_64"),
        *("after_training_at_16", "after_training_at_64"),
    ]
    assert set(losses) == {f"loss_{name}" for name in names}
    assert losses["loss_after_training_at_64"] < losses["loss_after_conversion_at_64"]
    model = AutoModelForMaskedLM.from_pretrained(whole, attn_implementation="longformer")
    assert model.config.attn_params["longformer"]["window"] == 8
    assert model.config.max_position_embeddings == 66
    assert AutoTokenizer.from_pretrained(whole).model_max_length == 64

    stopped = tmp_path / "stopped"
    shutil.copytree(whole / "checkpoint-3", stopped / "checkpoint-3")
    before = {name: value for name, value in losses.items() if "training" not in name}
    (stopped / "long_encoder_results.json").write_text(json.dumps(before))
    start(tmp_path, stopped)
    assert json.loads((stopped / "long_encoder_results.json").read_text()) == losses
