"""Encoders for long documents: positions copied, attention local and global (arXiv 2004.05150).

As in `gqa`, what has to change is not listed family by family. The model class is built without
weights for the present and for the new number of positions, and the two are compared: tables that
grew are the position embeddings, buffers that grew are index tensors to be made anew, numbers that
differ are to be set. Before anything is changed, the model is run on three tokens under
``longformer``, which shows whether its attention goes through transformers' interface, looks both
ways, and numbers positions as its table says.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from hf_attn_plugin.config import LongformerConfig, configure
from hf_attn_plugin.convert.in_place import evaluating, replace_parameters
from hf_attn_plugin.integrations.counters import count_reads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

SUPPORTED = (
    "supported are encoders whose attention goes through transformers' attention interface, with "
    "learned absolute positions (BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ALBERT, "
    "DistilBERT, ERNIE, Data2VecText, ...) or rotary ones (ModernBERT, EuroBERT, NomicBERT, ...)"
)

# The names that configs have for it; attention that never holds its weights cannot drop any.
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_dropout")


@dataclass(frozen=True)
class LongEncoderPlan:
    """What a conversion changes in a model; made from the config alone, without weights.

    Attributes:
        old_positions: Tokens that the model takes before.
        new_positions: Tokens that it takes after.
        offset: Rows of the position tables that belong to no position: RoBERTa and its kin number
            positions from ``padding_idx + 1``.
        tables: Names of the modules that hold a position table; none in models with rotary
            positions.
        buffers: For every buffer to make anew, its name and new shape.
        attributes: `(module name, attribute, new value)` for every number to set.
        settings: Config attributes to set, the dropout of attention weights among them.
    """

    old_positions: int
    new_positions: int
    offset: int
    tables: tuple[str, ...]
    buffers: dict[str, torch.Size]
    attributes: tuple[tuple[str, str, int | float], ...]
    settings: dict[str, int | float]


def to_long_encoder(
    model: PreTrainedModel,
    max_positions: int,
    window: int,
    num_global_tokens: int = 1,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Make an encoder take `max_positions` tokens, in place (arXiv 2004.05150, section 5).

    Position embeddings are copied over and over until they fill the longer table, and attention
    becomes ``longformer``: a window, and global tokens (by default the first, [CLS] or <s>) that
    see all tokens and are seen by all. Time and memory then grow linearly with the length. On
    inputs of up to `window` tokens the model computes what it did before, to rounding; beyond, it
    needs some training at the new length, for which the paper takes masked-LM steps.

    The model is saved and loaded with transformers' own classes; name the attention when loading::

        to_long_encoder(model, 4096, window=512, tokenizer=tokenizer)
        model.save_pretrained(out), tokenizer.save_pretrained(out)
        AutoModelForMaskedLM.from_pretrained(out, attn_implementation="longformer")

    For question answering the paper lets the question's tokens be global. Which these are differs
    from input to input, so say it in the call::

        is_question = torch.tensor([[s == 0 for s in encoding.sequence_ids(0)]])
        model(**inputs, global_attention_mask=is_question)

    Dropout of attention weights is set to 0 in the model and its config, with a warning if it was
    not: ``longformer`` never holds these weights and refuses it. Position tables become new
    `Parameter` objects without gradients: create optimizers after this call.

    Args:
        model: An encoder with any head, or none, as `from_pretrained` returns it.
        max_positions: Tokens the model is to take, special ones included. The present number only
            changes the attention.
        window: A token sees keys at distances below `window`, on each side: 2 `window` - 1 in all.
            (What the paper calls a window of 512 is 257 here.)
        num_global_tokens: First tokens of every sequence that are global.
        tokenizer: Its `model_max_length` is set, if given.

    Returns:
        The same model.

    Raises:
        ValueError: If a number is not valid, or the family or the state of the model is not
            supported. The model is then unchanged.
    """
    parameters = LongformerConfig(window=window, num_global_tokens=num_global_tokens)
    _check_model(model)
    plan = plan_long_encoder(type(model), model.config, max_positions)
    _check_weights(model, plan)
    _try(model, plan)

    tables = {name: model.get_parameter(f"{name}.weight") for name in plan.tables}
    tiled = {n: tile_positions(t, plan.new_positions, plan.offset) for n, t in tables.items()}
    replace_parameters(model, {f"{n}.weight": table for n, table in tiled.items()})
    for name, shape in plan.buffers.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[leaf] = _new_buffer(name, model.get_buffer(name), shape)
    for module_name, attribute, value in plan.attributes:
        setattr(model.get_submodule(module_name), attribute, value)
    for attribute, value in plan.settings.items():
        if attribute in _ATTENTION_DROPOUT and getattr(model.config, attribute):
            logger.warning(
                f"{attribute} was {getattr(model.config, attribute)} and is now 0: 'longformer' "
                "has no dropout of attention weights."
            )
        setattr(model.config, attribute, value)
    configure(model, parameters)
    model.set_attn_implementation(LongformerConfig.name)
    if tokenizer is not None:
        tokenizer.model_max_length = max_positions
    return model


