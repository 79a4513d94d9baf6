"""Gates of emergent experts: which experts a token goes to. Source: see ``spaces.layers.expert_mlp``.

Both compute in float32, or in float64 where their weights are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CosineGate", "KeyGate"]

_HOTTEST = math.log(100)


class KeyGate(nn.Module):
    """Scalar product with the mean key of each expert; a buffer, since nothing is learned and it can be recomputed.

    Args:
        dim: width of a token.
        experts: number of experts.
        normalise: inputs are brought to length 1 first. That changes no token's choice, only how sure it is: which
            matters for capacity and for the balancing loss.
    """

    weight: Tensor

    def __init__(self, dim: int, experts: int, *, normalise: bool = False):
        super().__init__()
        self.normalise = normalise
        self.register_buffer("weight", torch.zeros(experts, dim))

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again."""
        return {"dim": self.weight.shape[1], "experts": self.weight.shape[0], "normalise": self.normalise}

    def forward(self, x: Tensor) -> Tensor:
        """(T, dim) -> (T, experts)."""
        x, weight = _precise(x), _precise(self.weight)
        return functional.linear(functional.normalize(x, dim=1) if self.normalise else x, weight)


class CosineGate(nn.Module):
    """Cosine of a projection of the token with a learned vector for each expert, times a learned temperature.

    Args:
        dim: width of a token.
        experts: number of experts.
        width: of the space in which they are compared.
    """

    def __init__(self, dim: int, experts: int, width: int = 256):
        super().__init__()
        self.projector = nn.Linear(dim, width)
        self.similarity = nn.Parameter(torch.randn(width, experts) * 0.01)
        self.temperature = nn.Parameter(torch.full((1,), math.log(2.0)))

    @property
    def width(self) -> int:
        """Of the space of comparison."""
        return int(self.similarity.shape[0])

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again."""
        width, experts = self.similarity.shape
        return {"dim": self.projector.in_features, "experts": experts, "width": width}

    def forward(self, x: Tensor) -> Tensor:
        """(T, dim) -> (T, experts)."""
        projected = _precise(self.projector(x))
        vectors = functional.normalize(_precise(self.similarity), dim=0)
        heat = _precise(self.temperature).clamp(max=_HOTTEST).exp()
        return functional.normalize(projected, dim=1) @ vectors * heat


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
