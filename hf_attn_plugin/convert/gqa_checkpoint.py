"""Reading and writing model folders one tensor at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Memory-mapped pages stay in memory as long as their file is open; after so many bytes it is opened
# anew.
_REOPEN_AFTER = 16 * 2**20

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like.

    Attributes:
        file: Its file's name.
        shape: Its shape.
        dtype: Its dtype.
    """

    file: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The weights in a model folder: safetensors, or PyTorch's own format, sharded or not.

    Args:
        folder: The folder.

    Attributes:
        tensors: Every tensor, in the order of the files.
        metadata: That of the index, if there is one.

    Raises:
        OSError: If there are no weights, or a file of them is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: tuple[str, Any] | None = None
        self._bytes_read = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files():
            try:
                for name, shape, dtype in self._contents(file):
                    self.tensors[name] = TensorInfo(file, torch.Size(shape), dtype)
            except OSError:
                raise
            except Exception as error:  # safetensors, zipfile and pickle each raise their own
                raise OSError(f"cannot read the weights in {folder / file}: {error}") from error
        self.close()

    def _files(self) -> list[str]:
        for single in ("model.safetensors", "pytorch_model.bin"):
            if (self._folder / single).is_file():
                return [single]
            index = self._folder / f"{single}.index.json"
            if index.is_file():
                content = json.loads(index.read_text(encoding="utf-8"))
                self.metadata = content.get("metadata") or {}
                files = sorted(set(content["weight_map"].values()))
                missing = [file for file in files if not (self._folder / file).is_file()]
                if missing:
                    raise OSError(f"{index} names {', '.join(missing)}, which the folder lacks")
                return files
        raise OSError(
            f"{self._folder} has no weights: looked for model.safetensors, pytorch_model.bin and "
            f"their index files"
        )

    @property
    def files(self) -> list[str]:
        """The files that hold tensors."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file; copy what is to outlive the next call."""
        info = self.tensors[name]
        if self._open is None or self._open[0] != info.file or self._bytes_read > _REOPEN_AFTER:
            self.close()
            self._open = info.file, self._handle(info.file)
        self._bytes_read += info.nbytes
        handle = self._open[1]
        return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)

    def close(self) -> None:
        """Let go of the file that is open."""
        self._open = None
        self._bytes_read = 0

    def drop_ties(self, ties: dict[str, str]) -> None:
        """Leave out tensors that are others under a second name (`{second: first}`)."""
        for second, first in ties.items():
            held = self.tensors.get(second), self.tensors.get(first)
            if held[0] is None or held[0] != held[1] or held[0].file.endswith(".safetensors"):
                continue
            if self.read(second).data_ptr() == self.read(first).data_ptr():
                del self.tensors[second]

    def _handle(self, file: str) -> Any:
        path = self._folder / file
        if file.endswith(".safetensors"):
            from safetensors import safe_open

            return safe_open(path, framework="pt")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def _contents(self, file: str) -> Iterator[tuple[str, Any, torch.dtype]]:
        handle = self._handle(file)
        if isinstance(handle, dict):
            for name, tensor in handle.items():
                yield name, tensor.shape, tensor.dtype
            return
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            view = handle.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise OSError(f"{name} in {file} is of an unknown dtype, {view.get_dtype()}")
            yield name, view.get_shape(), _DTYPES[view.get_dtype()]


def write_safetensors(
    path: Path,
    tensors: dict[str, tuple[torch.Size, torch.dtype]],
    produce: Callable[[str], Tensor],
    progress: Callable[[int], object],
) -> None:
    """Write a safetensors file without holding its tensors together in memory.

    Args:
        path: The file; it appears when it is complete.
        tensors: Shape and dtype of everything that goes into it.
        produce: Gives a tensor when its turn has come.
        progress: Told the bytes of each tensor that has been written.
    """
    # Wide dtypes first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        shape, dtype = tensors[name]
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            tensor = produce(name)
            if (tensor.shape, tensor.dtype) != tensors[name]:
                raise ValueError(
                    f"{name} became {tensor.dtype} {list(tensor.shape)}, planned was "
                    f"{tensors[name][1]} {list(tensors[name][0])}"
                )
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)
            progress(len(raw))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def parameter_names(model: PreTrainedModel, keys: list[str]) -> dict[str, list[str]]:
    """Which parameter of a model every tensor of a checkpoint becomes when it is loaded.

    Checkpoints keep names from before a model's code was changed; transformers translates them.

    Args:
        model: The model, with or without weights.
        keys: Names in the checkpoint.

    Returns:
        For every parameter that is fed from the checkpoint the names that feed it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    sources: dict[str, list[str]] = {}
    for key in keys:
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        sources.setdefault(target, []).append(key)
    return sources
