"""What a pipeline learns from and judges by: data loaders, any other re-iterable of batches, or a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.passes.base import Batches
from nas.errors import UserMistake
from nas.tasks.base import Task

__all__ = ["Judge", "Judgement", "TaskBatches", "as_batches", "example_of", "move"]


class TaskBatches:
    """The training batches of a task, a fresh epoch (order, augmentation) each time they are gone through."""

    def __init__(self, task: Task, batch_size: int | None = None, seed: int = 0):
        self.task, self.seed = task, seed
        self.batch_size = batch_size or task.default_batch_size
        self._epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        batches: Any = self.task.train_batches(
            epoch=epoch, batch_size=self.batch_size, seed=self.seed, device=torch.device("cpu")
        )
        return iter(batches)

    def __len__(self) -> int:
        return self.task.batches_per_epoch(self.batch_size)


def as_batches(data: object, what: str, *, seed: int = 0) -> Batches:
    """``data`` as something that gives (inputs, labels) each time it is gone through.

    Args:
        data: a DataLoader, a list of batches or another re-iterable, or a task (its training data).
        what: the argument's name, for messages.
        seed: of a task's order and augmentation.

    Raises:
        UserMistake: it gives nothing, something else than pairs of tensors, or can be gone through only once.
    """
    if isinstance(data, Task):
        data = TaskBatches(data, seed=seed)
    if not isinstance(data, Iterable):
        raise UserMistake(
            f"{what}: {type(data).__name__} cannot be gone through; give a DataLoader or a task"
        )
    if isinstance(data, Iterator):
        raise UserMistake(
            f"{what}: {type(data).__name__} can be gone through only once; give a DataLoader, a list or a task"
        )
    first = next(iter(data), None)
    if first is None:
        raise UserMistake(
            f"{what}: yields no batch; give data with at least one batch (is drop_last dropping it?)"
        )
    if not _is_pair(first):
        raise UserMistake(
            f"{what}: must yield pairs (inputs, labels) of tensors with the batch first, not {_described(first)}"
        )
    return data


def example_of(model: nn.Module, *sources: Batches | Task | None) -> tuple[Tensor, ...]:
    """Inputs of one call with one sample, on the CPU: from the first source that is there, else the model's own size.

    Raises UserMistake when neither tells.
    """
    for source in sources:
        if isinstance(source, Task):
            return tuple(x.cpu() for x in source.example_inputs(1, torch.device("cpu")))
        if source is not None:
            again = next(iter(source), None)
            if again is None:
                raise UserMistake(
                    f"{type(source).__name__}: yields no batch when it is gone through for the second time; give a "
                    "DataLoader, a list or a task"
                )
            inputs, _ = again
            return (inputs[:1].detach().cpu().clone(),)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    grid = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if grid is not None:
        # The model may have been made for another size than its published weights.
        channels = int(getattr(getattr(model.patch_embed, "proj", None), "in_channels", 3))
        size = (channels, *grid)
    if size is None:
        raise UserMistake(
            "example: the model does not tell the size of its inputs; give train=, validation= or example="
        )
    return (torch.randn(1, *size, generator=torch.Generator().manual_seed(0)),)


def move(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and labels on ``device``."""
    return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)


@dataclass(frozen=True)
class Judgement:
    """``metrics`` holds ``accuracy`` (0 to 1) where labels are classes; ``predictions`` are classes, (N,)."""

    metrics: dict[str, float]
    predictions: Tensor | None

    def agreement(self, other: Judgement) -> float | None:
        """Share of the samples on which both predict the same class; None where they do not predict classes."""
        if self.predictions is None or other.predictions is None or not len(self.predictions):
            return None
        return float((self.predictions == other.predictions).float().mean())


class Judge:
    """Accuracy and predictions of models on the same validation data, without gradients, in evaluation mode.

    Args:
        data: batches or a task (its validation split).
        device: where the models run; they are moved there and back.
    """

    def __init__(self, data: Batches | Task, device: torch.device):
        self._data, self._device = data, device

    def judge(self, model: nn.Module) -> Judgement:
        """Raises UserMistake when the data gives nothing."""
        home = next((p.device for p in model.parameters()), torch.device("cpu"))
        training = model.training
        model.to(self._device).eval()
        try:
            with torch.no_grad():
                if isinstance(self._data, Task):
                    return self._by_task(model, self._data)
                return self._by_batches(model, self._data)
        finally:
            model.to(home).train(training)

    def _by_task(self, model: nn.Module, task: Task) -> Judgement:
        recorder = _Recorder(model).eval()
        metrics = task.evaluate(recorder, "validation", self._device)
        classes = torch.cat(recorder.seen) if recorder.seen else None
        return Judgement({name: float(value) for name, value in metrics.items()}, classes)

    def _by_batches(self, model: nn.Module, batches: Batches) -> Judgement:
        predicted, right, total = [], 0, 0
        for batch in batches:
            inputs, labels = move(batch, self._device)
            found = _classes(model(inputs))
            total += len(labels)
            if found is not None:
                wanted = labels.argmax(-1) if labels.dim() == 2 else labels
                right += int((found == wanted).sum())
                predicted.append(found.cpu())
        if not total:
            raise UserMistake("validation: yields no batch; give data with at least one batch")
        if not predicted:
            return Judgement({}, None)
        return Judgement({"accuracy": right / total}, torch.cat(predicted))


class _Recorder(nn.Module):
    """Passes everything on, and remembers which classes were predicted."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, *inputs: Any) -> Any:
        outputs = self.model(*inputs)
        found = _classes(outputs)
        if found is not None:
            self.seen.append(found.cpu())
        return outputs

    def __getattr__(self, name: str) -> Any:
        # Translation asks a model for more than its forward.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def _classes(outputs: Any) -> Tensor | None:
    return outputs.argmax(-1) if isinstance(outputs, Tensor) and outputs.dim() == 2 else None


def _is_pair(batch: object) -> bool:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return False
    return all(isinstance(x, Tensor) and x.dim() > 0 for x in batch) and len(batch[0]) == len(batch[1]) > 0


def _described(batch: object) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of {', '.join(type(x).__name__ for x in batch) or 'nothing'}"
    return type(batch).__name__
