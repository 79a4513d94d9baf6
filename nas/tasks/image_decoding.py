"""Decodes the samples of a source, in passes from front to back, into one array of equal images for each part."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nas.errors import UserMistake
from nas.tasks.cache import ArrayWriter
from nas.tasks.image_sources.base import Label, Part, Source

__all__ = ["decode_all", "fitted"]

logger = logging.getLogger(__name__)

_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MAX_IMAGE_PIXELS = 64_000_000
_OWN_SIZE_LIMIT, _DEFAULT_SIZE = 64, 224  # pixels; larger or unequal images get the default size


@dataclass(frozen=True)
class _Shape:
    channels: int
    height: int
    width: int
    resized: bool


class _Another(Exception):
    """An image does not fit the shape so far; decoding starts again, with the shape in ``args``."""


def decode_all(source: Source, image_size: tuple[int, int] | None, folder: Path) -> dict[str, Any]:
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
    source: Source, image_size: tuple[int, int] | None, shape: _Shape | None, folder: Path
) -> tuple[_Shape | None, dict[Part, list[Label]]]:
    labels: dict[Part, list[Label]] = {}
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


def _fitting(image: Image.Image, image_size: tuple[int, int] | None, shape: _Shape | None) -> _Shape:
    """The shape that ``image`` is stored in; raises ``_Another`` when those before it need a new one."""
    channels = 1 if image.mode == "L" else 3
    width, height = image.size
    if shape is None:
        if image_size is not None:
            return _Shape(channels, *image_size, True)
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


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image with its shorter side fitted, then the centre cut."""
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def _pixels(image: Image.Image, shape: _Shape) -> NDArray[np.uint8]:
    """(C, H, W) uint8."""
    if shape.resized and image.size != (shape.width, shape.height):
        image = fitted(image, shape.width, shape.height)
    if shape.channels == 3 and image.mode != "RGB":
        image = image.convert("RGB")
    array = np.asarray(image, np.uint8)
    return array[None] if shape.channels == 1 else array.transpose(2, 0, 1)
