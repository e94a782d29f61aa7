"""Which models can be spread over ranks at all, and what the ranks must agree on."""

from __future__ import annotations

import inspect
import weakref
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_attn_plugin.compat import recurrent_layers
from hf_attn_plugin.integrations.forward_positions import OWN_MASKS
from hf_attn_plugin.methods.sharding import SHARDED
from hf_attn_plugin.sequence_parallelism.hanging import refuse_nested

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, whose calls would wait for other ranks."""
    from torch.nn.parallel import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model


def transformers_model(model: Any) -> PreTrainedModel:
    """The outermost transformers model in ``model`` (PEFT's stand around one).

    Raises:
        ValueError: There is none.
    """
    from transformers import PreTrainedModel

    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise ValueError(
        f"sequence_parallel takes a transformers model; there is none in a {type(model).__name__}."
    )


def check_model(model: nn.Module, base: PreTrainedModel, length: int) -> None:
    """Refuse what is known by its config or its modules; `rehearsal` finds the rest.

    Args:
        model: As the caller calls it.
        base: The transformers model in it.
        length: Tokens per row.

    Raises:
        ValueError: With the reason.
    """
    refuse_nested(model)
    config: Any = base.config
    text = config.get_text_config()
    name, who = text._attn_implementation, type(base).__name__
    if name not in SHARDED:
        raise ValueError(
            f"{who} runs with attn_implementation={name!r}, which does not run over a sequence "
            f"that is spread over ranks; {', '.join(map(repr, SHARDED))} do. Load it with "
            "attn_implementation='ring', or call model.set_attn_implementation('ring')."
        )
    if any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    ):
        raise ValueError(
            f"{who} is compiled, and a sequence that is spread over ranks does not run under "
            "torch.compile. Pass the model as it was before."
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        raise ValueError(
            f"{who} attends from one sequence to another (cross-attention). Use a decoder such as "
            "Llama or an encoder such as BERT."
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{type(model).__name__} puts virtual tokens before every sequence (prompt or prefix "
            "tuning), and would do so on every rank. Use LoRA or another adapter of weights."
        )
    kinds = recurrent_layers(text)
    if kinds:
        raise ValueError(
            f"{who} has {' and '.join(map(repr, kinds))} layers, whose state goes from token to "
            "token past attention, and would begin anew on every rank. Use a model that has "
            "attention layers alone, or run this one on one GPU."
        )
    if type(base).__module__.rpartition(".")[2] in OWN_MASKS:
        raise ValueError(f"{who} draws its masks by itself, of one rank's tokens. Use one GPU.")
    if getattr(config, "output_router_logits", False) or getattr(
        text, "output_router_logits", False
    ):
        raise ValueError(
            f"{who} adds a loss for the balance of its experts (output_router_logits=True), which "
            "would be judged by one rank's tokens. Set model.config.output_router_logits=False."
        )
    scale = getattr(text, "floor_scale", None)
    if getattr(text, "attn_temperature_tuning", False) and scale and length >= scale:
        raise ValueError(
            f"{who} scales queries by the tokens it has counted in a call from {scale} on, which "
            f"are one rank's, and rows have {length}. Set attn_temperature_tuning=False, or use "
            "shorter rows."
        )


def computes_anew(model: nn.Module) -> bool:
    """Whether the backward pass computes parts of the forward pass again (checkpointing)."""
    return any(
        (getattr(module, "gradient_checkpointing", False) and module.training)
        or type(module).__name__ == "CheckpointWrapper"
        for module in model.modules()
    )


def fingerprint(base: PreTrainedModel) -> str:
    """What of a model decides how it is spread: a change is rehearsed anew."""
    text: Any = base.config.get_text_config()
    parameters = getattr(text, "attn_params", None)
    return f"{type(base).__qualname__} {text._attn_implementation} {parameters}"


def numbers_of(base: PreTrainedModel, device_type: str) -> dict[str, Any]:
    """What decides the dtypes of what travels, and whether its gradients do."""
    cast = torch.is_autocast_enabled(device_type)
    said = {
        "the model's dtype": str(base.dtype),
        "autocast": str(torch.get_autocast_dtype(device_type)) if cast else "off",
    }
    if torch.is_grad_enabled():
        trained = " ".join(name for name, p in base.named_parameters() if p.requires_grad)
        said["what is trained (a checksum of the names)"] = str(zlib.crc32(trained.encode()))
    return said


def loss_function(base: PreTrainedModel) -> Any:
    """What makes the loss of a model's labels; whoever trains it may put another in its place."""
    return getattr(base, "loss_function", None)


def reference(thing: Any) -> Callable[[], Any]:
    """Something that may belong to a model, without keeping that alive where that is possible."""
    try:
        return weakref.WeakMethod(thing) if inspect.ismethod(thing) else weakref.ref(thing)
    except TypeError:  # of a class with slots
        return lambda: thing


def signature_of(base: PreTrainedModel) -> inspect.Signature:
    """The arguments of the transformers model's forward."""
    return inspect.signature(type(base).forward)
