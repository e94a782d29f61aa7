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
        ValueError: If `length` is no positive integer, `scaling` is none of these, the model has
            no rotary positions, or it is scaled already in another way.
    """
    if scaling not in ("yarn", "linear", "none"):
        raise ValueError(f"RoPE scaling must be yarn, linear or none, got {scaling!r}")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"extend_context: length must be an integer >= 1, got {length!r}")
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"extend_context takes a model's config, got {type(config).__name__}: call it on "
            "AutoConfig.from_pretrained(...) before the model is built from it"
        )
    text = config.get_text_config()
    present = getattr(text, "max_position_embeddings", None)
    if not isinstance(present, int):
        raise ValueError(
            f"{config.model_type} has no max_position_embeddings to extend to {length}: its "
            "positions are not rotary ones, or have no limit"
        )
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
        if "rope_type" not in rope:
            raise ValueError(
                f"rope_parameters of {config.model_type} name no rope_type, they hold "
                f"{', '.join(map(str, rope))}: use scaling='none', or set rope_parameters yourself"
            )
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
