"""The run directory: its files, and the lock that keeps a second driver out."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from nas.errors import RunStopped, UserMistake
from nas.files import is_running, is_temporary, sweep_temporary

__all__ = ["RunDirectory"]

_BEFORE_RECIPE = ("environment.json", "run.log", "driver.lock")
_LOCK_ATTEMPTS = 100
_OWNER_SECONDS = 2.0
_LOOK_SECONDS = 0.02


class RunDirectory:
    """Paths of one run, and its exclusive use while the lock is held.

    The lock is the kernel's (``flock`` on ``driver.lock``), so it is gone the moment its owner is, however it died;
    the owner's host, PID and start are written into the file for the message that a second driver gets.
    """

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.database = path / "study.db"
        self.trials = path / "trials"
        self.log = path / "run.log"
        self.finalists = path / "finalists.json"
        self.scale = path / "reference.json"
        self.csv = path / "pareto.csv"
        self.png = path / "pareto.png"
        self.html = path / "report.html"
        self._lock: IO[str] | None = None
        self._closers: list[Callable[[], None]] = []

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """The run directory at ``path``. Raises UserMistake if there is none."""
        run = cls(path)
        if not run.holds_run():
            raise UserMistake(
                f"{path}: not a run directory (no recipe.yaml); give a directory made by 'nas search --out DIRECTORY'"
            )
        return run

    def trial(self, number: int) -> Path:
        """Directory of one trial."""
        return self.trials / str(number)

    def holds_run(self) -> bool:
        """Whether a run was started here; its recipe may have been lost since, its study not yet made."""
        parts = (self.environment.exists(), self.database.exists(), self.trials.is_dir())
        return self.recipe.exists() or sum(parts) >= 2

    def is_empty(self) -> bool:
        """Whether no run is there yet: nothing, or only what is written before the recipe."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return True
        except OSError as error:
            text = f"--out {self.path}: cannot be written ({error.strerror}); choose another directory"
            raise UserMistake(text) from None
        return all(name in _BEFORE_RECIPE or is_temporary(name) for name in names)

    def acquire(self) -> None:
        """Create the directory and take its lock; left-over temporary files of dead writers are removed.

        Raises UserMistake when another driver holds it or the place cannot be written, naming the owner.
        """
        if self._lock is not None:
            return
        handle = self._locked_handle()
        handle.seek(0)
        handle.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": int(time.time())}, handle)
        handle.flush()
        self._lock = handle
        for folder in (self.path, *(self.trials.iterdir() if self.trials.is_dir() else ())):
            if folder.is_dir():
                sweep_temporary(folder)

    def _locked_handle(self) -> IO[str]:
        place = self.path / "driver.lock"
        for _ in range(_LOCK_ATTEMPTS):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                handle = open(place, "a+", encoding="utf-8")  # noqa: SIM115  (held while we run)
            except (
                FileNotFoundError
            ):  # a driver whose start was refused is just removing the directory it had made
                continue
            except OSError as error:
                text = f"--out {self.path}: cannot be written ({error.strerror or error}); choose another directory"
                raise UserMistake(text) from None
            self._lock_or_refuse(handle)
            if _is_file_at(handle, place):
                return handle
            handle.close()  # it was removed between our opening and our locking it, and the next driver locks another
        raise UserMistake(f"--out {self.path}: disappears as soon as it is made; choose another directory")

    def _lock_or_refuse(self, handle: IO[str]) -> None:
        """The lock may be held by one that has not written its name yet, and, for a moment, by what a driver that was
        killed was just starting: both are waited for."""
        until = time.monotonic() + _OWNER_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    handle.close()
                    reason = f"its file system cannot lock files ({error.strerror})"
                    raise UserMistake(
                        f"--out {self.path}: {reason}; choose a directory on another one"
                    ) from None
            owner = _owner(handle)
            if owner or time.monotonic() >= until:
                handle.close()
                text = f"{self.path}: in use by another driver{owner}; wait for it, stop it, or use another --out"
                raise UserMistake(text)
            time.sleep(_LOOK_SECONDS)

    def on_release(self, closer: Callable[[], None]) -> None:
        """Call ``closer`` before the lock is given back."""
        self._closers.append(closer)

    def release(self) -> None:
        """Give the lock back; the file stays, empty, because removing it would race with the next owner."""
        while self._closers:
            self._closers.pop()()
        if self._lock is not None:
            with contextlib.suppress(OSError):  # a disk that is gone has no owner's name to clear
                self._lock.seek(0)
                self._lock.truncate()
            with contextlib.suppress(OSError):
                self._lock.close()
            self._lock = None

    def require_lock(self) -> None:
        """Raises RunStopped unless this object holds the lock."""
        if self._lock is None:
            raise RunStopped(f"{self.path}: written to without holding its lock")

    def discard_if_empty(self) -> None:
        """Remove a directory in which no run was made while we hold it, so that a refused start leaves no trace."""
        if self._lock is None or not self.is_empty():
            return
        with contextlib.suppress(OSError):  # it may be gone already, or not be ours to remove
            for name in os.listdir(self.path):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()


def _is_file_at(handle: IO[str], place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), place.stat())
    except FileNotFoundError:
        return False


def _owner(handle: IO[str]) -> str:
    """Who holds the lock, as far as its file names a living process."""
    handle.seek(0)
    try:
        owner = json.load(handle)
        host, pid, since = str(owner["host"]), int(owner["pid"]), int(owner["since"])
    except (ValueError, KeyError, TypeError):
        return ""
    # A dead process of this machine is the owner before.
    if host == socket.gethostname() and not is_running(pid):
        return ""
    return f" (host {host}, PID {pid}, started {max(0, int(time.time()) - since)} s ago)"
