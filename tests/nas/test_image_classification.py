"""Image classification: every kind of source, its pixels as they are, and the splits."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.errors import UserMistake
from nas.tasks import make_task
from nas.tasks.base import Task
from nas.tasks.image_classification import ImageClassification, stratified
from nas.tasks.image_data import load_images
from spaces.signature import ImageSignature
from tests.conformance.task import TaskConformance, tiny_model
from tests.nas._images import (
    CLASSES,
    Images,
    check,
    corpus,
    draw,
    load,
    made,
    members,
    row_keys,
    write_folder,
    write_idx,
    write_parquet,
    write_tar,
)


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


def test_digits_are_resized_like_files(tmp_path: Path) -> None:
    task = made(data="digits", image_size=32)
    assert task.signature == ImageSignature(channels=1, height=32, width=32, classes=10)
    assert task.describe()["image"] == [1, 32, 32]
    assert task.describe()["notes"] == ["images resized to 32x32 (as asked; option image_size)"]
    assert task.split_indices.keys() == made().split_indices.keys()
    assert row_keys(task) == row_keys(made()), "the size has no say in who is in which split"
    digits = load_images("digits", data_root=None, cache_dir=tmp_path)
    chosen = [np.flatnonzero(digits.labels["train"] == label)[:3] for label in range(3)]
    files = {
        ("", name): [digits.images["train"][row, 0] for row in rows]
        for name, rows in zip(CLASSES, chosen, strict=True)
    }
    found = load(write_folder(tmp_path / "data", files), tmp_path / "cache", image_size=32)
    own = task._data.images["train"][np.concatenate(chosen)]
    assert {image.tobytes() for image in own} == {image.tobytes() for image in found.images["train"]}


def test_height_and_width_may_differ(tmp_path: Path) -> None:
    task = made(image_size=[16, 24])
    assert task.signature == ImageSignature(channels=1, height=16, width=24, classes=10)
    assert task.describe()["notes"] == ["images resized to 16x24 (as asked; option image_size)"]
    image = np.zeros((48, 72), np.uint8)
    image[:24] = 255
    images: Images = {("", name): [image, image] for name in CLASSES}
    found = load(write_folder(tmp_path / "data", images), tmp_path / "cache", image_size=(16, 24))
    pixels = found.images["train"]
    assert pixels.shape == (6, 1, 16, 24)
    assert int(pixels[:, :, :6].min()) > 200 > 50 > int(pixels[:, :, 10:].max())


def test_the_size_that_they_have_changes_nothing() -> None:
    plain, asked = made(), made(image_size=8, channels=1)
    assert asked.describe() == plain.describe()
    for one, other in zip(_epoch(plain), _epoch(asked), strict=True):
        assert torch.equal(one, other)


def test_grey_images_for_models_of_colour(tmp_path: Path) -> None:
    task = made(image_size=16, channels=3, augment="none")
    plain = made(image_size=16, augment="none")
    assert task.signature == ImageSignature(channels=3, height=16, width=16, classes=10)
    assert task.augment == plain.augment
    assert made(channels=3).augment == "shift"
    assert "grey images given as 3 equal channels (option channels)" in task.describe()["notes"]
    assert task.describe()["mean"] == plain.describe()["mean"] * 3
    for one, other in zip(_epoch(task), _epoch(plain), strict=True):
        assert torch.equal(one, other.expand(-1, 3, -1, -1))
    assert task.example_inputs(2, torch.device("cpu"))[0].shape == (2, 3, 16, 16)
    assert 0 <= task.evaluate(tiny_model(task.signature), "test", torch.device("cpu"))["accuracy"] <= 1
    colour = write_folder(tmp_path / "data", corpus({"": 5}))
    with pytest.raises(
        UserMistake, match="channels=1: the images of 'data' have 3, and only grey ones can be repeated"
    ):
        made(data=str(colour), cache_dir=str(tmp_path / "cache"), channels=1)


def _epoch(task: ImageClassification) -> list[torch.Tensor]:
    batches = task.train_batches(epoch=0, batch_size=64, seed=0, device=torch.device("cpu"))
    return [batch[0] for batch in batches]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": "digitz"},
            r"data='digitz' does not exist \(did you mean 'digits'\?\); give 'digits', a torchvision",
        ),
        ({"data": "MNIST"}, r"data='MNIST' is a torchvision data set; give data_root"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0 must lie in \[0, 1\)"),
        (
            {"image_size": [16]},
            r"image_size=\[16\] must lie in 4\.\.1024 pixels; one number, or height and width",
        ),
        ({"image_size": 2}, r"image_size=2 must lie in 4\.\.1024 pixels"),
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"image_size": "big"}, r"option image_size='big' must be int \| list\[int\] \| None"),
        ({"augment": "cutmix"}, r"option augment='cutmix' must be Literal\['auto', 'none', 'shift'"),
        ({"limits": 5}, r"no option 'limits' \(did you mean 'limit'\?\); known: data, data_root"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        make_task("image_classification", **options)


def test_too_few_images_to_cut(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", corpus({"": 2}))
    with pytest.raises(
        UserMistake, match=r"class 'ant' has 2 training images but needs 3, because test and validation"
    ):
        made(data=str(data), cache_dir=str(tmp_path / "cache"))


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
