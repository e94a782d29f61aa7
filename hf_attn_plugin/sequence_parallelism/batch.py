"""A batch of whole rows: what is in it, and what of it a rank's model call gets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugin.parallel.layout import Layout
from hf_attn_plugin.patterns.documents import numbers_tokens, restarts

IGNORED = -100
"""The label of tokens that count nothing, in all of transformers' losses."""

_PER_TOKEN = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "labels",
    "shift_labels",
    "global_attention_mask",
)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
# Said by the lengths already, or read by recurrent kernels alone.
_BESIDE_LENGTHS = ("max_length_q", "max_length_k", "seq_idx")
_READ_ELSEWHERE = (*_LENGTHS, *_BESIDE_LENGTHS, "num_items_in_batch")
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_cache": ((None, False), "keys are spread over ranks, and no cache holds them"),
    "past_key_values": ((None,), "keys are spread over ranks, and no cache holds them"),
    "return_dict": ((None, True), "the loss is put into the model's output by name"),
    "output_attentions": ((None, False), "attention weights are never held"),
    "output_router_logits": (
        (None, False),
        "the experts' balance would be judged by one rank's tokens",
    ),
    "output_hidden_states": ((None, False, True), ""),
}


@dataclasses.dataclass(frozen=True, eq=False)
class WholeBatch:
    """The whole rows that every rank is given.

    Attributes:
        tensors: What has a value per token, by name, ``[batch, length, ...]`` or, of position_ids,
            also ``[1, length]`` and ``[axes, batch, length]``.
        lengths: Cumulative lengths of packed documents, or None.
        num_items: The number that the sum of the losses is divided by, if the caller knows better
            than to count (gradient accumulation).
        options: What else the model call gets, as it is.
    """

    tensors: dict[str, Tensor]
    lengths: Tensor | None
    num_items: Tensor | None
    options: dict[str, Any]

    @property
    def tokens(self) -> Tensor:
        """The model's input, token ids or embeddings."""
        name = "input_ids" if "input_ids" in self.tensors else "inputs_embeds"
        return self.tensors[name]

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.tokens.shape[1]

    @functools.cached_property
    def valid(self) -> Tensor | None:
        """Bool ``[batch, length]``, False at padding; None without any."""
        mask = self.tensors.get("attention_mask")
        return None if mask is None or bool(mask.all()) else mask.bool()

    @property
    def has_labels(self) -> bool:
        """Whether there is anything to compute a loss from."""
        return bool({"labels", "shift_labels"} & self.tensors.keys())

    def documents(self, config: Any) -> Tensor | None:
        """int64 ``[batch or 1, length]``, the packed document of each token; None for one a row."""
        if self.lengths is not None:
            index = torch.arange(self.length, device=self.lengths.device)
            ends = self.lengths[1:].long().contiguous()
            return torch.searchsorted(ends, index, right=True)[None].to(self.tokens.device)
        positions = self.tensors.get("position_ids")
        if positions is None or not numbers_tokens(config):
            return None
        starts = restarts(positions, self.valid)
        return starts.to(torch.int64).cumsum(1) if bool(starts.any()) else None

    def targets(self, shifted: bool) -> Tensor | None:
        """The label of each token, int64 ``[batch, length]``, or None without labels.

        Args:
            shifted: Whether a token predicts the next one.
        """
        if "shift_labels" in self.tensors:
            return self.tensors["shift_labels"]
        labels = self.tensors.get("labels")
        if labels is None or not shifted:
            return labels
        return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def statement(self) -> dict[str, Any]:
        """What must be the same on every rank, for JSON: shapes, dtypes and a sum of the values."""
        said: dict[str, Any] = {}
        tensors = {**self.tensors, "cu_seq_lens_q": self.lengths, "num_items": self.num_items}
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            said[f"the shape of {name}"] = [str(tensor.dtype), *tensor.shape]
        for name, tensor in tensors.items():
            if tensor is not None:
                said[f"the content of {name} (a checksum)"] = _checksum(tensor)
        said["options"] = {name: repr(value) for name, value in self.options.items()}
        return said


