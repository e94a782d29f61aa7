"""Gap: transformers keeps a recurrent state only for models that are written for one.

The cache that ``linear`` uses: a state of fixed size in place of keys and values, kept where
transformers' own linear-attention layers keep theirs. `cache_layers` puts it in its place.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

from hf_attn_plugin.ops.linear_state import StateSlot, attach_slot


class LinearStateLayer(LinearAttentionAndFullAttentionLayer):
    """A cache layer of fixed size: it counts tokens, and holds the state that attention writes.

    ``update`` stores nothing and returns the new keys and values alone; the attention function
    takes the state from the `StateSlot` on the keys. (Of transformers' layers for recurrent states
    this is the kind that also tells the length of the sequence, from which masks and positions are
    made.)
    """

    is_croppable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(number_of_states=2)
        self.slot = StateSlot(self.recurrent_states)
        self.cumulative_length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count ``[B, Hkv, new, D]`` keys and return them and their values."""
        self.is_initialized = True
        attach_slot(key_states, self.slot, self.cumulative_length)
        self.cumulative_length += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are for the new keys, which start where the earlier ones end."""
        return query_length, self.cumulative_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue beam ``beam_idx[i]``."""
        self.slot.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self.slot.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.slot.map(lambda tensor: tensor[indices, ...])

    def reset(self) -> None:
        """Forget all tokens."""
        self.slot.clear()
        self.cumulative_length = 0
        self.is_initialized = False

    def offload(self) -> None:
        """Nothing: the state is as small as what would be saved by moving it."""

    def prefetch(self) -> None:
        """Nothing, as `offload`."""

    def activate_past_recording(self) -> None:
        """Called before generation that will take tokens back."""
        _refuse_to_go_back()

    def crop(self, tokens_to_remove: int) -> None:
        """Only removing nothing is possible."""
        # A positive number is the length to keep, for transformers before 5.18.
        nothing = 0 < self.cumulative_length <= tokens_to_remove
        if tokens_to_remove and not nothing:
            _refuse_to_go_back()


def _refuse_to_go_back() -> NoReturn:
    raise ValueError(
        "attn_implementation='linear' keeps a sum over all tokens in place of keys and values, and "
        "tokens cannot be taken out of it again: no assisted generation, prompt lookup or crop(). "
        "Generate without an assistant, copy the cache before going on from it "
        "(copy.deepcopy(past_key_values)), or use attn_implementation='flash' or 'sparq'."
    )


def keeps_state(config: PreTrainedConfig) -> bool:
    """Whether this model's caches can hold states.

    Cross-attention, and layers that share the keys of others, come back to the keys in the cache:
    such models keep them, and attention adds them up again at every step.
    """
    return not any(
        getattr(config, name, None)
        for name in ("is_encoder_decoder", "add_cross_attention", "is_decoder", "kv_sharing_modes",
                     "num_kv_shared_layers", "cross_attention_layers")
    )  # fmt: skip
