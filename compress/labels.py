"""Whether labels are what a cross entropy takes for a model's outputs, and in which form it takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nas.errors import UserMistake

__all__ = ["IGNORED", "as_targets", "check_labels"]

IGNORED = -100
"""The label that cross entropy leaves out."""


def check_labels(labels: Tensor, outputs: Sequence[int], name: str, which: str = "a batch") -> None:
    """Looks at every label; they are few beside the inputs, and a GPU does not survive one that is out of range.

    Args:
        labels: classes (B, ...), or one-hot or chances (B, classes, ...).
        outputs: shape of the model's outputs, (B, classes, ...).
        name: of the data: ``train`` or ``validation``.
        which: batch it is.

    Raises:
        UserMistake: they have another shape, classes are no whole numbers or out of range; in one line.
    """
    count, shape = int(outputs[1]), tuple(labels.shape)
    whole = not labels.is_floating_point() and not labels.is_complex()
    if shape == tuple(outputs):
        return
    if not whole or shape != (outputs[0], *outputs[2:]):
        kind = str(labels.dtype).removeprefix("torch.")
        raise UserMistake(
            f"{name}: the labels of {which} are {kind} {shape}, the outputs {tuple(outputs)}; they must be whole "
            f"numbers {(outputs[0], *outputs[2:])} from 0 to {count - 1}, or chances {tuple(outputs)}; or give loss="
        )
    low, high = _range(labels)
    if not 0 <= low <= high < count:
        raise UserMistake(
            f"{name}: the model has {count} outputs, the labels of {which} are {low} to {high}; they must be 0 to "
            f"{count - 1}, or give a model with an output for each class, or loss="
        )


def as_targets(labels: Tensor, outputs: Sequence[int]) -> Tensor:
    """Labels that ``check_labels`` let through, as ``cross_entropy`` of float32 takes them."""
    return labels.float() if tuple(labels.shape) == tuple(outputs) else labels.long()


def _range(labels: Tensor) -> tuple[int, int]:
    counted = labels.long()
    counted = counted[counted != IGNORED]
    low, high = torch.aminmax(counted) if counted.numel() else (0, 0)
    return int(low), int(high)
