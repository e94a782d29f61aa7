"""Gap: transformers' caches do not know how much attention their keys have drawn.

The cache that ``h2o`` decodes over: a dynamic layer that carries an `H2OState` along.
`cache_layers` puts it in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_attn_plugin.ops.h2o import H2OState, attach_h2o_state


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