def read_batch(batch: Mapping[str, Any]) -> WholeBatch:
    """Check a batch as transformers' models take it.

    Raises:
        ValueError: Something in it is not per token or not known, or shapes do not fit.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            "sequence_parallel takes the batch as a dictionary of the model's arguments; "
            f"got a {type(batch).__name__}."
        )
    tensors: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    for name, value in batch.items():
        if name in _MUST_BE:
            allowed, reason = _MUST_BE[name]
            if value not in allowed:
                raise ValueError(f"sequence_parallel: {name}={value!r} is not possible: {reason}.")
            if name == "output_hidden_states" and value:
                options[name] = value
        elif value is None or name in _READ_ELSEWHERE:
            continue
        elif name in _PER_TOKEN:
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"sequence_parallel: {name} must be a tensor, got a {type(value).__name__}."
                )
            tensors[name] = value
        else:
            known = (*_PER_TOKEN, *_READ_ELSEWHERE, *_MUST_BE)
            raise ValueError(
                f"sequence_parallel does not know how to spread {name!r} over ranks (images, "
                f"sounds and the like are not supported). The batch may hold {', '.join(known)}."
            )
    _check_shapes(tensors)
    count = batch.get("num_items_in_batch")
    tokens = tensors["input_ids" if "input_ids" in tensors else "inputs_embeds"]
    return WholeBatch(
        tensors=tensors,
        lengths=_read_lengths(batch, tokens),
        num_items=None if count is None else torch.as_tensor(count, device=tokens.device),
        options=options,
    )


def _check_shapes(tensors: dict[str, Tensor]) -> None:
    if ("input_ids" in tensors) == ("inputs_embeds" in tensors):
        raise ValueError("sequence_parallel: the batch must hold input_ids or inputs_embeds.")
    name = "input_ids" if "input_ids" in tensors else "inputs_embeds"
    tokens = tensors[name]
    if tokens.ndim != 2 + (name == "inputs_embeds") or 0 in tokens.shape:
        raise ValueError(
            f"sequence_parallel: {name} must be [batch, tokens"
            f"{', width' if name == 'inputs_embeds' else ''}] and not empty; "
            f"got {tuple(tokens.shape)}."
        )
    rows, length = tokens.shape[:2]
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        fits = shape[:2] == (rows, length) and (tensor.ndim == 2 or name == "inputs_embeds")
        if name == "position_ids":
            fits = tensor.ndim in (2, 3) and shape[-1] == length and shape[-2] in (1, rows)
        if not fits:
            extra = ""
            if name == "attention_mask":
                extra = " A mask of your own for every pair cannot be spread over ranks."
            if name == "labels" and tensor.ndim == 1:
                extra = " Labels of whole rows (sequence classification) cannot be spread either."
            raise ValueError(
                f"sequence_parallel: {name} must be [{rows}, {length}] as the batch's tokens are; "
                f"got {shape}.{extra}"
            )


def _read_lengths(batch: Mapping[str, Any], tokens: Tensor) -> Tensor | None:
    lengths, others = (batch.get(name) for name in _LENGTHS)
    if lengths is None and others is None:
        return None
    rows, length = tokens.shape[:2]
    if not isinstance(lengths, Tensor) or not isinstance(others, Tensor):
        raise ValueError(
            "sequence_parallel: cu_seq_lens_q and cu_seq_lens_k belong together, as tensors."
        )
    same = lengths.shape == others.shape and torch.equal(lengths, others)
    if not same or rows != 1 or lengths.ndim != 1 or len(lengths) < 2:
        raise ValueError(
            "sequence_parallel: cu_seq_lens_q and cu_seq_lens_k must be the same cumulative "
            f"lengths of documents in one batch row; got {lengths.tolist()} and {others.tolist()} "
            f"with {rows} rows."
        )
    if int(lengths[0]) != 0 or int(lengths[-1]) != length or bool((lengths.diff() < 0).any()):
        raise ValueError(
            f"sequence_parallel: cu_seq_lens_q must ascend from 0 to the batch's {length} tokens; "
            f"got {lengths.tolist()}."
        )
    return lengths


def _checksum(tensor: Tensor) -> int:
    """Of all values and their places; of a token's embedding in eight parts, each added up."""
    if tensor.is_floating_point():
        tensor = tensor.detach().view(_BITS[tensor.itemsize])
        if tensor.ndim == 3:
            # No copy in 64 bits of all of it is made.
            parts = [tensor[..., i::8].sum(-1, dtype=torch.int64) for i in range(8)]
            tensor = torch.stack([part * (2 * i + 1) for i, part in enumerate(parts)]).sum(0)
    flat = tensor.reshape(-1).to(torch.int64)
    weights = torch.arange(flat.shape[0], device=flat.device) % 8191 + 1
    return int((flat * weights).sum())


def appended(tensor: Tensor, count: int, value: int, dim: int = 1) -> Tensor:
    """``count`` more tokens of this value at the end of every row."""
    if count == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_full(shape, value)], dim)


def spread(
    whole: WholeBatch, layout: Layout, rank: int, positions: Tensor | None, pad_id: int
) -> dict[str, Any]:
    """What the model call of a rank gets, without labels.

    The attention mask stays behind (attention knows of it otherwise), so that no model takes one
    rank's tokens for a sequence.

    Args:
        whole: The batch.
        layout: Which tokens every rank holds.
        rank: This one.
        positions: position_ids of the whole rows; None for a model that has no use for them.
        pad_id: The token id that is appended where the length does not divide.
    """
    count = layout.length - whole.length

    def part(tensor: Tensor, value: int, dim: int = 1) -> Tensor:
        return layout.take(appended(tensor, count, value, dim), rank, dim).contiguous()

    local: dict[str, Any] = dict(whole.options)
    for name, value in (("input_ids", pad_id), ("inputs_embeds", 0), ("token_type_ids", 0)):
        if name in whole.tensors:
            local[name] = part(whole.tensors[name], value)
    if positions is not None:
        local["position_ids"] = part(positions, 0, positions.ndim - 1)
    if "global_attention_mask" in whole.tensors:  # of all keys, as the method reads it
        local["global_attention_mask"] = appended(whole.tensors["global_attention_mask"], count, 0)
    return local
