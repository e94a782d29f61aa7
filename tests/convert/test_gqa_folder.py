"""Conversion from folder to folder: bit for bit what happens in memory, whatever the files."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from hf_attn_plugin.convert import gqa_folder, to_gqa
from hf_attn_plugin.convert.gqa_checkpoint import write_safetensors
from hf_attn_plugin.convert.gqa_folder import convert_folder

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "initializer_range": 0.5,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"attention_bias": True} | changes)).eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_files(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    """The folder's weights are those that the model would save, name for name and bit for bit."""
    model.save_pretrained(tmp_path / "expected")
    expected, found = weights(tmp_path / "expected"), weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)


@pytest.mark.parametrize("method", ["mean", "first", "random", "aligned"])
@pytest.mark.parametrize("sharded", [False, True])
def test_equals_to_gqa_bit_for_bit(method: Any, sharded: bool, tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in", max_shard_size="9KB" if sharded else "1GB")
    shards = len(list((tmp_path / "in").glob("*.safetensors")))
    assert (shards > 3) == sharded
    convert_folder(tmp_path / "in", tmp_path / "out", 2, method, seed=3)
    assert_same_files(tmp_path / "out", to_gqa(model, 2, method, seed=3), tmp_path)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_key_value_heads == 2
    assert not (tmp_path / "out" / ".convert-gqa").exists()


def test_the_index_is_right(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "in", max_shard_size="20KB")
    convert_folder(tmp_path / "in", tmp_path / "out", 1)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = weights(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in found.values())
    assert index["weight_map"].keys() == found.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
            assert shard.metadata() == {"format": "pt"}


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_files_with_ties(sharded: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    folder = tmp_path / "in"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    state = model.state_dict()
    assert "lm_head.weight" in state
    if sharded:
        names = list(state)
        parts = {f"pytorch_model-0000{i}-of-00002.bin": names[i - 1 :: 2] for i in (1, 2)}
        for file, part in parts.items():
            torch.save({name: state[name] for name in part}, folder / file)
        index = {"metadata": {}, "weight_map": {n: f for f, part in parts.items() for n in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    convert_folder(folder, tmp_path / "out", 4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = to_gqa(model, 4).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    if not sharded:  # in one file it is seen that two names are one tensor
        assert "lm_head.weight" not in weights(tmp_path / "out")


def test_names_that_transformers_translates(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "in")
    assert any("block_sparse_moe" in name for name in weights(tmp_path / "in"))
    convert_folder(tmp_path / "in", tmp_path / "out", 2)
    assert_same_files(tmp_path / "out", to_gqa(model, 2), tmp_path)


def test_weights_in_another_form_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "in")
    tensors = weights(tmp_path / "in")
    name = "model.layers.1.self_attn.v_proj.weight"
    from safetensors.torch import save_file

    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "in/model.safetensors")
    with pytest.raises(ValueError, match=rf"the weights have no {name}"):
        convert_folder(tmp_path / "in", tmp_path / "out", 2)
    save_file(tensors | {name: tensors[name][:16]}, tmp_path / "in/model.safetensors")
    with pytest.raises(ValueError, match="stored in another form"):
        convert_folder(tmp_path / "in", tmp_path / "out", 2)
    (tmp_path / "in/model.safetensors").unlink()
    with pytest.raises(OSError, match="has no weights"):
        convert_folder(tmp_path / "in", tmp_path / "out", 2)
    index = {"metadata": {}, "weight_map": {name: "model-00001-of-00002.safetensors"}}
    (tmp_path / "in/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="which the folder lacks"):
        convert_folder(tmp_path / "in", tmp_path / "out", 2)


def test_other_files_and_the_readme(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    model = llama()
    model.generation_config.max_length = 17
    model.save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (source / "extra").mkdir()
    (source / "extra" / "note.txt").write_text("kept")
    (source / "original").mkdir()
    (source / "original" / "consolidated.pth").write_text("other weights")
    (source / "tf_model.h5").write_text("other weights")
    out.mkdir()
    for stale in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "tokenizer.json"):
        (out / stale).write_text("stale")
    (out / "model.safetensors.index.json").write_text("{}")
    (out / "mine.txt").write_text("stays")

    with pytest.raises(ValueError, match="already holds a model"):
        convert_folder(source, out, 4)
    report = convert_folder(source, out, 4, overwrite=True)
    assert report.not_copied == ("original", "tf_model.h5")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "extra",
        "generation_config.json",
        "mine.txt",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "extra" / "note.txt").read_text() == "kept"
    readme = (out / "README.md").read_text()
    assert readme.startswith("---\nlicense: mit\n---\n\n> Converted with `hf-attn convert-gqa`")
    assert readme.endswith("# A model\n")
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.max_length == 17


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    model = llama()
    model.save_pretrained(source, max_shard_size="20KB")
    written: list[str] = []

    def interrupted(path: Path, *args: Any) -> None:
        if len(written) == 2:
            path.with_name(path.name + ".partial").write_text("half a shard")
            raise KeyboardInterrupt
        write_safetensors(path, *args)
        written.append(path.name)

    monkeypatch.setattr(gqa_folder, "write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(source, out, 2)
    assert [p.name for p in out.iterdir()] == [".convert-gqa"]
    with pytest.raises((OSError, ValueError)):  # which depends on the version of transformers
        AutoConfig.from_pretrained(out)

    def counted(path: Path, *args: Any) -> None:
        write_safetensors(path, *args)
        written.append(path.name)

    monkeypatch.setattr(gqa_folder, "write_safetensors", counted)
    convert_folder(source, out, 2)
    assert len(written) == len(set(written)) == len(list(source.glob("*.safetensors")))
    assert_same_files(out, to_gqa(llama(), 2), tmp_path)
    assert not list(out.glob("**/*.partial"))


def test_another_run_does_not_take_up_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    llama().save_pretrained(source, max_shard_size="20KB")
    monkeypatch.setattr(gqa_folder, "_publish", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(source, out, 2)
    monkeypatch.undo()
    convert_folder(source, out, 4, "first")
    assert_same_files(out, to_gqa(llama(), 4, "first"), tmp_path)


@pytest.mark.parametrize("moved", range(14))
@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_while_it_publishes(
    moved: int, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call goes on, nothing is computed again, and until then nothing loads."""
    source, out = tmp_path / "in", tmp_path / "out"
    llama(num_hidden_layers=2).save_pretrained(source, max_shard_size="20KB")
    (source / "extra").mkdir()
    (source / "extra" / "note.txt").write_text("kept")
    if overwrite:
        llama(num_hidden_layers=1).save_pretrained(out)
    replace, count = Path.replace, 0

    def interrupted(path: Path, target: Path) -> Path:
        nonlocal count
        if target.parent == out:
            if count == moved:
                raise KeyboardInterrupt
            count += 1
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        convert_folder(source, out, 2, overwrite=overwrite)
    monkeypatch.undo()
    entries = len([p for p in source.iterdir() if p.name != "README.md"]) + 1
    done = moved >= entries
    assert (out / "config.json").exists() == done
    assert (out / ".convert-gqa").exists() != done
    if done:
        return
    if list(out.glob("*.safetensors")):  # of this run alone
        with pytest.raises(ValueError, match="already holds a model"):
            convert_folder(source, out, 4)
    monkeypatch.setattr(gqa_folder, "write_safetensors", _interrupt)
    convert_folder(source, out, 2, overwrite=overwrite)
    assert_same_files(out, to_gqa(llama(num_hidden_layers=2), 2), tmp_path)
    assert (out / "extra" / "note.txt").read_text() == "kept"
    assert not (out / ".convert-gqa").exists()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_dtype(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "in")
    report = convert_folder(tmp_path / "in", tmp_path / "out", 2, dtype=torch.bfloat16)
    assert report.dtype == torch.bfloat16
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.skipif(
    not (Path("/proc/self/status").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="needs Linux' /proc and glibc",
)
def test_memory_stays_far_below_the_model(tmp_path: Path) -> None:
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(**sizes | {"vocab_size": 4096}))
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path / "in")
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    del model
    streamed = _peak(tmp_path / "in", tmp_path / "out-1", True)
    from_bin = _peak(tmp_path / "bin", tmp_path / "out-2", True)
    # The control: the measure sees a model that is loaded.
    loaded = _peak(tmp_path / "in", tmp_path / "out-3", False)
    assert size > 60e6
    assert streamed < 0.5 * size
    assert from_bin < 0.5 * size
    assert loaded > 0.8 * size


def _peak(source: Path, out: Path, stream: bool) -> float:
    """Bytes of memory (RSS, mapped files included) that a conversion adds at its peak."""
    tiny = source.parent / f"tiny-{out.name}"
    llama().save_pretrained(tiny)  # what imports and first calls take is not counted
    convert_folder(tiny, tiny / "out", 2, progress=False)
    gc.collect()
    # Memory that was freed but not given back would hide what is taken now.
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
    if stream:
        convert_folder(source, out, 2, progress=False)
    else:
        to_gqa(LlamaForCausalLM.from_pretrained(source), 2).save_pretrained(out)
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(field)).split()[1])
