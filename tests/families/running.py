"""Tiny models in float64: making them, running them, and the distance of two results."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from families.catalogue import CannotBuildError, attempts, is_tiny, one_line
from families.inputs import model_inputs
from families.odd import GAINS
from tiny import Float64
from torch import Tensor, nn


class Differs(Exception):  # noqa: N818
    """Something else was computed, or an error was raised that says nothing to the user."""


@contextlib.contextmanager
def double_precision(dtype: torch.dtype) -> Iterator[None]:
    """Everything in float64, also where a model asks for float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with Float64() if dtype is torch.float64 else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def eager_model(architecture: str) -> Any:
    """The first tiny model of the architecture that eager attention can run."""
    problems = []
    for cls, config in attempts(architecture):
        try:
            if not is_tiny(cls, config):
                problems.append(f"{cls.__name__} is not tiny")
                continue
            model = build(cls, config, "eager")
            _randomize(model, GAINS.get(architecture, 1.5))
            with torch.no_grad():
                found = run(model, model_inputs(model))
            if any(bool(value.isnan().any()) for value in found.values()):
                raise ValueError("eager attention gives NaN")
            return model
        except Exception as error:  # whatever an odd shape runs into
            problems.append(f"{cls.__name__}: {one_line(error, 160)}")
    raise CannotBuildError("; ".join(problems[:2]))


def build(cls: Any, config: Any, attn: Any) -> Any:
    model = cls._from_config(copy.deepcopy(config), attn_implementation=attn).eval()
    model.to(torch.get_default_dtype())
    with contextlib.suppress(Exception):  # the default of some experts knows no float64
        model.set_experts_implementation("eager")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.max_length = None
    return model


@torch.no_grad()
def _randomize(model: nn.Module, gain: float) -> None:
    """Weights large enough for attention to be far from uniform, whatever the family's own are."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        random = torch.empty(parameter.shape, dtype=parameter.dtype)
        random.normal_(generator=generator)
        if name.endswith("sinks"):
            parameter.copy_(random)
        elif parameter.ndim >= 2:
            inputs = parameter[0].numel()
            if "embed" in name:
                inputs = 1
            parameter.copy_(random * (gain / math.sqrt(max(1, inputs))))
        else:  # some are made empty and never filled
            parameter.copy_(torch.where(parameter.isfinite(), parameter, 0.0) + 0.2 * random)
    for name, buffer in model.named_buffers():
        if name.endswith("codebook.embed_sum"):  # codes of zeros would make all tokens alike
            buffer.normal_(generator=generator)


def run(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every floating-point output of a forward pass, by name; caches left out."""
    torch.manual_seed(0)  # some models draw their own masks
    found: dict[str, Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.numel():
                found[name] = value
        elif isinstance(value, dict):
            for key, entry in value.items():
                collect(f"{name}.{key}", entry)
        elif isinstance(value, list | tuple):
            for index, entry in enumerate(value):
                collect(f"{name}.{index}", entry)

    output = model(**inputs)
    for key, value in output.items() if hasattr(output, "items") else enumerate(output):
        if key not in ("past_key_values", "cache_params", "mems", "state", "projection_attentions"):
            collect(str(key), value)
    if not found:
        raise Differs("no output to compare")
    return found


def outputs_and_gradients(
    model: Any, inputs: dict[str, Any], valid: Tensor | None = None
) -> dict[str, Tensor]:
    """Outputs at valid positions, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    found = _of_valid(run(model, inputs), valid)
    generator = torch.Generator().manual_seed(3)
    loss = torch.zeros(())
    for value in found.values():
        if value.requires_grad:
            finite = torch.where(value.isfinite(), value, 0.0)
            finite = finite.clamp(-1e4, 1e4)  # heads fill forbidden logits with a huge number
            loss = loss + (finite * torch.rand(value.shape, generator=generator)).sin().sum()
    result = {name: value.detach() for name, value in found.items()}
    if loss.requires_grad:
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                result[f"grad {name}"] = parameter.grad.detach().clone()
    return result


def _of_valid(found: dict[str, Tensor], valid: Tensor | None) -> dict[str, Tensor]:
    """Only the rows of real tokens; outputs that are not one per token mix padding in."""
    if valid is None:
        return found
    batch, length = valid.shape
    rows = {}
    for name, value in found.items():
        if value.ndim > 1 and value.shape[0] == batch and value.shape[1] - length in (0, 1):
            more = value.shape[1] - length  # a token that the model puts behind the text
            rows[name] = value[nn.functional.pad(valid.bool(), (0, more), value=True)]
    return rows or found


def errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, float]:
    """The largest relative errors of outputs and of gradients."""
    if ours.keys() != theirs.keys():
        missing = sorted(ours.keys() ^ theirs.keys())[:3]
        raise Differs(f"outputs or gradients are missing on one side: {missing}")
    scales: dict[str, float] = {}
    for name, value in theirs.items():
        group = name.rsplit(".", 2)[0] if name.startswith("grad ") else name
        finite = value[value.isfinite() & (value.abs() < 1e30)]
        top = float(finite.abs().max()) if finite.numel() else 0.0
        scales[group] = max(scales.get(group, 0.0), top)
    worst = [0.0, 0.0]
    largest_gradient = max((s for n, s in scales.items() if n.startswith("grad ")), default=0.0)
    for name, value in theirs.items():
        gradient = name.startswith("grad ")
        scale = scales[name.rsplit(".", 2)[0] if gradient else name]
        if gradient:  # zero in truth and rounding in fact, as key biases are
            scale = max(scale, 1e-3 * largest_gradient)
        other = ours[name]
        if other.shape != value.shape:
            raise Differs(f"{name} has shape {tuple(other.shape)}, not {tuple(value.shape)}")
        same = (other == value) | (other.isnan() & value.isnan())
        gap = torch.where(same, 0.0, (other - value).abs())
        error = (
            float(gap.nan_to_num(nan=math.inf).max()) / max(scale, 1e-12) if gap.numel() else 0.0
        )
        worst[gradient] = max(worst[gradient], error)
    return worst[0], worst[1]
