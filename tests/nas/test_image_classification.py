"""Image classification: every kind of source, the splits, augmentation, the cache, and what is refused."""

from __future__ import annotations

import errno
import gzip
import io
import json
import logging
import lzma
import math
import os
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from nas.errors import TrialFailure, UnknownNameError, UserMistake
from nas.tasks import list_tasks, make_task, register_task
from nas.tasks.base import Task
from nas.tasks.cache import ArrayWriter, cached
from nas.tasks.image_classification import ImageClassification, _moved, stratified
from nas.tasks.image_data import load_images
from spaces.signature import ImageSignature
from tests.conformance.task import TaskConformance, tiny_model

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cow")
Images = dict[tuple[str, str], list[NDArray[np.uint8]]]  # (part, class) -> images


def draw(count: int, size: tuple[int, ...] = (9, 8, 3), seed: int = 0) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size, dtype=np.uint8) for _ in range(count)]


def corpus(parts: Mapping[str, int], size: tuple[int, ...] = (9, 8, 3)) -> Images:
    return {
        (part, name): draw(count, size, seed=100 * p + c)
        for p, (part, count) in enumerate(parts.items())
        for c, name in enumerate(CLASSES)
    }


def png(image: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def members(images: Images) -> list[tuple[str, bytes]]:
    """(path, content) in the order of the class names; no folder for an empty part name."""
    return [
        ("/".join(filter(None, (part, name, f"{number:03}.png"))), png(image))
        for (part, name), group in sorted(images.items())
        for number, image in enumerate(group)
    ]


def write_folder(root: Path, images: Images) -> Path:
    for name, content in members(images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, entries: list[tuple[str, bytes]]) -> Path:
    kind = {".xz": "w:xz", ".gz": "w:gz"}.get(path.suffix, "w")
    with tarfile.open(path, kind) as archive:  # type: ignore[call-overload]
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, images: Images, part: str, *, nested: bool, **columns: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(png(image), c) for c, name in enumerate(CLASSES) for image in images[part, name]]
    contents: list[Any] = [{"bytes": content, "path": "x.png"} if nested else content for content, _ in rows]
    table = {"image": contents, "label": [label for _, label in rows]}
    pq.write_table(
        pa.table({**table, **{name: [value] * len(rows) for name, value in columns.items()}}), path
    )
    return path


def write_idx(folder: Path, images: Images, *, packed: bool = False) -> Path:
    folder.mkdir(parents=True)
    for part, stem in (("train", "train"), ("test", "t10k")):
        rows = [(image, c) for c, name in enumerate(CLASSES) for image in images[part, name]]
        pixels = np.stack([image for image, _ in rows])
        labels = np.array([label for _, label in rows], np.uint8)
        for kind, array in (("images", pixels), ("labels", labels)):
            content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
            name = f"{stem}-{kind}-idx{array.ndim}-ubyte"
            (folder / (f"{name}.gz" if packed else name)).write_bytes(
                gzip.compress(content) if packed else content
            )
    return folder


def load(data: Path | str, cache: Path, **options: Any) -> Any:
    return load_images(str(data), cache_dir=cache, **{"data_root": None, **options})


def check(found: Any, images: Images, parts: Mapping[str, str]) -> None:
    """Exactly the drawn pixels with their labels, in whatever order."""
    for part, original in parts.items():
        expected = Counter(
            (c, image.tobytes()) for c, name in enumerate(CLASSES) for image in images[original, name]
        )
        array = found.images[part]
        layout = array.transpose(0, 2, 3, 1) if array.shape[1] == 3 else array[:, 0]
        pairs = zip(found.labels[part].tolist(), layout, strict=True)
        assert Counter((label, np.ascontiguousarray(image).tobytes()) for label, image in pairs) == expected
    assert set(found.images) == set(parts)


def made(**options: Any) -> ImageClassification:
    task = make_task("image_classification", **options)
    assert isinstance(task, ImageClassification)
    return task


def row_keys(task: Task) -> dict[str, list[Hashable]]:
    assert isinstance(task, ImageClassification)
    return {part: [(origin, int(row)) for row in rows] for part, (origin, rows) in task.split_indices.items()}


