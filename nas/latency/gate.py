"""The gate of a device: many may train on it at once, but while one measures, nothing else of ours runs there.

It is made of two files locked with flock, shared by all processes of one user on one machine; the kernel frees
what a killed process held. A measurer takes ``turn`` and then ``use``, both exclusively. A sharer passes through
``turn`` on its way to a shared ``use``, so that no new sharer gets in while a measurer waits, and gives ``use`` back
for a moment whenever somebody stands at ``turn``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from nas.errors import UserMistake

__all__ = ["DeviceGate", "GateTimeout"]

BREATHE_SECONDS = 0.1
"""How often a sharer looks whether a measurer waits; one look costs some microseconds."""

PATIENCE_SECONDS = 600.0
"""How long a process waits for a device by default."""

# Whoever waits wakes up on the cores that are being measured, so that only a measurer whose turn it is looks often.
_POLL_SECONDS = 0.005
_POLL_SECONDS_IN_QUEUE = 0.03
_gates: weakref.WeakSet[DeviceGate] = weakref.WeakSet()


class GateTimeout(TimeoutError):
    """The device was not free for as long as the caller was ready to wait."""


class DeviceGate:
    """Access of this process to one device. Not for use by several threads at once; give each its own gate.

    Nesting (measuring while sharing) works within one gate; two gates of one process shut each other out like two
    processes.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``cuda`` and ``cuda:0`` are one device, and indices are those of
            the machine even where ``CUDA_VISIBLE_DEVICES`` renumbers them.
        directory: where the lock files are; by default a private directory of this user in the temporary directory.

    Raises:
        UserMistake: the directory belongs to somebody else or cannot be made.
    """

    def __init__(self, device: str, directory: Path | None = None):
        self.device = device
        place = _private_directory() if directory is None else directory
        name = _file_name(device)
        self._turn_path = place / f"{name}.turn.lock"
        self._use_path = place / f"{name}.use.lock"
        self._turn: int | None = None
        self._use: int | None = None
        self._shared = 0
        self._exclusive = 0
        self._looked = 0.0
        _gates.add(self)

    @contextlib.contextmanager
    def shared(self, timeout: float = PATIENCE_SECONDS) -> Iterator[None]:
        """Use the device beside others, for training. Call ``breathe`` often.

        Raises GateTimeout when measurements have kept the device for ``timeout`` seconds.
        """
        if not (self._shared or self._exclusive):
            self._enter_shared(timeout)
        self._shared += 1
        try:
            yield
        finally:
            self._shared -= 1
            if not (self._shared or self._exclusive):
                self._leave()

    def breathe(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Let a waiting measurer in, then go on; does nothing while nobody waits or when the device is not shared."""
        now = time.monotonic()
        if not self._shared or self._exclusive or now - self._looked < BREATHE_SECONDS:
            return
        self._looked = now
        if self._somebody_waits():
            self._leave()
            self._enter_shared(timeout)
            self._looked = time.monotonic()

    @contextlib.contextmanager
    def exclusive(self, timeout: float = PATIENCE_SECONDS) -> Iterator[None]:
        """Have the device alone, for a measurement. A shared use by this gate rests meanwhile.

        Raises GateTimeout when others have kept the device for ``timeout`` seconds.
        """
        if not self._exclusive:
            self._enter_exclusive(timeout)
        self._exclusive += 1
        try:
            yield
        finally:
            self._exclusive -= 1
            if not self._exclusive:
                self._leave_exclusive()

    def _enter_shared(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        turn = self._lock(self._turn_path, fcntl.LOCK_SH, deadline, timeout)
        try:
            self._use = self._lock(self._use_path, fcntl.LOCK_SH, deadline, timeout)
        finally:
            os.close(turn)
        self._looked = time.monotonic()

    def _leave(self) -> None:
        # Kernels that were launched still run after the call returned; the next one would measure them.
        try:
            self._finish_work()
        finally:
            self._close()

    def _enter_exclusive(self, timeout: float) -> None:
        if self._shared:
            self._leave()
        deadline = time.monotonic() + timeout
        try:
            self._turn = self._lock(self._turn_path, fcntl.LOCK_EX, deadline, timeout)
            os.ftruncate(self._turn, 0)
            os.pwrite(self._turn, f"{os.getpid()}\n".encode(), 0)
            self._use = self._lock(self._use_path, fcntl.LOCK_EX, deadline, timeout, poll=_POLL_SECONDS)
        except BaseException:
            self._close()
            if self._shared:
                self._enter_shared(timeout)
            raise

    def _leave_exclusive(self) -> None:
        self._leave()
        if self._shared:
            self._enter_shared(PATIENCE_SECONDS)

    def _somebody_waits(self) -> bool:
        descriptor = self._open(self._turn_path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _lock(
        self, path: Path, kind: int, deadline: float, timeout: float, *, poll: float = _POLL_SECONDS_IN_QUEUE
    ) -> int:
        descriptor = self._open(path)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                    return descriptor
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise GateTimeout(self._timeout_text(timeout)) from None
                    time.sleep(poll)
        except BaseException:
            os.close(descriptor)
            raise

    def _timeout_text(self, timeout: float) -> str:
        try:
            owner = self._turn_path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            owner = ""
        known = owner.isdecimal() and int(owner) != os.getpid()
        last = f" (the last that measured is process {owner})" if known else ""
        return (
            f"device {self.device!r} was not free within {timeout:g} s: another process of this user trains or "
            f"measures on it without a pause{last}; wait for it or stop it"
        )

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UserMistake(
                f"lock file {path} cannot be opened: {error.strerror}; set TMPDIR to a writable directory"
            ) from error

    def _close(self) -> None:
        for descriptor in (self._use, self._turn):
            if descriptor is not None:
                os.close(descriptor)
        self._use = self._turn = None

    def _finish_work(self) -> None:
        torch = sys.modules.get("torch")
        if self.device.startswith("cuda") and torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize(self.device)

    def _forget(self) -> None:
        """For a forked child: its copies would keep the locks of a parent that dies; closing them frees nothing."""
        self._close()
        self._shared = self._exclusive = 0


def _forget_all() -> None:
    for gate in list(_gates):
        gate._forget()


os.register_at_fork(after_in_child=_forget_all)


def _file_name(device: str) -> str:
    kind, _, rest = device.partition(":")
    if kind == "cpu":
        return "cpu"
    if kind == "cuda":
        return f"cuda-{_plain(_physical_index(rest or '0'))}"
    return _plain(device)


def _physical_index(index: str) -> str:
    visible = [
        entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()
    ]
    return visible[int(index)] if index.isdecimal() and int(index) < len(visible) else index


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", text)[:100]


def _private_directory() -> Path:
    place = Path(tempfile.gettempdir()) / f"nas-toolkit-{os.getuid()}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise UserMistake(
                f"{place} is not a directory of this user; remove it or set TMPDIR to another directory"
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            place.chmod(0o700)
    except OSError as error:
        raise UserMistake(
            f"{place} cannot be made: {error.strerror}; set TMPDIR to a writable directory"
        ) from error
    return place
