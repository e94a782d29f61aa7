"""Conversion of a model folder, tensor by tensor, without ever holding the model."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_attn_plugin.convert.gqa_checkpoint import (
    Checkpoint,
    parameter_names,
    write_safetensors,
)
from hf_attn_plugin.convert.gqa_layers import Conversion, Method
from hf_attn_plugin.convert.gqa_plan import build_without_weights, set_heads

_STAGE = ".convert-gqa"  # holds finished shards until all are there
_PUBLISHING = "publishing"  # in it from when they are moved: what it lacks is in place already
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass(frozen=True)
class FolderReport:
    """What a conversion of a folder did.

    Attributes:
        old_heads: Key/value heads per layer before.
        new_heads: And after.
        parameters: Parameters before and after.
        cache_elements: Elements of the KV cache per token in the converted layers, before, after.
        dtype: Dtype of the converted weights.
        layers: Layers that were converted.
        turned_keys: In how many of them `"aligned"` could turn keys.
        not_copied: Files of the source that are neither its weights nor were copied.
    """

    old_heads: int
    new_heads: int
    parameters: tuple[int, int]
    cache_elements: tuple[int, int]
    dtype: torch.dtype
    layers: int
    turned_keys: int
    not_copied: tuple[str, ...]


def convert_folder(
    source: Path,
    out: Path,
    num_key_value_heads: int,
    method: Method = "mean",
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> FolderReport:
    """Reduce the key/value heads of a model folder, as `to_gqa` does for a model in memory.

    Weights are read and written one by one, an attention layer at most at a time; the result is bit
    for bit that of `to_gqa`. Shards are kept aside until all are finished, and `config.json` is
    written last: a run that is killed leaves no folder that loads, and the same call goes on where
    it was. Tokenizer, generation config and other small files are copied.

    Args:
        source: A model folder, safetensors or `pytorch_model.bin`, sharded or not.
        out: The folder for the converted model, safetensors with the same shards.
        num_key_value_heads: As for `to_gqa`, but not the present number.
        method: As for `to_gqa`; `"aligned"` without calibration.
        seed: As for `to_gqa`.
        dtype: For all floating-point weights; None keeps each tensor's own.
        overwrite: Replace a model that is in `out`.
        progress: A bar over the bytes; None shows it on terminals.

    Returns:
        What was done.

    Raises:
        ValueError: If the model cannot be converted, found before anything is written.
        OSError: If the source cannot be read or `out` not be written.
    """
    config = _read_config(source)
    model_class = _model_class(config)
    conversion = Conversion(model_class, config, num_key_value_heads, method, seed)
    if conversion.plan.new_heads == conversion.plan.old_heads:
        raise ValueError(
            f"{source} has {num_key_value_heads} key/value heads per layer already: choose fewer"
        )
    _check_out(source, out, overwrite)
    checkpoint = Checkpoint(source)
    skeleton = build_without_weights(model_class, copy.deepcopy(config))
    checkpoint.drop_ties(_ties(skeleton))
    keys = _match(conversion, checkpoint, skeleton)

    stage = out / _STAGE
    fingerprint = _fingerprint(source, checkpoint, conversion, seed, dtype)
    if not _is_of(stage, fingerprint):
        _check_held(out, overwrite)
        shutil.rmtree(stage)
        stage.mkdir()
        (stage / "fingerprint").write_text(fingerprint)
    publishing = (stage / _PUBLISHING).exists()
    writer = _Writer(conversion, checkpoint, keys, dtype)
    shards = _shard_names(checkpoint.files)
    planned = {name: writer.planned(name) for name in checkpoint.tensors}
    with tqdm(
        total=_nbytes(planned), unit="B", unit_scale=True, desc="convert",
        disable=None if progress is None else not progress,
    ) as bar:  # fmt: skip
        for file, shard in shards.items():
            part = {n: planned[n] for n, info in checkpoint.tensors.items() if info.file == file}
            if publishing or (stage / shard).exists():  # from a run that was interrupted
                bar.update(_nbytes(part))
            else:
                write_safetensors(stage / shard, part, writer.produce, bar.update)

    if len(shards) > 1:
        _stage_index(stage, checkpoint, planned, shards)
    _stage_small_files(source, stage, config, conversion, dtype)
    _publish(stage, out)
    changed = next(iter(keys.values()), next(iter(checkpoint.tensors)))
    return FolderReport(
        conversion.plan.old_heads,
        conversion.plan.new_heads,
        (
            sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
            sum(math.prod(shape) for shape, _ in planned.values()),
        ),
        conversion.plan.cache_elements(),
        planned[changed][1],
        len(conversion.plan.layers),
        conversion.layers_with_turned_keys,
        tuple(_not_copied(source, checkpoint)),
    )


class _Writer:
    """Gives every tensor of the output, converted layers as a whole."""

    def __init__(
        self,
        conversion: Conversion,
        checkpoint: Checkpoint,
        keys: dict[str, str],
        dtype: torch.dtype | None,
    ) -> None:
        self._conversion, self._checkpoint = conversion, checkpoint
        self._keys, self._dtype = keys, dtype
        self._names = {key: name for name, key in keys.items()}
        self._layers = {n: layer for layer, names in conversion.parameters.items() for n in names}
        self._ready: dict[str, Tensor] = {}

    def planned(self, key: str) -> tuple[torch.Size, torch.dtype]:
        info = self._checkpoint.tensors[key]
        name = self._names.get(key)
        shape = info.shape if name is None else self._conversion.new_shape(name)
        return shape, self._cast(info.dtype)

    def produce(self, key: str) -> Tensor:
        name = self._names.get(key)
        if name is None:
            tensor = self._checkpoint.read(key)
        else:
            if name not in self._ready:
                # Parameters of a layer can be in two shards: the rest waits for its turn.
                self._ready = self._conversion.new_tensors(self._layers[name], self._read)
            tensor = self._ready.pop(name)
        return tensor.to(self._cast(tensor.dtype))

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(self._keys[name])

    def _cast(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype


def _read_config(source: Path) -> PreTrainedConfig:
    if (source / "adapter_config.json").exists():
        raise ValueError(
            f"{source} holds a PEFT adapter: merge it into its model first (merge_and_unload)"
        )
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantized: convert the model it was made from")
    return config


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    raise ValueError(
        f"transformers has no model class for {config.model_type} with architectures "
        f"{config.architectures}: load the model yourself and call hf_attn_plugin.convert.to_gqa"
    )


def _match(
    conversion: Conversion, checkpoint: Checkpoint, skeleton: PreTrainedModel
) -> dict[str, str]:
    """The tensor of the checkpoint for every parameter that changes."""
    sources = parameter_names(skeleton, list(checkpoint.tensors))
    ties = _ties(skeleton)
    keys = {}
    for name in (name for names in conversion.parameters.values() for name in names):
        found = sources.get(name, [])
        if not found and ties.get(name) in sources:
            continue  # another layer's weight under a second name (Zamba)
        if not found:
            raise ValueError(f"the weights have no {name}, which the config promises")
        info = checkpoint.tensors[found[0]]
        if len(found) > 1 or info.shape != conversion.old_shape(name):
            raise ValueError(
                f"{name} is stored in another form ({', '.join(found)}, {list(info.shape)} where "
                f"the model has {list(conversion.old_shape(name))}): load the model, convert it "
                f"with hf_attn_plugin.convert.to_gqa and save it"
            )
        if not info.dtype.is_floating_point or info.dtype.itemsize == 1:
            raise ValueError(f"{found[0]} is {info.dtype}: convert weights that are not quantized")
        keys[name] = found[0]
    return keys


def _ties(model: PreTrainedModel) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def _is_weight(path: Path) -> bool:
    return path.suffix in _WEIGHTS or path.name.endswith(
        (".safetensors.index.json", ".bin.index.json")
    )


def _check_out(source: Path, out: Path, overwrite: bool) -> None:
    if out.resolve() == source.resolve():
        raise ValueError(f"--out is the model's own folder, {out}: choose another")
    if not (out / _STAGE / _PUBLISHING).exists():  # otherwise see first whether it is this run's
        _check_held(out, overwrite)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _STAGE).mkdir(exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to the folder {out}: {error}") from error


def _check_held(out: Path, overwrite: bool) -> None:
    held = sorted(
        path.name
        for path in (out.iterdir() if out.is_dir() else ())
        if path.name == "config.json" or _is_weight(path)
    )
    if held and not overwrite:
        raise ValueError(f"{out} already holds a model ({held[0]}): use --overwrite")


def _fingerprint(
    source: Path,
    checkpoint: Checkpoint,
    conversion: Conversion,
    seed: int,
    dtype: torch.dtype | None,
) -> str:
    """Whether the shards that an earlier run left are what this one would write."""
    stats = [
        (f, (source / f).stat().st_size, (source / f).stat().st_mtime_ns) for f in checkpoint.files
    ]
    said = [
        str(source.resolve()),
        stats,
        conversion.plan.new_heads,
        conversion.method,
        seed,
        str(dtype),
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _is_of(stage: Path, fingerprint: str) -> bool:
    kept = stage / "fingerprint"
    return kept.exists() and kept.read_text() == fingerprint


def _shard_names(files: list[str]) -> dict[str, str]:
    """The output's file for every input file."""
    if len(files) == 1:
        return {files[0]: "model.safetensors"}
    return {
        file: f"model-{number:05d}-of-{len(files):05d}.safetensors"
        for number, file in enumerate(files, 1)
    }


