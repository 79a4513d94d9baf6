"""Taking rows and columns out of layers, in place: what mechanisms that lose heads and ``compress`` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spaces.errors import UserMistake

__all__ = ["Index", "checked_positions", "slice_weights", "sliced"]

Index = Sequence[int] | Tensor


def checked_positions(index: Index, size: int, what: str) -> Tensor:
    """(n,) int64 on the CPU, in the order given; a mask (``size``,) of bool becomes the positions where it is True.

    Args:
        index: positions in [0, ``size``), each at most once, at least one.
        what: they are positions of, for the message.

    Raises:
        UserMistake: it is something else.
    """
    chosen = torch.as_tensor(index).detach().cpu()
    if chosen.dtype == torch.bool and chosen.shape == (size,):
        chosen = chosen.nonzero().flatten()
    if chosen.dim() != 1 or chosen.dtype == torch.bool or chosen.is_floating_point() or not len(chosen):
        raise UserMistake(f"{what}: give a non-empty list of positions to keep")
    chosen = chosen.long()
    if int(chosen.min()) < 0 or int(chosen.max()) >= size or len(chosen.unique()) != len(chosen):
        raise UserMistake(f"{what}: positions must be in [0, {size}), each once")
    return chosen


def slice_weights(
    layer: nn.Linear | nn.Conv2d, *, inputs: Tensor | None = None, outputs: Tensor | None = None
) -> None:
    """Leave only some input and output channels, in the order given, of a layer without groups."""
    if outputs is not None:
        layer.weight = sliced(layer.weight, outputs, 0)
        if layer.bias is not None:
            layer.bias = sliced(layer.bias, outputs, 0)
    if inputs is not None:
        layer.weight = sliced(layer.weight, inputs, 1)
    out, into = int(layer.weight.shape[0]), int(layer.weight.shape[1])
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = out, into
    else:
        layer.out_channels, layer.in_channels = out, into


def sliced(value: Any, index: Tensor, dim: int) -> nn.Parameter:
    """A parameter of the entries ``index`` along ``dim``; frozen where ``value`` is, of its dtype, on its device."""
    chosen = value.detach().index_select(dim, index.to(value.device)).clone()
    return nn.Parameter(chosen, requires_grad=value.requires_grad)