class TestDigits(TaskConformance):
    @pytest.fixture(scope="class")
    def task(self) -> Task:
        return make_task("image_classification")

    def split_keys(self, task: Task) -> dict[str, list[Hashable]]:
        return row_keys(task)

    def test_sizes(self, task: Task) -> None:
        assert task.describe()["splits"] == {"train": 1079, "validation": 359, "test": 359}
        assert task.signature == ImageSignature(channels=1, height=8, width=8, classes=10)

    def test_nothing_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        make_task("image_classification")
        assert not list(tmp_path.iterdir())


class TestPhotographs(TaskConformance):
    @pytest.fixture(scope="class")
    def task(self, tmp_path_factory: pytest.TempPathFactory) -> Task:
        root = tmp_path_factory.mktemp("photographs")
        images = corpus({"train": 40, "test": 10}, (32, 32, 3))
        return made(data=str(write_folder(root / "data", images)), cache_dir=str(root / "cache"))

    def split_keys(self, task: Task) -> dict[str, list[Hashable]]:
        return row_keys(task)


def test_class_folders(tmp_path: Path) -> None:
    images = corpus({"": 4})
    found = load(write_folder(tmp_path / "data", images), tmp_path / "cache")
    check(found, images, {"train": ""})
    assert found.classes == CLASSES


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "dev"])
def test_split_folders(tmp_path: Path, validation: str) -> None:
    images = corpus({"train": 4, validation: 2, "test": 3})
    found = load(write_folder(tmp_path / "data", images), tmp_path / "cache")
    check(found, images, {"train": "train", "validation": validation, "test": "test"})


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".tar.gz"])
@pytest.mark.parametrize("parts", [{"": 3}, {"train": 3, "test": 2}])
def test_archives(tmp_path: Path, suffix: str, parts: dict[str, int]) -> None:
    images = corpus(parts)
    prefixed = [(f"./data/{name}", content) for name, content in members(images)]
    found = load(write_tar(tmp_path / f"some{suffix}", prefixed), tmp_path / "cache")
    check(found, images, {part or "train": part for part in parts})


def test_folder_of_archives(tmp_path: Path) -> None:
    images = corpus({"train": 3, "test": 2})
    for part in ("train", "test"):
        # the archive's own name decides, whatever the folders inside are called
        inside = [
            (f"all/{name.split('/', 1)[1]}", content)
            for name, content in members(images)
            if name.startswith(part)
        ]
        write_tar(tmp_path / f"some-{part}.tar.xz", inside)
    found = load(tmp_path, tmp_path / "cache")
    check(found, images, {"train": "train", "test": "test"})


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_file(tmp_path: Path, nested: bool) -> None:
    images = corpus({"train": 5})
    file = write_parquet(tmp_path / "x.parquet", images, "train", nested=nested)
    check(load(file, tmp_path / "cache"), images, {"train": "train"})


def test_parquet_folder_and_columns(tmp_path: Path) -> None:
    images = corpus({"train": 5, "validation": 2, "test": 3})
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for part in ("train", "validation", "test"):
        name = f"{part}-00000-of-00001.parquet"
        write_parquet(tmp_path / "data" / "deep" / name, images, part, nested=True, group=7, note="n")
    found = load(tmp_path / "data", tmp_path / "cache")
    check(found, images, {part: part for part in ("train", "validation", "test")})
    with pytest.raises(
        UserMistake, match=r"label_column='image' is no fitting column of .*; fitting: label, group"
    ):
        load(tmp_path / "data", tmp_path / "cache", label_column="image")
    with pytest.raises(UserMistake, match=r"has one class only \(7\)"):
        load(tmp_path / "data", tmp_path / "cache", label_column="group")


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path: Path, packed: bool) -> None:
    images = corpus({"train": 5, "test": 2}, (28, 28))
    folder = write_idx(tmp_path / "root" / "MNIST" / "raw", images, packed=packed)
    check(load(folder, tmp_path / "cache"), images, {"train": "train", "test": "test"})
    named = load("mnist", tmp_path / "cache", data_root=str(tmp_path / "root"))
    check(named, images, {"train": "train", "test": "test"})
    assert (named.name, named.mirror) == ("MNIST", False)


def test_torchvision_set(tmp_path: Path) -> None:
    images = corpus({"": 4})
    write_folder(tmp_path / "root" / "eurosat" / "2750", images)
    found = load("EuroSAT", tmp_path / "cache", data_root=str(tmp_path / "root"))
    check(found, images, {"train": ""})


