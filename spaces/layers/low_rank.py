"""Linear maps and convolutions written as two thin ones in sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["LowRankConv2d", "LowRankLinear", "SplitLowRankLinear"]

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


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

    def whole(self) -> nn.Linear:
        """The one layer that computes the same."""
        return _linear(_product(self.up, self.down.weight), self.up.bias, self.down)

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

    def whole(self) -> nn.Linear:
        """The one layer that computes the same."""
        pairs = zip(self.ups, self.down.weight.split(self.ranks), strict=True)
        biases = [up.bias for up in self.ups if isinstance(up.bias, Tensor)]
        weight = torch.cat([_product(up, down) for up, down in pairs])
        bias = nn.Parameter(torch.cat(biases), biases[0].requires_grad) if biases else None
        return _linear(weight, bias, self.down)

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

    def whole(self) -> nn.Conv2d:
        """The one layer that computes the same."""
        window: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self._shape.items()
        }
        made = nn.Conv2d(self.in_channels, self.out_channels, bias=self.up.bias is not None, **window)
        weight = _product(self.up, self.down.weight.flatten(1)).reshape(made.weight.shape)
        return _filled(made, weight, self.up.bias, self.down)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        return self.up(self.down(x))  # type: ignore[no-any-return]


@torch.no_grad()
def _product(up: Any, down: Tensor) -> Tensor:
    """(out, in) of both factors, rounded once."""
    made: Tensor = up.weight.flatten(1).double() @ down.double()
    return made.to(down.dtype)


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    return _filled(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None), weight, bias, like)


def _filled(made: _Layer, weight: Tensor, bias: Tensor | None, like: nn.Linear | nn.Conv2d) -> _Layer:
    """``made`` with these values, which learn where those of ``like`` and ``bias`` do."""
    made.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return made.train(like.training)
