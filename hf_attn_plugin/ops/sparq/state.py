"""What SparQ decoding keeps of a KV cache, and its way from the cache to the attention.

Transformers hands an attention function the cached keys and values but not the cache, so the state
travels as an attribute of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_attn_plugin.ops.sparq.key_copy import Components
from hf_attn_plugin.ops.sparq.sums import RunningSums, StaticRunningSums

_STATE = "_sparq_state"


@dataclass(frozen=True, eq=False)
class SparQState:
    """What goes with one state of the cached keys.

    It holds tensors only and nothing that leads back to the cache, so that it can be copied and
    saved with the keys and dies with them.

    Attributes:
        key_copy: How the keys are kept a second time: a ``SparQConfig.key_copy``.
        components: That copy; None with ``key_copy="none"``.
        sums: The running sums of that cache layer's values, shared by all its states.
        length: Of a cache with room for more than it holds: the positions in use, 0-dimensional.
    """

    key_copy: str
    components: Components | None
    sums: RunningSums | StaticRunningSums
    length: Tensor | None = None


def attach_state(keys: Tensor, state: SparQState) -> None:
    """Leave ``state`` on the tensor ``keys``; tensors computed from it do not have it."""
    setattr(keys, _STATE, state)


def sparq_state(keys: Tensor) -> SparQState | None:
    """The state that the cache left on these keys, None on any other tensor."""
    return getattr(keys, _STATE, None)
