"""The lock files of one device: numbered leases that a holder loses when it stops giving signs of life.

``NAME.1.lock``, ``NAME.2.lock``, ... in one directory; only the one with the highest number counts. A measurer makes
the next one, already locked with flock and with its owner record inside, and gives it its name with ``link``, which
fails where the name exists: number, lock and record appear at one instant, and one of many waiters gets them. The
number is the fencing token. It is given once: when the lock on it is let go, by its holder or by the kernel because
the holder died, the lease is over for good, and from then on the file is what sharers lock together.

So that "lease 7 is over" stays true once it is true, and a waiter that acts on it late only finds number 8 taken.
Whoever finds the holder of 7 without a sign of life makes 8 in the same way; the holder of 7 keeps a lock on a file
that no longer counts, and ``Lease.check`` tells it so.

Signs of life are changes of the lease file's modification time. A waiter counts how long it has itself looked on
without seeing one; no clock is compared between processes, so that a clock that is set, a suspended machine or a
frozen container makes nobody look dead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from nas.errors import UserMistake

__all__ = ["Lease", "LeaseLost", "LockFiles", "Owner", "Watch", "try_lock"]

RENEW_SECONDS = 1.0
"""A sign of life is written at most this often; it costs one system call."""

_LOOKS = 10  # a waiter that was paused itself has seen at most one look's worth of silence
_OLD_SECONDS = 3600.0
_PATIENCE_WIDTH = 14
_counter = itertools.count(1)


class LeaseLost(RuntimeError):
    """The device was given to somebody else meanwhile: what was measured under this lease must be discarded."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds or last held a lease.

    Attributes:
        pid: process number, in the owner's PID namespace.
        started: when the process started, in clock ticks since boot, so that a reused number is noticed; None
            where the system does not say.
        boot: the kernel's boot id; None where there is none.
        namespace: inode of the owner's PID namespace; None where there is none.
        acquired: Unix time, seconds; for people, nothing is decided by it.
        heartbeat: Unix time of the last sign of life, seconds; for people too.
        patience: seconds without a sign of life after which the owner gives the lease up for lost.
    """

    pid: int
    started: int | None
    boot: str | None
    namespace: int | None
    acquired: float
    heartbeat: float
    patience: float

    @classmethod
    def of_this_process(cls, patience: float) -> Owner:
        now = time.time()
        started = _process(os.getpid())
        return cls(
            os.getpid(), started[1] if started else None, _boot_id(), _pid_namespace(), now, now, patience
        )

    def gone(self) -> bool:
        """Whether the process surely runs no more. False when this process cannot know, as in another container."""
        here = (_boot_id(), _pid_namespace())
        if None in here or None is self.started or here != (self.boot, self.namespace):
            return False
        found = _process(self.pid)
        return found is None or found[0] in "ZX" or found[1] != self.started

    def to_bytes(self) -> bytes:
        body = dataclasses.asdict(self)
        del body["heartbeat"], body["patience"]
        return _patience_text(self.patience) + json.dumps(body).encode("ascii") + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, heartbeat: float) -> Owner | None:
        """The owner in a lease file's contents; None for the file of sharers and for what is no record."""
        try:
            body: dict[str, Any] = json.loads(data[_PATIENCE_WIDTH:])
            return cls(patience=float(data[:_PATIENCE_WIDTH]), heartbeat=heartbeat, **body)
        except (ValueError, TypeError):
            return None


