"""Rotary positions for a longer context, through transformers' own RoPE scaling."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedConfig


def extend_context(
    config: PreTrainedConfig, length: int, scaling: Literal["yarn", "linear", "none"] = "yarn"
) -> PreTrainedConfig:
    """Set a config up for `length` positions, in place, before its model is built.

    The model needs fine-tuning at the new length afterwards. A config that is scaled already by
    the same method is scaled further. Where layers differ (Gemma 3), those with full attention are
    scaled: a layer with a window never meets a distance beyond it.

    Args:
        config: The model's config; multimodal ones have the text part extended.
        length: Tokens that the model is to take. Up to its present context nothing is changed.
        scaling: `"yarn"` (arXiv 2309.00071), `"linear"` position interpolation (arXiv 2306.15595),
            or `"none"`, which only raises the limit of a model with rotary positions.

    Returns:
        The same config.

    Raises:
        ValueError: If `scaling` is none of these, the model has no rotary positions, or it is
            scaled already in another way.
    """
    if scaling not in ("yarn", "linear", "none"):
        raise ValueError(f"RoPE scaling must be yarn, linear or none, got {scaling!r}")
    text = config.get_text_config()
    present = text.max_position_embeddings
    if length <= present:
        return config
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        raise ValueError(
            f"{config.model_type} has no rotary positions, its {present} positions cannot be "
            f"extended to {length}"
        )
    if scaling != "none":
        rope = rope.get("full_attention", rope)
        if rope["rope_type"] not in ("default", scaling):
            raise ValueError(
                f"the model's rotary positions are scaled already ({rope['rope_type']}), which "
                f"cannot be combined with {scaling}: use 'none', or a model that is not scaled"
            )
        rope["rope_type"] = scaling
        rope["factor"] = rope.get("factor", 1.0) * length / present
        if scaling == "yarn":
            rope.setdefault("original_max_position_embeddings", present)
    text.max_position_embeddings = length
    return config
