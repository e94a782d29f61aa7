"""Batches to verify a model with: unpadded, padded on either side, packed, a decoding step."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

DEFAULT_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class DecodingBatch:
    """New tokens over the cache of a prompt.

    Attributes:
        prompt: What the model is called with first, making its cache.
        step: What it is called with then; only this call is judged.
    """

    prompt: Mapping[str, Any]
    step: Mapping[str, Any]


def example_batches(
    model: nn.Module,
    tokens: Tensor | None = None,
    *,
    length: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Batches of two rows in the forms that masks go wrong in.

    Args:
        model: A transformers model that takes ``input_ids``.
        tokens: int64 ``[tokens]`` to fill them with, repeated as needed; None draws random ones.
        length: Tokens per row, at least 8 (default: 128, or what the model takes).
        seed: Of random tokens.

    Returns:
        Batches by name (``unpadded``, ``left-padded``, ``right-padded``, and for decoders
        ``packed`` and ``decoding``), and notes on those that this model cannot have.

    Raises:
        ValueError: A length that the model does not take, or a model without ``input_ids``.
    """
    config: Any = model.config
    text = config.get_text_config()
    parameters = inspect.signature(inner_model(model).forward).parameters
    if "input_ids" not in parameters:
        raise ValueError(
            f"{type(model).__name__} takes no input_ids: call verify() with a batch of your own."
        )
    longest = getattr(text, "max_position_embeddings", None)
    if length is None:
        length = min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if length < 8 or (longest is not None and length > longest):
        raise ValueError(
            f"length must be from 8 to {longest or 'any number of'} tokens, which is what "
            f"{type(model).__name__} takes; got {length}."
        )
    ids = _tokens(model, tokens, 2 * length, seed).reshape(2, length)
    if getattr(config, "is_encoder_decoder", False):
        return _for_encoder_decoder(ids)
    pads = torch.tensor([[0], [length // 3]])
    index = torch.arange(length)
    padded = {"input_ids": ids, "attention_mask": (index >= pads).long()}
    batches: dict[str, dict[str, Any] | DecodingBatch] = {
        "unpadded": {"input_ids": ids},
        "left-padded": padded,
        "right-padded": {"input_ids": ids, "attention_mask": (index < length - pads).long()},
    }
    notes: tuple[str, ...] = ()
    if not _is_decoder(model):
        return batches, notes
    if "position_ids" in parameters:
        cuts = (length // 4, length // 2)
        rows = [torch.cat([torch.arange(cut), torch.arange(length - cut)]) for cut in cuts]
        batches["packed"] = {"input_ids": ids, "position_ids": torch.stack(rows)}
    else:
        notes = (
            f"{type(model).__name__} takes no position_ids, so packed documents cannot be told "
            "apart in it: train it on one document per row",
        )
    batches["decoding"] = DecodingBatch(
        prompt={name: tensor[:, :-1] for name, tensor in padded.items()},
        step={
            "input_ids": ids[:, -1:],
            "attention_mask": padded["attention_mask"],
            "position_ids": padded["attention_mask"].sum(1, keepdim=True) - 1,
        },
    )
    return batches, notes


def shorten_batch(batch: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """The first tokens of every row of a batch, with all that belongs to them.

    Args:
        batch: With ``input_ids`` ``[rows, tokens]`` or ``inputs_embeds``.
        max_tokens: Tokens to keep per row.

    Returns:
        The batch with every tensor cut whose second dimension counts tokens (4D masks: both of
        the last two; positions: the last), and cumulative lengths ended where the tokens end.
    """
    ids = batch.get("input_ids")
    ids = batch.get("inputs_embeds") if ids is None else ids
    if not isinstance(ids, Tensor) or ids.ndim < 2 or ids.shape[1] <= max_tokens:
        return dict(batch)
    tokens = ids.shape[1]

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name.startswith("cu_seq_lens"):
            inside = value[value < max_tokens]
            return torch.cat([inside, inside.new_tensor([max_tokens])])
        if name == "position_ids" and value.shape[-1] == tokens:  # several axes come first
            return value[..., :max_tokens]
        if value.ndim == 4 and value.shape[-2:] == (tokens, tokens):
            return value[..., :max_tokens, :max_tokens]
        if value.ndim >= 2 and value.shape[1] == tokens:
            return value[:, :max_tokens]
        return value

    return {name: cut(name, value) for name, value in batch.items()}


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model under wrappers such as PEFT's."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def _is_decoder(model: nn.Module) -> bool:
    """Whether the layers look back only, by what the attention modules say of themselves."""
    config: Any = model.config
    causal = getattr(config.get_text_config(), "is_causal", None)
    if causal is not None and not causal:
        return False
    said = [bool(m.is_causal) for m in model.modules() if hasattr(m, "is_causal")]
    return any(said)


def _tokens(model: nn.Module, tokens: Tensor | None, count: int, seed: int) -> Tensor:
    if tokens is not None:
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"tokens must be one row of ids, got shape {tuple(tokens.shape)}.")
        return tokens.repeat(-(-count // len(tokens)))[:count]
    config: Any = model.config
    text = config.get_text_config()
    special = {
        value
        for part in (config, text)
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    usual = torch.tensor([i for i in range(text.vocab_size) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    return usual[torch.randint(len(usual), (count,), generator=generator)]


def _for_encoder_decoder(ids: Tensor) -> tuple[dict[str, Any], tuple[str, ...]]:
    length = ids.shape[1]
    part = {"decoder_input_ids": ids[:, : length // 2]}
    mask = (torch.arange(length) < length - torch.tensor([[0], [length // 3]])).long()
    return {
        "unpadded": {"input_ids": ids, **part},
        "right-padded": {
            "input_ids": ids,
            "attention_mask": mask,
            **part,
            "decoder_attention_mask": mask.flip(0)[:, -(length // 2) :],
        },
    }, ("decoding of encoder-decoders is not covered",)
