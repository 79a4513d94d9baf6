"""Batches of images: who is in them, augmentation, evaluation, and that they can be learned."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nas.errors import TrialFailure, UserMistake
from nas.tasks.image_classification import _moved
from nas.tasks.image_data import load_images
from tests.conformance.task import tiny_model
from tests.nas._images import corpus, made, write_folder

CPU = torch.device("cpu")


def test_fraction_keeps_the_same_images() -> None:
    task = made(augment="none")

    def images(epoch: int, fraction: float) -> set[bytes]:
        found = task.train_batches(epoch=epoch, batch_size=1, seed=2, device=CPU, train_fraction=fraction)
        return {batch[0].numpy().tobytes() for batch in found}

    assert images(0, 0.2) == images(3, 0.2)
    assert len(images(0, 0.2)) == pytest.approx(0.2 * 1079, abs=1)
    with pytest.raises(UserMistake, match=r"train_fraction=0 must lie in \(0, 1\]"):
        task.batches_per_epoch(8, 0)


def test_batches_are_normalised() -> None:
    task = made(augment="none")
    images = torch.cat([b[0] for b in task.train_batches(epoch=0, batch_size=13, seed=0, device=CPU)])
    assert len(images) == 1079  # 13 divides it: every image once
    assert float(images.mean()) == pytest.approx(0, abs=1e-4)
    assert float(images.std()) == pytest.approx(1, abs=1e-3)


def test_labels_follow_their_images() -> None:
    task = made(augment="none")
    origin, rows = task.split_indices["train"]
    source = load_images("digits", data_root=None, cache_dir=Path("unused"))
    known: dict[bytes, set[int]] = {}
    for image, label in zip(source.images[origin][rows], source.labels[origin][rows], strict=True):
        known.setdefault(image.tobytes(), set()).add(int(label))
    mean, deviation = task.describe()["mean"][0], task.describe()["deviation"][0]
    for images, labels in task.train_batches(epoch=0, batch_size=64, seed=0, device=CPU):
        raw = ((images * deviation + mean) * 255).round().to(torch.uint8)
        for image, label in zip(raw.numpy(), labels.tolist(), strict=True):
            assert label in known[image.tobytes()]


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_moves_every_image_on_its_own(flip: bool) -> None:
    images = torch.randint(1, 256, (40, 2, 6, 7), dtype=torch.uint8)
    moved = _moved(images, 2, flip, torch.Generator().manual_seed(0))
    seen = set()
    for before, after in zip(images, moved, strict=True):
        padded = nn.functional.pad(before, (2, 2, 2, 2))
        fits = [
            (y, x, mirrored)
            for y in range(5)
            for x in range(5)
            for mirrored in (False, True)
            if torch.equal(after, _cut(padded, y, x, mirrored))
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len({(y, x) for y, x, _ in seen}) > 12
    assert {mirrored for *_, mirrored in seen} == ({True, False} if flip else {False})


def _cut(padded: Tensor, y: int, x: int, mirrored: bool) -> Tensor:
    window = padded[:, y : y + 6, x : x + 7]
    return window.flip(2) if mirrored else window


def test_augmentation_fits_the_source(tmp_path: Path) -> None:
    colour = write_folder(tmp_path / "colour", corpus({"": 5}))
    grey = write_folder(tmp_path / "grey", corpus({"": 5}, (9, 8)))
    cache = str(tmp_path / "cache")
    assert made(data=str(colour), cache_dir=cache).augment == "crop+flip"
    assert made(data=str(colour), cache_dir=cache, augment="crop").augment == "crop"
    assert made(data=str(grey), cache_dir=cache).augment == "shift"
    assert made(data=str(colour), cache_dir=cache).label_smoothing == 0.1
    assert made().label_smoothing == 0.0


def test_evaluation_is_the_definition() -> None:
    task = made()
    model = tiny_model(task.signature)
    (images,) = task.example_inputs(359, CPU)
    origin, rows = task.split_indices["validation"]
    labels = torch.from_numpy(
        load_images("digits", data_root=None, cache_dir=Path("unused")).labels[origin][rows]
    )
    with torch.no_grad():
        logits = model(images)
    metrics = task.evaluate(model, "validation", CPU)
    assert metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert metrics["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_nan_is_a_failed_trial() -> None:
    task = made()
    model = tiny_model(task.signature)
    next(model.parameters()).data.fill_(math.nan)
    with pytest.raises(TrialFailure, match="test loss is nan") as failure:
        task.evaluate(model, "test", CPU)
    assert failure.value.kind == "nan"


def test_a_small_network_learns_the_digits() -> None:
    task = made()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    before = task.evaluate(model, "validation", CPU)
    for epoch in range(4):
        for batch in task.train_batches(epoch=epoch, batch_size=32, seed=0, device=CPU):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
    after = task.evaluate(model, "test", CPU)
    assert before["accuracy"] < 0.3
    assert after["accuracy"] > 0.85
    assert after["loss"] < before["loss"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_sees_the_same_batches() -> None:
    task, device = made(), torch.device("cuda", 0)
    pairs = zip(
        task.train_batches(epoch=1, batch_size=32, seed=0, device=CPU),
        task.train_batches(epoch=1, batch_size=32, seed=0, device=device),
        strict=True,
    )
    for (images, labels), (gpu_images, gpu_labels) in pairs:
        assert gpu_images.device == device
        assert torch.allclose(images, gpu_images.cpu(), atol=1e-5)
        assert torch.equal(labels, gpu_labels.cpu())
