"""Series-informed activation: a learned sum of ReLUs of the neighbouring pixels.

Paper: Chen, Wang, Guo, Tao, "VanillaNet: the Power of Minimalism in Deep Learning", NeurIPS 2023, arXiv 2305.12972,
section 3.2.
Code: huawei-noah/VanillaNet, commit 6aaf7311d8cadddcec9db7595f071bfda6c480f4, MIT (read, not copied).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spaces.errors import UserMistake

__all__ = ["SeriesActivation"]

_EPS = 1e-6


class SeriesActivation(nn.Module):
    """y[h, w, c] = sum over i, j = -n..n of a[i, j, c] * ReLU(x[h + i, w + j, c]), then a batch norm.

    The ReLU comes first and the sum is a depthwise convolution with zero padding, so that n = 0 is a ReLU with a scale
    per channel. Letters: B batch, C channels, n = ``terms``.

    Args:
        dim: C, at least 1.
        terms: n, at least 0; the published networks have 3, a 7x7 window.
        folded: with a bias in place of the batch norm, as ``fold`` returns it.

    Raises:
        UserMistake: ``dim`` below 1, or ``terms`` below 0.
    """

    def __init__(self, dim: int, terms: int = 3, *, folded: bool = False):
        super().__init__()
        if dim < 1 or terms < 0:
            raise UserMistake(f"series activation: dim={dim} must be at least 1 and terms={terms} at least 0")
        self.terms = terms
        self.weight = nn.Parameter(torch.empty(dim, 1, 2 * terms + 1, 2 * terms + 1))
        nn.init.trunc_normal_(self.weight, std=0.02)
        # Registered also where they are None, so that both forms have the same slots.
        self.bias: nn.Parameter | None
        self.bn: nn.BatchNorm2d | None
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if folded else None)
        self.register_module("bn", None if folded else nn.BatchNorm2d(dim, eps=_EPS))

    def config(self) -> dict[str, Any]:
        """Arguments that make a module of the same shape."""
        return {"dim": self.weight.shape[0], "terms": self.terms, "folded": self.bn is None}

    def extra_repr(self) -> str:
        """The sizes."""
        return ", ".join(f"{name}={value}" for name, value in self.config().items())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> the same shape."""
        summed = nn.functional.conv2d(
            torch.relu(x), self.weight, self.bias, padding=self.terms, groups=self.weight.shape[0]
        )
        return summed if self.bn is None else self.bn(summed)

    def fold(self) -> SeriesActivation:
        """A copy that has the batch norm, with its running statistics, in its weight and bias."""
        made = SeriesActivation(self.weight.shape[0], self.terms, folded=True).to(self.weight)
        assert made.bias is not None  # made so in the line above
        with torch.no_grad():
            if self.bn is None:
                assert self.bias is not None  # either a norm or a bias
                made.weight.copy_(self.weight)
                made.bias.copy_(self.bias)
            else:
                norm = self.bn
                stored: Any = norm.running_mean, norm.running_var, norm.weight, norm.bias
                mean, var, gain, shift = (value.double() for value in stored)
                scale = gain / (var + norm.eps).sqrt()
                made.weight.copy_(self.weight.double() * scale[:, None, None, None])
                made.bias.copy_(shift - mean * scale)
        return made.train(self.training)
