"""What a pipeline learns from and judges by: data loaders, any other re-iterable of batches, or a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.labels import IGNORED, check_labels
from compress.passes.base import (
    Batches,
    Context,
    Inputs,
    Loss,
    Pass,
    classification_loss,
    is_one_logit,
)
from nas.errors import UserMistake
from nas.tasks.base import Batch, Task

__all__ = [
    "Answer",
    "Judge",
    "Judgement",
    "Sources",
    "TaskBatches",
    "TaskLoss",
    "answer",
    "as_batches",
    "inputs_of",
    "loss_of",
    "move",
]


class TaskBatches:
    """The training batches of a task as pairs (inputs, labels): a task's batch is its model's inputs and, last, labels.

    A fresh epoch (order, augmentation) each time they are gone through.
    """

    def __init__(self, task: Task, batch_size: int | None = None, seed: int = 0):
        self.task, self.seed = task, seed
        self.batch_size = batch_size or task.default_batch_size
        self._epoch = 0

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        batches = self.task.train_batches(
            epoch=epoch, batch_size=self.batch_size, seed=self.seed, device=torch.device("cpu")
        )
        return (_as_pair(batch) for batch in batches)

    def __len__(self) -> int:
        return self.task.batches_per_epoch(self.batch_size)


class TaskLoss:
    """A task's own loss, of outputs that are there already: of one call of the model, or the mean over several heads.

    Args:
        task: its ``loss`` calls the model with the batch's inputs as they are.
    """

    def __init__(self, task: Task):
        self.task = task
        self._unknown = (None,) * len(task.example_inputs(1, torch.device("cpu")))

    def __call__(
        self, outputs: Any, labels: Tensor, inputs: Sequence[Tensor] | None = None, *, training: bool = True
    ) -> Tensor:
        """Scalar, as of a model that is in training, or not. Without ``inputs``, a task that looks at them itself
        cannot be asked.

        Raises UserMistake when the task calls the model with something else or twice, or asks for its weights.
        """
        if isinstance(outputs, (tuple, list)):
            return torch.stack([self(one, labels, inputs, training=training) for one in outputs]).mean()
        given: Any = self._unknown if inputs is None else tuple(inputs)
        return self.task.loss(_Answered(outputs, given).train(training), (*given, labels))


class _Answered(nn.Module):
    """In the model's place while a task takes its loss: answers with what the model has said to these inputs."""

    def __init__(self, outputs: Any, inputs: tuple[Any, ...]):
        super().__init__()
        self._outputs, self._inputs, self._asked = outputs, inputs, False

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Raises UserMistake: of a call that is over, no weights are known. ``parameters`` comes here too."""
        raise UserMistake("it looks at the weights of the model, not at its outputs alone")

    def forward(self, *inputs: Any) -> Any:
        """The outputs. Raises UserMistake for other inputs than those that they belong to, or a second call."""
        if len(inputs) != len(self._inputs) or any(
            one is not own for one, own in zip(inputs, self._inputs, strict=True)
        ):
            raise UserMistake("it calls the model with something else than the inputs of the batch")
        if self._asked:
            # Dropout makes two calls of a model differ, two answers from here are the same.
            raise UserMistake("it calls the model more than once")
        self._asked = True
        return self._outputs


@dataclass(frozen=True)
class Answer:
    """What a model gave for a batch, and its loss, a scalar; all on the context's device."""

    inputs: tuple[Tensor, ...]
    labels: Tensor
    outputs: Any
    loss: Tensor


def answer(model: nn.Module, batch: tuple[Inputs, Tensor], context: Context) -> Answer:
    """Call ``model``, which is on the context's device, on a batch, and take the context's loss."""
    inputs, labels = move(batch, context.device)
    outputs = model(*inputs)
    return Answer(inputs, labels, outputs, loss_of(context, outputs, inputs, labels))


