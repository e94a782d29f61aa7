"""Names of attention implementations, checked before anything is loaded."""

from __future__ import annotations


def check_implementation(name: str | None) -> None:
    """Raise ``ValueError`` for an attention implementation that transformers does not know."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # A slash names a kernel on the Hub, which transformers looks up itself.
    known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    if name is not None and "/" not in name and name not in known:
        raise ValueError(
            f"attn_implementation {name!r} is not registered; registered are {', '.join(known)}."
        )
