"""Labelled images from many sources, as one uint8 array for each part that the source brings.

Sources: scikit-learn's digits, torchvision data sets by name, IDX files, parquet files, tar archives of class
folders, directories of class folders. Everything but the digits is decoded once, in one pass from front to
back, and kept by ``nas.tasks.cache``. Files are taken as hostile: archives are read as a stream and never
unpacked, and sizes are bounded before anything is decoded.
"""

from __future__ import annotations

import gzip
import io
import logging
import lzma
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nas.errors import UserMistake, nearest
from nas.tasks.cache import ArrayWriter, cached

__all__ = ["ImageData", "Part", "load_images"]

logger = logging.getLogger(__name__)

Part = Literal["train", "validation", "test"]
_Parts = dict[Part, dict[str, Any]]
_Label = int | str
_PARTS: dict[str, Part] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
_PART_IN_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(_PARTS)})(?=[-_.]|$)")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_ARCHIVE_SUFFIXES = (".tar", ".tar.xz", ".tar.gz", ".tgz")
_Columns = tuple[str | None, str | None]  # of images and of labels, as the user named them; None: by type
_MAX_IMAGE_BYTES, _MAX_IMAGE_PIXELS = 64 << 20, 64_000_000
_MAX_UNPACKED_RATIO = 200  # photographs hardly compress; an archive that swells more is a bomb
_MIN_UNPACKED_BYTES = 1 << 30
_RULES = 1  # raised whenever the same files would be decoded to other arrays
_OWN_SIZE_LIMIT, _DEFAULT_SIZE = 64, 224  # pixels; larger or unequal images get the default size
_ACCEPTED = (
    "'digits', a torchvision name with data_root, a folder of class folders, a .parquet file, "
    "a .tar[.xz|.gz] archive, or a folder of IDX, parquet or archive files"
)


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


@dataclass(frozen=True)
class _Sample:
    part: Part
    label: _Label
    where: str
    image: bytes | Image.Image


