"""What conversions do to a model in memory: run it as it stands, and put new weights into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while, each module's own mode put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def replace_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put new parameters, of any shape, in the place of old ones, wherever these are held.

    A graph from before the change keeps the old objects with their shapes, so they are not given
    new data: gradients of the new shape would be refused as long as such a graph lives.

    Args:
        model: The model; ties, `requires_grad` and the parameters' own attributes stay.
        values: For every name of a parameter its new value, a tensor of its own.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((module, leaf))
    new = {name: (model.get_parameter(name), value) for name, value in values.items()}
    for old, value in new.values():
        parameter = nn.Parameter(value, old.requires_grad)
        vars(parameter).update(vars(old))
        for module, leaf in holders[id(old)]:
            module._parameters[leaf] = parameter
