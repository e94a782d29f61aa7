"""The quickstart at a miniature scale: every stage, interruption, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attn_plugin.cli.main import main
from hf_attn_plugin.data import IGNORE_INDEX
from hf_attn_plugin.quickstart import QuickstartSettings, run_quickstart
from hf_attn_plugin.quickstart.documents import (
    ANSWER,
    FACT,
    DocumentMaker,
    Mix,
    TrainingBatches,
    make_batch,
)
from hf_attn_plugin.quickstart.report import recovered, summary
from hf_attn_plugin.quickstart.settings import TEMPLATE
from hf_attn_plugin.quickstart.text import read_corpus, train_tokenizer
from hf_attn_plugin.quickstart.training import Curriculum
from hf_attn_plugin.quickstart.workspace import Workspace

MINIATURE = QuickstartSettings(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=32,
    context=64,
    extension=4,
    tokens_per_step=256,
    pretrain_steps=20,
    finetune_steps=6,
    uptrain_fraction=0.1,
    lora_rank=2,
    window=80,
    save_steps=4,
    # No accuracy is needed, so that the lengths grow within the few steps.
    advance_accuracy=-1.0,
    held_out_rows=4,
    lengths=(64, 256),
    depths=(0.0, 1.0),
    samples=2,
    bpb_samples=2,
    bpb_scored=4,
    batch_size=4,
)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "import", "value", "(x)", "= 12"]
    lines = [" ".join(rng.choice(words, 8)) for _ in range(1500)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def documents(text_file: Path) -> DocumentMaker:
    text = text_file.read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text], 320, 256)
    return DocumentMaker(tokenizer, tokenizer(text)["input_ids"])


def start(out: Path, text_file: Path, **kwargs: Any) -> dict[str, Any]:
    lines: list[str] = kwargs.pop("lines", [])
    return run_quickstart(
        out,
        [text_file],
        settings=kwargs.pop("settings", MINIATURE),
        progress=False,
        say=lines.append,
        minimum_characters=1000,
        **kwargs,
    )


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    out = tmp_path_factory.mktemp("finished") / "out"
    start(out, text_file, command="hf-attn quickstart --seed 0")
    return out


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "seconds"}
    return value


def test_all_stages_are_measured_and_written(finished: Path) -> None:
    results = results_of(finished)
    assert list(results) == ["text", "pretrained", "finetuned", "converted", "evaluation"]
    assert results["pretrained"]["steps"] == 20
    assert results["pretrained"]["lengths_reached_at_step"].keys() == {"32", "64"}
    assert results["finetuned"]["context"] == 256
    assert results["converted"]["steps"] == 2
    assert results["converted"]["heads"] == [4, 2]
    rows = results["evaluation"]
    assert list(rows) == [
        "sdpa (dense)",
        "sliding_window",
        "longformer",
        "sparq 1/2",
        "sparq 1/8",
    ]
    for row in rows.values():
        assert row["needles"] == 8
        assert np.array(row["grid"]["scores"]).shape == (2, 2)
        assert row["bits_per_byte"] > 0
    # Over 252 to 255 keys: rank / (2 * head_dim) + top_k / keys, with rank 4 and 1 of 8 components
    # and 40 and 10 keys. How long this untrained model writes about needles is not known.
    shares = {label: row["long_bpb_kv_share"] for label, row in rows.items()}
    assert shares["sdpa (dense)"] == 1
    assert shares["sparq 1/2"] == pytest.approx(4 / 16 + 40 / 253.5, rel=0.02)
    assert shares["sparq 1/8"] == pytest.approx(1 / 16 + 10 / 253.5, rel=0.02)
    assert shares["sliding_window"] == pytest.approx(80 / 253.5, rel=0.02)


def test_model_folder_loads_and_carries_its_parameters(finished: Path) -> None:
    folder = finished / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sparq")
    config = model.config
    assert config.num_key_value_heads == 2
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["rope_type"] != "default"
    assert config.rope_parameters["factor"] == 4
    assert config.attn_params == {
        "longformer": MINIATURE.longformer.to_dict(),
        "sliding_window": MINIATURE.sliding_window.to_dict(),
        "sparq": MINIATURE.sparq(1 / 2).to_dict(),
    }
    text = f"The secret word of apple is {TEMPLATE.values[0]}."
    inputs = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(inputs["input_ids"][0]) == text
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3


def test_card_holds_what_was_measured(finished: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished / "model" / "README.md")
    measured = {
        (result.dataset_type, result.metric_name.split(", ", 1)[1]): result.metric_value
        for result in card.data.eval_results
    }
    for label, row in results_of(finished)["evaluation"].items():
        assert measured["niah", label] == pytest.approx(row["niah"])
        assert measured["long_bpb", label] == pytest.approx(row["bits_per_byte"])
    assert "hf-attn quickstart --seed 0" in card.text
    for picture in ("needle.png", "quality.png"):
        assert f"figures/{picture}" in card.text
        assert (finished / "model" / "figures" / picture).stat().st_size > 1000


@pytest.mark.parametrize("stage", ["pretrained", "finetuned", "converted"])
def test_interrupted_training_ends_as_an_uninterrupted_one(
    stage: str,
    finished: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hf_attn_plugin.quickstart import stages

    settings = dataclasses.replace(MINIATURE, uptrain_fraction=0.25)
    expected_settings = settings if stage == "converted" else MINIATURE
    expected = (
        start(tmp_path / "whole", text_file, settings=settings)
        if stage == "converted"
        else results_of(finished)
    )
    # Interrupted in the middle of a stage, after a checkpoint and two steps more.
    total = {"pretrained": 14, "finetuned": 5, "converted": 5}[stage]
    real_train = stages.train

    def train(model: Any, batches: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs["checkpoints"].name == stage:
            make = batches.__class__.__getitem__

            class Interrupted(TrainingBatches):
                def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
                    if step == total:
                        raise KeyboardInterrupt
                    return make(self, step)

            batches.__class__ = Interrupted
        real_train(model, batches, *args, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", train)
        with pytest.raises(KeyboardInterrupt):
            start(out, text_file, settings=expected_settings)
    assert stage not in results_of(out)
    assert not (out / stage).exists()
    lines: list[str] = []
    resumed = start(out, text_file, settings=expected_settings, lines=lines)
    assert any("going on from" in line and "checkpoint-" in line for line in lines)
    assert without_times(resumed) == without_times(expected)
    assert not (out / "checkpoints" / stage).exists()


def test_interrupted_evaluation_keeps_the_methods_that_are_done(
    finished: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_attn_plugin.lm_eval as harness

    real = harness.evaluate
    labels: list[str] = []

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        labels.append(kwargs["attn"])
        if len(labels) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    out = tmp_path / "out"
    monkeypatch.setattr(harness, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        start(out, text_file)
    assert list(results_of(out)["evaluation"]) == ["sdpa (dense)"]
    labels[:] = ["done"] * 10
    resumed = start(out, text_file)
    assert "sdpa" not in labels
    assert without_times(resumed) == without_times(results_of(finished))


def test_finished_run_is_only_reported(finished: Path, text_file: Path) -> None:
    before = (finished / "model" / "model.safetensors").stat().st_mtime_ns
    lines: list[str] = []
    start(finished, text_file, lines=lines)
    assert (finished / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert not any(line.startswith("[2/6]") for line in lines)
    assert any("sparq 1/8" in line for line in lines)
    assert str(finished / "model") in lines[-1]


def test_summary_prints_the_measured_numbers(finished: Path) -> None:
    results = results_of(finished)
    rows = results["evaluation"]
    rows["sdpa (dense)"]["niah"] = 0.98765
    rows["sparq 1/8"].update(niah=0.5, niah_kv_share=0.123)
    rows["longformer"]["bits_per_byte"] = 1.2345
    losses = {"before": 2.0, "converted": 4.0, "uptrained": 2.5}
    results["converted"].update({stage: {"loss": loss} for stage, loss in losses.items()})
    text = summary(results, MINIATURE)
    for expected in ("98.8%", "1.234", "0.123 of dense", "-48.8 points", "75% of what it cost"):
        assert expected in text
    assert recovered(results["converted"]) == 0.75


def test_folder_of_another_run_is_refused(finished: Path, text_file: Path) -> None:
    with pytest.raises(ValueError, match="another seed"):
        start(finished, text_file, seed=1)
    with pytest.raises(ValueError, match="another settings"):
        start(finished, text_file, settings=dataclasses.replace(MINIATURE, samples=3))
    changed = finished.parent / "other.txt"
    changed.write_text(text_file.read_text() + "one more line\n")
    with pytest.raises(ValueError, match="another text"):
        start(finished, changed)


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        Workspace.open(file, {})
    with pytest.raises(OSError, match="cannot be written"):
        Workspace.open(file / "below", {})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not from the quickstart"):
        Workspace.open(foreign, {})
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_half_written_pieces_do_not_count(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "out", {"seed": 0})

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workspace.write("model", fail)
    assert not workspace.path("model").exists()
    folder = workspace.write("model", lambda path: (path / "whole").write_text(""))
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not (tmp_path / "out" / "model.unfinished").exists()


def test_texts_that_teach_nothing_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    empty, short, binary = (tmp_path / name for name in ("empty.txt", "short.txt", "data.bin"))
    empty.write_text(" \n")
    short.write_text("too little")
    binary.write_bytes(b"\xff\xfe\x00" * 1000)
    for file, expected in (
        (empty, "is empty"),
        (short, "too few"),
        (binary, "not UTF-8"),
        (tmp_path / "missing.txt", "missing.txt"),
    ):
        assert main(["quickstart", "--out", str(out), "--text", str(file)]) == 2
        assert expected in capsys.readouterr().err
    assert main(["quickstart", "--out", str(out), "--seed", "-1"]) == 2
    assert "--seed" in capsys.readouterr().err
    assert not out.exists()


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import hf_attn_plugin.quickstart as quickstart

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "run_quickstart", interrupted)
    out = tmp_path / "my out"
    assert main(["quickstart", "--out", str(out), "--seed", "3"]) == 130
    assert f"hf-attn quickstart --out '{out}' --seed 3" in capsys.readouterr().err


def test_corpus_holds_out_the_end_of_every_file(tmp_path: Path) -> None:
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file in files:
        file.write_text("".join(f"{file.stem} line {n}\n" for n in range(100)))
    corpus = read_corpus(files, minimum_characters=100)
    for file, train, held_out in zip(files, corpus.train, corpus.held_out, strict=True):
        assert train + held_out == file.read_text()
        assert train.endswith("\n")
        assert 0.05 < len(held_out) / len(train + held_out) < 0.15
    assert corpus.digest != read_corpus(files[:1], minimum_characters=100).digest


def test_standard_library_is_found() -> None:
    corpus = read_corpus()
    assert sum(map(len, corpus.train)) > 1_000_000
    assert any("import" in text for text in corpus.held_out)


def test_words_of_the_needles_are_single_tokens(text_file: Path) -> None:
    tokenizer = train_tokenizer([text_file.read_text()], 320, 256)
    words = [*TEMPLATE.keys, *TEMPLATE.values]
    for word in words:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1
    # The text has few different words, and may not give as many tokens as it could.
    assert len(words) < len(tokenizer) <= 320 + len(words)
    sentence = TEMPLATE.needle.format(key=TEMPLATE.keys[0], value=TEMPLATE.values[0])
    text = f"def f(x):\n    return x{sentence}# ü\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("packed", [False, True])
def test_facts_lie_within_reach_of_their_question(documents: DocumentMaker, packed: bool) -> None:
    reach = 70
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(20):
        batch = make_batch(documents, rng, 2, 256, Mix(0.4, reach), packed)
        assert batch["input_ids"].shape == (2, 256)
        positions = batch.get("position_ids", torch.arange(256).expand(2, -1))
        for tokens, kinds, places in zip(
            batch["input_ids"], batch["kinds"], positions, strict=True
        ):
            documents_of_row = (places == 0).cumsum(0)
            facts = (kinds == FACT).nonzero()[:, 0]
            for answer in (kinds == ANSWER).nonzero()[:, 0]:
                key = tokens[answer - 2]  # "... of KEY is VALUE"
                (fact,) = (
                    fact
                    for fact in facts
                    if tokens[fact - 2] == key
                    and documents_of_row[fact] == documents_of_row[answer]
                )
                assert tokens[fact] == tokens[answer]
                assert documents.sentence_length <= answer - fact < reach
                found += 1
    assert found > 20


def test_words_that_nobody_can_foresee_are_not_learnt(documents: DocumentMaker) -> None:
    batch = make_batch(documents, np.random.default_rng(0), 8, 64, Mix(0.6), packed=False)
    facts = batch["kinds"] == FACT
    assert facts.any()
    assert (batch["labels"][facts] == IGNORE_INDEX).all()
    assert torch.equal(batch["labels"][~facts], batch["input_ids"][~facts])


def test_batches_depend_on_their_index_alone(documents: DocumentMaker) -> None:
    def batches(seed: int) -> TrainingBatches:
        return TrainingBatches(
            documents, 10, 256, lambda step: 64, (seed, 0), lambda step: Mix(0.6), False
        )

    first, again, other = batches(0), batches(0), batches(1)
    assert torch.equal(first[3]["input_ids"], again[3]["input_ids"])
    assert not torch.equal(first[3]["input_ids"], first[4]["input_ids"])
    assert not torch.equal(first[3]["input_ids"], other[3]["input_ids"])


def test_curriculum_doubles_up_to_its_last_length() -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    curriculum = Curriculum(32, 100, threshold=0.5)
    state, control = TrainerState(), TrainerControl()
    arguments = TrainingArguments(use_cpu=True, report_to="none")
    for step, accuracy in enumerate((0.0, 1.0, 1.0, 1.0)):
        state.global_step = step + 1
        curriculum.accuracy = accuracy
        curriculum.on_step_end(arguments, state, control)
    # A batch ahead is made already when a step ends.
    assert curriculum.changes == [[0, 32], [3, 64], [4, 100]]
    assert [curriculum.length_at(step) for step in range(6)] == [32, 32, 32, 64, 100, 100]
