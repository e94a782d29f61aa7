"""`verify` names exactly the layer in which something is wrong, and by how much."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import LENGTH, pack_positions, padding_mask, random_ids
from transformers import Trainer, TrainingArguments

from hf_attn_plugin.data import collate_packed, pack_documents
from hf_attn_plugin.integrations.window_cache import WindowLayer
from hf_attn_plugin.methods import flash, longformer, sliding_window
from hf_attn_plugin.verification import (
    AttentionMismatchError,
    DecodingBatch,
    LayerCheck,
    VerifyCallback,
    verify,
    verify_batches,
)
from hf_attn_plugin.verification.batches import shorten_batch

from .test_verify import model_of

Fault = Callable[[Any], Any]  # an AttentionCall with something wrong about it


def break_layer(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, layer: int = 1, method: Any = flash
) -> None:
    """Let one layer read its calls wrongly."""
    read = method.read_call

    def faulty(*args: Any, **kwargs: Any) -> Any:
        call = read(*args, **kwargs)
        return fault(call) if call.module.layer_idx == layer else call

    monkeypatch.setattr(method, "read_call", faulty)


def only_difference(model: Any, batch: dict[str, Any], **options: Any) -> LayerCheck:
    """The one check that fails."""
    report = verify(model, batch, **options)
    (wrong,) = [check for check in report.checks if not check.ok]
    assert report.first_difference is wrong
    return wrong


def changed(**fields: Any) -> Fault:
    return lambda call: dataclasses.replace(call, **fields)


def of_pattern(**fields: Any) -> Fault:
    return lambda call: dataclasses.replace(call, pattern=call.pattern.replace(**fields))


IDS = random_ids(2, LENGTH)
PACKED = {"input_ids": IDS, "position_ids": pack_positions([[7, 13], [LENGTH]])}
PADDED = {"input_ids": IDS, "attention_mask": padding_mask(LENGTH, [0, 6], "left")}


def test_dropped_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    break_layer(monkeypatch, of_pattern(key_valid=None))
    wrong = only_difference(model_of("llama", "flash"), PADDED)
    assert wrong.name == "model.layers.1.self_attn"
    # Each of the 14 valid queries sees 6 more keys, and padding sees itself and what is before it.
    assert f"attends to {14 * 6 + 21} pairs too many, first row 1: query 0 → key 0" in wrong.detail
    assert wrong.relative_error > 100 * (wrong.budget or 1)


def test_documents_that_leak_in_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    break_layer(monkeypatch, of_pattern(q_documents=None, kv_documents=None))
    wrong = only_difference(model_of("llama", "flash"), PACKED)
    assert (wrong.name, wrong.layer_idx) == ("model.layers.1.self_attn", 1)
    assert f"attends to {7 * 13} pairs too many, first row 0: query 7 → key 0" in wrong.detail


def test_a_dropped_softcap(monkeypatch: pytest.MonkeyPatch) -> None:
    break_layer(monkeypatch, changed(softcap=None), layer=0)
    wrong = only_difference(model_of("gemma2", "flash"), {"input_ids": IDS})
    assert wrong.name == "model.layers.0.self_attn"
    assert "the right pairs attend, the numbers differ" in wrong.detail


def test_ignored_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    break_layer(monkeypatch, changed(sinks=None))
    wrong = only_difference(model_of("gpt_oss", "flash"), {"input_ids": IDS})
    assert wrong.name == "model.layers.1.self_attn"
    assert "the numbers differ" in wrong.detail


def test_another_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    break_layer(monkeypatch, changed(scaling=0.36))  # 8 ** -0.5 is 0.354
    assert only_difference(model_of("llama", "flash"), {"input_ids": IDS}).layer_idx == 1


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_off_by_one(monkeypatch: pytest.MonkeyPatch, off: int, dtype: torch.dtype) -> None:
    sparsify = sliding_window.sparsify

    def faulty(call: Any, **terms: Any) -> Any:
        if call.module.layer_idx == 1:
            terms["window"] += off
        return sparsify(call, **terms)

    monkeypatch.setattr(sliding_window, "sparsify", faulty)
    wrong = only_difference(model_of("llama", "sliding_window").to(dtype), {"input_ids": IDS})
    assert wrong.name == "model.layers.1.self_attn"
    # Window 5 and 2 sinks: with one more, queries from 7 on see a key that is no sink.
    pairs, words = (2 * 13, "pairs too many") if off > 0 else (2 * 14, "misses")
    assert str(pairs) in wrong.detail
    assert words in wrong.detail


def test_first_tokens_that_are_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Global tokens at the first places of the row instead of the first valid tokens."""
    ranks = torch.arange(LENGTH)[None]
    break_layer(monkeypatch, of_pattern(kv_ranks=ranks), method=longformer)
    wrong = only_difference(model_of("llama", "longformer"), PADDED)
    assert "misses" in wrong.detail
    assert "row 1" in wrong.detail