def tile_positions(weight: Tensor, positions: int, offset: int = 0) -> Tensor:
    """Repeat the rows of a position table until there are enough (arXiv 2004.05150, section 5).

    Args:
        weight: ``[offset + present positions, dim]``.
        positions: Positions wanted.
        offset: First rows that belong to no position; they are kept once.

    Returns:
        ``[offset + positions, dim]`` in a storage of its own, detached, dtype and device kept.
    """
    held = weight.detach()[offset:]
    index = torch.arange(positions, device=weight.device) % len(held)
    return torch.cat([weight.detach()[:offset], held[index]])


def plan_long_encoder(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, max_positions: int
) -> LongEncoderPlan:
    """Work out a conversion from the config, without weights.

    Args:
        model_class: The class that `config` is for, for example `RobertaForMaskedLM`.
        config: Its config; it is not changed.
        max_positions: Tokens the model is to take.

    Raises:
        ValueError: If the number is not valid or the family is not supported.
    """
    if isinstance(max_positions, bool) or not isinstance(max_positions, int):
        raise ValueError(f"max_positions must be an integer, got {max_positions!r}")
    _check_family(config)
    rows: int = config.max_position_embeddings
    old = _build_without_weights(model_class, config, {})
    trial = _build_without_weights(model_class, config, {"max_position_embeddings": rows + 1})
    _check_encoder(config, old)
    tables = _tables(config.model_type, old, trial)
    offsets = {_offset(old.get_submodule(name)) for name in tables} or {0}
    if len(offsets) > 1:
        raise ValueError(
            f"{config.model_type} cannot be converted, as its position tables {', '.join(tables)} "
            f"start at different rows: {SUPPORTED}"
        )
    offset = offsets.pop()
    if max_positions < rows - offset:
        raise ValueError(
            f"this {config.model_type} takes {rows - offset} tokens already: max_positions must be "
            f"at least that, got {max_positions}"
        )
    settings: dict[str, int | float] = {"max_position_embeddings": max_positions + offset}
    settings |= {name: 0.0 for name in _ATTENTION_DROPOUT if hasattr(config, name)}
    new = _build_without_weights(model_class, config, settings)
    buffers = {name: buffer.shape for name, buffer in new.named_buffers()}
    new_modules = dict(new.named_modules())
    return LongEncoderPlan(
        old_positions=rows - offset,
        new_positions=max_positions,
        offset=offset,
        tables=tables,
        buffers={
            name: buffers[name]
            for name, buffer in old.named_buffers()
            if buffer.shape != buffers[name]
        },
        attributes=tuple(
            (module_name, attribute, vars(new_modules[module_name])[attribute])
            for module_name, module in old.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, int | float) and vars(new_modules[module_name])[attribute] != value
        ),
        settings=settings,
    )


def _build_without_weights(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, settings: dict[str, int | float]
) -> PreTrainedModel:
    config = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"), no_init_weights():
        return model_class(config)


def _tables(family: str, old: PreTrainedModel, longer: PreTrainedModel) -> tuple[str, ...]:
    """The modules whose weight grows by one row with one more position, and nothing else may."""
    shapes = {name: parameter.shape for name, parameter in longer.named_parameters()}
    tables = []
    for name, parameter in old.named_parameters():
        new = shapes.get(name, torch.Size())
        if parameter.shape == new:
            continue
        owner, _, leaf = name.rpartition(".")
        grown = parameter.ndim == 2 and new == (parameter.shape[0] + 1, parameter.shape[1])
        if not (grown and leaf == "weight" and isinstance(old.get_submodule(owner), nn.Embedding)):
            raise ValueError(
                f"{family} cannot be converted, because {name} depends on the number of positions "
                f"and is not a table of one row per position: {SUPPORTED}"
            )
        tables.append(owner)
    return tuple(tables)