class Lease:
    """The right to have one device alone, until the ``with`` block of ``DeviceGate.exclusive`` ends or it is lost.

    Attributes:
        device: the gate's device.
        token: number of the lease; a later lease on the device has a higher one, as long as nobody removes the
            lock directory.
        owner: this process, as others see it.
    """

    def __init__(self, device: str, token: int, owner: Owner, files: LockFiles, descriptor: int):
        self.device = device
        self.token = token
        self.owner = owner
        self._files = files
        self._descriptor: int | None = descriptor
        self._patience = owner.patience
        self._renewed = time.monotonic()

    def check(self, patience: float | None = None) -> None:
        """Make sure that the device is still ours, and give a sign of life. Call it between timings.

        There is no thread that would do so, because it would wake up amid a timing. It costs three system calls
        (some microseconds); once a second one more.

        Args:
            patience: seconds within which the next call comes, when that is more than what the gate was made with:
                say so before a compilation. It holds until the next call.

        Raises:
            LeaseLost: others have taken the device over, or the ``with`` block is over, or this is a forked child.
        """
        if self._descriptor is None:
            raise LeaseLost(f"lease {self.token} on device {self.device!r} has ended in this process")
        if self._files.superseded(self._descriptor, self.token):
            raise LeaseLost(self._lost_text())
        self._renew(self._descriptor, max(self.owner.patience, patience or 0.0))

    def _renew(self, descriptor: int, patience: float) -> None:
        now = time.monotonic()
        if patience != self._patience:
            os.pwrite(descriptor, _patience_text(patience), 0)
            self._patience = patience
        elif now - self._renewed >= min(RENEW_SECONDS, patience / _LOOKS):
            os.utime(descriptor)
        else:
            return
        self._renewed = now

    def close(self) -> None:
        """Give the lease back, or forget one that is lost; does nothing the second time."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lost_text(self) -> str:
        latest = self._files.latest()
        owner = self._files.owner(latest)
        if latest <= self.token:
            why = f"the lock file of lease {self.token} was removed"
        else:
            why = (
                f"device {self.device!r} was given to {f'process {owner.pid}' if owner else 'others'} (lease {latest}) "
                f"because process {self.owner.pid}, which held lease {self.token}, gave no sign of life for "
                f"{self._patience:g} s"
            )
        return f"{why}; discard what was measured under it and measure again"


class LockFiles:
    """The numbered lock files of one device in ``place``; every operation is atomic towards other processes."""

    def __init__(self, place: Path, name: str):
        self._place = place
        self._name = name
        self._stem = os.path.join(place, name)

    def path(self, number: int) -> Path:
        return Path(self._text(number))

    def _text(self, number: int) -> str:
        # A Path would cost more than the look at the file that follows, and it is made between timings.
        return f"{self._stem}.{number}.lock"

    def numbers(self) -> list[int]:
        """The numbers that exist, ascending. Raises UserMistake when the directory cannot be read."""
        try:
            names = os.listdir(self._place)
        except OSError as error:
            raise self._mistake(error) from error
        parts = [name.split(".") for name in names]
        return sorted(
            int(part[1])
            for part in parts
            if len(part) == 3 and part[0] == self._name and part[2] == "lock" and part[1].isdecimal()
        )

    def latest(self) -> int:
        """The number that counts; 0 when nobody has used the device yet."""
        return max(self.numbers(), default=0)

    def begin(self, number: int) -> None:
        """Make a file for sharers, unless somebody has made that number already."""
        with contextlib.suppress(FileExistsError):
            os.close(self._open(self.path(number), os.O_CREAT | os.O_EXCL))

    def grant(self, device: str, number: int, patience: float) -> Lease | None:
        """Lease ``number``, or None when somebody else has made that number. Sharers may still be at work."""
        owner = Owner.of_this_process(patience)
        hidden = self._place / f".{self._name}.{owner.pid}-{time.time_ns()}-{next(_counter)}.tmp"
        descriptor = self._open(hidden, os.O_CREAT | os.O_EXCL)
        try:
            try_lock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, owner.to_bytes())
            os.link(hidden, self.path(number))
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, FileExistsError):
                return None
            if isinstance(error, OSError):
                raise self._mistake(error) from error
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                hidden.unlink()
        return Lease(device, number, owner, self, descriptor)

    def share(self, number: int) -> int | None:
        """A descriptor with a shared lock on the file; None while its lease lasts, and when the file is no more."""
        try:
            descriptor = self._open(self.path(number))
        except FileNotFoundError:
            return None
        if try_lock(descriptor, fcntl.LOCK_SH):
            return descriptor
        os.close(descriptor)
        return None

    def over(self, number: int) -> bool:
        """Whether the lease of that number is over, or there was none. Once True, always True."""
        descriptor = self.share(number)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def superseded(self, descriptor: int, number: int) -> bool:
        """Whether the file that is open as ``descriptor`` no longer counts."""
        # Looked at in this order: ``drained`` removes numbers ascending, so that while the next one has been made
        # and removed again, this one has been removed before.
        return os.path.lexists(self._text(number + 1)) or os.fstat(descriptor).st_nlink == 0

    def drained(self, number: int) -> bool:
        """Whether no sharer works under a lower number; what is used no more is removed.

        No sharer can come later: whoever locks a lower number looks afterwards whether it still counts.
        """
        for lower in self.numbers():
            if lower < number and not self._remove_unshared(lower):
                return False
        self._sweep()
        return True

    def queue(self) -> int:
        """A descriptor of the file whose lock the first of the waiting measurers holds."""
        return self._open(self._place / f"{self._name}.queue.lock", os.O_CREAT)

    def owner(self, number: int) -> Owner | None:
        """The owner record in that file; None for a file of sharers and for one that is no more."""
        try:
            descriptor = self._open(self.path(number))
        except FileNotFoundError:
            return None
        try:
            return Owner.from_bytes(os.pread(descriptor, 4096, 0), os.fstat(descriptor).st_mtime)
        finally:
            os.close(descriptor)

    def beat(self, number: int) -> int | None:
        """What changes with every sign of life of the lease's holder; None when the file is no more."""
        try:
            return os.stat(self._text(number)).st_mtime_ns
        except FileNotFoundError:
            return None

    def _remove_unshared(self, number: int) -> bool:
        try:
            descriptor = self._open(self.path(number))
        except FileNotFoundError:
            return True
        try:
            # Where not even a shared lock is to be had, somebody has an exclusive one: a holder that was passed over,
            # or another that looks for sharers right now. Either way nobody shares.
            if not try_lock(descriptor, fcntl.LOCK_EX) and try_lock(descriptor, fcntl.LOCK_SH):
                return False
            self.path(number).unlink(missing_ok=True)
            return True
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove what processes that were killed within ``grant`` have left."""
        for entry in self._place.glob(f".{self._name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > _OLD_SECONDS:
                    entry.unlink()

    def _open(self, path: Path, flags: int = 0) -> int:
        """Raises FileNotFoundError and FileExistsError where ``flags`` make them part of the game, else UserMistake."""
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
        except OSError as error:
            if isinstance(error, FileExistsError) or (
                isinstance(error, FileNotFoundError) and not flags & os.O_CREAT
            ):
                raise
            raise self._mistake(error) from error

    def _mistake(self, error: OSError) -> UserMistake:
        return UserMistake(
            f"lock files {self._place / self._name}.*.lock cannot be used: {error.strerror}; set TMPDIR to a "
            "writable directory on a local disk"
        )


class Watch:
    """How long one waiter has looked on without a sign of life of a lease's holder."""

    def __init__(self, files: LockFiles):
        self._files = files
        self._seen: tuple[int, int | None] | None = None
        self._owner: Owner | None = None
        self._silent = self._looked = self._asked = 0.0

    def stale(self, number: int, now: float | None = None) -> bool:
        """Whether the holder of the lease, whose lock is still there, is to be passed over. Call it at every look.

        It is after ``patience`` seconds of silence, or after one when its process is gone and a child that it forked
        outside of Python keeps the lock.

        Args:
            now: seconds of any clock that only goes forward; by default the monotonic one.
        """
        now = time.monotonic() if now is None else now
        seen = (number, self._files.beat(number))
        if seen != self._seen:
            self._seen, self._silent, self._looked, self._asked = seen, 0.0, now, now
            self._owner = self._files.owner(number)
        if self._owner is None:
            return False
        self._silent += min(now - self._looked, self._owner.patience / _LOOKS)
        self._looked = now
        if self._silent > self._owner.patience:
            # It may have been raised between the two readings above.
            self._owner = self._files.owner(number)
        return self._owner is not None and (self._silent > self._owner.patience or self._is_gone(now))

    def _is_gone(self, now: float) -> bool:
        if self._owner is None or now - self._asked < RENEW_SECONDS:
            return False
        self._asked = now
        return self._owner.gone()


def try_lock(descriptor: int, kind: int) -> bool:
    """flock without waiting; False while others have a lock that excludes ``kind`` (LOCK_SH or LOCK_EX)."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _patience_text(seconds: float) -> bytes:
    return f"{seconds:0{_PATIENCE_WIDTH - 1}.3f}\n".encode("ascii")


@functools.cache
def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _pid_namespace() -> int | None:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def _process(pid: int) -> tuple[str, int] | None:
    """(state, start time in clock ticks since boot) of a process, proc(5) fields 3 and 22; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode("ascii"), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
