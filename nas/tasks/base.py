"""The interface of a task: data, loss, metrics, and the shapes it asks of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spaces.signature import Signature

__all__ = ["Batch", "Direction", "Fidelity", "Objective", "Split", "Task"]

Batch = tuple[Tensor, ...]
Direction = Literal["maximize", "minimize"]
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Objective:
    """What counts: the name of a metric and whether more or less of it is better."""

    name: str
    direction: Direction


@dataclass(frozen=True)
class Fidelity:
    """How much effort an evaluation may take.

    ``epochs`` passes over the training data (at least 1); ``train_fraction`` in (0, 1] of the training data,
    always the same subset for the same seed.
    """

    epochs: int
    train_fraction: float = 1.0


class Task(ABC):
    """One learning problem. A task is made from JSON options alone, so that any process can make it again."""

    name: str
    signature: Signature
    objective: Objective
    default_epochs: int
    default_batch_size: int
    default_learning_rate: float

    @abstractmethod
    def train_batches(
        self, *, epoch: int, batch_size: int, seed: int, device: torch.device, train_fraction: float = 1.0
    ) -> Iterator[Batch]:
        """Shuffled, augmented batches of one epoch on ``device``; the same arguments give the same batches."""

    @abstractmethod
    def batches_per_epoch(self, batch_size: int, train_fraction: float = 1.0) -> int:
        """Number of batches that ``train_batches`` yields."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar training loss of one batch."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, split: Split, device: torch.device, *, quick: bool = False
    ) -> dict[str, float]:
        """Metrics of ``model`` on a split; contains ``objective.name`` and ``loss``.

        ``quick`` permits a cheaper stand-in between epochs (translation: the loss alone, no beam search); the
        objective is then missing and ``loss`` is what a pruner sees.
        """

    @abstractmethod
    def example_inputs(self, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """Inputs for latency, counting and export, with real shapes."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON facts for the report: source of the data, sizes of the three splits, classes or vocabulary."""
