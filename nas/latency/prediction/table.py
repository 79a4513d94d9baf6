"""Latency as a sum of measured blocks: each distinct block is measured once, a model is looked up.

This is how tables of operators (ProxylessNAS, FBNet, Once-for-all) predict. It needs no training, and it is blind to
whatever happens between blocks: fused work, caches, the launch queue of a GPU. ``rest_ms`` and ``scale``, fitted to a
few whole models, take up the part of that which is the same for all. It is offered beside ``LatencyPredictor``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nas.errors import UserMistake
from nas.files import read_record, write_record
from nas.latency.prediction.blocks import Block
from nas.latency.prediction.models import fit_prices
from nas.latency.prediction.samples import finite_number, stored_fields

__all__ = ["BlockTable"]

_FORMAT = 1


class BlockTable:
    """Measured milliseconds of blocks by signature, and the sum that a model's blocks come to.

    Args:
        identity: digest of the conditions of all its measurements, as of ``LatencyPredictor``.

    Attributes:
        rest_ms: what a model takes beside its blocks.
        scale: what a block takes inside of a model, over what it takes alone.
    """

    def __init__(self, *, identity: str | None = None):
        self.identity = identity
        self.rest_ms = 0.0
        self.scale = 1.0
        self._milliseconds: dict[str, float] = {}

    def __len__(self) -> int:
        """Number of distinct blocks."""
        return len(self._milliseconds)

    def missing(self, blocks: Sequence[Block]) -> list[Block]:
        """Those blocks, each signature once, that were not measured yet."""
        first = {block.signature: block for block in reversed(blocks)}
        return [
            first[name]
            for name in dict.fromkeys(b.signature for b in blocks)
            if name not in self._milliseconds
        ]

    def add(self, signature: str, milliseconds: float) -> None:
        """Enter a measured block. Raises UserMistake unless ``milliseconds`` is positive."""
        self._milliseconds[signature] = finite_number(
            milliseconds, "milliseconds", "of a block must be positive; measure it again"
        )

    def total(self, blocks: Sequence[Block | str]) -> float:
        """Milliseconds of a model of these blocks (or signatures).

        Raises:
            UserMistake: a block was not measured; ``missing`` lists them.
        """
        return self.rest_ms + self.scale * self._sum(blocks)

    def calibrate(self, models: Sequence[Sequence[Block | str]], milliseconds: Sequence[float]) -> None:
        """Fit ``rest_ms`` and ``scale`` to whole models that were measured, at least three.

        Raises:
            UserMistake: too few models, unequal numbers, latencies that are no positive numbers, or a block that was
                not measured.
        """
        if len(models) < 3 or len(models) != len(milliseconds):
            raise UserMistake(
                f"{len(models)} models and {len(milliseconds)} latencies; at least three of each are needed"
            )
        whole = [
            finite_number(ms, "milliseconds", f"of model {place} must be positive; measure it again")
            for place, ms in enumerate(milliseconds)
        ]
        sums = np.array([[1.0, self._sum(blocks)] for blocks in models])
        self.rest_ms, self.scale = map(float, fit_prices(sums, np.array(whole)).prices)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a sealed JSON record. Raises nas.files.WriteFailed."""
        write_record(
            path,
            {
                "format": _FORMAT,
                "identity": self.identity,
                "rest_ms": self.rest_ms,
                "scale": self.scale,
                "blocks": self._milliseconds,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, identity: str | None = None) -> BlockTable:
        """Read it back.

        Raises:
            UserMistake: no table or one of another version, or measurements of another identity than asked for.
            nas.files.CorruptFile: the file is damaged.
        """
        data: Mapping[str, Any] = read_record(path)
        if data.get("format") != _FORMAT:
            raise UserMistake(
                f"format {data.get('format')!r} of {path} is unknown, this version reads {_FORMAT}"
            )
        stored_fields(data, ("identity", "rest_ms", "scale", "blocks"), f"the table of blocks {path}")
        if identity is not None and data["identity"] not in (None, identity):
            raise UserMistake(
                f"identity={identity!r} differs from {data['identity']!r} of {path}; measure the blocks again"
            )
        table = cls(identity=data["identity"])
        table.rest_ms, table.scale = data["rest_ms"], data["scale"]
        table._milliseconds = dict(data["blocks"])
        return table

    def _sum(self, blocks: Sequence[Block | str]) -> float:
        times = Counter(block if isinstance(block, str) else block.signature for block in blocks)
        unknown = [name for name in times if name not in self._milliseconds]
        if unknown:
            raise UserMistake(
                f"{len(unknown)} of {len(times)} distinct blocks were not measured; see missing()"
            )
        return sum(self._milliseconds[name] * count for name, count in times.items())
