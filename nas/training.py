"""The one training loop: AMP, warm-up and cosine, clipping, a guard against NaN, reports, checkpoints.

Everything random in an epoch follows from (seed, epoch), so that a training that was interrupted after any epoch and
resumed gives the weights of one that was not.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nas.checkpoint import Checkpoints
from nas.errors import TrialFailure, UserMistake, nearest
from nas.tasks.base import Task

__all__ = ["Progress", "TrainConfig", "TrainResult", "train"]

_CHECK_EVERY = 20


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: passes over the training data, at least 1.
        batch_size: samples in a step, at least 1.
        learning_rate: the peak, reached after the warm-up; above 0.
        weight_decay: at least 0; norms, biases and what the model excludes by ``no_weight_decay()`` have none.
        warmup_fraction: share of all steps in which the rate rises linearly, in [0, 1); a half cosine to 0 follows.
        clip_norm: largest norm of the whole gradient, above 0; ``None`` for no clipping.
        optimizer: a name of ``timm.optim.list_optimizers()``.
        amp: ``auto`` (bf16 on CUDA devices that have it, else off), ``off`` or ``bf16``.
        seed: of shuffling, augmentation and dropout, in [0, 2**32).
        train_fraction: share of the training data, in (0, 1].

    Raises:
        UserMistake: a value outside of its range.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup_fraction: float = 0.1
    clip_norm: float | None = 1.0
    optimizer: str = "adamw"
    amp: Literal["auto", "off", "bf16"] = "auto"
    seed: int = 0
    train_fraction: float = 1.0

    def __post_init__(self) -> None:
        laws = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0 and finite"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            "warmup_fraction": (0 <= self.warmup_fraction < 1, "in [0, 1)"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "above 0, or None for no clipping"),
            "amp": (self.amp in ("auto", "off", "bf16"), "one of auto, off, bf16"),
            "seed": (0 <= self.seed < 2**32, "in [0, 2**32)"),
            "train_fraction": (0 < self.train_fraction <= 1, "in (0, 1]"),
        }
        for name, (holds, law) in laws.items():
            if not holds:
                raise UserMistake(f"training: {name}={getattr(self, name)!r} must be {law}")


@dataclass(frozen=True)
class Progress:
    """What is known after an epoch.

    ``epoch`` counts from 1 to ``epochs``. ``train_loss`` is the mean over its steps, ``metrics`` are those of the
    validation data, ``seconds`` has passed since the start, waiting for the device included.
    """

    epoch: int
    epochs: int
    train_loss: float
    metrics: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """``history`` is one JSON dict per epoch, the fields of ``Progress``; ``metrics`` are those of the last one."""

    history: list[dict[str, Any]]
    seconds: float
    stopped_early: bool
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    device: torch.device | str,
    *,
    report: Callable[[Progress], bool] | None = None,
    breathe: Callable[[], None] | None = None,
    checkpoint: Path | None = None,
) -> TrainResult:
    """Train ``model`` in place; it ends on ``device``, in evaluation mode, with the weights of the last epoch.

    Random numbers outside of the training are left as they were.

    Args:
        model: what ``task.signature`` asks for.
        task: gives batches, loss and validation metrics; the cheap metrics after every epoch but the last.
        config: how to train.
        device: where to train.
        report: told after every epoch; returning True ends the training there (``stopped_early``).
        breathe: called between steps, so that a latency measurement can get in.
        checkpoint: a directory for the state after each of the last two epochs. The newest whole one in it is taken
            up, and its epochs are reported again. It stays after the end.

    Raises:
        TrialFailure: the loss or a metric is NaN or infinite (kind ``nan``).
        UserMistake: an unknown optimiser, no training batch at all, or a checkpoint of another training.
    """
    device = torch.device(device)
    model.to(device)
    run = _Run(model, task, config, device, breathe or _no_breath)
    store = Checkpoints(checkpoint, config) if checkpoint is not None else None
    history = store.restore(run) if store else []
    earlier = history[-1]["seconds"] if history else 0.0
    started = time.perf_counter()
    stopped = report is not None and any(report(Progress(**entry)) for entry in history)
    remaining = range(0) if stopped else range(len(history), config.epochs)
    with _own_randomness(device):
        for epoch in remaining:
            train_loss = run.epoch(epoch)
            metrics = run.validate(epoch, quick=epoch + 1 < config.epochs)
            seconds = earlier + time.perf_counter() - started
            progress = Progress(epoch + 1, config.epochs, train_loss, metrics, seconds)
            history.append(asdict(progress))
            if store:
                store.save(run, history)
            if report is not None and report(progress):
                stopped = True
                break
    return _end(model, history, earlier + time.perf_counter() - started, stopped)


def _end(model: nn.Module, history: list[dict[str, Any]], seconds: float, stopped: bool) -> TrainResult:
    model.eval()
    return TrainResult(history, seconds, stopped, dict(history[-1]["metrics"]))


def _no_breath() -> None:
    pass


def _own_randomness(device: torch.device) -> Any:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class _Run:
    """Model, optimiser and schedule of one training."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        device: torch.device,
        breathe: Callable[[], None],
    ):
        self.model, self.task, self.config, self.device, self.breathe = model, task, config, device, breathe
        self.steps_per_epoch = task.batches_per_epoch(config.batch_size, config.train_fraction)
        if self.steps_per_epoch < 1:
            raise UserMistake(
                f"training: batch_size={config.batch_size} and train_fraction={config.train_fraction:g} leave no batch "
                f"of task {task.name!r}; use a smaller batch or more of the data"
            )
        self.optimizer = _optimizer(model, config)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._mixed = _uses_bf16(config, device)

    def epoch(self, epoch: int) -> float:
        """One pass over the training data; ``epoch`` counts from 0. Returns the mean loss."""
        _seed(self.config.seed, epoch)
        self.model.train()
        guard = _NanGuard(epoch, every=1 if self.device.type == "cpu" else _CHECK_EVERY)
        step = epoch * self.steps_per_epoch
        for batch in self._batches(epoch):
            guard.add(self._step(step, batch))
            step += 1
            self.breathe()
        return guard.mean()

    def validate(self, epoch: int, *, quick: bool) -> dict[str, float]:
        """Validation metrics in full precision."""
        _seed(self.config.seed, epoch)
        self.model.eval()
        # Not inference_mode: a model may keep a table that it makes here and needs in the next training step.
        with torch.no_grad():
            metrics = self.task.evaluate(self.model, "validation", self.device, quick=quick)
        metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TrialFailure("nan", f"validation {name} became {_word(value)} at epoch {epoch + 1}")
        return metrics

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        return self.task.train_batches(
            epoch=epoch,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            device=self.device,
            train_fraction=self.config.train_fraction,
        )

    def _step(self, step: int, batch: tuple[Tensor, ...]) -> Tensor:
        factor = _rate_factor(step, self.steps_per_epoch * self.config.epochs, self.config.warmup_fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor * group.get("lr_scale", 1.0)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._mixed):
            loss = self.task.loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
        self.optimizer.step()
        return loss.detach()