def _nbytes(planned: Mapping[str, tuple[torch.Size, torch.dtype]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in planned.values())


def _stage_index(
    stage: Path,
    checkpoint: Checkpoint,
    planned: Mapping[str, tuple[torch.Size, torch.dtype]],
    shards: Mapping[str, str],
) -> None:
    metadata = {**checkpoint.metadata, "total_size": _nbytes(planned)}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(shape) for shape, _ in planned.values())
    weight_map = {name: shards[info.file] for name, info in sorted(checkpoint.tensors.items())}
    index = {"metadata": metadata, "weight_map": weight_map}
    (stage / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _stage_small_files(
    source: Path,
    stage: Path,
    config: PreTrainedConfig,
    conversion: Conversion,
    dtype: torch.dtype | None,
) -> None:
    """Everything but weights and index."""
    for path in _to_copy(source):
        target = stage / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    new_config = copy.deepcopy(config)
    set_heads(new_config, conversion.plan.new_heads)
    if dtype is not None:
        new_config.dtype = dtype
    new_config.save_pretrained(stage)
    _mark_readme(source, stage, conversion)


def _to_copy(source: Path) -> list[Path]:
    """Files beside weights and config; folders only where they hold no weights themselves."""
    files = []
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or entry.name in ("config.json", "README.md"):
            continue
        if entry.is_file() and not _is_weight(entry):
            files.append(entry)
        elif entry.is_dir():
            inside = [path for path in entry.rglob("*") if path.is_file()]
            if not any(_is_weight(path) for path in inside):
                files += inside
    return files


def _not_copied(source: Path, checkpoint: Checkpoint) -> list[str]:
    known = {path.relative_to(source).parts[0] for path in _to_copy(source)}
    known |= {*checkpoint.files, "config.json", "README.md"}
    known |= {"model.safetensors.index.json", "pytorch_model.bin.index.json"}
    return sorted(e.name for e in source.iterdir() if e.name not in known and e.name[0] != ".")


def _mark_readme(source: Path, stage: Path, conversion: Conversion) -> None:
    plan = conversion.plan
    note = (
        f"> Converted with `hf-attn convert-gqa` from {plan.old_heads} to {plan.new_heads} "
        f"key/value heads per layer (method `{conversion.method}`, arXiv 2305.13245). Without "
        f"uptraining it is worse than the model described below.\n"
    )
    readme = source / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    head = ""
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        end = text.index("\n---\n", 4) + len("\n---\n")
        head, text = text[:end] + "\n", text[end:]
    (stage / "README.md").write_text(f"{head}{note}\n{text.lstrip()}", encoding="utf-8")


def _publish(stage: Path, out: Path) -> None:
    """Replace what is in the folder; without config.json it does not load until all is there."""
    (out / "config.json").unlink(missing_ok=True)
    if not (stage / _PUBLISHING).exists():
        for stale in out.iterdir():
            if stale.is_file() and (_is_weight(stale) or stale.name == "adapter_config.json"):
                stale.unlink()
        (stage / _PUBLISHING).touch()
    entries = sorted(stage.iterdir(), key=lambda entry: (entry.name == "config.json", entry.name))
    for entry in entries:
        if entry.name in (_PUBLISHING, "fingerprint"):
            continue
        target = out / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    shutil.rmtree(stage)
