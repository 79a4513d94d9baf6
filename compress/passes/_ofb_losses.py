"""The losses of the search: adaptive one-hot, masked image modelling, cost.

Source: OFB (Once for Both, CVPR 2024), equations of the adaptive one-hot loss and of PMIM, constants of the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.passes._ofb_gate import Gate

__all__ = ["local_normalisation", "one_hot_loss", "reconstruction_loss", "sparsity_losses"]

SCORE_WEIGHTS = {"attention": 4e-4, "mlp": 1e-4, "embedding": 1e-4}
CLAMP = 1e-3
WINDOW = 47


def one_hot_loss(probabilities: Tensor, *, tangent: bool = True, clamp: float = CLAMP) -> Tensor:
    """Entropy of ``probabilities`` (n,), plus tan(pi/2 - pi * sigma) / n: small where one option has all.

    sigma = sum (p - 1/n)**2 / (1 - 1/n) is 0 for uniform and 1 for one-hot p. The tangent is without bound at both
    ends, with the wrong sign at exactly uniform p in float32; sigma is therefore clamped to [clamp, 1 - clamp],
    with the gradient of the entropy alone outside. ``clamp=0`` is the original's form.
    """
    count = probabilities.numel()
    loss: Tensor = torch.special.entr(probabilities).sum()
    if not tangent or count < 2:
        return loss
    sigma = ((probabilities - probabilities.mean()) ** 2).sum() / (1 - 1 / count)
    if clamp > 0:
        sigma = sigma.clamp(clamp, 1 - clamp)
    loss = loss + torch.tan(math.pi / 2 - math.pi * sigma) / count
    return loss


def sparsity_losses(
    gates: Iterable[Gate], *, tangent: bool = True, clamp: float = CLAMP, score_norm: bool = True
) -> dict[str, Tensor]:
    """The adaptive one-hot loss with the norm of the scores, summed over the undecided gates of each kind.

    A gate with one option alive has nothing left to decide, and no loss.
    """
    totals: dict[str, Tensor] = {}
    for gate in gates:
        if gate.decided or int(gate.alive.sum()) == 1:
            continue
        loss = one_hot_loss(torch.softmax(gate.alpha[gate.alive], dim=0), tangent=tangent, clamp=clamp)
        if score_norm:
            loss = loss + SCORE_WEIGHTS[gate.kind] * gate.score.sigmoid().sum()
        totals[gate.kind] = totals[gate.kind] + loss if gate.kind in totals else loss
    return totals


def local_normalisation(images: Tensor, window: int = WINDOW) -> Tensor:
    """Images (B, C, H, W) less their mean and over their standard deviation in a window around each pixel.

    Unbiased variance plus 1e-6; pixels outside of the image do not count. ``window`` is odd.
    """
    pad = window // 2

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1, padding=pad, count_include_pad=False)

    inside = F.avg_pool2d(torch.ones_like(images[:1, :1]), window, stride=1, padding=pad) * window**2
    centre = mean(images)
    variance = (mean(images**2) - centre**2) * (inside / (inside - 1).clamp(min=1))
    return (images - centre) / (variance.clamp(min=0) + 1e-6).sqrt()


def reconstruction_loss(images: Tensor, predicted: Tensor, masked: Tensor) -> Tensor:
    """Mean absolute error on the masked patches, of images normalised locally.

    Args:
        images, predicted: (B, C, H, W).
        masked: (B, patches), 1 where the patch was hidden; a square or equally proportioned grid, row by row.
    """
    images = images.to(
        torch.promote_types(images.dtype, torch.float32)
    )  # a variance of bfloat16 is mostly rounding
    batch, channels, height, width = images.shape
    patch = math.isqrt(height * width // masked.shape[1])
    mask = masked.reshape(batch, 1, height // patch, width // patch)
    mask = mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    error = (local_normalisation(images) - predicted).abs()
    return (error * mask).sum() / (mask.sum() + 1e-5) / channels
