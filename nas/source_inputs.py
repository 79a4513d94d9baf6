"""Arguments to call a model with: their shapes at a given batch and size, and random contents."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nas.errors import UserMistake

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Extent", "MakeInputs", "Range", "Slot", "at_size", "drawing", "inputs_of", "range_of"]

_TRANSLATION_LENGTH = 30


class MakeInputs(Protocol):
    """Draws the arguments of one call of a model."""

    def __call__(
        self, batch: int, generator: torch.Generator, *, length: int | None = None
    ) -> tuple[Tensor, ...]:
        """Tensors on the CPU, the first dimension of each ``batch``.

        Args:
            batch: at least 1.
            generator: on the CPU.
            length: of sequences, in place of the usual one or of one drawn from the distribution asked for.

        Raises:
            UserMistake: a batch or a size that the model was not made for.
        """


@dataclass(frozen=True)
class Extent:
    """A size as given: ``low`` to ``high`` is a length or an image's height, ``width`` its width if not the height."""

    text: str
    low: int
    high: int
    width: int | None = None

    @classmethod
    def parse(cls, text: str) -> Extent:
        """The extent of a text. Raises UserMistake."""
        found = re.fullmatch(r"([1-9][0-9]{0,5})(?:([x-])([1-9][0-9]{0,5}))?", text)
        low, mark, high = (int(found[1]), found[2], int(found[3] or found[1])) if found else (0, None, -1)
        if mark == "x":
            return cls(text, low, low, high)
        if low > high:
            raise UserMistake(
                f"--size {text or repr(text)}: must be such as 224 (square image, or length), 224x192 (height x width) "
                "or 16-128 (lengths, the shortest first)"
            )
        return cls(text, low, high)

    @classmethod
    def of(cls, length: int) -> Extent:
        """That length alone."""
        return cls(str(length), length, length)

    def image(self, name: str) -> tuple[int, int]:
        """Height and width."""
        if self.low != self.high:
            raise UserMistake(
                f"--size {self.text}: model {name!r} takes images; give one size, such as 224 or 224x192"
            )
        return self.low, self.width or self.low

    def length(self, name: str, generator: torch.Generator) -> int:
        """A length from the distribution."""
        import torch

        if self.width is not None:
            raise UserMistake(
                f"--size {self.text}: model {name!r} takes sequences; give a length, such as 128 or 16-128"
            )
        return int(torch.randint(self.low, self.high + 1, (), generator=generator))


Range = tuple[int, int | None]
"""The least and the most that a dimension may be; None: without an end."""


def range_of(size: Any, constraints: Mapping[Any, Any]) -> Range | None:
    """What ``torch.export`` allows for a dimension of an exported program; None for one that is fixed or derived.

    Args:
        size: the dimension as the program's placeholder has it.
        constraints: the program's ``range_constraints``.
    """
    found = None if isinstance(size, int) else constraints.get(size.node.expr)
    if found is None:
        return None
    return int(found.lower), int(found.upper) if getattr(found.upper, "is_Integer", False) else None


@dataclass(frozen=True)
class Slot:
    """One argument. None in ``declared`` is a dimension that may be any, in ``usual`` one without a usual value."""

    dtype: torch.dtype
    declared: tuple[int | None, ...]
    usual: tuple[int | None, ...]
    values: Tensor | None = None  # to draw from; None: the normal distribution
    ranges: Sequence[
        Range | None
    ] = ()  # of dimensions that may be any within them, in the order of ``declared``

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        import torch

        if self.values is None:
            return torch.randn(shape, generator=generator).to(self.dtype)
        if tuple(self.values.shape) == shape:
            return self.values.clone()
        flat = self.values.flatten()
        return flat[torch.randint(flat.numel(), shape, generator=generator)]


def drawing(name: str, slots: Sequence[Slot], extent: Extent | None) -> MakeInputs:
    """A function ``(batch, generator) -> arguments`` for a model with these slots; ``name`` is for messages.

    Raises UserMistake at once when no argument can have that size, and the function for a batch or a size that the
    model was not made for.
    """

    def make_inputs(
        batch: int, generator: torch.Generator, *, length: int | None = None
    ) -> tuple[Tensor, ...]:
        wished = extent if length is None else Extent.of(length)
        lengths: list[int] = []  # one for all arguments

        def shape(slot: Slot) -> tuple[int, ...]:
            wanted = list(slot.usual)
            if wanted:
                wanted[0] = batch
            if wished is not None and len(wanted) == 4 and length is None:
                wanted[2:] = wished.image(name)
            elif wished is not None and (len(wanted) == 3 or (len(wanted) == 2 and not _is_float(slot))):
                lengths[:] = lengths or [wished.length(name, generator)]
                wanted[1] = lengths[0]
            return _settled(name, slot, wanted)

        return tuple(slot.draw(shape(slot), generator) for slot in slots)

    if extent is not None and not any(
        len(slot.usual) in (3, 4) or (len(slot.usual) == 2 and not _is_float(slot)) for slot in slots
    ):
        raise UserMistake(
            f"--size {extent.text}: model {name!r} takes neither images nor sequences; leave it out"
        )
    return make_inputs


