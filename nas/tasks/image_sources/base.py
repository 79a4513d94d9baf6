"""What every source of images gives, and the rules that hold for the files of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from nas.errors import UserMistake, first_line

__all__ = [
    "ACCEPTED",
    "PARTS",
    "PART_IN_NAME",
    "Columns",
    "Label",
    "Part",
    "Sample",
    "Source",
    "check_bytes",
    "first_line",
    "is_image",
    "part_of",
    "stamp",
]

Part = Literal["train", "validation", "test"]
Label = int | str
Columns = tuple[str | None, str | None]  # of images and of labels, as the user named them; None: by type
PARTS: dict[str, Part] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
PART_IN_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(PARTS)})(?=[-_.]|$)")
ACCEPTED = (
    "'digits', a torchvision name with data_root, a folder of class folders, a .parquet file, "
    "a .tar[.xz|.gz] archive, or a folder of IDX, parquet or archive files"
)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_MAX_IMAGE_BYTES = 64 << 20


@dataclass(frozen=True)
class Sample:
    """One image, encoded or open; ``where`` names it in messages."""

    part: Part
    label: Label
    where: str
    image: bytes | Image.Image


@dataclass(frozen=True)
class Source:
    """``stamp`` changes whenever the files do; ``samples`` starts again from the front at every call."""

    name: str
    stamp: Any
    samples: Callable[[], Iterable[Sample]]
    mirror: bool = True


def stamp(root: Path, files: Iterable[Path]) -> list[Any]:
    """What a change of the files changes: place, and name, size and time of every file."""
    stats = sorted((str(file.relative_to(root)), file.stat()) for file in files)
    return [str(root.resolve()), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def part_of(file: Path, root: Path) -> Part:
    """The part that a file's name tells, such as cifar10-train.tar.xz. Raises UserMistake if it tells none."""
    found = PART_IN_NAME.findall(file.name.lower())
    if len(set(found)) != 1:
        raise UserMistake(f"{file.name!r} in {root.name!r} must have one of {', '.join(PARTS)} in its name")
    return PARTS[found[0]]


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    path = PurePosixPath(name)
    return path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")


def check_bytes(size: int, where: str) -> None:
    """Raises UserMistake for an encoded image too large to be read."""
    if size > _MAX_IMAGE_BYTES:
        raise UserMistake(f"image {where} is larger than {_MAX_IMAGE_BYTES >> 20} MiB; shrink or remove it")