def loss_of(context: Context, outputs: Any, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The context's loss of ``outputs``, which a model gave for ``inputs``."""
    if isinstance(context.loss, TaskLoss):
        return context.loss(outputs, labels, inputs)
    return context.loss(outputs, labels)


def inputs_of(batch: tuple[Inputs, Tensor]) -> tuple[Tensor, ...]:
    """What a model is called with: ``model(*inputs_of(batch))``."""
    inputs = batch[0]
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def move(batch: tuple[Inputs, Tensor], device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs, in a tuple also where there is one, and labels on ``device``."""
    inputs = tuple(x.to(device, non_blocking=True) for x in inputs_of(batch))
    return inputs, batch[1].to(device, non_blocking=True)


def as_batches(data: object, what: str, *, seed: int = 0) -> Batches:
    """``data`` as something that gives (inputs, labels) each time it is gone through; see ``passes.base.Batches``.

    Args:
        data: a DataLoader, a list of batches or another re-iterable, or a task (its training data).
        what: the argument's name, for messages.
        seed: of a task's order and augmentation.

    Raises:
        UserMistake: it gives nothing, something else than such pairs, or can be gone through only once.
    """
    if isinstance(data, Task):
        _check_task(data, what, seed)
        return TaskBatches(data, seed=seed)  # looking at these would use up an epoch
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
            f"{what}: must yield pairs (inputs, labels) of tensors with the batch first, not {_described(first)}; "
            "several inputs are a tuple within the pair"
        )
    return data


@dataclass(frozen=True)
class Judgement:
    """``metrics`` are a task's own, or hold ``accuracy`` (0 to 1) where labels are classes.

    ``predictions`` are classes, (N,); of a single logit they are 0 and 1.
    """

    metrics: dict[str, float]
    predictions: Tensor | None

    def agreement(self, other: Judgement) -> float | None:
        """Share of the samples on which both predict the same class; None where they do not predict classes."""
        if self.predictions is None or other.predictions is None or not len(self.predictions):
            return None
        return float((self.predictions == other.predictions).float().mean())


class Judge:
    """Metrics and predictions of models on the same validation data, without gradients, in evaluation mode.

    ``metric`` is the one that counts: a task's objective, or accuracy. A loader that draws its order from the global
    generator gives every model the same one, so that what they predict can be compared.

    Args:
        data: batches or a task (its validation split).
        device: where the models run; they are moved there and back.
        classes: whether the labels must be what the default loss takes.
    """

    def __init__(self, data: Batches | Task, device: torch.device, *, classes: bool = True):
        self._data, self._device, self._classes = data, device, classes
        self.metric = data.objective.name if isinstance(data, Task) else "accuracy"

    def judge(self, model: nn.Module) -> Judgement:
        """Raises UserMistake when the data gives nothing, or labels that do not fit the model's outputs."""
        home = next((p.device for p in model.parameters()), torch.device("cpu"))
        training = model.training
        model.to(self._device).eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([]):
                torch.default_generator.manual_seed(0)
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
        predicted, right, counted, total = [], 0, 0, 0
        for batch in batches:
            inputs, labels = move(batch, self._device)
            outputs = model(*inputs)
            if self._classes and isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape[1] > 1:
                check_labels(labels, outputs.shape, "validation")
            found, wanted = _classes(outputs), _wanted(outputs, labels)
            total += len(labels)
            if found is not None and wanted is not None:
                right += int((found == wanted).sum())
                counted += int((wanted != IGNORED).sum())
                predicted.append(found.cpu())
        if not total:
            raise UserMistake("validation: yields no batch; give data with at least one batch")
        if sum(map(len, predicted)) != total:
            return Judgement({}, None)
        metrics = {"accuracy": right / counted} if counted else {}
        return Judgement(metrics, torch.cat(predicted))


class Sources:
    """Training and validation data, looked at before anything is done, and the loss.

    Args:
        train, validation, loss: as given to ``compress``.
        seed: of a task's order and augmentation.
        passes: that will run.

    Raises:
        UserMistake: as ``as_batches``, or a pass needs data and there is none.
    """

    def __init__(self, train: Any, validation: Any, seed: int, passes: Iterable[Pass], loss: Loss | None):
        if validation is None and isinstance(train, Task):
            validation = train
        self.train: Batches | None = None if train is None else as_batches(train, "train", seed=seed)
        self.loss: Loss = loss or (TaskLoss(train) if isinstance(train, Task) else classification_loss)
        self.validation: Batches | Task | None = validation
        if validation is not None and not isinstance(validation, Task):
            self.validation = as_batches(validation, "validation")
        for one in passes:
            if one.requires and self.train is None:
                needs = " and ".join(sorted(one.requires))
                raise UserMistake(f"pass {one.name!r} needs data ({needs}); give train=")

    def sources(self) -> list[tuple[str, Batches | Task]]:
        """What there is, with its name; the validation data first, since it is not augmented."""
        both = (("validation", self.validation), ("train", self.train))
        return [(name, one) for name, one in both if one is not None]

    def judge(self, device: torch.device) -> Judge | None:
        """Of the validation data, if there is any."""
        if self.validation is None:
            return None
        return Judge(self.validation, device, classes=self.loss is classification_loss)


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
    """(B,) classes that outputs (B, classes) stand for; 0 and 1 of a single logit, (B, 1) or (B,)."""
    if not isinstance(outputs, Tensor) or outputs.dim() not in (1, 2):
        return None
    if is_one_logit(outputs):
        return (outputs.flatten() > 0).long()
    return outputs.argmax(-1)


def _wanted(outputs: Any, labels: Tensor) -> Tensor | None:
    """(B,) classes that the labels stand for; None where labels of a single output are other numbers than 0 and 1."""
    if isinstance(outputs, Tensor) and is_one_logit(outputs):
        flat = labels.flatten()
        return flat.long() if bool(((flat == 0) | (flat == 1)).all()) else None
    return labels.argmax(-1) if labels.dim() == 2 else labels


def _as_pair(batch: Batch) -> tuple[Inputs, Tensor]:
    *inputs, labels = batch
    return (inputs[0] if len(inputs) == 1 else tuple(inputs)), labels


def _check_task(task: Task, what: str, seed: int) -> None:
    """Raises UserMistake for a task whose batches are not its model's inputs and then labels."""
    cpu = torch.device("cpu")
    first = next(task.train_batches(epoch=0, batch_size=task.default_batch_size, seed=seed, device=cpu), None)
    if first is None:
        raise UserMistake(f"{what}: task {task.name!r} yields no batch; give it more data")
    example = task.example_inputs(1, cpu)
    alike = len(first) == len(example) + 1 and all(
        x.is_floating_point() == own.is_floating_point() and x.dim() == own.dim()
        for x, own in zip(first, example, strict=False)
    )
    if not alike:
        raise UserMistake(
            f"{what}: task {task.name!r} gives batches of {len(first)} tensors, not the {len(example)} input(s) of its "
            "model and labels behind them; give batches and loss="
        )


def _is_pair(batch: object) -> bool:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return False
    inputs, labels = batch
    tensors = [*inputs, labels] if isinstance(inputs, (tuple, list)) and inputs else [inputs, labels]
    if not all(isinstance(x, Tensor) and x.dim() > 0 for x in tensors):
        return False
    return len({len(x) for x in tensors}) == 1 and len(labels) > 0


def _described(batch: object) -> str:
    if not isinstance(batch, (tuple, list)):
        return type(batch).__name__
    text = f"{type(batch).__name__} of {', '.join(type(x).__name__ for x in batch) or 'nothing'}"
    if len(batch) != 2:
        return text
    parts = [*batch[0], batch[1]] if isinstance(batch[0], (tuple, list)) and batch[0] else list(batch)
    if not all(isinstance(x, Tensor) for x in parts):
        return text
    sizes = [str(len(x)) if x.dim() else "no" for x in parts]
    return f"{text} with {', '.join(sizes[:-1])} and {sizes[-1]} samples"