def _is_float(slot: Slot) -> bool:
    return slot.dtype.is_floating_point


def _settled(name: str, slot: Slot, wanted: Sequence[int | None]) -> tuple[int, ...]:
    for number, (fixed, size) in enumerate(zip(slot.declared, wanted, strict=True)):
        if size is None:
            raise UserMistake(
                f"model {name!r}: dimension {number} of an input of shape {_shape_text(slot.declared)} is open; "
                "give --size"
            )
        if fixed is not None and fixed != size:
            what = "a batch of" if number == 0 else f"dimension {number} of size"
            raise UserMistake(
                f"model {name!r}: made for {what} {fixed} (input {_shape_text(slot.declared)}), not {size}; "
                f"{'choose the target @' + str(fixed) if number == 0 else 'leave --size out'} or export it anew"
            )
        if number < len(slot.ranges) and slot.ranges[number] is not None:
            _check_range(name, slot, number, size)
    return tuple(size for size in wanted if size is not None)


def _check_range(name: str, slot: Slot, number: int, size: int) -> None:
    low, high = slot.ranges[number] or (0, None)
    if low <= size and (high is None or size <= high):
        return
    allowed = f"{low} to {high}" if high is not None else f"at least {low}"
    what = "batches of" if number == 0 else f"dimension {number} of size"
    way_out = "choose such a target, as in @" if number == 0 else "give such a --size, as in "
    raise UserMistake(
        f"model {name!r}: made for {what} {allowed} (input {_shape_text(slot.declared)}), not {size}; "
        f"{way_out}{low if size < low else high}, or export it anew"
    )


def _shape_text(declared: Sequence[int | None]) -> str:
    return " x ".join("?" if size is None else str(size) for size in declared)


def at_size(name: str, signature: Any, extent: Extent | None) -> Any:
    """A task's signature for another size. Raises UserMistake for one that it cannot have."""
    from spaces.signature import ClickThroughRateSignature, ImageSignature

    if extent is None:
        return signature
    if isinstance(signature, ImageSignature):
        height, width = extent.image(name)
        return dataclasses.replace(signature, height=height, width=width)
    if isinstance(signature, ClickThroughRateSignature):
        raise UserMistake(
            f"--size {extent.text}: model {name!r} takes neither images nor sequences; leave it out"
        )
    longest = getattr(signature, "max_length", None)
    if longest is not None and extent.high > longest:
        raise UserMistake(f"--size {extent.text}: model {name!r} takes at most {longest} tokens")
    return signature


def inputs_of(name: str, signature: Any, extent: Extent | None) -> MakeInputs:
    """A function ``(batch, generator) -> arguments`` for a model of that signature. Raises UserMistake if unknown."""
    import torch

    from spaces.signature import ClickThroughRateSignature, ImageSignature, TranslationSignature

    if isinstance(signature, ClickThroughRateSignature):
        return _features(signature)
    if isinstance(signature, ImageSignature):
        shape = (None, signature.channels, signature.height, signature.width)
        return drawing(name, [Slot(torch.float32, shape, shape)], None)
    if not isinstance(signature, TranslationSignature):
        raise UserMistake(f"model {name!r}: no inputs are known for the task {signature.task!r}")
    first = max(signature.padding, signature.begin, signature.end) + 1
    usual = Extent.of(min(_TRANSLATION_LENGTH, signature.max_length))

    def make_inputs(
        batch: int, generator: torch.Generator, *, length: int | None = None
    ) -> tuple[Tensor, ...]:
        wished = extent or usual if length is None else Extent.of(length)
        shape = (batch, wished.length(name, generator))
        source = torch.randint(first, signature.source_vocabulary, shape, generator=generator)
        target = torch.randint(first, signature.target_vocabulary, shape, generator=generator)
        source[:, -1] = signature.end
        target[:, 0] = signature.begin
        return source, target

    return make_inputs


def _features(signature: Any) -> MakeInputs:
    """Ids of every field, each as frequent as the other, and normal numbers."""
    import torch

    def make_inputs(
        batch: int, generator: torch.Generator, *, length: int | None = None
    ) -> tuple[Tensor, ...]:
        columns = [
            torch.randint(1, vocabulary, (batch, width), generator=generator)
            for vocabulary, width in zip(signature.vocabularies, signature.widths, strict=True)
        ]
        return torch.cat(columns, 1), torch.randn(batch, signature.dense, generator=generator)

    return make_inputs
