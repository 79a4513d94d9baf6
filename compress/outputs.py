"""How far apart the outputs of two models are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.structure import StructureError
from nas.errors import first_line

__all__ = ["difference", "relative_gap", "require_same", "size_of"]

_EXACT = 1e-3
"""Of the outputs' size: far above what another order of the same sums does, far below what a wrong one does."""


def difference(one: Any, other: Any) -> float:
    """Largest absolute difference of two outputs (tensors, None, tuples or dicts of them); infinite where shapes or
    keys differ, and for NaN. Infinities of one sign are equal."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return float("inf")
        return max((difference(value, other[key]) for key, value in one.items()), default=0.0)
    if one is None and other is None:
        return 0.0
    first, second = _parts(one), _parts(other)
    if first is not None and second is not None:
        if len(first) != len(second):
            return float("inf")
        return max((difference(*two) for two in zip(first, second, strict=True)), default=0.0)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    a, b = _wide(one), _wide(other).to(one.device)
    found = float((a - b).abs().masked_fill(a == b, 0.0).max())
    return found if found == found else float("inf")


def size_of(outputs: Any) -> float:
    """Largest finite absolute value of outputs: what differences are measured by."""
    parts = list(outputs.values()) if isinstance(outputs, Mapping) else _parts(outputs)
    if parts is not None:
        return max((size_of(one) for one in parts), default=0.0)
    if not isinstance(outputs, Tensor):
        return 0.0
    values = _wide(outputs).abs()
    return float(values[values.isfinite()].max()) if values.isfinite().any() else 0.0


def relative_gap(found: Any, wanted: Any) -> float:
    """``difference`` over the size of ``wanted``; 0 where both are 0."""
    gap = difference(found, wanted)
    return gap / max(size_of(wanted), 1e-30) if gap else 0.0


def require_same(result: nn.Module, model: nn.Module, inputs: Sequence[Tensor], why_not: str) -> float:
    """The relative gap between both models' outputs in evaluation mode; neither is changed.

    Args:
        result: runs where ``model`` does.
        inputs: of one call; moved to the device of ``model``.
        why_not: what a difference would mean, for the message.

    Raises:
        StructureError: they differ by more than rounding, or ``result`` does not run.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = [x.to(device) for x in inputs]
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(*given)
        try:
            found = copy.deepcopy(result).eval()(*given)
        except Exception as error:  # the rest of the model is anybody's, and may call its parts in any way
            raise StructureError(f"{why_not} ({type(error).__name__}: {first_line(error, 150)})") from error
    gap = relative_gap(found, wanted)
    if not gap <= _EXACT:
        raise StructureError(f"{why_not} (the outputs change by {gap:.2g} of their size)")
    return gap


def _parts(outputs: Any) -> list[Any] | None:
    return list(outputs) if isinstance(outputs, (tuple, list)) else None


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)
