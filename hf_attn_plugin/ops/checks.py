"""What every attention function of this package asks of its tensors."""

from __future__ import annotations

from torch import Tensor

from hf_attn_plugin.patterns import Pattern


def check_tensors(
    function: str, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, ranks: int = 1
) -> None:
    """Refuse tensors that do not fit each other or their pattern.

    Args:
        function: Its name, for the message.
        query: To be ``[batch, heads, q_len, head_dim]``.
        key: To be ``[batch, kv_heads, kv_len, head_dim]``.
        value: To be ``[batch, kv_heads, kv_len, value_dim]``.
        pattern: To be of ``q_len`` and ``kv_len``.
        ranks: Of so many times these, where tensors hold one rank's share.

    Raises:
        ValueError: They are not.
    """
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(f"{function} takes [batch, heads, tokens, dim] tensors; got {shapes}.")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise ValueError(f"{function}: batch, KV heads and keys must agree; got {shapes}.")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"{function}: query and key must have one head_dim; got {shapes}.")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{function}: KV heads must divide query heads; got {shapes}.")
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        dtypes = f"{query.dtype}, {key.dtype}, {value.dtype}"
        raise ValueError(
            f"{function}: query, key and value must share a float dtype; got {dtypes}."
        )
    if (pattern.q_len, pattern.kv_len) != (query.shape[2] * ranks, key.shape[2] * ranks):
        raise ValueError(
            f"{function}: the pattern is for {pattern.q_len} queries and {pattern.kv_len} keys; "
            f"got {shapes}."
        )
    for name, tensor in pattern.tensors().items():
        if tensor.ndim > 0 and tensor.shape[0] not in (1, query.shape[0]):
            raise ValueError(
                f"{function}: the pattern's {name} is for a batch of {tensor.shape[0]}; "
                f"got {shapes}."
            )
    if pattern.dense is not None and pattern.dense.shape[1] not in (1, query.shape[1]):
        raise ValueError(
            f"{function}: the pattern's dense mask must have 1 or {query.shape[1]} heads, one per "
            f"query head; got {pattern.dense.shape[1]}."
        )


def check_softmax(
    function: str, query: Tensor, softcap: float | None, sinks: Tensor | None
) -> None:
    """Refuse what cannot enter the softmax of these query heads.

    Args:
        function: Its name, for the message.
        query: ``[batch, heads, q_len, head_dim]``.
        softcap: To be above 0, or None.
        sinks: To hold one number per head, or None.

    Raises:
        ValueError: They do not.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{function}: softcap must be above 0, or None for none; got {softcap}.")
    if sinks is not None and sinks.numel() != query.shape[1]:
        raise ValueError(
            f"{function}: sinks must hold one logit per query head, {query.shape[1]}; "
            f"got {tuple(sinks.shape)}."
        )
