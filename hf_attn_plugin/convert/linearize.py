"""Teaching a softmax model's layers to attend linearly: their outputs compared, and distilled.

Every layer is given the inputs that it has in the softmax model, so that all layers learn at once
and the error of one does not reach the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Parts of an attention module that make queries and keys; the student has its own.
_QUERY_AND_KEY = frozenset(
    {"q_proj", "k_proj", "q_norm", "k_norm", "q_layernorm", "k_layernorm", "query", "key"}
)


@dataclasses.dataclass(frozen=True)
class AttentionModuleCall:
    """What an attention module was called with, and what came out.

    Attributes:
        module: The attention module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: ``[batch, tokens, hidden]``, behind the output projection.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def relative_error(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Squared error of the module's output now, over the squared norm of the recorded one.

        Args:
            parameters: Used in place of the module's own, by name.
        """
        result = functional_call(self.module, dict(parameters or {}), self.args, self.kwargs)
        output = result[0] if isinstance(result, tuple) else result
        return (output - self.output).float().square().sum() / self.output.float().square().sum()


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that call the attention function, by name.

    Raises:
        ValueError: There is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "config")
        and (hasattr(module, "layer_idx") or "is_causal" in vars(module))
    }
    names = tuple(found)
    inner = {
        name: module
        for name, module in found.items()
        if not any(other.startswith(f"{name}.") for other in names)
    }
    if not inner:
        raise ValueError(f"{type(model).__name__} has no attention modules that could be linear.")
    return inner


def record_attention(
    model: PreTrainedModel, batch: Mapping[str, Any], teacher: str = "flash"
) -> list[AttentionModuleCall]:
    """Run ``model`` with exact softmax attention, and keep what its attention modules did.

    Args:
        model: A transformers model.
        batch: Its inputs; labels are left out.
        teacher: An exact attention of this package, whose masks ``linear`` can read.

    Returns:
        A call for each attention module, in the order of the layers, without gradients.
    """
    calls: list[AttentionModuleCall] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        output = result[0] if isinstance(result, tuple) else result
        calls.append(AttentionModuleCall(module, args, kwargs, output))

    with contextlib.ExitStack() as stack:
        for module in attention_modules(model).values():
            stack.enter_context(_removed(module.register_forward_hook(keep, with_kwargs=True)))
        stack.enter_context(attending_with(model, teacher))
        stack.enter_context(torch.no_grad())
        model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    return calls


@contextlib.contextmanager
def attending_with(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside the block the model uses the attention ``name``."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def attention_output_errors(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    attn: str = "linear",
    students: Sequence[Mapping[str, Tensor]] | None = None,
) -> list[float]:
    """How far the attention outputs under ``attn`` are from those of softmax, for each layer.

    Args:
        model: A transformers model; the parameters of ``attn`` are those in its config.
        batches: Inputs of the model.
        attn: The attention to judge.
        students: For each layer, parameters that it uses under ``attn`` in place of its own:
            `AttentionDistillation.students`.

    Returns:
        For each layer the norm of the difference over the norm of softmax's output, root mean
        square over the batches. The layers' inputs are those of the softmax model.
    """
    totals: list[float] = []
    count = 0
    for batch in batches:
        calls = record_attention(model, batch)
        with attending_with(model, attn), torch.no_grad():
            own = students or [{}] * len(calls)
            errors = [
                float(call.relative_error(other)) for call, other in zip(calls, own, strict=True)
            ]
        totals = [a + b for a, b in zip(totals or [0.0] * len(errors), errors, strict=True)]
        count += 1
    if not count:
        raise ValueError("attention_output_errors needs at least one batch.")
    return [(total / count) ** 0.5 for total in totals]


class AttentionDistillation(nn.Module):
    """Query and key projections that make ``linear`` give the outputs of softmax attention.

    A module for transformers' Trainer: called with a batch, it returns the loss, the mean over the
    layers of the squared relative error. Only the students' projections are parameters of it;
    the model is frozen, used by both, and no part of checkpoints.

    Args:
        model: A transformers model whose attention modules have query and key projections.

    Raises:
        ValueError: Queries and keys are made together with the values (fused projections).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = (model.eval().requires_grad_(False),)  # in a tuple: not a submodule
        self._names: list[dict[str, str]] = []
        stores = []
        for name, module in attention_modules(model).items():
            own = {k: p for k, p in module.named_parameters() if k.split(".")[0] in _QUERY_AND_KEY}
            if not any(k.startswith(("q_proj", "query")) for k in own):
                raise ValueError(
                    f"distilling into linear attention trains query and key projections, and "
                    f"{name} ({type(module).__name__}) has none of its own, only "
                    f"{', '.join(k for k, _ in module.named_children())}. Fine-tune under "
                    "attn_implementation='linear' without distillation."
                )
            names = {k.replace(".", "/"): k for k in own}  # torch allows no dots in a key
            self._names.append(names)
            stores.append(
                nn.ParameterDict(
                    {key: nn.Parameter(own[k].detach().clone()) for key, k in names.items()}
                )
            )
        self._stores = nn.ModuleList(stores)

    @property
    def model(self) -> PreTrainedModel:
        """The softmax model."""
        return self._model[0]

    @property
    def students(self) -> list[dict[str, Tensor]]:
        """For each layer the projections that are trained, by their names in its module."""
        return [
            {names[key]: parameter for key, parameter in store.named_parameters()}
            for names, store in zip(self._names, self._stores, strict=True)
        ]

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of a batch; ``labels`` are what Trainer passes and do not matter."""
        model: Any = self.model
        model.to(input_ids.device)
        calls = record_attention(model, {"input_ids": input_ids, "position_ids": position_ids})
        with attending_with(model, "linear"):
            errors = [
                call.relative_error(student)
                for call, student in zip(calls, self.students, strict=True)
            ]
        return {"loss": torch.stack(errors).mean()}

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the model the students' projections."""
        modules = attention_modules(self.model).values()
        for module, student in zip(modules, self.students, strict=True):
            for name, parameter in student.items():
                module.get_parameter(name).copy_(parameter)
