"""Storing one new token per sequence in SparQ's cache: keys, values and the keys' copy at once."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hf_attn_plugin.ops.triton.dispatch import launch, on_device
from hf_attn_plugin.ops.triton.sparq_append_kernels import (
    add_value_kernel,
    append_kernel,
    window_start_kernel,
)

# What the kernel does for the keys' copy.
_NO_COPY, _COLUMN, _TAIL = 0, 1, 2


def append_token(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    column: Tensor | None,
    position: int,
    place: int,
) -> None:
    """Store a token at a position that the host knows. One launch.

    Args:
        key: ``[B, Hkv, 1, D]``, any strides.
        value: ``[B, Hkv, 1, Dv]``, any strides.
        keys: ``[B, Hkv, capacity, D]``, written at ``position``.
        values: ``[B, Hkv, capacity, Dv]``, written at ``position``.
        column: ``[B, Hkv, D, any]``, written at ``[..., place]``: the keys by component, or the
            tail of their quantised copy. None without a copy.
        position: Where the token goes.
        place: Where its key goes in ``column``.
    """
    kind = _NO_COPY if column is None else _COLUMN
    _launch(key, value, keys, values, column, None, None, None, None, None, position, place, kind)


def _append_at(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    column: Tensor | None,
    codes: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    tail_at: Tensor | None,
    length: Tensor,
) -> None:
    """Store a token at a position that only the device knows. One launch.

    Args:
        key: ``[B, Hkv, 1, D]``, any strides.
        value: ``[B, Hkv, 1, Dv]``, any strides.
        keys: ``[B, Hkv, S, D]``, written.
        values: ``[B, Hkv, S, Dv]``, written.
        column: The keys by component, ``[B, Hkv, D, S]``, or with ``codes`` the tail of their
            quantised copy, ``[B, Hkv, D, group]``; written. None without a copy.
        codes: With a quantised copy, contiguous as in `QuantizedComponents`, written where the
            token fills a group; and so are ``scale`` and ``offset``.
        scale: See ``codes``.
        offset: See ``codes``.
        tail_at: Where the tail begins, 0-dimensional, written.
        length: Positions in use with this token, 0-dimensional, integer; with more than S the last
            value becomes NaN.
    """
    kind = _NO_COPY if column is None else _COLUMN if codes is None else _TAIL
    quantized = (codes, scale, offset, tail_at)
    _launch(key, value, keys, values, column, *quantized, length, 0, 0, kind)


append_token_at = torch.library.custom_op(
    "hf_attn_plugin::sparq_append",
    _append_at,
    mutates_args=("keys", "values", "column", "codes", "scale", "offset", "tail_at"),
)


@append_token_at.register_fake
def _(*args: Any) -> None:
    return None


def store_token_at(*args: Any) -> None:
    """`append_token_at`, in eager mode without the way through PyTorch's dispatcher."""
    if torch.compiler.is_compiling():
        append_token_at(*args)
    else:
        _append_at(*args)


def _launch(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    column: Tensor | None,
    codes: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    tail_at: Tensor | None,
    length: Tensor | None,
    position: int,
    place: int,
    kind: int,
) -> None:
    batch, kv_heads, _, head_dim = key.shape
    value_dim = value.shape[-1]
    if batch * kv_heads == 0:
        return
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    column_strides = (0, 0, 0) if column is None else column.stride()[:3]
    groups = 0 if codes is None else codes.shape[3]
    group = 2 if column is None or codes is None else column.shape[3]
    bits = 8 if codes is None else codes.shape[4] * 8 // group
    arguments = {
        "key": key,
        "value": value,
        "keys": keys,
        "values": values,
        "column": column,
        "codes": codes,
        "scale": scale,
        "offset": offset,
        "tail_at": tail_at,
        "length": length,
        "key_b": key.stride(0),
        "key_h": key.stride(1),
        "value_b": value.stride(0),
        "value_h": value.stride(1),
        "keys_b": keys.stride(0),
        "keys_h": keys.stride(1),
        "keys_n": keys.stride(2),
        "values_b": values.stride(0),
        "values_h": values.stride(1),
        "values_n": values.stride(2),
        "column_b": column_strides[0],
        "column_h": column_strides[1],
        "column_d": column_strides[2],
        "kv_heads": kv_heads,
        "groups": groups,
        "room": keys.shape[2],
        "position": position,
        "place": place,
    }
    fixed = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_V": triton.next_power_of_2(value_dim),
        "KIND": kind,
        "GROUP": group,
        "BITS": bits,
        "num_warps": 4 if kind == _TAIL else 1,
    }
    with on_device(keys):
        launch(append_kernel, batch * kv_heads, arguments, fixed)


