"""Feature maps of linear attention: positive features whose products stand for exp(score).

A map returns the *logarithm* of its features. Features of one token are then divided by the largest
of them, whose logarithm is carried along (`split_scale`): nothing overflows, and whatever scales
are compared later on belong to one token each, so that no chunk size and no order of computation
enters the result.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from typing import ClassVar

import torch
from torch import Tensor

# Features are kept above exp(-64) of their token's largest. Products of two tokens' features are
# then at least 1e-28 of the largest possible one, and no sum of them vanishes in float32.
_LOG_FLOOR = -64.0


@dataclasses.dataclass(frozen=True)
class EluFeatures:
    """``elu(x) + 1`` for each component (arXiv 2006.16236); scores are not scaled."""

    name: ClassVar[str] = "elu"

    def width(self, head_dim: int) -> int:
        """Number of features."""
        return head_dim

    def log(self, x: Tensor, scaling: float) -> Tensor:
        """Logarithms of the features, ``[..., head_dim]``; ``scaling`` does not apply."""
        return torch.where(x > 0, torch.log1p(x.clamp(min=0)), x)


@dataclasses.dataclass(frozen=True)
class FavorFeatures:
    """Positive orthogonal random features of the softmax kernel (FAVOR+, arXiv 2009.14794).

    With ``x' = x * sqrt(scaling)`` the features are ``exp(w_i x' - |x'|^2 / 2)``. Over random
    ``w_i`` the mean of their products is ``exp(scaling * q k)``, the kernel of softmax attention.
    The ``w_i`` are orthogonal to each other in blocks of head_dim, with the lengths of Gaussian
    vectors. They follow from the fields alone, on any machine, and are not stored anywhere.

    Attributes:
        num_features: Number of features m; None is ``head_dim * log(head_dim)``, rounded.
        seed: Seed of the draw.
        redraw: Number of the draw under this seed.
        layer: Layers draw features of their own.
    """

    name: ClassVar[str] = "favor"

    num_features: int | None = None
    seed: int = 0
    redraw: int = 0
    layer: int = 0

    def width(self, head_dim: int) -> int:
        """Number of features."""
        if self.num_features is None:
            return max(head_dim, round(head_dim * math.log(head_dim)))
        return self.num_features

    def projection(self, head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The ``w_i``, ``[num_features, head_dim]``; kept for each device and dtype."""
        return _draw(
            self.width(head_dim), head_dim, self.seed, self.redraw, self.layer, device, dtype
        )

    def root(self, scaling: float) -> float:
        """The share of ``scaling`` that queries and keys have each.

        Raises:
            ValueError: ``scaling`` is not above 0, so that it has no square root.
        """
        if not scaling > 0:
            raise ValueError(
                f"linear attention with feature_map='favor' approximates exp(scaling * q k) and "
                f"needs scaling > 0; got {scaling}. Use feature_map='elu'."
            )
        return math.sqrt(scaling)

    def log(self, x: Tensor, scaling: float) -> Tensor:
        """Logarithms of the features, ``[..., num_features]``; ``scaling`` must be above 0."""
        x = x * self.root(scaling)
        weights = self.projection(x.shape[-1], x.device, x.dtype)
        return x @ weights.t() - x.square().sum(-1, keepdim=True) / 2


FeatureMap = EluFeatures | FavorFeatures


# Bounded by the layers of a model on a few devices; one entry takes num_features x head_dim floats.
@functools.lru_cache(maxsize=1024)
def _draw(
    num_features: int,
    head_dim: int,
    seed: int,
    redraw: int,
    layer: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{redraw}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    # Drawn on the CPU in float64, for the same features everywhere. Not as inference tensors, which
    # a later training step could not use.
    with torch.inference_mode(False), torch.no_grad():
        blocks = []
        for _ in range(math.ceil(num_features / head_dim)):
            square = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(square)
            # A positive diagonal of r makes q unique, and uniform among all rotations.
            blocks.append(q * r.diagonal().sign())
        directions = torch.cat(blocks)[:num_features]
        lengths = torch.randn(num_features, head_dim, generator=generator, dtype=torch.float64)
        weights = directions * lengths.norm(dim=1, keepdim=True)
        return weights.to(device=device, dtype=dtype)


def floored_log(feature_map: FeatureMap, x: Tensor, scaling: float) -> Tensor:
    """Logarithms of a token's features, none far below its largest: ``[..., features]``."""
    log = feature_map.log(x, scaling)
    return torch.maximum(log, log.amax(-1, keepdim=True).detach() + _LOG_FLOOR)


def split_scale(feature_map: FeatureMap, x: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Features of each token and their common factor.

    Returns:
        ``[..., features]`` between exp(-64) and 1, and ``[...]``, the logarithm of the factor by
        which they were divided. It counts as a constant: products of both have the right gradient.
    """
    log = floored_log(feature_map, x, scaling)
    scale = log.amax(-1).detach()
    return torch.exp(log - scale[..., None]), scale
