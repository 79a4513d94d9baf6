"""Images of the size and the number of channels that a model takes, where no decoder has seen to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nas.errors import UserMistake
from nas.tasks.image_data import ImageData

__all__ = ["resized", "with_channels"]


def resized(data: ImageData, side: int | None) -> ImageData:
    """What was never decoded (the digits) at the size that was asked for, just as images of files are.

    Args:
        data: as ``load_images`` gives it.
        side: in pixels; None leaves the size as it is.
    """
    if side is None or all(images.shape[2:] == (side, side) for images in data.images.values()):
        return data

    def fitted(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(ImageOps.fit(Image.fromarray(plane), (side, side), Image.Resampling.BICUBIC))

    images = {
        part: np.stack([np.stack([fitted(plane) for plane in image]) for image in some])
        for part, some in data.images.items()
    }
    note = f"images resized to {side}x{side} (as asked; option image_size)"
    return replace(data, images=images, notes=(*data.notes, note))


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
