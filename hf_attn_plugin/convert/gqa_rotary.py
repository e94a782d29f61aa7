"""Which components of a head the rotary embedding of a model rotates together, found by trying.

Models pair the components of a head in halves or side by side, rotate all of them or a part. The
model's own function is applied to unit vectors and its matrices are read off, so that no family
has to be listed; what does not look like rotations is reported as not known.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_attn_plugin.convert.gqa_aligned import RotaryPlanes

_FUNCTIONS = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")
_POSITIONS = torch.tensor([[0, 1, 2, 3, 5, 11, 40]])
_TOLERANCE = 1e-5  # the embeddings are float32


def rotary_planes(
    attention: nn.Module, text_config: PreTrainedConfig, head_dim: int
) -> RotaryPlanes | None:
    """Find the planes in which an attention layer's keys are rotated.

    Args:
        attention: The attention layer, with or without weights.
        text_config: Config of the decoder it belongs to.
        head_dim: Components of a key head.

    Returns:
        The planes, or None where they could not be found or what was found are not rotations in
        planes that do not depend on the position.
    """
    code = sys.modules[type(attention).__module__]
    if not code.__name__.startswith("transformers.models."):
        return None  # what surrounds the function in foreign code is not known
    apply = next((getattr(code, name) for name in _FUNCTIONS if hasattr(code, name)), None)
    embeddings = [
        value
        for name, value in vars(code).items()
        if name.endswith("RotaryEmbedding") and "Vision" not in name and isinstance(value, type)
    ]
    if apply is None or not embeddings:
        return None
    for embedding in embeddings:
        try:
            cos, sin = _cos_sin(embedding(text_config), attention, text_config, head_dim)
            matrices = _matrices(apply, cos, sin, head_dim)
        except Exception:  # any other signature than the usual one: not known
            continue
        return _planes(matrices)
    return None


def _cos_sin(
    rotary: Any, attention: nn.Module, text_config: PreTrainedConfig, head_dim: int
) -> tuple[Tensor, Tensor]:
    like = torch.zeros(1, _POSITIONS.shape[1], head_dim)
    arguments: list[Any] = [like, _POSITIONS]
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        arguments.append(text_config.layer_types[attention.layer_idx])
    cos, sin = rotary(*arguments)
    return cos, sin


def _matrices(apply: Any, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """What the function does to the unit vectors, ``[positions, head_dim (from), head_dim]``."""
    names = list(inspect.signature(apply).parameters)
    rotated = head_dim
    while True:
        # One head per unit vector, since cos and sin belong to positions.
        unit = torch.eye(rotated)[None, :, None].expand(1, -1, cos.shape[-2], -1).contiguous()
        try:
            result = (
                apply(unit, unit, cos, sin) if names[1].startswith("k") else apply(unit, cos, sin)
            )
            break
        except (RuntimeError, IndexError):
            # Some layers cut out the part that is rotated before they call the function.
            if rotated == cos.shape[-1]:
                raise
            rotated = cos.shape[-1]
    turned = result[0] if isinstance(result, tuple) else result
    matrices = torch.eye(head_dim).repeat(cos.shape[-2], 1, 1)
    matrices[:, :rotated, :rotated] = turned[0].transpose(0, 1)
    return matrices


def _planes(matrices: Tensor) -> RotaryPlanes | None:
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    others = (matrices - torch.diag_embed(diagonal)).abs().amax(0) > _TOLERANCE
    if (others.sum(1) > 1).any() or (others != others.mT).any():
        return None
    rest = (~others.any(1)).nonzero()[:, 0]
    first, second = others.triu().nonzero().unbind(1)
    deviations = (
        diagonal[:, rest] - 1,
        diagonal[:, first] - diagonal[:, second],
        matrices[:, first, second] + matrices[:, second, first],
    )
    if any((deviation.abs() > _TOLERANCE).any() for deviation in deviations):
        return None
    return RotaryPlanes(first, second, rest)
