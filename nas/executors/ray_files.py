"""The files of one trial on two machines without a disk in common: what differs is carried, whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from nas.files import atomic_path, is_temporary

__all__ = ["CHUNK", "Mirror", "Stamp", "carried", "listing", "read_part", "write_all"]

logger = logging.getLogger(__name__)

CHUNK = 8 << 20
"""Bytes carried at a time, so that neither the object store nor the driver has to hold a whole file of weights."""

_LAST = "result.json"

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds; equal stamps mean equal files."""


def listing(folder: Path) -> dict[str, Stamp]:
    """Every whole file below ``folder`` by its relative name with slashes; empty when there is no such folder."""
    found: dict[str, Stamp] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            if is_temporary(name) or path.is_symlink():
                continue
            with contextlib.suppress(FileNotFoundError):  # replaced by the next checkpoint meanwhile
                status = path.stat()
                found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found


def read_part(path: Path, stamp: Stamp, offset: int) -> bytes | None:
    """At most ``CHUNK`` bytes from ``offset``; None when the file is no longer the one with that stamp."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != tuple(stamp):
                return None
            return os.pread(file.fileno(), CHUNK, offset)
    except FileNotFoundError:
        return None


def carried(folder: Path) -> dict[str, tuple[Stamp, bytes]]:
    """The files of a trial that was begun elsewhere, for the node where it goes on."""
    found = {}
    for name, stamp in listing(folder).items():
        with contextlib.suppress(FileNotFoundError):
            found[name] = (stamp, (folder / name).read_bytes())
    return found


def write_all(folder: Path, files: Mapping[str, tuple[Stamp, bytes]]) -> None:
    """Put ``files`` below ``folder`` with the stamps they had, so that they are not carried back unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (stamp, data) in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=(stamp[1], stamp[1]))


class _Changed(Exception):
    """The file was replaced while it was read; its successor is carried with the next listing."""


class Mirror:
    """The driver's copy of a trial directory that lives on a node.

    ``read(name, stamp, offset)`` is :func:`read_part` over there. Files appear atomically, the result last of all;
    a file that was carried and is gone over there (an old checkpoint) is removed here too.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._known = listing(folder)
        self._carried: set[str] = set()

    def pull(
        self,
        there: Mapping[str, Stamp],
        small: Mapping[str, bytes],
        read: Callable[[str, Stamp, int], bytes | None],
    ) -> None:
        """Make this side equal to ``there``; the bytes of ``small`` have come already. Raises WriteFailed."""
        for name in sorted(there, key=lambda name: (name == _LAST, _is_record(name), name)):
            stamp = (there[name][0], there[name][1])
            if self._known.get(name) == stamp or not _is_plain(name):
                continue
            target = self._folder / name
            target.parent.mkdir(parents=target.parent != self._folder, exist_ok=True)
            with contextlib.suppress(_Changed):
                self._fetch(name, target, stamp, small.get(name), read)
                self._known[name] = stamp
                self._carried.add(name)
        for name in self._carried - set(there):
            (self._folder / name).unlink(missing_ok=True)
            self._known.pop(name, None)
        self._carried &= set(there)

    @staticmethod
    def _fetch(
        name: str,
        target: Path,
        stamp: Stamp,
        data: bytes | None,
        read: Callable[[str, Stamp, int], bytes | None],
    ) -> None:
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            if data is not None:
                file.write(data)
            while data is None and file.tell() < stamp[0]:
                part = read(name, stamp, file.tell())
                if not part:
                    raise _Changed
                file.write(part)


def _is_record(name: str) -> bool:
    """Records say which weights belong to them, so they follow the weights."""
    return name.endswith(".json")


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and not is_temporary(path.name)
    if not plain:
        logger.warning("a node offered a file called %r, which is not taken", name)
    return plain
