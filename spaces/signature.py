"""What a task asks of a model: the shapes it feeds in and the size of what it expects back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Union

__all__ = ["ClickThroughRateSignature", "ImageSignature", "Signature", "TranslationSignature"]


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


@dataclass(frozen=True)
class ClickThroughRateSignature:
    """Click prediction: ``model((B, sum(widths)) int64, (B, dense) float) -> (B, outputs)`` logits.

    Categorical field number i has ids from 0 to ``vocabularies[i] - 1`` and takes ``widths[i]`` columns of the first
    argument, fields in order. One column holds one id, of which 0 stands for everything that is not in the vocabulary;
    several hold a set of ids, padded with 0. The second argument holds ``dense`` numbers of about unit variance.

    Raises:
        ValueError: no field, a vocabulary below 2, a width or ``outputs`` below 1, ``dense`` below 0, or not one
            width for each vocabulary.
    """

    vocabularies: tuple[int, ...]
    widths: tuple[int, ...]
    dense: int
    outputs: int = 1
    task: ClassVar[str] = "click_through_rate"

    def __post_init__(self) -> None:
        # A signature that was read from JSON comes with lists, and must equal the one that was written.
        object.__setattr__(self, "vocabularies", tuple(self.vocabularies))
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.vocabularies or len(self.vocabularies) != len(self.widths):
            raise ValueError(
                f"vocabularies={self.vocabularies} and widths={self.widths} must be as many, and at least one"
            )
        if min(self.vocabularies) < 2 or min(self.widths) < 1 or self.dense < 0 or self.outputs < 1:
            raise ValueError(
                f"vocabularies={self.vocabularies} must be at least 2 each, widths={self.widths} and "
                f"outputs={self.outputs} at least 1, dense={self.dense} at least 0"
            )


Signature = Union[ImageSignature, TranslationSignature, ClickThroughRateSignature]  # noqa: UP007  (a runtime alias on Python 3.10)