@dataclass(frozen=True)
class _Source:
    """``stamp`` changes whenever the files do; ``samples`` starts again from the front at every call."""

    name: str
    stamp: Any
    samples: Callable[[], Iterable[_Sample]]
    mirror: bool = True


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
_TORCHVISION: dict[str, _Named] = {
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


def load_images(
    data: str,
    *,
    data_root: str | None,
    cache_dir: Path,
    image_size: int | None = None,
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
        image_size: side in pixels to which all images are resized (shorter side fitted, then the centre cut).
            ``None`` keeps the own size if it is the same for all and at most 64, else takes 224.
        image_column, label_column: of a parquet file, where their types do not tell.
        download: lets torchvision fetch missing files into ``data_root``.

    Raises:
        UserMistake: nothing usable there, a file that cannot be decoded, images without classes, fewer than
            two classes, or an empty class.
    """
    if data.lower() == "digits":
        return _digits()
    path, columns = Path(data), (image_column, label_column)
    name = next((known for known in _TORCHVISION if known.lower() == data.lower()), None)
    if name is not None and (data_root is not None or not path.exists()):
        source = _torchvision_source(name, data_root, download)
    elif path.is_dir():
        source = _directory_source(path, columns)
    elif path.suffix == ".parquet" and path.is_file():
        source = _parquet_source(path, [path], columns)
    elif path.name.endswith(_ARCHIVE_SUFFIXES) and path.is_file():
        source = _archive_source(path, {path: None})
    else:
        hint = nearest(data, ["digits", *_TORCHVISION])
        what = "is a file of an unknown kind" if path.exists() else f"does not exist{hint}"
        raise UserMistake(f"data={data!r} {what}; give {_ACCEPTED}")
    key = {"source": source.stamp, "image_size": image_size, "columns": columns, "rules": _RULES}
    entry = cached(cache_dir, source.name, key, lambda folder: _decode_all(source, image_size, folder))
    parts = cast("list[Part]", entry.facts["parts"])
    images = {part: entry.arrays[f"{part}-images"] for part in parts}
    labels = {part: np.asarray(entry.arrays[f"{part}-labels"]) for part in parts}
    classes, notes = tuple(entry.facts["classes"]), tuple(entry.facts["notes"])
    return ImageData(source.name, classes, images, labels, source.mirror, notes)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The values are 0..16; 255 / 16 keeps their differences and fills the byte.
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels, classes = bunch.target.astype(np.int64), tuple("0123456789")
    return ImageData("scikit-learn digits", classes, {"train": images}, {"train": labels}, mirror=False)


@dataclass(frozen=True)
class _Shape:
    channels: int
    height: int
    width: int
    resized: bool


class _Another(Exception):
    """An image does not fit the shape so far; decoding starts again, with the shape in ``args``."""


def _decode_all(source: _Source, image_size: int | None, folder: Path) -> dict[str, Any]:
    """Writes ``<part>-images.npy`` and ``<part>-labels.npy`` into ``folder``; the facts name the parts."""
    shape: _Shape | None = None
    while True:  # at most three rounds: the size only goes to the default, the channels only from 1 to 3
        try:
            shape, labels = _decode_round(source, image_size, shape, folder)
            break
        except _Another as another:
            shape = another.args[0]
    if shape is None or "train" not in labels:
        raise UserMistake(
            f"data={source.name!r} holds no training images, only {', '.join(labels) or 'nothing'}"
        )
    classes = sorted(set(labels["train"]), key=lambda label: (isinstance(label, str), label))
    if len(classes) < 2:
        raise UserMistake(f"data={source.name!r} has one class only ({classes[0]!r}); at least 2 are needed")
    numbers = {label: number for number, label in enumerate(classes)}
    for part, values in labels.items():
        for extra in sorted({str(label) for label in set(values) - numbers.keys()}):
            raise UserMistake(f"data={source.name!r}: class {extra!r} of {part} has no training images")
        np.save(folder / f"{part}-labels.npy", np.array([numbers[label] for label in values], np.int64))
    notes = []
    if shape.resized:
        why = "as asked" if image_size else f"they differ in size or exceed {_OWN_SIZE_LIMIT} pixels"
        notes.append(f"images resized to {shape.height}x{shape.width} ({why}; option image_size)")
        logger.info("%s: %s", source.name, notes[-1])
    return {"classes": [str(label) for label in classes], "parts": list(labels), "notes": notes}


def _decode_round(
    source: _Source, image_size: int | None, shape: _Shape | None, folder: Path
) -> tuple[_Shape | None, dict[Part, list[_Label]]]:
    labels: dict[Part, list[_Label]] = {}
    writers: dict[Part, ArrayWriter] = {}
    with ExitStack() as stack:
        for number, sample in enumerate(source.samples()):
            image = _opened(sample.image, sample.where)
            shape = _fitting(image, image_size, shape)
            if sample.part not in writers:
                path = folder / f"{sample.part}-images.npy"
                row = (shape.channels, shape.height, shape.width)
                writers[sample.part] = stack.enter_context(ArrayWriter(path, row, np.uint8))
            writers[sample.part].append(_pixels(image, shape))
            labels.setdefault(sample.part, []).append(sample.label)
            if number % 10_000 == 9_999:
                logger.info("%s: %d images decoded", source.name, number + 1)
    return shape, labels


def _fitting(image: Image.Image, image_size: int | None, shape: _Shape | None) -> _Shape:
    """The shape that ``image`` is stored in; raises ``_Another`` when those before it need a new one."""
    channels = 1 if image.mode == "L" else 3
    width, height = image.size
    if shape is None:
        if image_size is not None:
            return _Shape(channels, image_size, image_size, True)
        if max(image.size) > _OWN_SIZE_LIMIT:
            return _Shape(channels, _DEFAULT_SIZE, _DEFAULT_SIZE, True)
        return _Shape(channels, height, width, False)
    if not shape.resized and (height, width) != (shape.height, shape.width):
        raise _Another(_Shape(max(channels, shape.channels), _DEFAULT_SIZE, _DEFAULT_SIZE, True))
    if channels > shape.channels:
        raise _Another(_Shape(channels, shape.height, shape.width, shape.resized))
    return shape


def _opened(content: bytes | Image.Image, where: str) -> Image.Image:
    """A fully decoded image of mode L or RGB."""
    if isinstance(content, Image.Image):
        image = content
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of bombs and odd metadata; the check below decides
                image = Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS)
                if image.width * image.height > _MAX_IMAGE_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are too many")
                image.load()
        except Exception as error:  # damaged files make Pillow raise nearly anything, struct.error included
            reason = str(error).replace("\n", " ").split(" <")[0]
            raise UserMistake(f"image {where} cannot be decoded ({reason}); repair or remove it") from error
    if image.mode.startswith(("I", "F")):
        raise UserMistake(f"image {where} has more than 8 bits a channel; convert it to 8 bits")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


def _pixels(image: Image.Image, shape: _Shape) -> NDArray[np.uint8]:
    """(C, H, W) uint8."""
    if shape.resized and image.size != (shape.width, shape.height):
        image = ImageOps.fit(image, (shape.width, shape.height), Image.Resampling.BICUBIC)
    if shape.channels == 3 and image.mode != "RGB":
        image = image.convert("RGB")
    array = np.asarray(image, np.uint8)
    return array[None] if shape.channels == 1 else array.transpose(2, 0, 1)


def _stamp(root: Path, files: Iterable[Path]) -> list[Any]:
    """What a change of the files changes: place, and name, size and time of every file."""
    stats = sorted((str(file.relative_to(root)), file.stat()) for file in files)
    return [str(root.resolve()), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def _directory_source(root: Path, columns: _Columns) -> _Source:
    parquet = sorted(root.rglob("*.parquet"))
    archives = sorted(file for file in root.iterdir() if file.name.endswith(_ARCHIVE_SUFFIXES))
    if _idx_files(root):
        return _idx_source(root.name, root, mirror=False)
    if parquet:
        return _parquet_source(root, parquet, columns)
    if archives:
        return _archive_source(root, {file: _part_of(file, root) for file in archives})
    return _folder_source(root)


def _part_of(file: Path, root: Path) -> Part:
    """The part that a file's name tells, such as cifar10-train.tar.xz."""
    found = _PART_IN_NAME.findall(file.name.lower())
    if len(set(found)) != 1:
        raise UserMistake(f"{file.name!r} in {root.name!r} must have one of {', '.join(_PARTS)} in its name")
    return _PARTS[found[0]]


def _folder_source(root: Path) -> _Source:
    """Class folders, or folders train, validation, test of class folders."""
    parts = {folder: _PARTS[folder.name] for folder in _folders(root) if folder.name in _PARTS}
    if "train" not in parts.values():
        parts = {root: "train"}
    found: list[tuple[Part, str, Path]] = []
    for folder, part in parts.items():
        for group in _folders(folder):
            files = sorted(file for file in group.rglob("*") if _is_image(file.name) and file.is_file())
            if not files:
                raise UserMistake(f"class folder {group.name!r} of {str(folder)!r} holds no images")
            found += [(part, group.name, file) for file in files]
    if not found:
        raise UserMistake(f"data={str(root)!r} holds no class folders with images; give {_ACCEPTED}")

    def samples() -> Iterator[_Sample]:
        for part, label, file in found:
            _check_bytes(file.stat().st_size, repr(str(file)))
            yield _Sample(part, label, repr(str(file)), file.read_bytes())

    return _Source(root.name, _stamp(root, (file for _, _, file in found)), samples)


def _folders(root: Path) -> list[Path]:
    return sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))


