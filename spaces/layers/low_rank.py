"""Linear maps and convolutions written as two thin ones in sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LowRankConv2d", "LowRankLinear", "SplitLowRankLinear"]


class LowRankLinear(nn.Module):
    """``x (..., in) -> (..., out)`` through ``rank`` channels: ``up(down(x))``; the bias is ``up``'s.

    Cheaper than the full map where rank < in * out / (in + out).
    Source: "Hiformer: Heterogeneous Feature Interactions Learning with Transformers for Recommender Systems",
    section on low-rank approximation (K = L R^T).

    Args:
        in_features, out_features, bias: as of nn.Linear.
        rank: at least 1.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.up.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.up(self.down(x))  # type: ignore[no-any-return]


class SplitLowRankLinear(nn.Module):
    """A ``LowRankLinear`` for each of several equal runs of outputs (queries, keys, values), each of its own rank.

    The runs share one product in front: ``down`` gives all their channels at once.

    Args:
        in_features, out_features, bias: as of nn.Linear; ``out_features`` is a multiple of the number of ranks.
        ranks: of each run, at least 1 each.
    """

    def __init__(self, in_features: int, out_features: int, ranks: Sequence[int], bias: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.ranks = in_features, out_features, tuple(ranks)
        self.down = nn.Linear(in_features, sum(ranks), bias=False)
        self.ups = nn.ModuleList(nn.Linear(rank, out_features // len(ranks), bias=bias) for rank in ranks)

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "ranks": list(self.ranks),
            "bias": any(name.endswith("bias") for name, _ in self.ups.named_parameters()),
        }

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        parts = self.down(x).split(self.ranks, dim=-1)
        return torch.cat([up(part) for up, part in zip(self.ups, parts, strict=True)], dim=-1)


class LowRankConv2d(nn.Module):
    """``rank`` filters of the full kernel, then a 1x1 convolution that mixes them; the bias is the latter's.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode: as of nn.Conv2d, which
            must not be grouped.
        rank: at least 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        kernel_size: Sequence[int] = (1, 1),
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | str = (0, 0),
        dilation: Sequence[int] = (1, 1),
        bias: bool = True,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self._shape: dict[str, Any] = {
            "kernel_size": list(kernel_size),
            "stride": list(stride),
            "padding": padding if isinstance(padding, str) else list(padding),
            "dilation": list(dilation),
            "padding_mode": padding_mode,
        }
        window: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self._shape.items()
        }
        self.down = nn.Conv2d(in_channels, rank, bias=False, **window)
        self.up = nn.Conv2d(rank, out_channels, 1, bias=bias)

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "rank": self.rank,
            "bias": self.up.bias is not None,
            **self._shape,
        }

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        return self.up(self.down(x))  # type: ignore[no-any-return]
