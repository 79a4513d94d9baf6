"""Decoded data kept on disk: made once, checked on every load, shared by all processes.

An entry is a folder ``<name>-<hash of the key>`` with one ``.npy`` file per array and ``manifest.json`` (facts,
and the SHA-256 of everything). It is written under a temporary name and renamed when complete, so it is there
as a whole or not at all; whatever damages it later is found by the checksums and it is made again. One process
makes, the others wait for it (``flock``: the kernel releases it when a process dies).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nas.errors import UserMistake

__all__ = ["ArrayWriter", "Entry", "cached", "default_cache_dir"]

logger = logging.getLogger(__name__)
_FORMAT = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """``arrays`` are memory-mapped (copy on write: the files never change), ``facts`` is JSON."""

    arrays: dict[str, NDArray[Any]]
    facts: dict[str, Any]


class _Damaged(Exception):
    """The entry is there but not what was written."""


class ArrayWriter:
    """Writes a ``.npy`` file row by row when the number of rows is not known beforehand.

    Args:
        path: the file to create.
        row_shape: shape of one row; the array becomes (rows, \\*row_shape).
        dtype: of the array.
    """

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: DTypeLike):
        self._dtype = np.dtype(dtype)
        self.row_shape = row_shape
        self.rows = 0
        self._file = path.open("w+b")
        self._header_bytes = self._write_header()

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, row: NDArray[Any]) -> None:
        """Adds one row; raises ValueError when its shape or dtype is another."""
        if row.shape != self.row_shape or row.dtype != self._dtype:
            raise ValueError(f"row {row.shape} {row.dtype} does not fit {self.row_shape} {self._dtype}")
        self._file.write(np.ascontiguousarray(row).tobytes())
        self.rows += 1

    def close(self) -> None:
        """Writes the final number of rows into the header and closes the file."""
        if self._file.closed:
            return
        self._file.seek(0)
        if self._write_header() != self._header_bytes:
            raise RuntimeError("the .npy header changed its length")  # numpy reserves room for the first axis
        self._file.close()

    def _write_header(self) -> int:
        facts = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self._file, facts)
        return self._file.tell()


def default_cache_dir(cache_dir: str | None) -> Path:
    """``cache_dir`` as a path; ``None`` is ./runs/.cache below the working directory."""
    return Path(cache_dir) if cache_dir is not None else Path("runs") / ".cache"


def cached(
    cache_dir: Path, name: str, key: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
) -> Entry:
    """The entry for ``key``, made by ``make`` unless it is there and whole.

    Args:
        cache_dir: folder of all entries; created when missing.
        name: leads the folder's name, for people.
        key: JSON; everything that the content depends on (source path, size, time of change, options).
        make: writes ``<array>.npy`` files into the empty folder that it is given; returns the facts (JSON).

    Raises:
        UserMistake: ``cache_dir`` cannot be written or its disk is full. Whatever ``make`` raises passes
            through and leaves nothing behind.
    """
    canonical = _canonical(dict(key))
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:40] or "data"
    place = cache_dir / f"{slug}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"
    try:
        if (entry := _load(place)) is not None:
            return entry
    except _Damaged:
        pass  # judged and reported below, under the lock
    with _locked(cache_dir):
        try:
            if (entry := _load(place)) is not None:
                return entry
        except _Damaged as damage:
            logger.warning("cache entry %s is damaged (%s) and is made again", place, damage)
        return _make(place, json.loads(canonical), make)


def _make(place: Path, key: dict[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> Entry:
    for stale in place.parent.glob(".*.partial"):
        shutil.rmtree(stale)  # the lock is ours: whoever wrote this was killed
    partial = place.parent / f".{place.name}.partial"
    partial.mkdir()
    try:
        facts = dict(make(partial))
        body = {
            "format": _FORMAT,
            "key": key,
            "facts": facts,
            "arrays": {path.stem: _sha256(path) for path in sorted(partial.glob("*.npy"))},
        }
        manifest = {**body, "sha256": hashlib.sha256(_canonical(body).encode()).hexdigest()}
        (partial / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        if place.exists():
            place.rename(place.parent / f".{place.name}.damaged.partial")
            shutil.rmtree(place.parent / f".{place.name}.damaged.partial")
        partial.rename(place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _unwritable(place.parent, error) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    entry = _load(place)
    if entry is None:
        raise RuntimeError(f"cache entry {place} vanished while it was being made")
    return entry


def _load(place: Path) -> Entry | None:
    """The verified entry, or None when there is none; raises ``_Damaged``."""
    try:
        manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise _Damaged("the manifest is not an object")
        body = {name: value for name, value in manifest.items() if name != "sha256"}
        if hashlib.sha256(_canonical(body).encode()).hexdigest() != manifest.get("sha256"):
            raise _Damaged("the manifest does not match its checksum")
        if body["format"] != _FORMAT:
            raise _Damaged(f"format {body['format']} is not {_FORMAT}")
        arrays: dict[str, NDArray[Any]] = {}
        for name, digest in body["arrays"].items():
            path = place / f"{name}.npy"
            if _sha256(path) != digest:
                raise _Damaged(f"{path.name} does not match its checksum")
            arrays[name] = np.load(path, mmap_mode="c", allow_pickle=False)
    except FileNotFoundError as missing:
        if place.is_dir():
            raise _Damaged(f"{Path(missing.filename).name} is missing") from missing
        return None
    except (OSError, ValueError) as error:
        raise _Damaged(str(error)) from error
    return Entry(arrays, body["facts"])


@contextmanager
def _locked(cache_dir: Path) -> Iterator[None]:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        file = (cache_dir / ".lock").open("a")
    except OSError as error:
        raise _unwritable(cache_dir, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that decodes data into %s", cache_dir)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unwritable(cache_dir: Path, error: OSError) -> UserMistake:
    reason = error.strerror or error
    return UserMistake(f"cache_dir={str(cache_dir)!r} cannot be written ({reason}); give another cache_dir")


def _canonical(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