def test_path_wins_over_a_name_without_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = corpus({"": 3})
    write_folder(tmp_path / "cifar10", images)
    check(load("cifar10", tmp_path / "cache"), images, {"train": ""})
    with pytest.raises(
        UserMistake, match=r"data='CIFAR10': no files at .*cifar-10-batches-py.*download=true"
    ):
        load("cifar10", tmp_path / "cache", data_root=str(tmp_path))


def test_images_of_different_sizes_are_resized(tmp_path: Path) -> None:
    images = corpus({"": 2})
    images["", "cow"] = draw(2, (30, 50, 3))
    data = write_folder(tmp_path / "data", images)
    found = load(data, tmp_path / "cache")
    assert found.images["train"].shape == (6, 3, 224, 224)
    assert found.notes == (
        "images resized to 224x224 (they differ in size or exceed 64 pixels; option image_size)",
    )
    small = load(data, tmp_path / "cache", image_size=16)
    assert small.images["train"].shape == (6, 3, 16, 16)
    assert "resized to 16x16 (as asked" in small.notes[0]


def test_resizing_cuts_the_centre(tmp_path: Path) -> None:
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 32:64] = 255
    images: Images = {("", name): [image, image] for name in CLASSES}
    found = load(write_folder(tmp_path / "data", images), tmp_path / "cache", image_size=8)
    assert int(found.images["train"].min()) > 200


def test_grey_and_colour_become_colour(tmp_path: Path) -> None:
    images = corpus({"": 2}, (9, 8))
    images["", "cow"] = draw(2, (9, 8, 3))
    found = load(write_folder(tmp_path / "data", images), tmp_path / "cache")
    assert found.images["train"].shape == (6, 3, 9, 8)
    first = found.images["train"][0]
    assert np.array_equal(first, np.stack([images["", "ant"][0]] * 3))


def test_source_splits_are_kept(tmp_path: Path) -> None:
    images = corpus({"train": 40, "test": 7})
    task = made(data=str(write_folder(tmp_path / "data", images)), cache_dir=str(tmp_path / "cache"))
    assert task.describe()["splits"] == {"train": 108, "validation": 12, "test": 21}
    assert task.split_indices["test"][0] == "test"
    assert task.describe()["cut"].startswith("validation cut from")


def test_three_way_cut_is_stratified() -> None:
    task, again, other = made(), made(), made(seed=1)
    assert row_keys(task) == row_keys(again)
    assert row_keys(task) != row_keys(other)
    every = np.concatenate([rows for _, rows in task.split_indices.values()])
    assert sorted(every.tolist()) == list(range(1797))
    labels = load_images("digits", data_root=None, cache_dir=Path("unused")).labels["train"]
    whole = np.bincount(labels) / len(labels)
    for _, rows in task.split_indices.values():
        assert np.abs(np.bincount(labels[rows]) / len(rows) - whole).max() < 0.01


@pytest.mark.parametrize(("count", "leave"), [(10, 0), (37, 1), (100, 0), (3, 0), (90, 2)])
def test_stratified_counts(count: int, leave: int) -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    rng = np.random.default_rng(0)
    chosen, others = stratified(labels, count, rng, leave=leave)
    assert sorted([*chosen, *others]) == list(range(100))
    assert len(chosen) == count
    assert np.abs(np.bincount(labels[chosen]) - count * np.array([0.6, 0.3, 0.1])).max() <= 1
    assert set(labels[chosen].tolist()) == {0, 1, 2}
    assert (np.bincount(labels[others], minlength=3) >= leave).all()