def _check_bytes(size: int, where: str) -> None:
    if size > _MAX_IMAGE_BYTES:
        raise UserMistake(f"image {where} is larger than {_MAX_IMAGE_BYTES >> 20} MiB; shrink or remove it")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")


class _Bounded(io.RawIOBase):
    """A decompressed stream that may not swell without end; ``end`` is where its last non-zero byte ends."""

    def __init__(self, file: IO[bytes], limit: int):
        self._file = file
        self._limit = limit
        self.count = 0
        self.end = 0

    def read(self, size: int = -1, /) -> bytes:
        block = self._file.read(size)
        if stripped := block.rstrip(b"\0"):
            self.end = self.count + len(stripped)
        self.count += len(block)
        if self.count > self._limit:
            raise tarfile.ReadError(f"it swells to more than {_MAX_UNPACKED_RATIO} times its size")
        return block


def _archive_source(root: Path, archives: dict[Path, Part | None]) -> _Source:
    parts = [part for part in archives.values() if part is not None]
    if len(set(parts)) != len(parts):
        raise UserMistake(f"data={str(root)!r} holds several archives for one part; keep one for each part")

    def samples() -> Iterator[_Sample]:
        for path, part in archives.items():
            yield from _archive_samples(path, part)

    return _Source(root.name, _stamp(root.parent, archives), samples)


