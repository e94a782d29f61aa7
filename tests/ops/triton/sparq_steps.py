"""Decoding steps for the tests of SparQ's kernels, and what they should compute."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.ops.choice import most_recent
from hf_attn_plugin.ops.sparq.decode import sparq_decode
from hf_attn_plugin.ops.sparq.key_copy import (
    FullComponents,
    QuantizedComponents,
    StridedComponents,
    allocate_copy,
)
from hf_attn_plugin.ops.sparq.sums import BlockSums
from tests.ops.test_attention_property import within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def triton_sparq(*inputs, **options) -> Tensor:
    from hf_attn_plugin.ops.triton.sparq import triton_sparq as operation

    return operation(*inputs, **options)


@dataclasses.dataclass
class Step:
    """One decoding step: a cache of which some positions are in use and visible.

    Attributes:
        query: [B, H, 1, D].
        keys: [B, Hkv, N, D], NaN where nothing is visible.
        values: [B, Hkv, N, Dv], likewise.
        components: The copy, likewise.
        first: [B], the first visible key.
        stop: [B], one after the last.
        mask: bool [B, N], which between them are visible; None is all.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    components: Any
    first: Tensor
    stop: Tensor
    mask: Tensor | None = None

    @property
    def visible(self) -> Tensor:
        """bool [B, N]."""
        at = torch.arange(self.keys.shape[2], device=self.keys.device)
        seen = (at >= self.first[:, None]) & (at < self.stop[:, None])
        return seen if self.mask is None else seen & self.mask


def make_step(
    batch: int,
    kv_heads: int,
    groups: int,
    length: int,
    dims: tuple[int, int] = (32, 32),
    copy: str = "full",
    dtype: torch.dtype = torch.float32,
    lengths: list[tuple[int, int]] | None = None,
    mask: bool = False,
) -> Step:
    """Random tensors, in buffers with room for more; ``lengths`` are (first, stop) of each row."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(DEVICE, dtype)

    capacity = -(-length // 128) * 128 + 128
    keys = normal(batch, kv_heads, capacity, dims[0])[:, :, :length]
    values = normal(batch, kv_heads, capacity, dims[1])[:, :, :length]
    lengths = lengths or [(0, length)] * batch
    first, stop = torch.tensor(lengths, dtype=torch.int32, device=DEVICE).T
    seen = torch.rand(batch, length, device=DEVICE) < 0.7 if mask else None
    query = normal(batch, groups * kv_heads, 1, dims[0]) * 2
    step = Step(query, keys, values, None, first, stop, seen)
    hidden = ~step.visible
    buffer = allocate_copy(copy, keys, capacity)
    if buffer is None:
        step.components = StridedComponents(keys, counted=False)
    else:
        buffer.append(0, keys)
        step.components = buffer.components(length)
    if isinstance(step.components, FullComponents):
        step.components.keys_t.masked_fill_(hidden[:, None, None], float("nan"))
    keys.masked_fill_(hidden[:, None, :, None], float("nan"))
    values.masked_fill_(hidden[:, None, :, None], float("nan"))
    return step


def run(step: Step, **options) -> Tensor:
    """What the kernels compute."""
    tensors: dict[str, Tensor] = {"first": step.first, "stop": step.stop}
    if step.mask is not None:
        tensors["visible"] = step.mask
        window = most_recent(step.visible, options["local_window"])
        # Where there is no window, it begins after the last position.
        begin = torch.where(window.any(1), window.to(torch.uint8).argmax(1), window.shape[1])
        tensors["recent"] = begin
    if options["mean_value_reallocation"]:
        sums = BlockSums.of(step.values, step.visible, None)
        tensors["value_sum"] = sums.total[:, :, 0].float()
        tensors["value_count"] = sums.seen[:, 0]
    components = step.components
    return triton_sparq(
        step.query, step.keys, step.values, components=components, **tensors, **options
    )


def expected(step: Step, dtype: torch.dtype, **options) -> Tensor:
    """The definition, in ``dtype``; it needs numbers where nothing is visible."""
    components = step.components

    def exact(tensor: Tensor) -> Tensor:
        return tensor.nan_to_num(0.0).to(dtype)

    if isinstance(components, FullComponents):
        components = FullComponents(exact(components.keys_t))
    elif isinstance(components, QuantizedComponents):
        parts = {name: exact(getattr(components, name)) for name in ("scale", "offset", "tail")}
        components = dataclasses.replace(components, **parts)
    else:
        components = None
    if options.get("sinks") is not None:
        options["sinks"] = exact(options["sinks"])
    tensors = (exact(t) for t in (step.query, step.keys, step.values))
    output, _ = sparq_decode(*tensors, components=components, visible=step.visible, **options)
    return output


def options_for(**changes) -> dict[str, Any]:
    return {
        "rank": 8,
        "top_k": 24,
        "local_window": 6,
        "mean_value_reallocation": True,
        **changes,
    }


def assert_right(step: Step, **options) -> Tensor:
    """Within the budget of the definition; returns what the kernels computed."""
    got = run(step, **options)
    want = expected(step, torch.float64, **options)
    plain = expected(step, step.query.dtype, **options)
    assert got.shape == want.shape
    within_budget("output", got, want, plain, step.query.dtype, options)
    return got
