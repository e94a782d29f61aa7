"""Gap: transformers has no hook around the function that computes a layer's attention."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

AttentionFunction = Callable[..., tuple[Tensor, Any]]


@dataclasses.dataclass(frozen=True)
class InterfaceCall:
    """One call of transformers' attention interface, just before it is made.

    Attributes:
        implementation: The ``attn_implementation`` that is looked up.
        function: What it is registered as; for ``eager`` the family's own function.
        eager: The eager attention function of the family's modeling file, or None.
        module: The attention module that calls.
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, kv_heads, kv_len, head_dim]``.
        value: ``[batch, kv_heads, kv_len, value_dim]``.
        mask: The layer's mask as the function gets it.
        kwargs: The other keyword arguments.
    """

    implementation: str
    function: AttentionFunction
    eager: AttentionFunction | None
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    kwargs: dict[str, Any]

    def run(self, **changes: Any) -> tuple[Tensor, Any]:
        """Make the call, with some of the attributes above changed."""
        call = dataclasses.replace(self, **changes)
        return call.function(
            call.module, call.query, call.key, call.value, call.mask, **call.kwargs
        )


Handler = Callable[[InterfaceCall], tuple[Tensor, Any]]


@contextlib.contextmanager
def intercept_attention(modules: Iterable[nn.Module], handler: Handler) -> Iterator[None]:
    """Let ``handler`` answer the attention calls of these modules, inside the block.

    Args:
        modules: Modules of a model; those that never attend may be among them.
        handler: Takes a call and returns what the attention function would.
    """
    from transformers.modeling_utils import AttentionInterface

    wanted = {id(module) for module in modules}
    original = AttentionInterface.get_interface

    def get_interface(
        self: AttentionInterface, attn_implementation: str, default: AttentionFunction
    ) -> AttentionFunction:
        function = original(self, attn_implementation, default)

        def call(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Any]:
            if id(module) not in wanted:
                return function(module, query, key, value, attention_mask, **kwargs)
            name = str(attn_implementation)
            return handler(
                InterfaceCall(
                    name, function, default, module, query, key, value, attention_mask, kwargs
                )
            )

        return call

    setattr(AttentionInterface, "get_interface", get_interface)  # noqa: B010
    try:
        yield
    finally:
        setattr(AttentionInterface, "get_interface", original)  # noqa: B010


@contextlib.contextmanager
def eager_names(model: nn.Module) -> Iterator[None]:
    """Every part of ``model`` runs as ``attn_implementation="eager"`` inside the block.

    Not through ``set_attn_implementation``: what it changes besides cannot all be put back.
    """
    configs: dict[int, Any] = {
        id(config): config
        for module in model.modules()
        if hasattr(config := getattr(module, "config", None), "_attn_implementation_internal")
    }
    names = {key: config._attn_implementation_internal for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = names[key]
