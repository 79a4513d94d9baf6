"""Labelled images from many sources, as one uint8 array for each part that the source brings.

Sources: scikit-learn's digits, torchvision data sets by name, IDX files, parquet files, tar archives of class
folders, directories of class folders. Everything but the digits is decoded once, in one pass from front to
back, and kept by ``nas.tasks.cache``. Files are taken as hostile: archives are read as a stream and never
unpacked, and sizes are bounded before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nas.errors import UserMistake, nearest
from nas.tasks.cache import cached
from nas.tasks.image_decoding import decode_all, fitted
from nas.tasks.image_sources.archives import ARCHIVE_SUFFIXES, archive_source
from nas.tasks.image_sources.base import ACCEPTED, Columns, Part, Source, part_of
from nas.tasks.image_sources.folders import folder_source
from nas.tasks.image_sources.idx import idx_files, idx_source
from nas.tasks.image_sources.named import TORCHVISION, torchvision_source
from nas.tasks.image_sources.parquet import parquet_source

__all__ = ["ImageData", "load_images", "with_channels"]

_RULES = 1  # raised whenever the same files would be decoded to other arrays


@dataclass(frozen=True)
class ImageData:
    """Decoded images: for each part that the source brings, (N, C, H, W) uint8 and the labels (N,) int64.

    ``train`` is always there. ``classes`` names the label ids in order. ``mirror`` tells whether a mirrored
    image still belongs to its class. ``notes`` says in words what was done to the images.
    """

    name: str
    classes: tuple[str, ...]
    images: dict[Part, NDArray[np.uint8]]
    labels: dict[Part, NDArray[np.int64]]
    mirror: bool
    notes: tuple[str, ...] = ()


def load_images(
    data: str,
    *,
    data_root: str | None,
    cache_dir: Path,
    image_size: int | Sequence[int] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    download: bool = False,
) -> ImageData:
    """All images of ``data`` (see the module's docstring for what it may be).

    Args:
        data: ``digits``, a torchvision name (any case), or a path. An existing path wins over a name unless
            ``data_root`` is given.
        data_root: folder that holds a torchvision data set's files.
        cache_dir: where decoded arrays are kept; about C*H*W bytes an image.
        image_size: side in pixels, in 4..1024, or height and width, to which all images are resized (fitted, then the
            centre cut).
            ``None`` keeps the own size if it is the same for all and at most 64, else takes 224.
        image_column, label_column: of a parquet file, where their types do not tell.
        download: lets torchvision fetch missing files into ``data_root``.

    Raises:
        UserMistake: nothing usable there, a file that cannot be decoded, images without classes, fewer than
            two classes, or an empty class.
    """
    sides = _height_and_width(image_size)
    if data.lower() == "digits":
        return _digits(sides)
    path, columns = Path(data), (image_column, label_column)
    name = next((known for known in TORCHVISION if known.lower() == data.lower()), None)
    if name is not None and (data_root is not None or not path.exists()):
        source = torchvision_source(name, data_root, download)
    elif path.is_dir():
        source = _directory_source(path, columns)
    elif path.suffix == ".parquet" and path.is_file():
        source = parquet_source(path, [path], columns)
    elif path.name.endswith(ARCHIVE_SUFFIXES) and path.is_file():
        source = archive_source(path, {path: None})
    else:
        hint = nearest(data, ["digits", *TORCHVISION])
        what = "is a file of an unknown kind" if path.exists() else f"does not exist{hint}"
        raise UserMistake(f"data={data!r} {what}; give {ACCEPTED}")
    # Squares keep the key that caches of one number have.
    size = sides[0] if sides and sides[0] == sides[1] else sides
    key = {"source": source.stamp, "image_size": size, "columns": columns, "rules": _RULES}
    entry = cached(cache_dir, source.name, key, lambda folder: decode_all(source, sides, folder))
    parts = cast("list[Part]", entry.facts["parts"])
    images = {part: entry.arrays[f"{part}-images"] for part in parts}
    labels = {part: np.asarray(entry.arrays[f"{part}-labels"]) for part in parts}
    classes, notes = tuple(entry.facts["classes"]), tuple(entry.facts["notes"])
    return ImageData(source.name, classes, images, labels, source.mirror, notes)


def _height_and_width(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2 or not all(4 <= side <= 1024 for side in sides):
        raise UserMistake(
            f"image_size={image_size} must lie in 4..1024 pixels; one number, or height and width"
        )
    return sides[0], sides[1]


def _digits(image_size: tuple[int, int] | None) -> ImageData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The values are 0..16; 255 / 16 keeps their differences and fills the byte.
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels, classes = bunch.target.astype(np.int64), tuple("0123456789")
    notes: tuple[str, ...] = ()
    if image_size is not None and images.shape[1:] != image_size:
        height, width = image_size
        pictures = (fitted(Image.fromarray(one), width, height) for one in images)
        images = np.stack([np.asarray(one, np.uint8) for one in pictures])
        notes = (f"images resized to {height}x{width} (as asked; option image_size)",)
    kept = images[:, None]
    return ImageData("scikit-learn digits", classes, {"train": kept}, {"train": labels}, False, notes)


def with_channels(data: ImageData, channels: int | None) -> tuple[ImageData, int]:
    """``data``, noting what will be done to it, and the number of channels that models get.

    The arrays stay as they are: a grey image is repeated by whoever hands it on.

    Args:
        channels: None is as many as the images have.

    Raises:
        UserMistake: a number below 1, or another than that of images which are not grey.
    """
    own = data.images["train"].shape[1]
    if channels is None or channels == own:
        return data, own
    if channels < 1:
        raise UserMistake(f"channels={channels} must be at least 1")
    if own != 1:
        raise UserMistake(
            f"channels={channels}: the images of {data.name!r} have {own}, and only grey ones can be repeated; give "
            f"a model that takes {own}"
        )
    note = f"grey images given as {channels} equal channels (option channels)"
    return replace(data, notes=(*data.notes, note)), channels


def _directory_source(root: Path, columns: Columns) -> Source:
    parquet = sorted(root.rglob("*.parquet"))
    archives = sorted(file for file in root.iterdir() if file.name.endswith(ARCHIVE_SUFFIXES))
    if idx_files(root):
        return idx_source(root.name, root, mirror=False)
    if parquet:
        return parquet_source(root, parquet, columns)
    if archives:
        return archive_source(root, {file: part_of(file, root) for file in archives})
    return folder_source(root)