def _offset(table: Any) -> int:
    """Rows before position 0. Tables with a row for padding number positions after it."""
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _check_family(config: PreTrainedConfig) -> None:
    family = config.model_type
    if config.is_encoder_decoder:
        raise ValueError(
            f"{family} is an encoder-decoder, which cannot be converted to a long encoder: "
            f"{SUPPORTED}"
        )
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    if parts or config.get_text_config() is not config:
        raise ValueError(
            f"{family} is a model of several parts: convert its text encoder alone. {SUPPORTED}"
        )
    if getattr(config, "is_decoder", False):
        raise ValueError(
            f"this {family} is a decoder (config.is_decoder), and only encoders can be converted: "
            "for decoders see hf_attn_plugin.convert.extend_context"
        )
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        raise ValueError(
            f"{family} has no `max_position_embeddings` in its config, so its positions are not "
            f"absolute: {SUPPORTED}"
        )


def _check_encoder(config: PreTrainedConfig, model: PreTrainedModel) -> None:
    """Refuse decoders and models that compute attention by themselves."""
    if any(getattr(module, "is_causal", False) is True for module in model.modules()):
        raise ValueError(
            f"{config.model_type} is a decoder, its attention looks back only, and only encoders "
            "can be converted: for decoders see hf_attn_plugin.convert.extend_context"
        )
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} computes attention by itself (relative positions, or a method "
            f"of its own) and would ignore 'longformer': {SUPPORTED}"
        )


def _check_model(model: PreTrainedModel) -> None:
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model carries PEFT adapters: merge them first "
            "(`model = model.merge_and_unload()`), or add adapters after the conversion"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"to_long_encoder takes a transformers model, got {type(model).__name__}: "
            "unwrap it first (`accelerator.unwrap_model`), or convert before wrapping or compiling"
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the model is quantized: load it without quantization, convert it, and quantize it anew"
        )


def _check_weights(model: PreTrainedModel, plan: LongEncoderPlan) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model has weights without data (meta device): load them into memory, without "
            "offloading to disk or CPU"
        )
    for name in plan.tables:
        rows = model.get_parameter(f"{name}.weight").shape[0]
        if rows != plan.old_positions + plan.offset:
            raise ValueError(
                f"{name} has {rows} rows where the config says {plan.old_positions + plan.offset}"
            )
    for name, shape in plan.buffers.items():
        _new_buffer(name, model.get_buffer(name), shape)


def _new_buffer(name: str, buffer: Tensor, shape: torch.Size) -> Tensor:
    """A longer buffer of the same kind: numbers from 0 on, or zeros."""
    numbers = torch.arange(buffer.shape[-1], device=buffer.device, dtype=buffer.dtype)
    if torch.equal(buffer, numbers.expand_as(buffer)):
        return torch.arange(shape[-1], device=buffer.device, dtype=buffer.dtype).expand(shape)
    if not bool(buffer.any()):
        return buffer.new_zeros(shape)
    raise ValueError(
        f"the buffer {name} depends on the number of positions, and holds neither 0, 1, 2, ... nor "
        f"zeros, so it is not known how it goes on: {SUPPORTED}"
    )


@torch.no_grad()
def _try(model: PreTrainedModel, plan: LongEncoderPlan) -> None:
    """Run three tokens under ``longformer``, and refuse a model that does not do what it should."""
    family = model.config.model_type
    base: Any = model.base_model
    pad = getattr(model.config, "pad_token_id", None)
    first, second, third, other = [i for i in range(model.config.vocab_size) if i != pad][:4]
    device = base.get_input_embeddings().weight.device
    numbers: list[Tensor] = []
    before = model.config._attn_implementation
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in plan.tables:
            hook = model.get_submodule(name).register_forward_pre_hook(
                lambda _, args: numbers.append(args[0])
            )
            stack.callback(hook.remove)
        stack.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(LongformerConfig.name)
        reads = stack.enter_context(count_reads(base))
        inputs = [torch.tensor([[first, second, last]]).to(device) for last in (third, other)]
        try:
            seen = [base(ids)[0][:, 0] for ids in inputs]
        except (TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{family} cannot be converted: it does not run on token ids alone ({error}). "
                f"{SUPPORTED}"
            ) from error
    if not reads.calls[LongformerConfig.name]:
        raise ValueError(
            f"{family} cannot be converted: it has no attention modules that hold the model's "
            f"config, where the window is kept. {SUPPORTED}"
        )
    if torch.equal(*seen):
        raise ValueError(
            f"{family} cannot be converted: its first token does not see the last one, so it is "
            f"not an encoder. {SUPPORTED}"
        )
    wanted = list(range(plan.offset, plan.offset + 3))
    if any(found.flatten().tolist() != wanted for found in numbers):
        raise ValueError(
            f"{family} cannot be converted: it numbers the positions of three tokens "
            f"{numbers[0].flatten().tolist()}, and {wanted} was expected. {SUPPORTED}"
        )
