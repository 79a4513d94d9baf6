"""Train from scratch: the evaluator that says what a candidate is really worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nas.evaluators import register_evaluator
from nas.evaluators.base import Context, Evaluation
from nas.training import Progress, TrainConfig, train

if TYPE_CHECKING:
    from torch import nn

    from nas.tasks.base import Task
    from spaces import Architecture

__all__ = ["evaluate_by_training"]


@register_evaluator("train")
def evaluate_by_training(
    model: nn.Module, architecture: Architecture, task: Task, context: Context
) -> Evaluation:
    """Train ``model`` for the configured epochs, reporting after each but the last, which a stop would not shorten.

    Raises TrialFailure("nan") when the loss is no longer finite.
    """

    def report(progress: Progress) -> bool:
        # A cheap evaluation between epochs may leave the objective out; the loss then stands for it.
        objective = progress.metrics.get(task.objective.name)
        sign = 1.0 if task.objective.direction == "maximize" else -1.0
        quality = -progress.metrics["loss"] if objective is None else sign * objective
        point = {"train_loss": progress.train_loss, **progress.metrics}
        stop = context.report(progress.epoch, progress.epochs, quality, point)
        return stop and progress.epoch < progress.epochs

    settings = train_config(context, task)
    outcome = train(
        model,
        task,
        settings,
        context.device,
        report=report,
        breathe=context.breathe,
        checkpoint=context.checkpoint,
    )
    return Evaluation(metrics=dict(outcome.metrics), stopped_early=outcome.stopped_early)


def train_config(context: Context, task: Task) -> TrainConfig:
    """The training of this run: what the configuration says, and the task's own values where it says nothing."""
    options = dict(context.config["training"])
    options["batch_size"] = options["batch_size"] or task.default_batch_size
    options["learning_rate"] = options["learning_rate"] or task.default_learning_rate
    epochs = context.config["epochs"] or task.default_epochs
    return TrainConfig(epochs=epochs, seed=context.seed, **options)
