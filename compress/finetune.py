"""Fine-tuning with distillation from the original: the one training that the passes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import answer
from compress.passes.base import Context, PassFailed, batches_of, class_axis, is_one_logit
from nas.errors import TrialFailure, UserMistake
from nas.tasks.base import Objective, Split, Task
from nas.training import TrainConfig, TrainResult, train

__all__ = ["ExtraLoss", "distillation_loss", "epochs_of", "finetune", "require_trainable"]

ExtraLoss = Callable[[nn.Module, tuple[Tensor, ...], Any, Any], Tensor]
"""Model in training, its inputs, its outputs, the teacher's outputs (None without one) -> a scalar to be added."""


def epochs_of(own: int | None, context: Context, default: int, *, must: bool = False) -> int:
    """How long a pass trains: as long as it was told, else as the context says, else as is usual for it.

    Args:
        own: the pass's option.
        default: of the pass.
        must: it is nothing without training. The others stay untrained, 0, where there is no data.
    """
    if context.train is None and not must:
        return 0
    chosen = context.epochs if own is None else own
    return default if chosen is None else chosen


def require_trainable(model: nn.Module, epochs: int, option: str = "epochs") -> None:
    """Raises UserMistake when ``model`` is to be trained, for ``epochs`` above 0, but every parameter is frozen.

    Passes that fine-tune ask this first; ``option`` is the name of theirs that leaves the fine-tuning out.
    """
    if epochs and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserMistake(
            f"fine-tuning: every parameter of {type(model).__name__} is frozen (requires_grad=False); unfreeze some, "
            f"or give {option}=0"
        )


def finetune(
    model: nn.Module,
    context: Context,
    *,
    epochs: int,
    learning_rate: float = 5e-4,
    weight_decay: float = 0.05,
    warmup_fraction: float = 0.1,
    distillation: float = 0.5,
    temperature: float = 2.0,
    extra: ExtraLoss | None = None,
    breathe: Callable[[], None] | None = None,
) -> TrainResult | None:
    """Train ``model`` in place on ``context.train``, with the original as teacher; it ends in evaluation mode.

    The loss is ``(1 - distillation) * task loss + distillation * distillation_loss + extra``.

    One rule for all passes: what the user has frozen (``requires_grad=False``) stays frozen. It is not trained, what a
    cut leaves of it is frozen too, and so it comes back; modules that a pass adds are trained.

    Args:
        model: a pass's own copy; it comes back on the device it was on, without gradients.
        context: data, loss, teacher, seed and device. With ``context.probe``, or ``epochs=0``, nothing is trained.
        epochs: passes over ``context.train``; see ``epochs_of``.
        learning_rate: peak, with warm-up and a cosine to 0.
        distillation: weight of the teacher in [0, 1]; without a teacher the task's loss counts alone.
        temperature: above 0; see ``distillation_loss``.
        extra: a further term, of features for instance.
        breathe: called between steps.

    Returns:
        What ``nas.training.train`` tells, or None when nothing was trained.

    Raises:
        PassFailed: the loss became NaN or infinite, or there was no batch.
        UserMistake: no training data, nothing that is not frozen, or a number out of its range.
    """
    if context.probe or epochs == 0:
        model.eval()
        return None
    if context.train is None:
        raise UserMistake("train: fine-tuning needs data; give train=, or epochs=0 to leave it out")
    if not 0 <= distillation <= 1 or not temperature > 0:
        raise UserMistake(
            f"fine-tuning: distillation={distillation} must be in [0, 1] and temperature={temperature} above 0"
        )
    require_trainable(model, epochs)
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    task = _Lesson(context, distillation, temperature, extra)
    config = TrainConfig(
        epochs=epochs,
        batch_size=1,  # the batches are what the caller's data makes them
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_fraction=warmup_fraction,
        seed=context.seed,
    )
    try:
        return train(model, task, config, context.device, breathe=breathe)
    except TrialFailure as failure:
        hint = f"; lower its learning rate ({learning_rate:g})" if failure.kind == "nan" else ""
        raise PassFailed(f"fine-tuning failed: {failure.reason}{hint}") from failure
    finally:
        model.to(home).eval()
        model.zero_grad(set_to_none=True)


