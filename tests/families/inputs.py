"""Random inputs of tiny models, told from the names of what their forward pass takes."""

from __future__ import annotations

from typing import Any

import torch
from families.catalogue import forward_arguments
from families.shrink import ORDINARY
from torch import Tensor

BATCH, LENGTH = 2, 12


def tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Token ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, ORDINARY, (batch, length), generator=generator)


def noise(*shape: int, seed: int = 2) -> Tensor:
    """Normal noise in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _lookup(config: Any, name: str, default: Any) -> Any:
    """A value of the config, or of the first of its parts that has it."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None and (found := _lookup(part, name, None)) is not None:
            return found
    return default


def is_text(model: Any) -> bool:
    """Whether the model reads tokens."""
    return "input_ids" in forward_arguments(model)


def model_inputs(model: Any) -> dict[str, Tensor]:
    """Two rows of what the model reads."""
    from families.odd_inputs import INPUTS

    taken = forward_arguments(model)
    config = model.config
    if config.model_type in INPUTS:
        return INPUTS[config.model_type](config)
    inputs: dict[str, Tensor] = {}
    if "input_ids" in taken and model.main_input_name not in ("input_features", "input_values"):
        inputs["input_ids"] = tokens()
    if "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = tokens(seed=4)
    if "bbox" in taken:
        corners = torch.randint(
            0, 50, (BATCH, LENGTH, 2), generator=torch.Generator().manual_seed(5)
        )
        inputs["bbox"] = torch.cat([corners, corners + 20], -1)
    needs_pixels = "input_ids" not in taken or model.main_input_name.startswith("pixel")
    if "grid_thw" in taken:
        patches = _patches(config)
        if "hidden_states" not in taken:
            patches["pixel_values"] = patches.pop("hidden_states")
        inputs.update(patches)
    elif "pixel_values" in taken and (needs_pixels or _contrastive(config)):
        inputs["pixel_values"] = pixels(config)
    elif "pixel_values_videos" in taken and needs_pixels:
        channels, size = _lookup(config, "num_channels", 3), _side(config)
        inputs["pixel_values_videos"] = noise(
            BATCH, _lookup(config, "num_frames", 4), channels, size, size
        )
    elif model.main_input_name == "input_values" and "input_values" in taken:
        inputs["input_values"] = noise(BATCH, 2000)
    elif "input_features" in taken and "input_ids" not in inputs:
        inputs["input_features"] = features = _features(config)
        if "input_features_mask" in taken:
            inputs["input_features_mask"] = torch.ones(BATCH, features.shape[2], dtype=torch.long)
    return inputs


def _contrastive(config: Any) -> bool:
    return hasattr(config, "projection_dim") and hasattr(config, "logit_scale_init_value")


def _side(config: Any) -> int:
    size = _lookup(config, "image_size", 32)
    return int(size[0] if isinstance(size, list | tuple) else size)


def pixels(config: Any) -> Tensor:
    """An image in each row."""
    channels = _lookup(config, "num_channels", None) or _lookup(config, "in_channels", 3)
    return noise(BATCH, channels, _side(config), _side(config))


def _patches(config: Any) -> dict[str, Tensor]:
    """Flattened patches of two images, as the Qwen-VL vision towers read them."""
    channels = _lookup(config, "in_channels", None) or _lookup(config, "num_channels", 3)
    patch = _lookup(config, "patch_size", 8)
    width = channels * patch * patch * _lookup(config, "temporal_patch_size", 1)
    return {
        "hidden_states": noise(32, width),
        "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


def _features(config: Any) -> Tensor:
    bins = _lookup(config, "num_mel_bins", None) or _lookup(config, "feature_size", 80)
    return noise(BATCH, bins, 2 * _lookup(config, "max_source_positions", 64))
