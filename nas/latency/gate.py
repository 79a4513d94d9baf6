"""The gate of a device: many may train on it at once, but while one measures, nothing else of ours runs there.

It is made of numbered lock files (``nas.latency.lease``), shared by all processes of one user on one machine. A
measurer takes the next number and waits until those who share an earlier one have left, which they do as soon as they
see it; new sharers wait for its end. The kernel frees what a killed process held. A holder that is paused or hangs is
passed over after a while, and what it measured is refused when it comes back (``LeaseLost``).
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
from nas.latency.lease import Lease, LeaseLost, LockFiles, Watch, try_lock

__all__ = ["DeviceGate", "GateTimeout", "Lease", "LeaseLost"]

BREATHE_SECONDS = 0.1
"""How often a sharer looks whether a measurer waits; one look costs some microseconds."""

PATIENCE_SECONDS = 600.0
"""How long a process waits for a device by default."""

STALE_SECONDS = 60.0
"""How long a holder may give no sign of life by default. A killed one is noticed at once; this is for a paused one."""

# Whoever waits wakes up on the cores that are being measured, so that only a measurer whose turn it is looks often.
_POLL_SECONDS = 0.005
_POLL_SECONDS_IN_QUEUE = 0.03
_COURTESY_SECONDS = 0.5  # how long a free device is left to the first in the queue, who may be paused itself
_gates: weakref.WeakSet[DeviceGate] = weakref.WeakSet()


class GateTimeout(TimeoutError):
    """The device was not free for as long as the caller was ready to wait."""


class DeviceGate:
    """Access of this process to one device. Not for use by several threads at once; give each its own gate.

    Nesting (measuring while sharing) works within one gate; two gates of one process shut each other out like two
    processes.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``cuda`` and ``cuda:0`` are one device, and indices are those of
            the machine even where ``CUDA_VISIBLE_DEVICES`` renumbers them. Where one process names a GPU there by its
            index and another by its uuid, the two do not see each other.
        directory: where the lock files are; by default a private directory of this user in the temporary directory.
        stale_after: seconds without ``Lease.check`` after which this process, when it measures, loses the device to
            whoever waits for it. Longer than any single step between two checks.

    Raises:
        UserMistake: the directory belongs to somebody else or cannot be made, or ``stale_after`` is not positive.
    """

    def __init__(self, device: str, directory: Path | None = None, *, stale_after: float = STALE_SECONDS):
        if not 0.0 < stale_after < 1e6:
            raise UserMistake(
                f"stale_after: {stale_after!r} is not a number of seconds above 0 and below 1e6"
            )
        self.device = device
        place = _private_directory() if directory is None else directory
        self.stale_after = stale_after
        self._files = LockFiles(place, _file_name(device))
        self._watch = Watch(self._files)
        self._lease: Lease | None = None
        self._share: tuple[int, int] | None = None  # descriptor and number of the file that is locked
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
            if self._shared:  # not in a forked child, which has nothing
                self._shared -= 1
                if not (self._shared or self._exclusive):
                    self._leave()

    def breathe(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Let a waiting measurer in, then go on; does nothing while nobody waits or when the device is not shared."""
        now = time.monotonic()
        if not self._shared or self._exclusive or now - self._looked < BREATHE_SECONDS:
            return
        self._looked = now
        if self._share is not None and self._files.superseded(*self._share):
            self._leave()
            self._enter_shared(timeout)
            self._looked = time.monotonic()

    @contextlib.contextmanager
    def exclusive(self, timeout: float = PATIENCE_SECONDS) -> Iterator[Lease]:
        """Have the device alone, for a measurement. A shared use by this gate rests meanwhile.

        The block gets the lease; call its ``check`` between timings. It is checked once more at the end of the block,
        so that nothing that was measured under a lost lease gets out by accident.

        Raises:
            GateTimeout: others have kept the device for ``timeout`` seconds.
            LeaseLost: at the end of the block, or from ``check``: discard the figures and measure again.
        """
        lease = self._lease
        if lease is None or not self._exclusive:
            lease = self._enter_exclusive(timeout)
        self._exclusive += 1
        try:
            yield lease
            lease.check()
        finally:
            if self._exclusive:
                self._exclusive -= 1
                if not self._exclusive:
                    self._leave_exclusive()

    def _enter_shared(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while (found := self._try_share()) is None:
            self._wait(deadline, timeout)
        self._share = found
        self._looked = time.monotonic()

    def _try_share(self) -> tuple[int, int] | None:
        number = self._files.latest()
        descriptor = self._files.share(number) if number else None
        if descriptor is None:
            if number and not self._watch.stale(number):
                return None
            number += 1
            self._files.begin(number)
            descriptor = self._files.share(number)
        # Only now that we have the lock: a measurer that took the next number before may not have seen it.
        if descriptor is not None and self._files.latest() != number:
            os.close(descriptor)
            descriptor = None
        return None if descriptor is None else (descriptor, number)

    def _leave(self) -> None:
        # Kernels that were launched still run after the call returned; the next one would measure them.
        try:
            self._finish_work()
        finally:
            self._close()

    def _enter_exclusive(self, timeout: float) -> Lease:
        if self._shared:
            self._leave()
        deadline = time.monotonic() + timeout
        queue = self._files.queue()
        try:
            return self._queue_up(queue, deadline, timeout)
        except BaseException:
            self._close()
            if self._shared:
                self._enter_shared(timeout)
            raise
        finally:
            os.close(queue)

    def _queue_up(self, queue: int, deadline: float, timeout: float) -> Lease:
        """Take turns: who measures again and again stands behind the one that waits meanwhile."""
        first = False
        free_since: float | None = None
        while True:
            first = first or try_lock(queue, fcntl.LOCK_EX)
            number = self._files.latest()
            if number and not self._files.over(number) and not self._watch.stale(number):
                free_since = None
            else:
                free_since = time.monotonic() if free_since is None else free_since
                if first or time.monotonic() - free_since >= _COURTESY_SECONDS:
                    self._lease = self._files.grant(self.device, number + 1, self.stale_after)
                    if self._lease is not None and self._is_empty(self._lease, deadline, timeout):
                        return self._lease
                    self._close()
            self._wait(deadline, timeout)

    def _is_empty(self, lease: Lease, deadline: float, timeout: float) -> bool:
        """Wait for the sharers to leave. False when the lease was lost meanwhile."""
        while True:
            try:
                lease.check()
            except LeaseLost:
                return False
            # An older number than the latest may come of reading the directory while names change.
            if self._files.latest() != lease.token:
                return False
            if self._files.drained(lease.token):
                return True
            self._wait(deadline, timeout, _POLL_SECONDS)

    def _leave_exclusive(self) -> None:
        self._leave()
        if self._shared:
            self._enter_shared(PATIENCE_SECONDS)

    def _wait(self, deadline: float, timeout: float, poll: float = _POLL_SECONDS_IN_QUEUE) -> None:
        if time.monotonic() >= deadline:
            raise GateTimeout(self._timeout_text(timeout))
        time.sleep(poll)

    def _timeout_text(self, timeout: float) -> str:
        owner = self._files.owner(self._files.latest())
        others = owner is not None and owner.pid != os.getpid()
        last = f" (the last that measured is process {owner.pid})" if owner and others else ""
        return (
            f"device {self.device!r} was not free within {timeout:g} s: another process of this user trains or "
            f"measures on it without a pause{last}; wait for it or stop it"
        )

    def _close(self) -> None:
        if self._share is not None:
            os.close(self._share[0])
        if self._lease is not None:
            self._lease.close()
        self._share = self._lease = None

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