def _archive_samples(path: Path, part: Part | None) -> Iterator[_Sample]:
    folders: set[PurePosixPath] = set()
    filled: set[PurePosixPath] = set()
    last = "its start"
    limit = max(_MIN_UNPACKED_BYTES, _MAX_UNPACKED_RATIO * path.stat().st_size)
    try:
        with _decompressed(path) as file:
            stream = _Bounded(file, limit)
            with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
                while (member := archive.next()) is not None:
                    # A stream never looks back; without this the list grows by a kilobyte a member.
                    cast("Any", archive).members.clear()
                    last, name = repr(member.name), PurePosixPath(member.name)
                    if ".." in name.parts or name.is_absolute():
                        raise UserMistake(f"{path.name}: member {last} points outside the archive; remove it")
                    if member.isdir():
                        folders.add(name)
                    elif member.isfile() and _is_image(member.name) and "__MACOSX" not in name.parts:
                        filled.update(name.parents)
                        yield _member(archive, member, f"{last} of {path.name}", part)
                _check_end(stream, archive.offset)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UserMistake(f"archive {path.name!r} is damaged after {last} ({error}); get it again") from error
    for empty in sorted(folders - filled):
        raise UserMistake(f"class folder {str(empty)!r} of {path.name!r} holds no images")


def _check_end(stream: _Bounded, offset: int) -> None:
    """tarfile stops silently at a damaged header or a cut; in a whole archive only zeros follow."""
    while stream.read(1 << 20):
        pass
    if stream.end > offset or stream.count < offset + tarfile.BLOCKSIZE:
        raise tarfile.ReadError("what follows is no archive member")


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, where: str, part: Part | None) -> _Sample:
    folders = PurePosixPath(member.name).parts[:-1]
    if not folders or (len(folders) == 1 and folders[0] in _PARTS):
        raise UserMistake(f"image {where} lies in no class folder; the folder's name is its label")
    _check_bytes(member.size, where)
    content = archive.extractfile(member)
    if content is None:
        raise tarfile.ReadError(f"{member.name} cannot be read")
    inside = _PARTS.get(folders[-2]) if len(folders) > 1 else None
    return _Sample(part or inside or "train", folders[-1], where, content.read())


def _decompressed(path: Path) -> IO[bytes]:
    # Not tarfile's own detection: its stream mode takes a cut compressed file for a complete one.
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path)
    if magic.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.open(path))
    return path.open("rb")


def _parquet_source(root: Path, files: Sequence[Path], columns: _Columns) -> _Source:
    told = any(_PART_IN_NAME.search(file.name.lower()) for file in files)

    def samples() -> Iterator[_Sample]:
        for file in files:
            yield from _parquet_samples(file, _part_of(file, root) if told else "train", columns)

    return _Source(root.name, _stamp(root if root.is_dir() else root.parent, files), samples)


def _parquet_samples(file: Path, part: Part, columns: _Columns) -> Iterator[_Sample]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        table = pq.ParquetFile(file)
        image = _column(table.schema_arrow, file, "image", columns[0], _holds_images)
        label = _column(table.schema_arrow, file, "label", columns[1], _holds_labels)
        for batch in table.iter_batches(batch_size=256, columns=[image, label]):
            contents, labels = batch.column(image).to_pylist(), batch.column(label).to_pylist()
            for content, value in zip(contents, labels, strict=True):
                content = content.get("bytes") if isinstance(content, dict) else content
                if content is None or value is None:
                    lacking = "label" if value is None else "image bytes"
                    raise UserMistake(f"row {row} of {file.name} has no {lacking}; remove the row")
                yield _Sample(part, value, f"in row {row} of {file.name}", content)
                row += 1
    except (pa.ArrowException, OSError) as error:
        reason = _first_line(error)
        raise UserMistake(f"parquet file {file.name!r} cannot be read ({reason}); get it again") from error


