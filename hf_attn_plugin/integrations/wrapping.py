"""How the functions of transformers that have no hook are wrapped, once, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

ORIGINAL = "_hf_attn_plugin_original"
# Wrappers that others make around ours with functools.wraps have its attributes too; by this one
# they are told apart.
_SELF = "_hf_attn_plugin_wrapper"


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``make(original)`` in the place of a function; idempotent.

    Args:
        owner: A module or a class.
        name: Of the function in it.
        make: Takes the function that is there and returns what is to be called.
    """
    original = getattr(owner, name)
    if hasattr(original, ORIGINAL):
        return
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, ORIGINAL, original)
    setattr(wrapper, _SELF, wrapper)
    setattr(owner, name, wrapper)


def unwrap(owner: Any, name: str) -> None:
    """Undo `wrap`, unless somebody else has wrapped the function since."""
    current = getattr(owner, name)
    if getattr(current, _SELF, None) is current:
        setattr(owner, name, getattr(current, ORIGINAL))
