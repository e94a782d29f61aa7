"""Packing against rows written by hand, and packed rows against documents one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import hf_attn_plugin  # noqa: F401  (registers the names)
from hf_attn_plugin.data import (
    TextArguments,
    collate_packed,
    load_texts,
    pack_documents,
    pack_texts,
)
from hf_attn_plugin.training import last_checkpoint


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"</s>": 0, "?": 1, "a": 2, "b": 3, "c": 4, "d": 5, "e": 6}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="?")


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_rows_written_by_hand() -> None:
    documents = [[10, 11], [20, 21, 22, 23, 24], [30], [40], [50, 51]]
    assert list(pack_documents(documents, 4)) == [
        {
            "input_ids": [10, 11, 20, 21],
            "position_ids": [0, 1, 0, 1],
            "labels": [-100, 11, -100, 21],
        },
        # The rest of the second document is a document of its own.
        {
            "input_ids": [22, 23, 24, 30],
            "position_ids": [0, 1, 2, 0],
            "labels": [-100, 23, 24, -100],
        },
        # 40, 50, 51 do not fill a row.
    ]


def test_one_document_over_several_rows() -> None:
    rows = list(pack_documents([range(9)], 3))
    assert [row["input_ids"] for row in rows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert all(row["position_ids"] == [0, 1, 2] for row in rows)


def test_documents_are_read_lazily() -> None:
    def endless():  # type: ignore[no-untyped-def]
        while True:
            yield [1, 2, 3]

    rows = pack_documents(endless(), 4)
    assert next(rows)["input_ids"] == [1, 2, 3, 1]


@pytest.mark.parametrize("length", [1, 0, -5])
def test_too_short_rows_are_refused_at_once(length: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 tokens, got {length}"):
        pack_documents([[1, 2]], length)


def test_empty_document_is_refused_by_number() -> None:
    rows = pack_documents([[1, 2], [3, 4], [], [5, 6]], 2)
    assert [next(rows)["input_ids"], next(rows)["input_ids"]] == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="document 2 is empty"):
        next(rows)


def test_collated_rows_are_int64_without_a_mask() -> None:
    batch = collate_packed(list(pack_documents([range(5), range(7)], 4)))
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert all(t.dtype == torch.int64 and t.shape == (3, 4) for t in batch.values())


def test_collating_without_positions_is_refused() -> None:
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    with pytest.raises(ValueError, match="position_ids is missing"):
        collate_packed(rows)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_packed_loss_is_that_of_the_documents_one_by_one() -> None:
    model = tiny_llama()
    documents = [torch.randint(32, (n,)) for n in (5, 1, 7, 3)]
    batch = collate_packed(list(pack_documents([d.tolist() for d in documents], 16)))
    packed = model(**batch, use_cache=False)

    alone = torch.cat([model(d[None]).logits[0] for d in documents])
    torch.testing.assert_close(packed.logits[0], alone, rtol=0, atol=1e-4)
    losses = [
        torch.nn.functional.cross_entropy(model(d[None]).logits[0, :-1], d[1:], reduction="sum")
        for d in documents
    ]
    expected = torch.stack(losses).sum() / (16 - len(documents))
    torch.testing.assert_close(packed.loss, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "flash", "sliding_window"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trainer_keeps_documents_apart(attention: str, lora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    documents = [torch.randint(32, (n,)) for n in (5, 9, 2, 8, 8)]
    rows = list(pack_documents([d.tolist() for d in documents], 16))
    losses = [
        torch.nn.functional.cross_entropy(model(d[None]).logits[0, :-1], d[1:], reduction="sum")
        for d in documents
        if len(d) > 1
    ]
    expected = (torch.stack(losses).sum() / (32 - len(documents))).item()

    model.set_attn_implementation(attention)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")) if lora else model,
        arguments,
        data_collator=collate_packed,
        train_dataset=rows,
        eval_dataset=rows,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-4)


def test_texts_end_with_eos_and_empty_ones_are_left_out(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = pack_texts(["a b", "", "c </s>", "d e"], tokenizer, 4)
    assert rows["input_ids"][:] == [[2, 3, 0, 4], [0, 5, 6, 0]]
    assert rows["position_ids"][:] == [[0, 1, 2, 0], [0, 0, 1, 2]]
    assert rows["labels"][:] == [[-100, 3, 0, -100], [-100, -100, 6, 0]]


def test_too_little_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="4 tokens in 1 documents do not fill one row of 64"):
        pack_texts(["a b c"], tokenizer, 64)
    with pytest.raises(ValueError, match="0 tokens in 0 documents"):
        pack_texts(["", ""], tokenizer, 2)


def test_each_file_is_one_document(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "one.txt").write_text("a b\n\nc")
    (tmp_path / "two.txt").write_text("d e")
    texts = load_texts([tmp_path / "one.txt", tmp_path / "two.txt"])
    assert texts["text"][:] == ["a b\n\nc", "d e"]
    assert pack_texts(texts, tokenizer, 7)["input_ids"][:] == [[2, 3, 4, 0, 5, 6, 0]]


@pytest.mark.parametrize("column", ["text", "body"])
def test_dataset_folder(column: str, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "data.jsonl").write_text(f'{{"{column}": "a b", "n": 1}}\n{{"{column}": "c"}}\n')
    texts = load_texts(dataset=str(folder), text_column=column)
    assert texts.column_names == ["text"]
    assert texts["text"][:] == ["a b", "c"]
    with pytest.raises(ValueError, match=f"no column 'title', only {column}, n"):
        load_texts(dataset=str(folder), text_column="title")


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either text files or a dataset"):
        load_texts()
    with pytest.raises(ValueError, match="either text files or a dataset"):
        load_texts(["a.txt"], dataset="b")
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        load_texts([tmp_path / "absent.txt"])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        load_texts([tmp_path / "empty.txt"])


def test_the_last_rows_are_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "text.txt").write_text("a b c d " * 5)
    files = [str(tmp_path / "text.txt")]
    rows = TextArguments(text=files, eval_fraction=0.4).load_rows(tokenizer, 4)
    assert rows["train"]["input_ids"][:] == [[2, 3, 4, 5]] * 3
    assert rows["test"]["input_ids"][:] == [[2, 3, 4, 5]] * 2
    for fraction in (0.0, 0.01, 1.0):
        with pytest.raises(ValueError, match="of 5 packed rows leaves no row"):
            TextArguments(text=files, eval_fraction=fraction).load_rows(tokenizer, 4)


def test_last_checkpoint_is_the_newest_complete_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "absent") is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_copies_of_checkpoints_are_not_resumed_from(tmp_path) -> None:
    from hf_attn_plugin.training import last_checkpoint

    for name in ("checkpoint-3", "checkpoint-20", "checkpoint-best", "checkpoint-40.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