def test_limit(tmp_path: Path) -> None:
    task = made(limit=100)
    assert task.describe()["splits"] == {"train": 100, "validation": 359, "test": 359}
    assert task.describe()["limit"] == 100
    assert {row for row in row_keys(task)["train"]} < {row for row in row_keys(made())["train"]}
    with pytest.raises(UserMistake, match="limit=3 must be at least the number of classes, 10"):
        made(limit=3)


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


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": "digitz"},
            r"data='digitz' does not exist \(did you mean 'digits'\?\); give 'digits', a torchvision",
        ),
        ({"data": "MNIST"}, r"data='MNIST' is a torchvision data set; give data_root"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0 must lie in \[0, 1\)"),
        ({"image_size": 2}, r"image_size=2 must lie in 4\.\.1024 pixels"),
        ({"image_size": "big"}, r"option image_size='big' must be int \| None"),
        ({"augment": "cutmix"}, r"option augment='cutmix' must be Literal\['auto', 'none', 'shift'"),
        ({"limits": 5}, r"no option 'limits' \(did you mean 'limit'\?\); known: data, data_root"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        make_task("image_classification", **options)


def test_wrong_folders(tmp_path: Path) -> None:
    cache, data = tmp_path / "cache", tmp_path / "data"
    data.mkdir()
    with pytest.raises(UserMistake, match=r"holds no class folders with images; give 'digits'"):
        load(data, cache)
    write_folder(data, {("", "ant"): draw(3)})
    with pytest.raises(UserMistake, match=r"has one class only \('ant'\); at least 2 are needed"):
        load(data, cache)
    (data / "bee").mkdir()
    with pytest.raises(UserMistake, match=r"class folder 'bee' of .* holds no images"):
        load(data, cache)
    (data / "bee" / "broken.jpg").write_bytes(png(draw(1, (40, 40, 3))[0], "JPEG")[:400])
    with pytest.raises(
        UserMistake, match=r"image '.*bee/broken\.jpg' cannot be decoded \(.*\); repair or remove it"
    ):
        load(data, cache)
    (data / "bee" / "broken.jpg").write_bytes(b"no image at all")
    with pytest.raises(UserMistake, match=r"broken\.jpg' cannot be decoded"):
        load(data, cache)
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(UserMistake, match=r"x\.zip' is a file of an unknown kind"):
        load(tmp_path / "x.zip", cache)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_classes_must_agree(tmp_path: Path) -> None:
    images = corpus({"train": 3, "test": 2})
    images["test", "dog"] = draw(1)
    with pytest.raises(UserMistake, match=r"class 'dog' of test has no training images"):
        load(write_folder(tmp_path / "data", images), tmp_path / "cache")


def test_too_few_images_to_cut(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", corpus({"": 2}))
    with pytest.raises(
        UserMistake, match=r"class 'ant' has 2 training images but needs 3, because test and validation"
    ):
        made(data=str(data), cache_dir=str(tmp_path / "cache"))


def test_images_without_a_class(tmp_path: Path) -> None:
    for number, name in enumerate(("stray.png", "train/stray.png")):
        path = write_tar(
            tmp_path / f"{number}.tar", [*members(corpus({"train": 2})), (name, png(draw(1)[0]))]
        )
        with pytest.raises(UserMistake, match=r"stray\.png' of \d\.tar lies in no class folder"):
            load(path, tmp_path / "cache")


@pytest.mark.parametrize("name", ["../../ant/evil.png", "/ant/evil.png", "ant/../../evil.png"])
def test_members_cannot_leave_the_archive(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = write_tar(folder / "x.tar", [(name, png(draw(1)[0]))])
    with pytest.raises(UserMistake, match=r"x\.tar: member '.*evil\.png' points outside the archive"):
        load(path, folder / "cache")
    assert not list(tmp_path.rglob("evil.png"))


def test_links_and_other_files_are_passed_over(tmp_path: Path) -> None:
    images = corpus({"": 3})
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("ant/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, content in [*members(images), ("ant/readme.txt", b"x"), ("__MACOSX/ant/._0.png", b"x")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    check(load(path, tmp_path / "cache"), images, {"train": ""})


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".tar.gz"])
def test_cut_archives_are_noticed(tmp_path: Path, suffix: str) -> None:
    whole = write_tar(tmp_path / f"x{suffix}", members(corpus({"": 4}, (30, 30, 3)))).read_bytes()
    content = len(whole) if suffix != ".tar" else whole.rstrip(b"\0").__len__()
    for place in np.linspace(0.05, 0.99, 12):
        (tmp_path / f"x{suffix}").write_bytes(whole[: int(place * content)])
        with pytest.raises(UserMistake, match=r"archive 'x\.tar.*' is damaged after .*; get it again"):
            load(tmp_path / f"x{suffix}", tmp_path / "cache")


def test_archive_with_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", members(corpus({"": 4})))
    with tarfile.open(path) as archive:
        place = archive.getmembers()[7].offset
    content = bytearray(path.read_bytes())
    content[place + 130] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserMistake, match=r"archive 'x\.tar' is damaged after 'bee/002\.png'"):
        load(path, tmp_path / "cache")


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = png(draw(1)[0])
    size = struct.pack(">II", 60_000, 60_000)
    huge = (
        small[:16]
        + size
        + small[24:29]
        + struct.pack(">I", zlib.crc32(small[12:16] + size + small[24:29]))
        + small[33:]
    )
    with pytest.raises(UserMistake, match=r"'ant/huge\.png' of x\.tar cannot be decoded \(.*pixels"):
        load(write_tar(tmp_path / "x.tar", [("ant/huge.png", huge)]), tmp_path / "cache")
    monkeypatch.setattr("nas.tasks.image_sources.compressed._MIN_UNPACKED_BYTES", 1 << 20)
    swollen = tmp_path / "swollen.tar.xz"
    swollen.write_bytes(
        lzma.compress(write_tar(tmp_path / "y.tar", [("ant/zeros.txt", bytes(8 << 20))]).read_bytes())
    )
    with pytest.raises(UserMistake, match=r"it swells to more than 200 times its size"):
        load(swollen, tmp_path / "cache")
    monkeypatch.setattr("nas.tasks.image_sources.base._MAX_IMAGE_BYTES", 100)
    with pytest.raises(UserMistake, match=r"is larger than \d+ MiB; shrink or remove it"):
        load(write_folder(tmp_path / "data", corpus({"": 3})), tmp_path / "cache")


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    deep = png(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)  # type: ignore[arg-type]
    with pytest.raises(UserMistake, match="has more than 8 bits a channel; convert it to 8 bits"):
        load(write_tar(tmp_path / "x.tar", [("ant/deep.png", deep)]), tmp_path / "cache")


def test_damaged_parquet_and_idx(tmp_path: Path) -> None:
    images = corpus({"train": 3, "test": 3}, (9, 8))
    file = write_parquet(tmp_path / "x.parquet", images, "train", nested=True)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserMistake, match=r"parquet file 'x\.parquet' cannot be read \(.*\); get it again"):
        load(file, tmp_path / "cache")
    folder = write_idx(tmp_path / "idx", images)
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(UserMistake, match=r"IDX file 'train-labels-idx1-ubyte' is damaged"):
        load(folder, tmp_path / "cache")


def test_parquet_without_labels(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = [png(image) for image in draw(4)]
    pq.write_table(pa.table({"image": content, "score": [0.5] * 4}), tmp_path / "x.parquet")
    with pytest.raises(UserMistake, match=r"x\.parquet has no column of labels; its columns: image, score"):
        load(tmp_path / "x.parquet", tmp_path / "cache")
    pq.write_table(pa.table({"image": content, "a": [1] * 4, "b": [2] * 4}), tmp_path / "y.parquet")
    with pytest.raises(
        UserMistake, match=r"y\.parquet has several label columns; choose label_column from a, b"
    ):
        load(tmp_path / "y.parquet", tmp_path / "cache")
    pq.write_table(pa.table({"image": content, "label": [1, 2, None, 1]}), tmp_path / "z.parquet")
    with pytest.raises(UserMistake, match=r"row 2 of z\.parquet has no label; remove the row"):
        load(tmp_path / "z.parquet", tmp_path / "cache")


# the cache


def test_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = corpus({"": 3})
    data, cache = write_folder(tmp_path / "data", images), tmp_path / "cache"
    load(data, cache)
    monkeypatch.setattr("nas.tasks.image_decoding._opened", None)
    check(load(data, cache), images, {"train": ""})
    monkeypatch.undo()
    images["", "ant"][0] ^= 255
    time.sleep(0.01)
    write_folder(data, images)
    check(load(data, cache), images, {"train": ""})


@pytest.mark.parametrize("name", ["train-images.npy", "train-labels.npy", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_found_and_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: str
) -> None:
    images = corpus({"": 3})
    data, cache = write_folder(tmp_path / "data", images), tmp_path / "cache"
    load(data, cache)
    (file,) = cache.rglob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "flip":
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING, "nas.tasks.cache"):
        check(load(data, cache), images, {"train": ""})
    assert len(caplog.records) == 1
    assert "is damaged" in caplog.text
    check(load(data, cache), images, {"train": ""})
    assert len(caplog.records) == 1
    assert sorted(path.name for path in cache.iterdir())[0] == ".lock"
    assert len(list(cache.iterdir())) == 2


def test_concurrent_users_decode_once(tmp_path: Path) -> None:
    calls = []

    def make(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        time.sleep(0.05)
        np.save(folder / "x.npy", np.arange(5))
        return {"n": 5}

    found: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(int(cached(tmp_path, "x", {"k": 1}, make).arrays["x"].sum()))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [10] * 4
    assert len(calls) == 1


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def full(folder: Path) -> dict[str, Any]:
        (folder / "x.npy").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        UserMistake, match=r"cache_dir='.*' cannot be written \(No space left on device\); give another"
    ):
        cached(tmp_path, "x", {}, full)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserMistake, match=r"cache_dir='.*file' cannot be written"):
        cached(tmp_path / "file", "x", {}, full)


def test_killed_writer_is_cleaned_up(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from nas.tasks.cache import cached\n"
        "def make(folder):\n"
        "    (folder / 'x.npy').write_bytes(b'half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "cached(pathlib.Path(sys.argv[1]), 'other', {'k': 2}, make)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(list(tmp_path.glob(".*.partial"))) == 1

    def make(folder: Path) -> dict[str, Any]:
        np.save(folder / "x.npy", np.arange(3))
        return {}

    assert cached(tmp_path, "x", {}, make).arrays["x"].tolist() == [0, 1, 2]
    assert not list(tmp_path.glob(".*.partial"))


def test_array_writer(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (137, 2, 3), dtype=np.uint8)
    with ArrayWriter(tmp_path / "x.npy", (2, 3), np.uint8) as writer:
        for row in rows:
            writer.append(row)
        with pytest.raises(ValueError, match=r"row \(3, 2\) uint8 does not fit \(2, 3\) uint8"):
            writer.append(rows[0].T)
    assert np.array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), rows)


