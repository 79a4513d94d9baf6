"""IDX files, the format of MNIST and its kin."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nas.errors import UserMistake
from nas.tasks.image_sources.base import Part, Sample, Source, stamp
from nas.tasks.image_sources.compressed import decompressed, unpacked_limit

__all__ = ["idx_files", "idx_source"]

_IDX_NAMES: dict[Part, str] = {"train": "train", "test": "t10k"}


def idx_files(root: Path) -> dict[Part, tuple[Path, Path]]:
    """(images, labels) of each part in MNIST's own file naming, plain or gzipped."""
    found: dict[Part, tuple[Path, Path]] = {}
    for part, stem in _IDX_NAMES.items():
        for end in ("", ".gz"):
            pair = root / f"{stem}-images-idx3-ubyte{end}", root / f"{stem}-labels-idx1-ubyte{end}"
            if part not in found and all(file.is_file() for file in pair):
                found[part] = pair
    return found


def idx_source(name: str, root: Path, mirror: bool) -> Source:
    """The pairs of files that ``idx_files`` finds in ``root``."""
    files = idx_files(root)

    def samples() -> Iterator[Sample]:
        for part, (image_file, label_file) in files.items():
            images, labels = _idx_array(image_file, 3), _idx_array(label_file, 1)
            if len(images) != len(labels):
                sizes = f"{len(images)} images but {len(labels)} labels"
                raise UserMistake(f"{image_file.name}: {sizes}; get both files again")
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield Sample(part, int(label), f"{number} of {image_file.name}", Image.fromarray(image))

    return Source(name, stamp(root, (file for pair in files.values() for file in pair)), samples, mirror)


def _idx_array(path: Path, dimensions: int) -> NDArray[np.uint8]:
    limit = unpacked_limit(path)
    start = 4 + 4 * dimensions
    try:
        with decompressed(path) as file:
            content = file.read(limit)
        # 8 is the type code of unsigned bytes; the fourth byte is the number of dimensions.
        if content[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"no unsigned bytes in {dimensions} dimensions")
        shape = [int(size) for size in np.frombuffer(content[4:start], ">u4")]
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserMistake(f"IDX file {path.name!r} is damaged ({error}); get it again") from error
