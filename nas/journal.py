"""Optuna's journal file, made safe against writers that are killed.

Optuna appends to whatever is there: a record after a torn one is glued to it, and the journal can never be read again.
And its lock is a symbolic link that a killed writer leaves behind, for which everybody then waits 30 seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nas.files import CorruptFile

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.storages.journal import JournalFileBackend

__all__ = [
    "JournalLock",
    "check_journal",
    "journal_records",
    "lock_of",
    "open_journal",
    "repair_journal_tail",
]


class JournalLock:
    """The kernel's lock on the journal itself, which ends with its owner, and Optuna's link for other programs.

    The link of a dead driver is told from that of a living foreign program by its target, which leads to the journal
    as Optuna expects, but by a spelling of ours.

    Whoever has it may take it again before giving it back, and so several changes become one step for others. What a
    driver that was killed while it wrote has left of a record is cut off before anything is written after it.

    Raises OSError when the journal is no longer the file that was opened: nothing is written to another one.
    """

    def __init__(self, path: Path):
        from optuna.storages.journal import JournalFileSymlinkLock

        self._path = path
        self._link = f"{path}.lock"
        self._target = f".//{path.name}"
        self._foreign = JournalFileSymlinkLock(str(path))
        self._handle: IO[bytes] | None = None
        self._file: os.stat_result | None = None
        self._thread = threading.RLock()
        self._depth = 0

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._thread.acquire()
        try:
            if self._depth == 0:
                self._take()
            self._depth += 1
        except BaseException:
            self._thread.release()
            raise
        return True

    def _take(self) -> None:
        handle = open(self._path, "r+b")  # noqa: SIM115  (held until release)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            now = os.fstat(handle.fileno())
            self._file = self._file or now
            if not (os.path.samestat(now, self._file) and os.path.samestat(now, os.stat(self._path))):
                raise OSError(errno.ESTALE, "it was replaced by another file", str(self._path))
            self._take_link()
            if not _ends_well(handle):
                repair_journal_tail(self._path)
        except BaseException:
            handle.close()
            raise
        self._handle = handle

    def _take_link(self) -> None:
        # Whoever has the kernel's lock is the only driver of ours: such a link is a dead one's.
        with contextlib.suppress(OSError):
            if os.readlink(self._link) == self._target:
                os.unlink(self._link)
        try:
            os.symlink(self._target, self._link)
        except FileExistsError:
            self._foreign.acquire()

    def release(self) -> None:
        """Give the lock back."""
        self._depth -= 1
        if self._depth == 0:
            with contextlib.suppress(FileNotFoundError):  # somebody has waited too long for it
                os.unlink(self._link)
            if self._handle is not None:
                self._handle.close()
                self._handle = None
        self._thread.release()


def _ends_well(handle: IO[bytes]) -> bool:
    size = handle.seek(0, os.SEEK_END)
    if size == 0:
        return True
    handle.seek(size - 1)
    return handle.read(1) == b"\n"


def lock_of(storage: BaseStorage) -> JournalLock | None:
    """The lock of a journal that was opened here for writing; None for every other storage."""
    lock = getattr(getattr(storage, "_backend", None), "_lock", None)
    return lock if isinstance(lock, JournalLock) else None


def open_journal(path: Path) -> JournalFileBackend:
    """The journal at ``path`` for reading and writing; a torn last record is cut off and kept beside it. Made if
    need be, in a directory that exists. Raises OSError, CorruptFile."""
    from optuna.storages.journal import JournalFileBackend

    path.touch()
    lock = JournalLock(path)
    lock.acquire()  # cuts off what is torn
    lock.release()
    check_journal(path)
    return JournalFileBackend(str(path), lock_obj=lock)  # type: ignore[arg-type]  # its base class is private


def repair_journal_tail(path: Path) -> int:
    """Cut a torn last record off a journal, keeping the bytes in ``NAME.torn-N``; returns how many were cut.

    The caller holds the journal's lock: the record that another driver is just writing looks the same.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end == len(data):
        return 0
    number = 1
    while (aside := path.with_name(f"{path.name}.torn-{number}")).exists():
        number += 1
    aside.write_bytes(data[end:])
    with open(path, "r+b") as handle:
        handle.truncate(end)
        os.fsync(handle.fileno())
    return len(data) - end


def check_journal(path: Path) -> None:
    """Raises CorruptFile, naming the line, when a record cannot be read; an unfinished last one is no damage."""
    for number, record in journal_records(path):
        if not isinstance(record, dict) or not isinstance(record.get("op_code"), int):
            raise CorruptFile(path, f"line {number} is no record of a journal")


def journal_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of each finished line, None for one that is not JSON."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None
