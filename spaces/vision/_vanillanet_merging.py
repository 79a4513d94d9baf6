"""Exact merging of a batch norm into a layer, and of two linear layers with nothing between them into one.

Source: "VanillaNet" (see ``vanillanet``), section 3.1, and its official code; also used by
``compress.passes.activation_pruning``. All arithmetic is in float64, whatever the layers are of.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from spaces.errors import UserMistake

__all__ = [
    "CONVOLUTIONS",
    "NORMS",
    "Linear",
    "fold_norm",
    "merge_layers",
    "why_not_foldable",
    "why_not_mergeable",
]

Linear: TypeAlias = nn.Module
"""nn.Linear or an nn.Conv1d, nn.Conv2d, nn.Conv3d."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def why_not_foldable(norm: nn.Module) -> str | None:
    """Why a batch norm cannot become part of the layer before it; None if it can."""
    if type(norm) not in NORMS:
        return f"a {type(norm).__name__} is no batch norm"
    return (
        "its batch norm keeps no running statistics" if getattr(norm, "running_mean", None) is None else None
    )


def why_not_mergeable(first: nn.Module, second: nn.Module, *, biased: bool | None = None) -> str | None:
    """Why ``second(first(x))`` is not one layer of the same kind, in few words; None if it is.

    Args:
        first, second: both nn.Linear, or both convolutions of one kind.
        biased: whether something is added behind ``first`` besides its own bias (a batch norm does); None: no.

    Two convolutions merge if the second is 1x1 (any stride), or the first is 1x1 with stride 1 and the border of the
    second sees what it would see: no padding, padding that repeats pixels, or zeros where the first adds nothing.
    """
    if type(first) is not type(second) or not isinstance(first, (nn.Linear, *CONVOLUTIONS)):
        return f"a {type(first).__name__} and a {type(second).__name__} do not merge into one layer"
    if isinstance(first, nn.Linear):
        return None
    assert isinstance(second, CONVOLUTIONS)  # of the same type as first
    if first.groups != 1 or second.groups != 1:
        return "a convolution in groups would become a dense one"
    if _is_point(second) and not _pads(second):
        whole = first.padding != "same" or set(_strides(first, second)) == {1}
        return (
            None
            if whole
            else "PyTorch has no strided convolution with padding='same'; give the padding in numbers"
        )
    if not (_is_point(first) and not _pads(first) and set(first.stride) == {1}):
        return "none of the two convolutions is 1x1 without padding (the first also without stride)"
    if _pads(second) and second.padding_mode == "zeros" and (first.bias is not None or biased):
        return "zeros at the border of the second convolution do not pass the bias of the first; put the 1x1 second"
    return None


def fold_norm(layer: Linear, norm: nn.Module) -> Linear:
    """``layer`` with the batch norm behind it, by its running statistics, as one new layer.

    For nn.Linear the norm has to see (B, features), for a convolution its output.

    Raises:
        UserMistake: ``norm`` is no batch norm with running statistics.
    """
    if reason := why_not_foldable(norm):
        raise UserMistake(f"batch norm cannot be folded: {reason}")
    weight, bias = _values(layer)
    stored: Any = norm
    mean, var = stored.running_mean.double(), stored.running_var.double()
    scale = (var + stored.eps).rsqrt()
    shift = -mean * scale
    if stored.weight is not None:
        gain, offset = stored.weight.detach().double(), stored.bias.detach().double()
        scale, shift = scale * gain, shift * gain + offset
    return _like(layer, weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias * scale + shift)


def merge_layers(first: Linear, second: Linear) -> Linear:
    """``second(first(x))`` as one new layer, equal in real arithmetic.

    Raises:
        UserMistake: they cannot be merged exactly (see ``why_not_mergeable``).
    """
    if reason := why_not_mergeable(first, second):
        raise UserMistake(f"layers cannot be merged: {reason}")
    (w1, b1), (w2, b2) = _values(first), _values(second)
    bias = b2 + w2.flatten(2).sum(2) @ b1 if w2.dim() > 2 else b2 + w2 @ b1
    if isinstance(first, nn.Linear):
        return _like(second, w2 @ w1, bias)
    if _is_point(second):
        weight = torch.einsum("oi,ic...->oc...", w2.flatten(1), w1)
        return _like(first, weight, bias, stride=_strides(first, second))
    return _like(second, torch.einsum("oi...,ic->oc...", w2, w1.flatten(1)), bias)


def _strides(first: Any, second: Any) -> tuple[int, ...]:
    return tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))


def _is_point(convolution: Any) -> bool:
    return bool(math.prod(convolution.kernel_size) == 1)


def _pads(convolution: Any) -> bool:
    padding: Any = convolution.padding
    if padding == "same":
        return not _is_point(convolution)
    return bool(padding != "valid" and any(padding))


def _values(layer: Linear) -> tuple[Tensor, Tensor]:
    given: Any = layer
    weight: Tensor = given.weight.detach().double()
    bias: Tensor | None = given.bias
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().double()


def _like(layer: Any, weight: Tensor, bias: Tensor, **changes: Any) -> Linear:
    """A layer of these values with the geometry of ``layer``, of its type of numbers and on its device."""
    made: Any
    if isinstance(layer, nn.Linear):
        made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        geometry = {name: getattr(layer, name) for name in names} | changes
        made = type(layer)(weight.shape[1], weight.shape[0], **geometry, device="meta")
    # A matrix product leaves another memory layout behind, and convolutions are slower with it.
    kind = layer.weight.dtype
    made.weight = nn.Parameter(weight.to(kind).contiguous())
    made.bias = nn.Parameter(bias.to(kind).contiguous())
    made.train(layer.training)
    return made  # type: ignore[no-any-return]
