"""What the comparison of compression methods shares: the task, a teacher trained to its plateau, fine-tuning, judging.

Every method starts from the same checkpoint, sees the same batches of the same training images, and is fine-tuned for
the same number of epochs. Settings are chosen on validation images; test images are looked at once, by ``judged``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from compress.data import TaskBatches
from compress.measuring import count
from compress.passes.base import Context
from nas.files import atomic_write_json, read_json
from nas.latency import Target
from nas.tasks import make_task
from nas.tasks.base import Task
from nas.training import Progress, TrainConfig, train
from nas.weights import load_weights, save_weights

__all__ = [
    "BATCH",
    "EPOCHS",
    "IMAGES",
    "Lesson",
    "build",
    "context_of",
    "judged",
    "make_lesson",
    "teacher_of",
]

SHAPE = {"embed_dim": 64, "depth": 8, "num_heads": 2}
IMAGES, BATCH = 8_000, 32
TEACHER_EPOCHS, TEACHER_RATE = 24, 1e-3
EPOCHS, RATES = 3, (5e-4, 1.5e-3)
"""Of fine-tuning, the same for every method. Validation chooses the rate."""

CPU = torch.device("cpu")


class Lesson:
    """One seed's task, its batches and its teacher's place on the disk."""

    def __init__(self, data: str, seed: int, work: Path):
        self.seed, self.folder = seed, work / f"seed{seed}"
        self.task: Any = make_task(
            "image_classification",
            data=data,
            limit=IMAGES,
            cache_dir=str(work / "cache"),
            seed=seed,
            augment="none",  # a plateau within minutes: with shifted images it takes several times the epochs
        )

    def batches(self) -> TaskBatches:
        """The training batches, from the first epoch on."""
        return TaskBatches(self.task, BATCH, self.seed)


def make_lesson(data: str, seed: int, work: Path) -> Lesson:
    """``data`` is a folder or a name of the task's own sources."""
    return Lesson(data, seed, work)


def build(task: Task) -> nn.Module:
    """A small DeiT: 49 patches of pictures of 28 pixels, 64 of those of 32."""
    wanted: Any = task.signature
    return timm.create_model(
        "deit_tiny_patch16_224",
        in_chans=wanted.channels,
        num_classes=wanted.classes,
        img_size=wanted.height,
        patch_size=4,
        **SHAPE,
    )


def teacher_of(lesson: Lesson, goes_on: Callable[[], bool]) -> tuple[nn.Module, dict[str, Any]] | None:
    """The trained teacher and what is known of its training; None where ``goes_on`` ended it, to be taken up again."""
    torch.manual_seed(lesson.seed)
    model, file, about = (
        build(lesson.task),
        lesson.folder / "teacher.safetensors",
        lesson.folder / "teacher.json",
    )
    if about.exists():
        load_weights(model, file)
        return model.eval(), read_json(about)
    config = TrainConfig(TEACHER_EPOCHS, BATCH, TEACHER_RATE, seed=lesson.seed)

    def report(progress: Progress) -> bool:
        accuracy = progress.metrics["accuracy"]
        print(f"teacher {lesson.seed}: epoch {progress.epoch}, validation {accuracy:.4f}", flush=True)
        return progress.epoch < TEACHER_EPOCHS and not goes_on()

    lesson.folder.mkdir(parents=True, exist_ok=True)
    found = train(model, lesson.task, config, CPU, report=report, checkpoint=lesson.folder / "checkpoint")
    if found.stopped_early:
        return None
    save_weights(model, file)
    curve = [round(entry["metrics"]["accuracy"], 4) for entry in found.history]
    facts = {
        "epochs": TEACHER_EPOCHS,
        "validation_curve": curve,
        "wall_seconds": round(found.seconds, 1),
    }
    atomic_write_json(about, facts)
    return model.eval(), facts


def context_of(lesson: Lesson, teacher: nn.Module) -> Context:
    """What a pass of ours, or the shared fine-tuning, is given."""
    example = lesson.task.example_inputs(1, CPU)

    def loss(outputs: Any, labels: Tensor) -> Tensor:
        smoothing = lesson.task.label_smoothing
        return nn.functional.cross_entropy(outputs.float(), labels, label_smoothing=smoothing)

    return Context(
        example=example,
        train=lesson.batches(),
        loss=loss,
        teacher=teacher,
        target=Target.parse("cpu:1"),
        seed=lesson.seed,
        epochs=EPOCHS,
        report=lambda text: print("  ", text, flush=True),
    )


def judged(model: nn.Module, lesson: Lesson) -> dict[str, Any]:
    """Accuracies in 0..1 on validation and test images, and what the model costs."""
    example = lesson.task.example_inputs(1, CPU)
    counted = count(model, example)
    return {
        "validation": round(lesson.task.evaluate(model, "validation", CPU)["accuracy"], 4),
        "test": round(lesson.task.evaluate(model, "test", CPU)["accuracy"], 4),
        "params": counted["params"],
        "macs": counted["macs"],
    }
