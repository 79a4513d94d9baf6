"""Reading compressed files that may be cut, damaged, or made to swell without end."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from pathlib import Path
from typing import IO, cast

__all__ = ["MAX_UNPACKED_RATIO", "Bounded", "decompressed", "unpacked_limit"]

MAX_UNPACKED_RATIO = 200  # photographs hardly compress; an archive that swells more is a bomb
_MIN_UNPACKED_BYTES = 1 << 30


def unpacked_limit(path: Path) -> int:
    """How many bytes the file may hold when unpacked."""
    return max(_MIN_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size)


def decompressed(path: Path) -> IO[bytes]:
    """The content of an xz, gzip or plain file."""
    # Not tarfile's own detection: its stream mode takes a cut compressed file for a complete one.
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path)
    if magic.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.open(path))
    return path.open("rb")


class Bounded(io.RawIOBase):
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
            raise tarfile.ReadError(f"it swells to more than {MAX_UNPACKED_RATIO} times its size")
        return block
