"""The interface of an evaluator: how good is a candidate, and how it is told when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nas.tasks.base import Task
    from spaces import Architecture

__all__ = ["Context", "Evaluation", "Evaluator"]


@dataclass(frozen=True)
class Context:
    """What an evaluator is given beside the model and the task.

    ``config`` is ``SearchConfig.dump()``. ``report(epoch, epochs, quality, point)`` records one point of the
    learning curve (``quality``: more is better) and returns True when the candidate should stop. ``breathe()``
    is to be called between steps: it lets a latency measurement in that waits for the device. ``checkpoint`` is a
    directory for the state of a training, from which the candidate goes on after an interruption, on this machine or
    another one; it is removed when the trial is finished. None: nothing is kept.
    """

    config: Mapping[str, Any]
    device: torch.device
    seed: int
    directory: Path
    report: Callable[[int, int, float, dict[str, Any]], bool]
    breathe: Callable[[], None]
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """Metrics of the evaluated model, and whether ``report`` stopped it before they were final."""

    metrics: dict[str, Any] = field(default_factory=dict)
    stopped_early: bool = False


class Evaluator(Protocol):
    """Judges one candidate. ``model`` arrives on the device and is left with the weights worth keeping."""

    def __call__(
        self, model: nn.Module, architecture: Architecture, task: Task, context: Context
    ) -> Evaluation:
        """Raises TrialFailure for what concerns this candidate alone."""
