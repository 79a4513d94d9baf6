"""What turns inputs into tokens: patches of an image, positions of a sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PatchEmbedding", "grid_waves", "sinusoids"]


class PatchEmbedding(nn.Module):
    """Cuts an image into patches and maps each to a token; the image is padded with zeros at the bottom and right.

    Letters: B batch, C channels, E width, T = rows * columns tokens, row by row.

    Args:
        channels: C.
        size: height and width of the image in pixels.
        patch: height and width of a patch in pixels.
        dim: E.

    Attributes:
        grid: rows and columns of patches.
    """

    def __init__(self, channels: int, size: tuple[int, int], patch: tuple[int, int], dim: int):
        super().__init__()
        self.grid = (-(-size[0] // patch[0]), -(-size[1] // patch[1]))
        self.padding = (0, self.grid[1] * patch[1] - size[1], 0, self.grid[0] * patch[0] - size[0])
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, T, E)."""
        if any(self.padding):
            image = F.pad(image, self.padding)
        return self.proj(image).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def sinusoids(length: int, dim: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Fixed positions (Vaswani et al. 2017), sines in the first half of the columns: (``length``, ``dim``).

    Wavelengths run from 2 pi to 20,000 pi in a geometric series. The last column is zero where ``dim`` is odd.
    """
    half = dim // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10_000.0) / max(half - 1, 1)))
    angles = torch.arange(1, length + 1, device=device).unsqueeze(-1) * rates  # (length, half)
    return F.pad(torch.cat((angles.sin(), angles.cos()), dim=-1), (0, dim % 2)).to(dtype)


def grid_waves(grid: tuple[int, int], dim: int) -> Tensor:
    """Positions of a small grid as standing waves, in row-major order: (rows * columns, ``dim``), within [-1, 1].

    The first half of the columns is for the row, the second for the column; each axis gets sines and cosines of 1, 2,
    ... half-periods over its length, beginning again at 1 where there are more columns than patches tell apart.
    """
    rows, columns = grid
    down, across = _waves(rows, dim // 2), _waves(columns, dim - dim // 2)
    parts = (down.unsqueeze(1).expand(-1, columns, -1), across.unsqueeze(0).expand(rows, -1, -1))
    return torch.cat(parts, dim=-1).flatten(0, 1)


def _waves(length: int, dim: int) -> Tensor:
    places = (torch.arange(length) + 0.5) / length
    half_periods = torch.arange((dim + 1) // 2) % length + 1
    angles = math.pi * places.unsqueeze(-1) * half_periods  # (length, (dim + 1) // 2)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[:, :dim]