# the registry


def test_known_names() -> None:
    assert {"image_classification", "translation"} <= set(list_tasks())
    with pytest.raises(
        UnknownNameError,
        match=r"unknown task 'image_clasification' \(did you mean 'image_classification'\?\)",
    ):
        make_task("image_clasification")
    with pytest.raises(UnknownNameError, match="unknown task 'no such'"):
        make_task("no such")


def test_third_party_tasks() -> None:
    task = make_task("nas.tasks.image_classification:ImageClassification", seed=1)
    assert task.describe()["seed"] == 1
    with pytest.raises(UserMistake, match=r"task 'nas\.errors:UserMistake' is not a subclass"):
        make_task("nas.errors:UserMistake")
    with pytest.raises(UserMistake, match=r"task 'no_such_module:X' cannot be loaded"):
        make_task("no_such_module:X")
    with pytest.raises(ValueError, match="task 'translation' is registered twice"):
        register_task("translation")(ImageClassification)
    assert ImageClassification.name == "image_classification"


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, json\n"
        "heavy = ('torch', 'torchvision', 'sklearn', 'tokenizers', 'pyarrow', 'sacrebleu', 'pydantic')\n"
        "import nas.tasks\n"
        "first = [name for name in heavy if name in sys.modules]\n"
        "nas.tasks.list_tasks()\n"
        "second = [name for name in heavy if name in sys.modules]\n"
        "nas.tasks.make_task('image_classification')\n"
        "third = [name for name in heavy if name in sys.modules]\n"
        "print(json.dumps([first, second, third]))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, second, third = json.loads(output)
    assert first == []
    assert second == ["torch"]
    # Where pandas is installed, scikit-learn loads it, and pandas pyarrow.
    assert set(third) - {"pyarrow"} == {"torch", "sklearn", "pydantic"}


needs_data = pytest.mark.skipif(
    "NAS_TEST_DATA" not in os.environ, reason="NAS_TEST_DATA (folder with cifar10/ and mnist/) is not set"
)


def real_data(name: str) -> Path:
    folder = Path(os.environ["NAS_TEST_DATA"]) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return folder


@needs_data
@pytest.mark.slow
def test_cifar10_archives(tmp_path: Path) -> None:
    facts = made(data=str(real_data("cifar10")), cache_dir=str(tmp_path)).describe()
    assert facts["splits"] == {"train": 45000, "validation": 5000, "test": 10000}
    assert facts["classes"] == [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    assert facts["mean"] == pytest.approx([0.491, 0.482, 0.447], abs=0.003)


@needs_data
@pytest.mark.slow
def test_mnist_files(tmp_path: Path) -> None:
    source = load(real_data("mnist"), tmp_path)
    assert source.labels["train"][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert {part: len(labels) for part, labels in source.labels.items()} == {"train": 60000, "test": 10000}
    assert source.images["train"].mean() / 255 == pytest.approx(0.13066, abs=1e-4)
