"""Drawn images in every kind of source, and what must be read from them."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nas.tasks import make_task
from nas.tasks.base import Task
from nas.tasks.image_classification import ImageClassification
from nas.tasks.image_data import load_images

__all__ = [
    "CLASSES",
    "Images",
    "check",
    "corpus",
    "draw",
    "load",
    "made",
    "members",
    "png",
    "row_keys",
    "write_folder",
    "write_idx",
    "write_parquet",
    "write_tar",
]

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
