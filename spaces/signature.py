"""What a task asks of a model: the shapes it feeds in and the size of what it expects back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Union

__all__ = ["ImageSignature", "Signature", "TranslationSignature"]


@dataclass(frozen=True)
class ImageSignature:
    """Image classification: ``model((B, channels, height, width) float) -> (B, classes) float`` logits."""

    channels: int
    height: int
    width: int
    classes: int
    task: ClassVar[str] = "image_classification"


@dataclass(frozen=True)
class TranslationSignature:
    """Encoder-decoder: ``model((B, S) int64, (B, T) int64) -> (B, T, target_vocabulary)`` logits.

    The second argument is the target shifted right (it starts with ``begin``). ``max_length`` bounds S and T,
    special tokens included. Positions equal to ``padding`` are padding, on both sides.
    """

    source_vocabulary: int
    target_vocabulary: int
    max_length: int
    shared_vocabulary: bool = True
    padding: int = 0
    begin: int = 1
    end: int = 2
    task: ClassVar[str] = "translation"


Signature = Union[ImageSignature, TranslationSignature]  # noqa: UP007  (a runtime alias on Python 3.10)