def test_the_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = flash.attend

    def faulty(call: Any, pattern: Any) -> Any:
        output, weights = attend(call, pattern)
        if call.module.layer_idx == 0:
            output[1, 11, 2, 3] += 0.25
        return output, weights

    monkeypatch.setattr(flash, "attend", faulty)
    wrong = only_difference(model_of("llama", "flash"), {"input_ids": IDS})
    assert wrong.name == "model.layers.0.self_attn"
    assert wrong.max_abs_error == pytest.approx(0.25, rel=1e-4)
    assert wrong.relative_error < 0.25


def test_a_wrong_backward_is_seen_with_gradients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    break_layer(
        monkeypatch,
        lambda call: dataclasses.replace(call, key=0.9 * call.key + 0.1 * call.key.detach()),
    )
    model = model_of("llama", "flash")
    assert verify(model, {"input_ids": IDS}).ok
    wrong = only_difference(model, {"input_ids": IDS}, gradients=True)
    assert (wrong.name, wrong.quantity) == ("model.layers.1.self_attn", "key gradient")
    assert 0.05 < wrong.relative_error <= 0.1 + 1e-4


def test_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    break_layer(monkeypatch, changed(scaling=float("nan")))
    assert only_difference(model_of("llama", "flash"), {"input_ids": IDS}).layer_idx == 1


def test_a_long_batch_is_cut_with_all_that_belongs_to_it() -> None:
    lengths = torch.tensor([0, 7, 15, LENGTH], dtype=torch.int32)
    batch = {**PACKED, "cu_seq_lens_q": lengths, "use_cache": False, "labels": IDS}
    cut = shorten_batch({**batch, "attention_mask": torch.ones(1, 1, LENGTH, LENGTH)}, 12)
    assert torch.equal(cut["input_ids"], IDS[:, :12])
    assert torch.equal(cut["position_ids"], PACKED["position_ids"][:, :12])
    assert cut["cu_seq_lens_q"].tolist() == [0, 7, 12]
    assert cut["attention_mask"].shape == (1, 1, 12, 12)
    assert cut["use_cache"] is False
    assert shorten_batch(batch, LENGTH) == batch


def test_a_cache_that_drops_a_key_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    append = WindowLayer.update

    def faulty(self: WindowLayer, *args: Any, **kwargs: Any) -> Any:
        keys, values = append(self, *args, **kwargs)
        if keys.shape[2] < LENGTH:  # the step, not the prompt
            values = values.clone()
            values[:, :, -3] = 0
            for name, kept in vars(keys).items():
                setattr(values, name, kept)
        return keys, values

    model = model_of("llama", "sliding_window")
    monkeypatch.setattr(WindowLayer, "update", faulty)
    report = verify_batches(
        model,
        {"step": DecodingBatch({"input_ids": random_ids(2, LENGTH)}, {"input_ids": IDS[:, :1]})},
    )
    assert report.first_difference is not None
    assert "dropped keys" in report.first_difference.detail


def trainer(folder: Path, callback: VerifyCallback | None, **options: Any) -> Trainer:
    documents = [random_ids(1, length, seed=length)[0].tolist() for length in (9, 30, 17, 24)]
    rows = Dataset.from_list(list(pack_documents(documents, LENGTH)))
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(
        model_of("llama", "longformer"),
        arguments,
        train_dataset=rows,
        data_collator=collate_packed,
        callbacks=[callback] if callback else None,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_on_as_it_would_have(tmp_path: Path, checkpointing: bool) -> None:
    callback = VerifyCallback(gradients=True, max_tokens=14)
    losses = []
    for callbacks in (callback, None):
        run = trainer(tmp_path, callbacks, gradient_checkpointing=checkpointing)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert callback.report is not None
    assert callback.report.ok
    assert len(callback.report.checks) == 2 * 4


def test_training_stops_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_layer(monkeypatch, of_pattern(q_documents=None, kv_documents=None), method=longformer)
    run = trainer(tmp_path, VerifyCallback())
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with pytest.raises(AttentionMismatchError, match=r"layers\.1\.self_attn.*pairs too many"):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
