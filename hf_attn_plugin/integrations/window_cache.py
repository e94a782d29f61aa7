"""Gap: transformers bounds a cache by the model's own window only, not by the attention's.

Under ``sliding_window`` and ``longformer`` no decoding step sees more than the first tokens and the
last ones, but a `DynamicCache` keeps all. ``install()`` makes transformers put `WindowLayer` in the
place of every full-attention layer of the dynamic caches that it builds for such models.

The constructor of `DynamicCache` is wrapped, and not the function that names the layers' types:
that one serves static and quantized caches too, which are to stay as they are. So do caches made
without a config, and those of models that share keys between layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from hf_attn_plugin.integrations.wrapping import unwrap, wrap
from hf_attn_plugin.ops.window_state import WindowStore

METHODS = ("sliding_window", "longformer")


class WindowLayer(DynamicLayer):
    """A dynamic layer that keeps what a window sees, and first tokens (arXiv 2309.17453).

    What to drop is said by the attention function after every call, see `WindowStore`. To the mask
    it shows the keys it holds as if they were the last ones, without gaps; the attention function
    puts right which the first ones are.

    Args:
        config: Of the model, whose attention implementation may be changed later.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._store = WindowStore()
        self._config = config
        super().__init__()

    # Where transformers looks for them.
    @property
    def keys(self) -> Tensor | None:
        """``[batch, kv_heads, held, head_dim]``."""
        return self._store.keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._store.keys = keys

    @property
    def values(self) -> Tensor | None:
        """``[batch, kv_heads, held, value_dim]``."""
        return self._store.values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._store.values = values

    @property
    def record_past(self) -> bool:
        """Whether nothing is dropped for now; transformers sets it."""
        return self._store.keep_all

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._store.keep_all = value

    def activate_past_recording(self) -> None:
        """Keep all tokens from now on, since some may be taken back."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take note of dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[batch, kv_heads, new, dim]``; return all that is held.

        Raises:
            ValueError: Tokens were dropped, and another attention is to go on with this cache.
        """
        name = self._config._attn_implementation
        if self._store.start > 0 and name not in METHODS:
            raise ValueError(
                f"attn_implementation={name!r} cannot go on with a cache that was filled under "
                f"{' or '.join(map(repr, METHODS))}: that keeps only what its window sees. Start "
                "with a new cache, or pass past_key_values=DynamicCache() from the start, which "
                "keeps all tokens."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._store.append(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next call has, and the position of the first, as if there were no gap."""
        held = 0 if self.keys is None else self.keys.shape[2]
        return held + query_length, self._store.seen - held

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        return self._store.seen

    def reset(self) -> None:
        """Forget all tokens."""
        self._store = WindowStore()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back.

        Raises:
            ValueError: The number is positive, or needs tokens that are dropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the negative number of tokens to remove, got {tokens_to_remove}."
            )
        self._store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue beam ``beam_idx[i]``."""
        self._store.map_batch(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._store.map_batch(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._store.map_batch(lambda held: held[indices])


def _bounded(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = kwargs.get("config", args[1] if len(args) > 1 else None)
        # Subclasses count positions in ways of their own.
        if type(self) is DynamicCache and config is not None and _wanted(config):
            text = config.get_text_config(decoder=True)
            self.layers = [
                WindowLayer(text)
                if type(layer) is DynamicLayer and not layer.is_initialized
                else layer
                for layer in self.layers
            ]

    return init


def install() -> None:
    """Make transformers use `WindowLayer`; idempotent."""
    wrap(DynamicCache, "__init__", _bounded)


def uninstall() -> None:
    """Undo `install`, unless somebody else has wrapped it since. Existing caches go on working."""
    unwrap(DynamicCache, "__init__")


def _wanted(config: PreTrainedConfig) -> bool:
    """Whether a cache for this model is bounded."""
    text = config.get_text_config(decoder=True)
    shares = getattr(text, "num_kv_shared_layers", None) or getattr(text, "kv_sharing_modes", None)
    return getattr(text, "_attn_implementation", None) in METHODS and not shares
