"""A task that leaves a mark for every epoch that was trained to its end, and dies when it is told to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nas.tasks.base import Batch
from nas.tasks.image_classification import ImageClassification

__all__ = ["CountedDigits"]


class CountedDigits(ImageClassification):
    """The digits. ``NAS_FAULTS_EPOCHS`` names the file of the marks: seed, epoch and process of each epoch.

    ``NAS_FAULTS_HOLD``: when so many epochs have been trained, the next one waits for the file ``NAS_FAULTS_GO``.
    ``NAS_FAULTS_DEADLY``: the epoch in which the process is killed.
    """

    def train_batches(self, *, epoch: int, seed: int, **arguments: Any) -> Iterator[Batch]:
        while self._held():
            time.sleep(0.01)
        if os.environ.get("NAS_FAULTS_DEADLY") == str(epoch):
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().train_batches(epoch=epoch, seed=seed, **arguments)
        with open(os.environ["NAS_FAULTS_EPOCHS"], "a", encoding="ascii") as file:
            file.write(f"{seed} {epoch} {os.getpid()}\n")

    def _held(self) -> bool:
        hold, marks = os.environ.get("NAS_FAULTS_HOLD"), Path(os.environ["NAS_FAULTS_EPOCHS"])
        if hold is None or os.path.exists(os.environ["NAS_FAULTS_GO"]) or not marks.exists():
            return False
        return len(marks.read_text().splitlines()) == int(hold)
