"""Image classification: scikit-learn's digits by default, or any source of ``nas.tasks.image_data``.

Letters: B batch, C channels, H height, W width, N images of a split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nas.errors import TrialFailure, UserMistake
from nas.tasks import register_task
from nas.tasks.base import Batch, Objective, Split, Task
from nas.tasks.cache import default_cache_dir
from nas.tasks.image_data import ImageData, load_images, with_channels
from nas.tasks.image_sources.base import Part
from spaces.signature import ImageSignature

__all__ = ["Augmentation", "ImageClassification", "cut_splits", "stratified"]

Augmentation = Literal["auto", "none", "shift", "crop", "crop+flip"]

_RESIDENT_BYTES = 2 << 30  # a split below this is moved to the device once and stays there
_STATISTICS_IMAGES = 10_000  # more do not change the mean and the deviation visibly
_EVALUATION_VALUES = 1 << 23  # input values in one evaluation batch
_THREE_WAY_SHARE = 0.2  # of validation, and of test, when the source brings training images only
_SHARE, _MOST = 0.1, 5000  # of validation or test, when the source brings the other
# Measured on the digits with a small ViT, 30 epochs, two seeds: test error 1.0 % with both, 2.6 % with little noise
# alone, 4.2 % with neither; moving every image by one of its eight pixels needs several times the epochs.
_NOISE = 0.3  # standard deviation, in units of the normalised digits
_SMALL_SIDE, _SMALL_SHIFTED = 16, 0.2  # below this side only this share of the images is shifted


@dataclass(frozen=True)
class _Pixels:
    """One split: rows ``indices`` of ``images`` (N, C, H, W) uint8, and the labels (N,) int64 of those rows."""

    images: Tensor
    indices: Tensor
    labels: Tensor

    @property
    def nbytes(self) -> int:
        return len(self.indices) * self.images[0].numel()


@register_task("image_classification")
class ImageClassification(Task):
    """Images to classes, judged by accuracy.

    Three splits, none sharing an image with another: candidates are trained on the first, chosen by ``validation``,
    and only the final figure comes from ``test``. Splits that the source brings are kept; of validation and test,
    one that is missing is cut from the training images (10 %, at most 5,000), and with both missing all images are
    cut 60/20/20. Cuts are stratified and depend on ``seed`` alone.

    Args:
        data: ``digits`` (default), a torchvision name, a directory, a parquet file or a tar archive; see
            ``nas.tasks.image_data.load_images``.
        data_root: folder of a torchvision data set's files.
        cache_dir: where decoded arrays are kept; ./runs/.cache by default. They are decoded once on each machine and
            mapped by all of its processes; on a cluster, a disk of each node's own is the best place.
        seed: of the cuts and of ``limit``.
        image_size: side in pixels, or [height, width], to which images are resized.
        channels: of the images as models get them, at least 1. Grey ones are repeated to as many; others cannot be
            given otherwise than they are.
        limit: number of training images to keep, for quick tries.
        label_smoothing: of the training loss, in [0, 1); 0 for the digits and 0.1 otherwise by default.
        augment: ``shift`` by up to 1/14 of the side (at least 1 pixel; one image in five below 16 pixels, all
            otherwise), ``crop`` after padding by 4 pixels (an eighth of the side beyond 32), ``crop+flip``, or
            ``none``. ``auto``: shift for grey images, crop+flip for coloured ones, crop where a mirrored image means
            something else. The digits also get a little noise.
        image_column, label_column: of a parquet file.
        download: lets torchvision fetch missing files; nothing is ever fetched without it.

    Raises:
        UserMistake: data that cannot be used, or an option out of its range.
    """

    objective = Objective("accuracy", "maximize")
    signature: ImageSignature

    def __init__(
        self,
        data: str | None = None,
        data_root: str | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
        *,
        image_size: int | list[int] | None = None,
        channels: int | None = None,
        limit: int | None = None,
        label_smoothing: float | None = None,
        augment: Augmentation = "auto",
        image_column: str | None = None,
        label_column: str | None = None,
        download: bool = False,
    ):
        if label_smoothing is not None and not 0 <= label_smoothing < 1:
            raise UserMistake(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        loaded = load_images(
            data or "digits",
            data_root=data_root,
            cache_dir=default_cache_dir(cache_dir),
            image_size=image_size,
            image_column=image_column,
            label_column=label_column,
            download=download,
        )
        self._data, channels = with_channels(loaded, channels)
        digits = data is None or data.lower() == "digits"
        self._seed = seed
        self._limit = limit
        self.split_indices, self._cut = cut_splits(self._data, seed, limit)
        self._splits = {part: self._pixels(part) for part in self.split_indices}
        self._resident: dict[tuple[Part, torch.device], _Pixels] = {}
        own, height, width = self._splits["train"].images.shape[1:]
        self.signature = ImageSignature(channels, height, width, len(self._data.classes))
        self.label_smoothing = label_smoothing if label_smoothing is not None else (0.0 if digits else 0.1)
        self.augment = self._chosen(augment, own)
        self._noise = _NOISE if digits and augment != "none" else 0.0
        # As many as the signature's channels: normalising is then what repeats a grey image.
        self._mean, self._deviation = (
            one.expand(channels, 1, 1) for one in _statistics(self._splits["train"])
        )
        self.default_epochs = 11 if digits else 10
        self.default_batch_size = 32 if digits else 128
        self.default_learning_rate = 3e-3 if digits else 1e-3

    def _chosen(self, augment: Augmentation, own: int) -> Augmentation:
        if augment != "auto":
            return augment
        if own == 1:
            return "shift"
        return "crop+flip" if self._data.mirror else "crop"

    def _pixels(self, part: Part) -> _Pixels:
        origin, indices = self.split_indices[part]
        labels = self._data.labels[origin][indices]
        images = torch.from_numpy(self._data.images[origin])
        return _Pixels(images, torch.from_numpy(indices), torch.from_numpy(labels))

    def train_batches(
        self, *, epoch: int, batch_size: int, seed: int, device: torch.device, train_fraction: float = 1.0
    ) -> Iterator[Batch]:
        """Pairs (B, C, H, W) float32, (B,) int64. What is left of the last full batch sits out this epoch."""
        kept = self._kept(train_fraction, seed)
        count = self.batches_per_epoch(batch_size, train_fraction)
        generator = torch.Generator().manual_seed(_mixed(seed, epoch))
        order = kept[torch.randperm(len(kept), generator=generator)]
        for number in range(count):
            chosen = order[number * batch_size : (number + 1) * batch_size]
            images, labels = self._rows("train", chosen, device)
            yield self._augmented(images, generator), labels

    def batches_per_epoch(self, batch_size: int, train_fraction: float = 1.0) -> int:
        """Number of full batches, or 1 when there are fewer images than ``batch_size``."""
        if batch_size < 1:
            raise UserMistake(f"batch_size={batch_size} must be at least 1")
        return max(1, len(self._kept(train_fraction, 0)) // batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy with label smoothing, averaged over the batch."""
        images, labels = batch
        return F.cross_entropy(model(images).float(), labels, label_smoothing=self.label_smoothing)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, split: Split, device: torch.device, *, quick: bool = False
    ) -> dict[str, float]:
        """``accuracy`` in 0..1 and ``loss`` (cross-entropy without smoothing, nats) over the whole split.

        Raises TrialFailure("nan") when the loss is not finite.
        """
        signature = self.signature
        size = max(
            8, min(512, _EVALUATION_VALUES // (signature.channels * signature.height * signature.width))
        )
        total = len(self._splits[split].labels)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        losses: list[Tensor] = []
        training = model.training
        model.eval()
        try:
            for start in range(0, total, size):
                images, labels = self._rows(split, torch.arange(start, min(start + size, total)), device)
                logits = model(self._normalised(images)).float()
                correct += (logits.argmax(1) == labels).sum()
                losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        finally:
            model.train(training)
        loss = torch.stack(losses).cpu().double().sum().item() / total
        if not math.isfinite(loss):
            raise TrialFailure("nan", f"{split} loss is {loss}")
        return {"accuracy": correct.item() / total, "loss": loss}

    def example_inputs(self, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """One tensor (B, C, H, W) of validation images, repeated where there are fewer than ``batch_size``."""
        rows = torch.arange(batch_size) % len(self._splits["validation"].labels)
        images, _ = self._rows("validation", rows, device)
        return (self._normalised(images),)

    def describe(self) -> dict[str, Any]:
        """JSON facts: source, classes, sizes of the splits and how they were cut, preparation of the images."""
        signature = self.signature
        return {
            "task": self.name,
            "source": self._data.name,
            "classes": list(self._data.classes),
            "splits": {part: len(pixels.labels) for part, pixels in self._splits.items()},
            "cut": self._cut,
            "seed": self._seed,
            "limit": self._limit,
            "image": [signature.channels, signature.height, signature.width],
            "mean": self._mean.flatten().tolist(),
            "deviation": self._deviation.flatten().tolist(),
            "augment": self.augment,
            "noise": self._noise,
            "label_smoothing": self.label_smoothing,
            "notes": list(self._data.notes),
        }

    def _kept(self, fraction: float, seed: int) -> Tensor:
        """Positions within the training split that count at this fraction."""
        labels = self._splits["train"].labels
        if not 0 < fraction <= 1:
            raise UserMistake(f"train_fraction={fraction} must lie in (0, 1]")
        if fraction == 1:
            return torch.arange(len(labels))
        rng = np.random.default_rng(_mixed(seed, 0))
        return torch.from_numpy(stratified(labels.numpy(), fraction * len(labels), rng)[0])

    def _rows(self, part: Part, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) uint8 and (B,) int64 on ``device``."""
        pixels = self._splits[part]
        if device.type != "cpu" and pixels.nbytes < _RESIDENT_BYTES:
            pixels = self._on_device(part, device)
            positions = positions.to(device)
        rows = pixels.indices[positions]
        return pixels.images[rows].to(device), pixels.labels[positions].to(device)

    def _on_device(self, part: Part, device: torch.device) -> _Pixels:
        if (part, device) not in self._resident:
            pixels = self._splits[part]
            images = pixels.images[pixels.indices].to(device)
            rows = torch.arange(len(images), device=device)
            self._resident[part, device] = _Pixels(images, rows, pixels.labels.to(device))
        return self._resident[part, device]

    def _normalised(self, images: Tensor) -> Tensor:
        mean, deviation = self._mean.to(images.device), self._deviation.to(images.device)
        return (images.float() / 255 - mean) / deviation

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Every sample moved on its own; the random numbers are drawn on the CPU, so all devices see the same."""
        height, width = images.shape[2:]
        side = min(height, width)
        if self.augment == "shift":
            moved = _moved(images, max(1, side // 14), False, generator)
            share = _SMALL_SHIFTED if side < _SMALL_SIDE else 1.0
            which = torch.rand(len(images), 1, 1, 1, generator=generator) < share
            images = torch.where(which.to(images.device), moved, images)
        elif self.augment in ("crop", "crop+flip"):
            images = _moved(images, max(4, side // 8), self.augment == "crop+flip", generator)
        result = self._normalised(images)
        if self._noise:
            result = result + self._noise * torch.randn(result.shape, generator=generator).to(result.device)
        return result


def _moved(images: Tensor, reach: int, flip: bool, generator: torch.Generator) -> Tensor:
    """(B, C, H, W) -> same: each image shifted by up to ``reach`` pixels (black comes in), half of them mirrored."""
    batch, channels, height, width = images.shape
    device = images.device
    offsets = torch.randint(0, 2 * reach + 1, (2, batch, 1), generator=generator).to(device)
    mirrored = (torch.rand(batch, 1, generator=generator) < 0.5).to(device) & flip
    padded = F.pad(images, (reach, reach, reach, reach))
    across = torch.arange(width, device=device)
    rows = offsets[0] + torch.arange(height, device=device)  # (B, H)
    columns = offsets[1] + torch.where(mirrored, width - 1 - across, across)  # (B, W)
    places = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (B, H, W)
    places = places.view(batch, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, places).view(batch, channels, height, width)


def cut_splits(
    data: ImageData, seed: int, limit: int | None
) -> tuple[dict[Part, tuple[Part, NDArray[np.int64]]], str]:
    """For each split the part of the source that it comes from and its row numbers there; and the cut in words.

    Raises UserMistake when a class has too few images, or ``limit`` is below the number of classes.
    """
    rng = np.random.default_rng(_mixed(seed, 1))
    labels = data.labels["train"]
    taken: dict[Part, tuple[Part, NDArray[np.int64]]] = {
        part: (part, np.arange(len(values))) for part, values in data.labels.items()
    }
    missing: list[Part] = [part for part in ("test", "validation") if part not in taken]
    rest = np.arange(len(labels))
    share = min(_SHARE * len(labels), _MOST) if len(missing) == 1 else _THREE_WAY_SHARE * len(labels)
    for left, part in zip(range(len(missing), 0, -1), missing, strict=True):
        _check_counts(data, labels[rest], left + 1, missing)
        chosen, others = stratified(labels[rest], share, rng, leave=left)
        taken[part], rest = ("train", rest[chosen]), rest[others]
    if limit is not None:
        if limit < len(data.classes):
            raise UserMistake(f"limit={limit} must be at least the number of classes, {len(data.classes)}")
        rest = rest[stratified(labels[rest], min(limit, len(rest)), rng)[0]]
    taken["train"] = ("train", rest)
    words = "as the source brings them"
    if missing:
        words = f"{' and '.join(missing)} cut from the source's training images, stratified, by seed"
    order: tuple[Part, ...] = ("train", "validation", "test")
    return {part: taken[part] for part in order}, words


def _check_counts(data: ImageData, labels: NDArray[np.int64], least: int, missing: list[Part]) -> None:
    counts = np.bincount(labels, minlength=len(data.classes))
    if counts.min() < least:
        name = data.classes[int(counts.argmin())]
        raise UserMistake(
            f"data={data.name!r}: class {name!r} has {counts.min()} training images but needs {least}, because "
            f"{' and '.join(missing)} must be cut from them; add images or give folders train, validation, test"
        )


def stratified(
    labels: NDArray[np.int64], count: float, rng: np.random.Generator, *, leave: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted positions of ``count`` random samples, each class by its share (at least 1), and of the others.

    ``leave`` is the number of samples of each class that stay with the others in any case. ``count`` is rounded, and
    missed only where these two bounds leave no choice. How many are taken does not depend on ``rng``.
    """
    sizes = np.bincount(labels)
    quotas = count * sizes / len(labels)
    most = np.maximum(sizes - leave, 0)
    least = np.minimum(1, most)
    takes = np.clip(np.floor(quotas + 1e-9).astype(np.int64), least, most)
    while gap := round(count) - int(takes.sum()):
        step = 1 if gap > 0 else -1
        open_ = takes < most if gap > 0 else takes > least
        if not open_.any():
            break
        takes[np.where(open_, step * (quotas - takes), -np.inf).argmax()] += step
    chosen = np.zeros(len(labels), bool)
    for label, take in enumerate(takes):
        chosen[rng.permutation(np.flatnonzero(labels == label))[:take]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def _statistics(pixels: _Pixels) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel on the 0..1 scale, (C, 1, 1) each."""
    step = max(1, len(pixels.indices) // _STATISTICS_IMAGES)
    images = pixels.images[pixels.indices[::step]]
    values = images.transpose(0, 1).flatten(1)  # (C, N*H*W)
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in values]).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ levels
    deviation = (shares @ levels.square() - mean.square()).clamp_min(0).sqrt()
    # A constant channel would divide by zero; one grey level is the least that a deviation can mean.
    return mean.float()[:, None, None], deviation.clamp_min(1 / 255).float()[:, None, None]


def _mixed(seed: int, number: int) -> int:
    """One 63-bit seed of two numbers."""
    return int(np.random.SeedSequence([seed & (2**64 - 1), number]).generate_state(1, np.uint64)[0] >> 1)
