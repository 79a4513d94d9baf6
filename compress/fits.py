"""Whether a model, its data and a loss fit each other: found out before a pass begins, by one batch of each source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import TaskBatches, TaskLoss, inputs_of
from compress.labels import check_labels
from compress.passes.base import Batches, Loss, classification_loss
from nas.errors import UserMistake, first_line
from nas.tasks.base import Task

__all__ = ["Look", "check_fits", "example_of", "look_at"]

_FEW = 2  # samples to try a loss with
_RELATIVE, _ABSOLUTE = 1e-4, 1e-6  # how far two values of one loss may be apart


@dataclass(frozen=True)
class Look:
    """What one source of data gives first, on the CPU.

    Attributes:
        name: ``train`` or ``validation``.
        inputs: of a batch; of a task that judges, its example.
        labels: of the batch; None of a task that judges.
        task: that the batch is of, if any.
    """

    name: str
    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None
    task: Task | None = None


def look_at(source: Batches | Task, name: str) -> Look:
    """One look at ``source``; it uses up no epoch of a task, and draws nothing from the global generator.

    Raises UserMistake when it gives nothing any more.
    """
    if isinstance(source, Task):
        return Look(name, _on_cpu(source.example_inputs(1, torch.device("cpu"))), task=source)
    task = None
    if isinstance(source, TaskBatches):
        task, source = source.task, TaskBatches(source.task, source.batch_size, source.seed)
    with torch.random.fork_rng([]):
        batch = next(iter(source), None)
    if batch is None:
        raise UserMistake(
            f"{name}: yields no batch when it is gone through for the second time; give a DataLoader, a list or a task"
        )
    return Look(name, _on_cpu(inputs_of(batch)), batch[1].detach().cpu(), task)


def example_of(model: nn.Module, *looks: Look) -> tuple[Tensor, ...]:
    """Inputs of one call with one sample, on the CPU: of the first look, else random ones of the model's own size.

    Raises UserMistake when neither tells.
    """
    if looks:
        return tuple(x[:1].clone() for x in looks[0].inputs)
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


def check_fits(model: nn.Module, example: Sequence[Tensor], looks: Sequence[Look], loss: Loss) -> None:
    """Try ``model``, in evaluation mode on the CPU, on all that it will be given.

    Raises:
        UserMistake: it does not run on ``example`` or on a sample of a source; it has other classes than a task, or
            the labels of a batch do not fit its outputs under the default loss; or ``loss``, of a task, cannot be
            taken of outputs alone.
    """
    _outputs(model, example, "model", "its data or example")
    for look in looks:
        found = _outputs(model, tuple(x[:1] for x in look.inputs), look.name, "its first batch")
        _check_classes(found[0] if isinstance(found, (tuple, list)) and found else found, look, loss)
        if isinstance(loss, TaskLoss) and look.labels is not None and look.task is loss.task:
            _check_loss(model, look, look.labels, loss)


def _outputs(model: nn.Module, inputs: Sequence[Tensor], name: str, whose: str) -> Any:
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            return model(*inputs)
    except Exception as error:  # the model is anybody's
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        subject = f"{name}: " if name == "model" else f"{name}: model "
        raise UserMistake(
            f"{subject}{type(model).__name__} does not run on the inputs {shapes} of {whose} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _check_classes(outputs: Any, look: Look, loss: Loss) -> None:
    """Of outputs (1, n): one for each class of the task, and for each label."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        return
    count, labels = outputs.shape[1], look.labels
    classes = getattr(getattr(look.task, "signature", None), "classes", None)
    if isinstance(classes, int) and count != classes and (count, classes) != (1, 2):
        raise UserMistake(
            f"{look.name}: the model has {count} outputs, the data {classes} classes; give a model with {classes} "
            "outputs"
        )
    if classes is not None or loss is not classification_loss or count == 1:
        return
    if labels is not None:
        check_labels(labels, (len(labels), count), look.name, "the first batch")


def _check_loss(model: nn.Module, look: Look, labels: Tensor, loss: TaskLoss) -> None:
    """Raises UserMistake when the task's loss of the model is not that of the model's outputs."""
    few, labels = tuple(x[:_FEW] for x in look.inputs), labels[:_FEW]
    blame = f"{look.name}: the loss of task {loss.task.name!r}"
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.default_generator.manual_seed(0)
            found = float(loss(model(*few), labels, few, training=False))
            torch.default_generator.manual_seed(0)
            own = float(loss.task.loss(model, (*few, labels)))
    except Exception as error:  # the task may be anybody's too
        raise UserMistake(
            f"{blame} cannot be taken of the outputs of {type(model).__name__} ({first_line(error)}); give batches and "
            "loss="
        ) from error
    same = math.isclose(found, own, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    if not same and not (math.isnan(found) and math.isnan(own)):
        raise UserMistake(
            f"{blame} is not that of the outputs of one call of the model ({own:.6g}, of them alone {found:.6g}); give "
            "batches and loss="
        )


def _on_cpu(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().cpu() for x in inputs)