def _add_value(
    values: Tensor,
    total: Tensor,
    seen: Tensor,
    visible: Tensor | None,
    wanted: Tensor | None,
    length: Tensor | None,
    counted: Tensor | None,
    last: int,
) -> None:
    """Bring sums of visible values up to date, by adding the last one or else all anew.

    They are right as soon as they hold as many values as are visible, as in `BlockSums.lacks`. One
    launch; nothing is read back.

    Args:
        values: ``[B, Hkv, N, Dv]``, any strides but the last, which is 1.
        total: float32 ``[B, Hkv, 1, Dv]``, contiguous: the sums; written.
        seen: int64 ``[B, 1]``, how many values they hold; written.
        visible: bool ``[B or 1, N]``, which positions count; None is all.
        wanted: int64 ``[B or 1]``, how many are visible of those in use; given with ``visible``.
        length: Positions in use, 0-dimensional, integer; None where ``last`` says it.
        counted: 0-dimensional, gets the positions in use; None where nobody asks.
        last: Without ``length``, the positions in use.
    """
    batch, kv_heads, _, value_dim = values.shape
    arguments = {
        "values": values,
        "total": total,
        "seen": seen,
        "visible": visible if visible is None else visible.view(torch.uint8),
        "wanted": wanted,
        "length": length,
        "counted": counted,
        "values_b": values.stride(0),
        "values_h": values.stride(1),
        "values_n": values.stride(2),
        "visible_b": 0 if visible is None or visible.shape[0] == 1 else visible.stride(0),
        "wanted_b": 0 if wanted is None or wanted.shape[0] == 1 else 1,
        "room": values.shape[2],
        "last": last,
    }
    fixed = {
        "KV_HEADS": kv_heads,
        "VALUE_DIM": value_dim,
        "BLOCK_V": triton.next_power_of_2(value_dim),
        "BLOCK_N": 64,
        "num_warps": 4,
    }
    with on_device(values):
        launch(add_value_kernel, batch, arguments, fixed)


add_value_op = torch.library.custom_op(
    "hf_attn_plugin::sparq_add_value", _add_value, mutates_args=("total", "seen", "counted")
)


@add_value_op.register_fake
def _(*args: Any) -> None:
    return None


def add_value(*args: Any) -> None:
    """`add_value_op`, in eager mode without the way through PyTorch's dispatcher."""
    if torch.compiler.is_compiling():
        add_value_op(*args)
    else:
        _add_value(*args)


def _window_start(visible: Tensor, stop: Tensor | None, window: int) -> Tensor:
    """Where the last ``window`` visible keys begin, in one launch.

    Args:
        visible: bool ``[B or 1, N]``.
        stop: No key at or after this one is looked at, one integer; None is N.
        window: Keys; with fewer visible ones the window begins at 0.

    Returns:
        int64 ``[B or 1]``.
    """
    visible = visible.contiguous()
    batch, length = visible.shape
    starts = torch.empty(batch, dtype=torch.int64, device=visible.device)
    arguments = {
        "visible": visible.view(torch.uint8),
        "stop": stop,
        "starts": starts,
        "visible_b": length,
        "length": length,
        "window": window,
    }
    with on_device(visible):
        launch(window_start_kernel, batch, arguments, {"BLOCK": 1024, "num_warps": 4})
    return starts


window_start_op = torch.library.custom_op(
    "hf_attn_plugin::sparq_window_start", _window_start, mutates_args=()
)


@window_start_op.register_fake
def _(visible: Tensor, *args: Any) -> Tensor:
    return visible.new_empty(visible.shape[0], dtype=torch.int64)


def window_start(visible: Tensor, stop: Tensor | None, window: int) -> Tensor:
    """`window_start_op`, in eager mode without the way through PyTorch's dispatcher."""
    if torch.compiler.is_compiling():
        return window_start_op(visible, stop, window)
    return _window_start(visible, stop, window)