def distillation_loss(outputs: Any, teacher: Any, temperature: float = 2.0, *, axis: int = -1) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distribution, softened by ``temperature``, times its square.

    Outputs are logits of one distribution for each sample and position, over which the mean is taken. A single output,
    (B, 1) or (B,), is the logit of a chance: both distributions are then Bernoulli's. A tuple of outputs (distilled
    models in training) counts as the mean of its members. Source: Hinton, Vinyals and Dean, "Distilling the Knowledge
    in a Neural Network", section 2.

    Args:
        outputs, teacher: (B, classes); or with positions (B, ..., classes), with ``axis=1`` (B, classes, ...).
        temperature: above 0.
        axis: of the classes; ``class_axis`` tells that of a context: 1 where its loss is a cross entropy.

    Raises UserMistake when outputs with positions have one number along ``axis``: no distribution lies there.
    """
    if isinstance(outputs, (tuple, list)):
        return torch.stack(
            [distillation_loss(one, teacher, temperature, axis=axis) for one in outputs]
        ).mean()
    wanted = torch.stack(list(teacher)).mean(0) if isinstance(teacher, (tuple, list)) else teacher
    own, other = (_log_chances(x.float() / temperature, axis) for x in (outputs, wanted))
    return nn.functional.kl_div(own, other, reduction="batchmean", log_target=True) * temperature**2


def _log_chances(logits: Tensor, axis: int) -> Tensor:
    """(samples and positions, classes) logarithms."""
    if is_one_logit(logits):
        one = logits.reshape(-1)
        return torch.stack((nn.functional.logsigmoid(-one), nn.functional.logsigmoid(one)), dim=-1)
    if logits.shape[axis] == 1:
        raise UserMistake(
            f"distillation: outputs {tuple(logits.shape)} have one number where their classes should be; give the "
            "model another form of outputs, or distillation=0"
        )
    return nn.functional.log_softmax(logits.movedim(axis, -1), dim=-1).flatten(0, -2)


class _Lesson(Task):
    """The data and loss of a context, in the form that the training loop takes."""

    name = "compression"

    def __init__(self, context: Context, distillation: float, temperature: float, extra: ExtraLoss | None):
        self.objective = Objective("loss", "minimize")
        self._context, self._temperature, self._extra = context, temperature, extra
        self._distillation = distillation if context.teacher is not None else 0.0
        self._length = _length(context.train)

    def train_batches(
        self, *, epoch: int, batch_size: int, seed: int, device: torch.device, train_fraction: float = 1.0
    ) -> Iterator[Any]:
        """The caller's pairs, wherever they lie: ``loss`` moves them."""
        yield from batches_of(self._context)

    def batches_per_epoch(self, batch_size: int, train_fraction: float = 1.0) -> int:
        """Number of the caller's batches."""
        return self._length

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Task's loss, distillation and the extra term."""
        found, taught = answer(model, batch, self._context), None
        if self._context.teacher is not None and (self._distillation or self._extra):
            with torch.no_grad():
                taught = self._context.teacher(*found.inputs)
        total = (1 - self._distillation) * found.loss
        if self._distillation:
            axis = class_axis(self._context)
            taught_loss = distillation_loss(found.outputs, taught, self._temperature, axis=axis)
            total = total + self._distillation * taught_loss
        if self._extra is not None:
            total = total + self._extra(model, found.inputs, found.outputs, taught)
        return total

    def evaluate(
        self, model: nn.Module, split: Split, device: torch.device, *, quick: bool = False
    ) -> dict[str, float]:
        """Nothing: the pipeline judges before and after each pass, by the same data for all."""
        return {}

    def example_inputs(self, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """The context's example, repeated."""
        return tuple(x.expand(batch_size, *x.shape[1:]).to(device) for x in self._context.example)

    def describe(self) -> dict[str, Any]:
        """Number of batches."""
        return {"task": self.name, "batches": self._length}


def _length(batches: Any) -> int:
    try:
        return len(batches)
    except TypeError:  # an iterable without a length: counted, since the schedule must know where it ends
        return sum(1 for _ in batches)
