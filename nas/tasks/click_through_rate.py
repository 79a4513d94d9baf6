"""Click prediction: generated clicks by default, or a folder of film ratings; judged by the area under the ROC curve.

Letters: B batch, I columns of ids, D dense numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.errors import TrialFailure, UserMistake
from nas.tasks import register_task
from nas.tasks._click_data import GENERATED, ClickData, auc_of, generate_clicks
from nas.tasks._movielens import read_movielens
from nas.tasks.base import Batch, Objective, Split, Task
from nas.tasks.cache import default_cache_dir
from spaces.signature import ClickThroughRateSignature

__all__ = ["ClickThroughRate"]

_EVALUATION_BATCH = 2048  # samples
_UNKNOWN_SHARE = 0.5

_Part = Literal["train", "validation", "test"]


@register_task("click_through_rate")
class ClickThroughRate(Task):
    """Features of a sample to the chance of a click, judged by AUC; ``loss`` is the log loss.

    The model is called as ``model(ids, dense)`` and gives logits, see ``ClickThroughRateSignature``.

    Three splits: of the generated clicks drawn alike; of ratings cut by time, 80/10/10, so that many users of the later
    ones are new. Vocabularies and the scaling of numbers come from the training split alone.

    Args:
        data: ``generated-clicks`` (default; nobody clicked, see ``nas.tasks._click_data``), or a folder with
            ``ratings.csv`` and ``movies.csv`` of MovieLens, see ``nas.tasks._movielens``.
        data_root: not used; every task takes it.
        cache_dir: where arrays are kept; ./runs/.cache by default. Nothing is kept of the generated clicks.
        seed: of the generated clicks and of ``limit``.
        click_rating: a rating of at least this is a click.
        vocabulary: most ids of users and of films, the most frequent in training; all others are one, "unknown".
        least_count: ids that occur less often in training are unknown.
        unknown_share: share of the users and films that a training batch hides, in [0, 1): the model learns to go
            without. 0.5 for ratings by default, chosen by validation AUC.
        limit: number of training samples to keep, for quick tries.

    Raises:
        UserMistake: data that cannot be used, or an option out of its range.
    """

    objective = Objective("auc", "maximize")
    signature: ClickThroughRateSignature

    def __init__(
        self,
        data: str | None = None,
        data_root: str | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
        *,
        click_rating: float = 4.0,
        vocabulary: int = 50_000,
        least_count: int = 5,
        unknown_share: float | None = None,
        limit: int | None = None,
    ):
        for option, value in (("vocabulary", vocabulary), ("least_count", least_count), ("limit", limit)):
            if value is not None and value < 1:
                raise UserMistake(f"{option}={value} must be at least 1")
        if not math.isfinite(click_rating):
            raise UserMistake(f"click_rating={click_rating} must be a finite number")
        if unknown_share is not None and not 0 <= unknown_share < 1:
            raise UserMistake(f"unknown_share={unknown_share} must lie in [0, 1)")
        generated = data is None or data == GENERATED
        self.data: ClickData = (
            generate_clicks(seed)
            if data is None or generated
            else read_movielens(
                _folder(data),
                click_rating=click_rating,
                vocabulary=vocabulary,
                least_count=least_count,
                cache_dir=default_cache_dir(cache_dir),
            )
        )
        self.signature = self.data.signature
        self._seed, self._limit = seed, limit
        self.unknown_share = (
            (0.0 if generated else _UNKNOWN_SHARE) if unknown_share is None else unknown_share
        )
        self._train = self._training_rows()
        self._identities = self._identity_columns()
        self._resident: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self.default_epochs = 4 if generated else 2
        self.default_batch_size = 256
        self.default_learning_rate = 3e-3 if generated else 1e-3

    def _training_rows(self) -> Tensor:
        rows = torch.arange(len(self.data.rows("train")))
        if self._limit is None or self._limit >= len(rows):
            return rows
        chosen = np.random.default_rng([abs(self._seed), 2]).permutation(len(rows))[: self._limit]
        return torch.from_numpy(np.sort(chosen))

    def _identity_columns(self) -> Tensor:
        """(I,) bool."""
        return torch.tensor([field.is_identity for field in self.data.fields for _ in range(field.width)])

    def train_batches(
        self, *, epoch: int, batch_size: int, seed: int, device: torch.device, train_fraction: float = 1.0
    ) -> Iterator[Batch]:
        """Triples ids (B, I) int64, numbers (B, D) float32, clicks (B,) float32. What is left of the last full batch
        sits out this epoch."""
        kept = self._kept(train_fraction, seed)
        count = self.batches_per_epoch(batch_size, train_fraction)
        # Drawn on the CPU, so all devices see the same.
        generator = torch.Generator().manual_seed(_mixed(seed, 1 + epoch))
        order = kept[torch.randperm(len(kept), generator=generator)]
        for number in range(count):
            ids, dense, clicks = self._rows(order[number * batch_size : (number + 1) * batch_size], device)
            yield self._hidden(ids, generator), dense, clicks

    def batches_per_epoch(self, batch_size: int, train_fraction: float = 1.0) -> int:
        """Number of full batches, or 1 when there are fewer samples than ``batch_size``."""
        if batch_size < 1:
            raise UserMistake(f"batch_size={batch_size} must be at least 1")
        return max(1, self._kept_count(train_fraction) // batch_size)

    def _kept_count(self, fraction: float) -> int:
        if not 0 < fraction <= 1:
            raise UserMistake(f"train_fraction={fraction} must lie in (0, 1]")
        return math.ceil(fraction * len(self._train))

    def _kept(self, fraction: float, seed: int) -> Tensor:
        count = self._kept_count(fraction)
        if count == len(self._train):
            return self._train
        generator = torch.Generator().manual_seed(_mixed(seed, 0))
        return self._train[torch.randperm(len(self._train), generator=generator)[:count]]

    def _hidden(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """``ids`` with some users and films unknown."""
        if not self.unknown_share or not self._identities.any():
            return ids
        hide = (torch.rand(ids.shape, generator=generator) < self.unknown_share) & self._identities
        return ids.masked_fill(hide.to(ids.device), 0)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log loss in nats, averaged over the batch."""
        ids, dense, clicks = batch
        return F.binary_cross_entropy_with_logits(model(ids, dense).float()[:, 0], clicks)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, split: Split, device: torch.device, *, quick: bool = False
    ) -> dict[str, float]:
        """``auc`` in 0..1 and ``loss`` (log loss, nats) over the whole split.

        Raises TrialFailure("nan") when the loss is not finite.
        """
        rows = self.data.rows(split)
        outputs: list[Tensor] = []
        training = model.training
        model.eval()
        try:
            for start in range(rows.start, rows.stop, _EVALUATION_BATCH):
                some = torch.arange(start, min(start + _EVALUATION_BATCH, rows.stop))
                ids, dense, _ = self._rows(some, device)
                outputs.append(model(ids, dense).float()[:, 0])
        finally:
            model.train(training)
        logits = torch.cat(outputs).cpu().double()
        clicks = torch.from_numpy(self.data.clicks[rows.start : rows.stop]).double()
        loss = F.binary_cross_entropy_with_logits(logits, clicks).item()
        if not math.isfinite(loss):
            raise TrialFailure("nan", f"{split} loss is {loss}")
        return {"auc": auc_of(clicks.numpy(), logits.numpy()), "loss": loss}

    def example_inputs(self, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """Ids (B, I) and numbers (B, D) of validation samples, repeated where there are fewer than ``batch_size``."""
        rows = self.data.rows("validation")
        ids, dense, _ = self._rows(rows.start + torch.arange(batch_size) % len(rows), device)
        return ids, dense

    def describe(self) -> dict[str, Any]:
        """JSON facts: source, features, sizes of the splits and their shares of clicks."""
        data = self.data
        sizes = {part: len(data.rows(part)) for part in ("train", "validation", "test")}
        shares = {
            part: round(float(data.clicks[data.rows(part).start : data.rows(part).stop].mean()), 4)
            for part in sizes
        }
        return {
            "task": self.name,
            **data.facts,
            "splits": {**sizes, "train": len(self._train)},
            "clicks": shares,
            "fields": {field.name: field.vocabulary for field in data.fields},
            "numbers": list(data.dense_names),
            "seed": self._seed,
            "limit": self._limit,
            "unknown_share": self.unknown_share,
        }

    def _rows(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, numbers and clicks of these samples on ``device``, where all of them stay once they are there."""
        if device not in self._resident:
            data = self.data
            arrays = (data.ids, data.dense, data.clicks.astype(np.float32))
            ids, dense, clicks = (torch.from_numpy(np.ascontiguousarray(one)).to(device) for one in arrays)
            self._resident[device] = (ids, dense, clicks)
        rows = rows.to(device)
        ids, dense, clicks = self._resident[device]
        return ids[rows].long(), dense[rows], clicks[rows]


def _folder(data: str) -> Path:
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UserMistake(
            f"data={data!r} is neither {GENERATED!r} nor a folder; give a folder with the csv files of MovieLens"
        )
    return folder


def _mixed(seed: int, number: int) -> int:
    """One 63-bit seed of two numbers."""
    return int(np.random.SeedSequence([seed & (2**64 - 1), number]).generate_state(1, np.uint64)[0] >> 1)
