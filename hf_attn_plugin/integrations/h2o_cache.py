"""Gap: transformers' caches do not know how much attention their keys have drawn.

The cache that ``h2o`` decodes over: a dynamic layer that carries an `H2OState` along.

``install()`` makes transformers build it by itself wherever it builds a `DynamicCache` for a model
whose attention implementation is ``h2o``. Static caches keep their own layers, with which ``h2o``
refuses to decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicLayer, StaticLayer

from hf_attn_plugin.ops.h2o import H2OState, attach_h2o_state

METHOD = "h2o"
LAYER_TYPE = "h2o:full_attention"


class H2OLayer(DynamicLayer):
    """A dynamic cache layer for H2O decoding (arXiv 2306.14048).

    It keeps all keys and values, and with them which of them H2O has not dropped and how much
    attention these have drawn; ``update`` leaves that as an `H2OState` on the keys it returns.
    """

    # What a rejected guess made the cache drop cannot be brought back.
    is_croppable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._state = H2OState()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, Hkv, new, D]`` keys and values; return all of them."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        attach_h2o_state(keys, self._state)
        return keys, values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row i continue beam ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        self._state.map_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._state.map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        super().batch_select_indices(indices)
        self._state.map_batch(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the sums and the choice cannot be taken back.

        Raises:
            ValueError: Tokens are to be removed.
        """
        if tokens_to_remove == 0:
            return
        raise ValueError(
            "attn_implementation='h2o' cannot remove tokens from its cache (crop, as in assisted "
            "generation and prompt lookup): the keys that they made it drop are gone. Use another "
            "method, for example 'sparq' or 'exact_topk'."
        )

    def reset(self) -> None:
        """Forget all positions."""
        super().reset()
        self._state = H2OState()


# In transformers 5.17 the second part is one dictionary for all layers; it is only handed on.
LayerTypes = Callable[[PreTrainedConfig], tuple[list[str], list[dict[Any, Any]]]]


@dataclass(frozen=True)
class _H2OLayerTypes:
    """transformers' ``get_layer_types_and_kwargs``, with our layer in models that use ``h2o``."""

    original: LayerTypes

    def __call__(self, config: PreTrainedConfig) -> tuple[list[str], list[dict[Any, Any]]]:
        layer_types, layer_kwargs = self.original(config)
        installed = LAYER_TYPE in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
        if installed and getattr(config, "_attn_implementation", None) == METHOD:
            layer_types = [LAYER_TYPE if t == "full_attention" else t for t in layer_types]
        return layer_types, layer_kwargs


def install() -> None:
    """Make transformers use `H2OLayer` in the dynamic caches of models that use ``h2o``.

    Only full-attention layers change; those with a sliding window keep their own. Calling it again
    does nothing.
    """
    if LAYER_TYPE in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING:
        return
    cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = H2OLayer
    cache_utils.STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = StaticLayer
    current = cache_utils.get_layer_types_and_kwargs
    if not isinstance(current, _H2OLayerTypes):
        cache_utils.get_layer_types_and_kwargs = _H2OLayerTypes(current)


def uninstall() -> None:
    """Undo `install`. Caches that exist already keep their layers and go on working.

    Where somebody else has wrapped the same function since, ours stays underneath and does nothing.
    """
    cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.pop(LAYER_TYPE, None)
    cache_utils.STATIC_LAYER_TYPE_MAPPING.pop(LAYER_TYPE, None)
    current = cache_utils.get_layer_types_and_kwargs
    if isinstance(current, _H2OLayerTypes):
        cache_utils.get_layer_types_and_kwargs = current.original  # type: ignore[assignment]