class _NanGuard:
    """Sums the losses of an epoch and looks at them every so many steps, because looking waits for the GPU."""

    def __init__(self, epoch: int, every: int):
        self._epoch, self._every = epoch, every
        self._pending: list[Tensor] = []
        self._sum, self._count = 0.0, 0

    def add(self, loss: Tensor) -> None:
        """Take the loss of one step. Raises TrialFailure when one since the last look is not finite."""
        self._pending.append(loss.float())
        if len(self._pending) >= self._every:
            self._look()

    def mean(self) -> float:
        """Mean over the epoch."""
        self._look()
        if not self._count:
            raise TrialFailure("error", f"the task gave no training batch at epoch {self._epoch + 1}")
        return self._sum / self._count

    def _look(self) -> None:
        for loss in torch.stack(self._pending).tolist() if self._pending else ():
            self._count += 1
            if not math.isfinite(loss):
                where = f"epoch {self._epoch + 1}, step {self._count}"
                raise TrialFailure("nan", f"loss became {_word(loss)} at {where}")
            self._sum += loss
        self._pending.clear()


def _optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    timm_optim: Any = importlib.import_module("timm.optim")  # a second to import, for training alone
    known: list[str] = timm_optim.list_optimizers()
    if config.optimizer not in known:
        raise UserMistake(
            f"training: unknown optimizer={config.optimizer!r}{nearest(config.optimizer, known)}; "
            f"known: {', '.join(known)}"
        )
    # One kernel instead of a dozen small operations for each parameter: for small models a tenth of a step.
    fused = {"fused": True} if config.optimizer in ("adam", "adamw") else {}
    optimizer: Optimizer = timm_optim.create_optimizer_v2(
        model, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay, **fused
    )
    return optimizer


def _uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    if config.amp == "bf16":
        return True
    return config.amp == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()


def _rate_factor(step: int, total: int, warmup_fraction: float) -> float:
    """Learning rate of ``step`` (from 0) relative to its peak, in (0, 1]."""
    warmup = math.ceil(warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    # The task may give a batch more than it announced; the rate must not rise again.
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


def _seed(seed: int, epoch: int) -> None:
    # One stream per epoch: a resumed training needs no generator states, which differ between devices.
    torch.manual_seed(seed * 1_000_003 + epoch)


def _word(value: float) -> str:
    return "nan" if math.isnan(value) else "infinite"