def _column(schema: Any, file: Path, kind: str, asked: str | None, fits: Callable[[Any], bool]) -> str:
    """The column that holds ``kind`` (image, label): as asked, else by type, else by its usual names."""
    found = [str(field.name) for field in schema if fits(field.type)]
    if asked is not None:
        if asked not in found:
            known = ", ".join(found) or "none"
            raise UserMistake(
                f"{kind}_column={asked!r} is no fitting column of {file.name}; fitting: {known}"
            )
        return asked
    if len(found) > 1:
        usual = [name for name in (kind, f"{kind}s", "img") if name in found]
        if not usual:
            known = ", ".join(found)
            raise UserMistake(f"{file.name} has several {kind} columns; choose {kind}_column from {known}")
        found = usual
    if not found:
        raise UserMistake(f"{file.name} has no column of {kind}s; its columns: {', '.join(schema.names)}")
    return found[0]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_labels(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))


_IDX_NAMES: dict[Part, str] = {"train": "train", "test": "t10k"}


def _idx_files(root: Path) -> dict[Part, tuple[Path, Path]]:
    """(images, labels) of each part in MNIST's own file naming, plain or gzipped."""
    found: dict[Part, tuple[Path, Path]] = {}
    for part, stem in _IDX_NAMES.items():
        for end in ("", ".gz"):
            pair = root / f"{stem}-images-idx3-ubyte{end}", root / f"{stem}-labels-idx1-ubyte{end}"
            if part not in found and all(file.is_file() for file in pair):
                found[part] = pair
    return found


def _idx_source(name: str, root: Path, mirror: bool) -> _Source:
    files = _idx_files(root)

    def samples() -> Iterator[_Sample]:
        for part, (image_file, label_file) in files.items():
            images, labels = _idx_array(image_file, 3), _idx_array(label_file, 1)
            if len(images) != len(labels):
                sizes = f"{len(images)} images but {len(labels)} labels"
                raise UserMistake(f"{image_file.name}: {sizes}; get both files again")
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield _Sample(part, int(label), f"{number} of {image_file.name}", Image.fromarray(image))

    return _Source(name, _stamp(root, (file for pair in files.values() for file in pair)), samples, mirror)


def _idx_array(path: Path, dimensions: int) -> NDArray[np.uint8]:
    limit = max(_MIN_UNPACKED_BYTES, _MAX_UNPACKED_RATIO * path.stat().st_size)
    start = 4 + 4 * dimensions
    try:
        with _decompressed(path) as file:
            content = file.read(limit)
        # 8 is the type code of unsigned bytes; the fourth byte is the number of dimensions.
        if content[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"no unsigned bytes in {dimensions} dimensions")
        shape = [int(size) for size in np.frombuffer(content[4:start], ">u4")]
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserMistake(f"IDX file {path.name!r} is damaged ({error}); get it again") from error


def _torchvision_source(name: str, data_root: str | None, download: bool) -> _Source:
    if data_root is None:
        raise UserMistake(f"data={name!r} is a torchvision data set; give data_root, the folder of its files")
    named, root = _TORCHVISION[name], Path(data_root)
    way_out = f"put them there, or set download=true to let torchvision fetch them; data_root={data_root!r}"

    def opened(part: Part, fetch: bool) -> Any:
        from torchvision import datasets

        try:
            return getattr(datasets, name)(str(root), download=fetch, **named.parts[part])
        except (RuntimeError, OSError) as error:
            raise UserMistake(f"data={name!r} cannot be used ({_first_line(error)}): {way_out}") from error

    def samples() -> Iterator[_Sample]:
        for part in named.parts:
            dataset = opened(part, fetch=False)
            for index in range(len(dataset)):
                image, label = dataset[index]
                yield _Sample(part, int(label), f"{index} of {name} {part}", image)

    if download:
        for part in named.parts:
            opened(part, fetch=True)
    if named.idx:
        # Read by us: torchvision overlooks files that are still gzipped, as they are handed out.
        for folder in (root / name / "raw", root):
            if "train" in _idx_files(folder):
                return _idx_source(name, folder, named.mirror)
    files = [file for file in root.glob(named.files) if file.exists()]
    if not files or named.idx:
        raise UserMistake(f"data={name!r}: no files at {root / named.files}: {way_out}")
    return _Source(name, [name, _stamp(root, files)], samples, named.mirror)
