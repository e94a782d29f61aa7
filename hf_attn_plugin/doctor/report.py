"""The whole report: as text, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch

from hf_attn_plugin.doctor.cache import CacheBytes, cache_bytes
from hf_attn_plugin.doctor.environment import (
    Device,
    Package,
    devices,
    packages,
    target,
)
from hf_attn_plugin.doctor.layers import (
    LayerBackend,
    build_model,
    layer_backends,
    read_layers,
    sample_call,
)
from hf_attn_plugin.methods import METHODS

DEFAULT_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """What a model would do on this machine.

    Attributes:
        name: Of its class.
        attn: The ``attn_implementation`` asked about.
        dtype: Of its weights and cache.
        length: Tokens of the prompt and the cache.
        target: The device and packages that backends are chosen for.
        problem: Why nothing more is known, or None: the family computes attention by itself, ...
        backends: Per kind of layer.
        cache: Per method.
    """

    name: str
    attn: str
    dtype: str
    length: int
    target: str
    problem: str | None = None
    backends: tuple[LayerBackend, ...] = ()
    cache: tuple[CacheBytes, ...] = ()

    def __str__(self) -> str:
        head = f"{self.name}, attn_implementation={self.attn!r}, {self.dtype}"
        lines = [f"{head}, {self.length:,} tokens, {self.target}"]
        if self.problem is not None:
            return "\n".join([*lines, f"  {self.problem}"])
        for found in self.backends:
            lines.append(f"  layers {found.layers}: {found.kind}")
            prefill = f"{found.prefill} ({found.prefill_reason})"
            training = f"{found.training} ({found.training_reason})"
            reasons = [f"      not {reason}" for reason in found.prefill_passed_over]
            more = [f"      not {reason}" for reason in found.training_passed_over]
            if (prefill, reasons) == (training, more):
                lines += [f"    prefill, training: {prefill}", *reasons]
            else:
                lines += [f"    prefill: {prefill}", *reasons]
                lines += [f"    training: {training}", *more]
            if found.decoding is not None:
                lines.append(f"    decoding: {found.decoding} ({found.decoding_reason})")
                lines += [f"      not {reason}" for reason in found.decoding_passed_over]
        if self.cache:
            lines += ["", *_table(self.cache, self.length)]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Report:
    """Versions, devices, and a model if one was asked about."""

    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    model: ModelReport | None = None

    @property
    def ok(self) -> bool:
        """Whether every version is supported, and the model too."""
        broken = any(package.ok is False for package in self.packages)
        return not broken and (self.model is None or self.model.problem is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [str(package) for package in self.packages]
        lines += ["", *map(str, self.devices)]
        if all(device.type == "cpu" for device in self.devices):
            lines.append("no GPU")
        if self.model is not None:
            lines += ["", str(self.model)]
        return "\n".join(lines)


def examine(
    model_class: Any = None,
    config: Any = None,
    *,
    attn: str = "flash",
    length: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    installed: Collection[str] | None = None,
) -> Report:
    """Examine this machine, and what a model would do on it. No weights are read or made.

    Args:
        model_class: The model's class; None examines the machine alone.
        config: Its config.
        attn: The ``attn_implementation`` whose backends are asked about.
        length: Tokens of the prompt and the cache (default: 4096, or what the model takes).
        dtype: Of weights and cache; None takes the config's, or float32.
        device: What to choose backends for: ``"cpu"``, or ``"cuda:9.0"`` for a GPU of that compute
            capability, here or not. None: the first of this machine.
        installed: Packages with kernels to choose among; None: those of this Python.

    Returns:
        The report; what is wrong with the model is in it.

    Raises:
        ValueError: A length that the model does not take, or an unknown device or package.
    """
    wanted = target(device, installed)
    report = Report(tuple(packages()), tuple(devices()))
    if model_class is None:
        return report
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if length is None:
        length = min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if length < 2 or (longest is not None and length > longest):
        raise ValueError(
            f"--length must be from 2 to {longest or 'any number of'} tokens, which is what "
            f"{model_class.__name__} takes; got {length}."
        )
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    about = {
        "name": model_class.__name__,
        "attn": attn,
        "dtype": str(dtype).removeprefix("torch."),
        "length": length,
        "target": str(wanted),
    }
    try:
        layers = read_layers(build_model(model_class, config, attn, dtype), length)
    except ValueError as error:
        return dataclasses.replace(report, model=ModelReport(**about, problem=str(error)))
    if not layers:
        problem = (
            f"{model_class.__name__} made no attention call through transformers' interface: it "
            "ignores attn_implementation"
        )
        return dataclasses.replace(report, model=ModelReport(**about, problem=problem))
    try:
        for layer in layers if attn in METHODS else ():
            sample_call(layer, attn)
    except ValueError as error:
        return dataclasses.replace(report, model=ModelReport(**about, problem=str(error)))
    model = ModelReport(
        **about,
        backends=tuple(layer_backends(layers, attn, dtype, wanted)),
        cache=tuple(cache_bytes(layers, config, length, dtype, wanted)),
    )
    return dataclasses.replace(report, model=model)


def _table(rows: tuple[CacheBytes, ...], length: int) -> list[str]:
    """The cache's bytes, and what a step reads of what dense attention would."""
    dense = rows[0].read or 1
    lines = [
        f"  {'KV cache of one sequence':<28}{'kept per 1k':>14}{f'kept at {length:,}':>18}"
        f"{'read per step':>16}{'of dense':>10}"
    ]
    for row in rows:
        per_thousand = None if row.kept is None else row.kept * 1000 // length
        share = "" if row.read is None else f"{row.read / dense:.1%}"
        line = (
            f"  {row.method:<28}{_size(per_thousand):>14}{_size(row.kept):>18}"
            f"{_size(row.read):>16}{share:>10}"
        )
        lines.append(f"{line}  {row.note}".rstrip())
    return lines


def _size(number: int | None) -> str:
    if number is None:
        return "-"
    if number < 1e6:
        return f"{number / 1e3:,.1f} kB"
    return f"{number / 1e6:,.1f} MB"
