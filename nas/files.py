"""Files that are whole or not there: atomic writes, sealed JSON records, checksums.

Every write goes to a temporary file in the same directory, is flushed to the disk and then renamed, so that a
reader sees the old contents or the new ones whatever moment the writer is killed at. A record carries the SHA-256
of its own canonical JSON, so that a flipped bit is noticed and not believed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "CorruptFile",
    "WriteFailed",
    "atomic_path",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "canonical_json",
    "is_running",
    "is_temporary",
    "read_json",
    "read_record",
    "seal",
    "sha256_file",
    "sweep_temporary",
    "unseal",
    "write_record",
]

_SEAL = "sha256"
_TEMPORARY = re.compile(r"\..+\.(\d+)(?:-\d+)?\.tmp", re.DOTALL)
_counter = itertools.count(1)
_live: set[str] = set()


class CorruptFile(RuntimeError):
    """What is stored under ``path`` is not what was written; ``why`` says how that is known."""

    def __init__(self, path: str | os.PathLike[str], why: str):
        super().__init__(f"{os.fspath(path)} is damaged: {why}")
        self.path = Path(path)
        self.why = why


class WriteFailed(OSError):
    """A file could not be written; what stood there before is untouched."""

    def __init__(self, path: Path, number: int | None, reason: str):
        super().__init__(number or errno.EIO, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} cannot be written: {self.reason}; nothing was changed"


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace ``path`` by ``data``; durable when this returns. Raises WriteFailed, with nothing changed."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """``atomic_write_bytes`` of UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Replace ``path`` by indented JSON. Raises ValueError for NaN, infinities and what JSON has no form for."""
    atomic_write_text(path, _indented(path, data))


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to; when the block ends it becomes ``path``, when the block raises it is removed.

    The directory must exist: one that has vanished during a run is an error and is not made again.

    Raises:
        WriteFailed: for any OSError inside the block or while the file is put in place.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{next(_counter)}.tmp")
    _live.add(temporary.name)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush_directory(target.parent)
    except WriteFailed:
        raise
    except OSError as error:
        raise WriteFailed(target, error.errno, error.strerror or str(error)) from error
    finally:
        # After the rename this name is gone; a directory that cannot be reached has nothing to clean.
        with contextlib.suppress(OSError):
            temporary.unlink()
        _live.discard(temporary.name)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a directory; the rename itself has happened.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value in ``path``. Raises CorruptFile when it is truncated or not JSON, OSError when unreadable."""
    data = Path(path).read_bytes()
    if not data.strip(b"\0 \t\r\n"):
        raise CorruptFile(path, "it is empty")
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorruptFile(path, f"not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise CorruptFile(path, f"not JSON or cut short ({error.msg}, {where})") from None
    except (RecursionError, ValueError) as error:
        raise CorruptFile(path, f"not JSON that can be read ({type(error).__name__})") from None


def canonical_json(data: Any) -> str:
    """One text for one JSON value: sorted keys, no spaces. Raises ValueError for NaN and infinities."""
    # Keys that are numbers become text first; sorting them as numbers would give another order after reading back.
    return _canonical(json.loads(json.dumps(data, allow_nan=False)))


def _canonical(plain: Any) -> str:
    """``canonical_json`` of what was read from JSON."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with the SHA-256 of its canonical JSON under ``sha256``. Raises ValueError when it has that key."""
    if _SEAL in data:
        raise ValueError(f"a record cannot have a key {_SEAL!r} of its own")
    return {**data, _SEAL: _digest(data)}


def unseal(data: Any, where: str | os.PathLike[str]) -> dict[str, Any]:
    """The record without its seal; ``where`` names it in messages. Raises CorruptFile when the seal does not hold."""
    if not isinstance(data, Mapping):
        raise CorruptFile(where, "holds no record")
    body = {key: value for key, value in data.items() if key != _SEAL}
    if _SEAL not in data:
        raise CorruptFile(where, "its checksum is missing")
    try:
        digest = hashlib.sha256(_canonical(body).encode("ascii")).hexdigest()
    except (ValueError, TypeError, RecursionError):
        raise CorruptFile(where, "holds values that no record can have") from None
    if data[_SEAL] != digest:
        raise CorruptFile(where, "its contents do not match its checksum")
    return body


def write_record(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Atomically write ``data`` as sealed, indented JSON."""
    atomic_write_text(path, _indented(path, data, sealed=True))


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The data of a sealed record. Raises CorruptFile when it is not whole, OSError when it cannot be read."""
    return unseal(read_json(path), path)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is the unfinished work of one of the writers here."""
    return _TEMPORARY.fullmatch(name) is not None


def sweep_temporary(directory: str | os.PathLike[str]) -> int:
    """Remove what writers that were killed have left in ``directory``; returns how many files that were.

    A file whose writer's process still exists on this machine is left alone. Call it while nobody on another
    machine writes to the directory.
    """
    removed = 0
    for entry in Path(directory).iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and _abandoned(entry.name, int(match.group(1))):
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
                removed += 1
    return removed


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _indented(path: str | os.PathLike[str], data: Any, *, sealed: bool = False) -> str:
    try:
        return (
            json.dumps(seal(data) if sealed else data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be written as JSON: {error}") from error


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(data).encode("ascii")).hexdigest()


def is_running(pid: int) -> bool:
    """Whether a process of this number runs on this machine. One that has ended but was not waited for does not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return not os.path.exists("/proc/self/stat")  # a system without /proc knows no better


def _abandoned(name: str, owner: int) -> bool:
    # In a container the next process often has the PID of the one that was killed, so our own PID proves nothing.
    if owner == os.getpid():
        return name not in _live
    return not is_running(owner)
