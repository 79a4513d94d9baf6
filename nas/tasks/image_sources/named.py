"""torchvision's data sets by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.errors import UserMistake
from nas.tasks.image_sources.base import Part, Sample, Source, first_line, stamp
from nas.tasks.image_sources.idx import idx_files, idx_source

__all__ = ["TORCHVISION", "torchvision_source"]

_Parts = dict[Part, dict[str, Any]]


@dataclass(frozen=True)
class _Named:
    """A torchvision data set: its files below data_root, and the arguments that select each part."""

    files: str
    parts: _Parts
    mirror: bool = True
    idx: bool = False


_BY_FLAG: _Parts = {"train": {"train": True}, "test": {"train": False}}
_BY_NAME: _Parts = {"train": {"split": "train"}, "test": {"split": "test"}}
_BY_NAME_3: _Parts = {**_BY_NAME, "validation": {"split": "val"}}
TORCHVISION: dict[str, _Named] = {
    "CIFAR10": _Named("cifar-10-batches-py/*", _BY_FLAG),
    "CIFAR100": _Named("cifar-100-python/*", _BY_FLAG),
    "MNIST": _Named("MNIST/raw/*", _BY_FLAG, mirror=False, idx=True),
    "FashionMNIST": _Named("FashionMNIST/raw/*", _BY_FLAG, idx=True),
    "KMNIST": _Named("KMNIST/raw/*", _BY_FLAG, mirror=False, idx=True),
    "USPS": _Named("usps*", _BY_FLAG, mirror=False),
    "SVHN": _Named("*_32x32.mat", _BY_NAME, mirror=False),
    "STL10": _Named("stl10_binary/*", _BY_NAME),
    "GTSRB": _Named("gtsrb/*", _BY_NAME, mirror=False),
    "Food101": _Named("food-101/*", _BY_NAME),
    "Flowers102": _Named("flowers-102/*", _BY_NAME_3),
    "DTD": _Named("dtd/*/*", _BY_NAME_3),
    "EuroSAT": _Named("eurosat/*/*", {"train": {}}),
}


def torchvision_source(name: str, data_root: str | None, download: bool) -> Source:
    """The data set ``name``, a key of ``TORCHVISION``, with its files in ``data_root``."""
    if data_root is None:
        raise UserMistake(f"data={name!r} is a torchvision data set; give data_root, the folder of its files")
    named, root = TORCHVISION[name], Path(data_root)
    way_out = f"put them there, or set download=true to let torchvision fetch them; data_root={data_root!r}"

    def opened(part: Part, fetch: bool) -> Any:
        from torchvision import datasets

        try:
            return getattr(datasets, name)(str(root), download=fetch, **named.parts[part])
        except (RuntimeError, OSError) as error:
            raise UserMistake(f"data={name!r} cannot be used ({first_line(error)}): {way_out}") from error

    def samples() -> Iterator[Sample]:
        for part in named.parts:
            dataset = opened(part, fetch=False)
            for index in range(len(dataset)):
                image, label = dataset[index]
                yield Sample(part, int(label), f"{index} of {name} {part}", image)

    if download:
        for part in named.parts:
            opened(part, fetch=True)
    if named.idx:
        # Read by us: torchvision overlooks files that are still gzipped, as they are handed out.
        for folder in (root / name / "raw", root):
            if "train" in idx_files(folder):
                return idx_source(name, folder, named.mirror)
    files = [file for file in root.glob(named.files) if file.exists()]
    if not files or named.idx:
        raise UserMistake(f"data={name!r}: no files at {root / named.files}: {way_out}")
    return Source(name, [name, stamp(root, files)], samples, named.mirror)
