"""What SparQ's kernels read of a KV cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_attn_plugin.ops.reads import CacheReads, nbytes
from hf_attn_plugin.ops.sparq.key_copy import (
    GROUP,
    Components,
    FullComponents,
    QuantizedComponents,
)


def reads_of_kernels(
    keys: Tensor,
    values: Tensor,
    *,
    visible: Sequence[int],
    rank: int,
    top_k: int,
    components: Components | None,
    mean: bool,
    summed: bool,
) -> CacheReads:
    """The bytes of one step of `ops.triton.sparq.triton_sparq` without coverages.

    Args:
        keys: [B, Hkv, N, D].
        values: [B, Hkv, N, Dv].
        visible: How many keys every sequence sees; no others are read.
        rank: Components r.
        top_k: Keys k.
        components: What the approximate scores are made of; anything but a copy reads keys whole.
        mean: Whether a mean value is used, whose sums are read and one value added.
        summed: Whether these sums were made of all values.
    """
    batch, kv_heads, _, head_dim = keys.shape
    size, value_bytes = keys.element_size(), values.shape[3] * values.element_size()
    chosen, seen = sum(min(top_k, n) for n in visible), sum(visible)
    per_head = head_dim * size * seen
    if rank < head_dim and isinstance(components, FullComponents):
        per_head = rank * size * seen
    elif rank < head_dim and isinstance(components, QuantizedComponents):
        whole = sum(n // GROUP for n in visible)
        group = GROUP * components.bits // 8 + 2 * size  # codes, scale and offset
        per_head = rank * (whole * group + sum(n % GROUP for n in visible) * size)
    added = 0
    if mean:
        added = kv_heads * batch * (values.shape[3] * 4 + value_bytes)
        added += kv_heads * seen * value_bytes if summed else 0
    return CacheReads(
        keys=kv_heads * chosen * head_dim * size,
        values=kv_heads * chosen * value_bytes,
        components=kv_heads * per_head,
        mean=added,
        dense=nbytes(keys, values),
    )
