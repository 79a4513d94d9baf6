"""One worker process as the driver sees it: started, spoken with, watched, ended with all its descendants.

The process leads its own session, so that Ctrl-C and a closed terminal reach the driver only, and its own
process group, so that everything it starts can be ended with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from nas.executors.wire import Decoder, TornMessage, encode

__all__ = ["HANDLES", "Log", "WorkerGone", "WorkerProcess", "memory_used", "out_of_memory_kills"]

logger = logging.getLogger(__name__)

HANDLES = 5
"""File handles that the driver holds for each worker: three pipes, the worker's log, the running job's log."""

LOG_BYTES = 10 << 20
LOG_KEPT_BYTES = 1 << 20

# The driver's import path replaces the worker's before anything is imported: with -m, a file in the current
# directory that is called json.py would break every worker.
_START = (
    "import sys; sys.path[:] = sys.argv[4:]; fds = map(int, sys.argv[1:4]); del sys.argv[1:]; "
    "from nas.executors.worker import main; main(*fds)"
)

_lifelines: set[int] = set()


def _drop_lifelines() -> None:
    """In a child that the driver forks (a data loader's, for one): it must not keep workers alive after the driver."""
    for descriptor in list(_lifelines):
        os.close(descriptor)
    _lifelines.clear()


os.register_at_fork(after_in_child=_drop_lifelines)


class WorkerGone(Exception):
    """The worker ended, or what it sent cannot be understood; the text says how."""


class Log:
    """What a worker prints: an open file that is kept short, and whose last lines can be shown."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        # Several processes write and the driver shortens: only appending keeps every writer at the end.
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)

    @classmethod
    def scratch(cls) -> Log:
        """A log without a name, which vanishes with its last user even if the driver is killed."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("worker-log", os.MFD_CLOEXEC))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    @classmethod
    def open(cls, path: Path) -> Log:
        """The log at ``path``, created with its folder if that is all that is missing. Raises OSError."""
        path.parent.mkdir(exist_ok=True)
        return cls(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644))

    def clear(self) -> None:
        os.ftruncate(self.descriptor, 0)

    def shorten(self) -> None:
        """Keep only the end once the log has outgrown its limit."""
        size = os.fstat(self.descriptor).st_size
        if size <= LOG_BYTES:
            return
        note = b"[log longer than %d MB: its beginning was dropped]\n" % (LOG_BYTES >> 20)
        try:
            kept = os.pread(self.descriptor, LOG_KEPT_BYTES, size - LOG_KEPT_BYTES)
            os.ftruncate(self.descriptor, 0)
            os.write(self.descriptor, note + kept)
        except OSError as error:  # a full disk: a log is not worth a job
            logger.warning("a worker's log cannot be shortened: %s", error)

    def tail(self, lines: int = 20, size: int = 4000) -> str:
        """The last lines, at most ``size`` bytes of them."""
        length = os.fstat(self.descriptor).st_size
        text = os.pread(self.descriptor, size, max(0, length - size)).decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:]).strip()

    def close(self) -> None:
        os.close(self.descriptor)


class WorkerProcess:
    """A running worker. Raises OSError when the system refuses another process or another file handle.

    Args:
        environment: the complete environment of the process.
        import_path: its ``sys.path``.
        hello: first message, see :func:`nas.executors.worker.main`.
    """

    def __init__(self, environment: Mapping[str, str], import_path: list[str], hello: dict[str, Any]):
        self._decoder = Decoder()
        self._status: int | None = None
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as childs_ends:
            self.log = Log.scratch()
            undo.callback(self.log.close)
            (commands, self._commands), (self._results, results), (lifeline, self._lifeline) = (
                _pipe(undo, childs_ends, driver_reads=driver_reads) for driver_reads in (False, True, False)
            )
            _lifelines.add(self._lifeline)
            undo.callback(_lifelines.discard, self._lifeline)
            os.set_blocking(self._commands, False)
            fds = (commands, results, lifeline)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, *map(str, fds), *import_path],
                stdin=subprocess.DEVNULL,
                stdout=self.log.descriptor,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=fds,
                start_new_session=True,
            )
            self._close_handles = undo.pop_all().close
        self.pid = self._process.pid
        self._readable = select.poll()
        self._readable.register(self._results, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(self._commands, select.POLLOUT)
        # If it has ended already, the first answer that is waited for will say so.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._commands, encode("hello", hello))

    # -- talking ---------------------------------------------------------------------------------------------

    def send(self, frame: bytes, look: Callable[[], None], tick: float) -> None:
        """Write one message; every ``tick`` seconds that the worker does not read, call ``look``, which may raise."""
        rest = memoryview(frame)
        while rest:
            try:
                rest = rest[os.write(self._commands, rest) :]
            except BlockingIOError:
                if not self._writable.poll(tick * 1000):
                    look()
            except BrokenPipeError:
                raise WorkerGone(self.epitaph()) from None

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None when none came in time. Raises WorkerGone."""
        until = time.monotonic() + seconds
        while True:
            try:
                message = self._decoder.pop()
            except TornMessage as error:
                raise WorkerGone(str(error)) from None
            if message is not None:
                return message
            if not self._readable.poll(max(0.0, until - time.monotonic()) * 1000):
                return None
            data = os.read(self._results, 1 << 16)
            if not data:
                raise WorkerGone(self.epitaph())
            self._decoder.feed(data)

    # -- watching --------------------------------------------------------------------------------------------

    def exit_status(self) -> int | None:
        """None while it runs; then the exit code, or minus the signal that killed it.

        It is not reaped here: until then the system gives its number, by which the group is killed, to no
        other.
        """
        if self._status is None:
            if not hasattr(os, "waitid"):  # macOS before Python 3.13
                self._status = self._process.poll()
                return self._status
            try:
                found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # somebody's wait for any child took it; Popen knows no more than we do
                self._status = self._process.poll()
                return self._status
            if found is not None:
                self._status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        return self._status

    def epitaph(self) -> str:
        """How it ended ("killed by signal 9 (SIGKILL)"), waiting a moment for an end that is under way."""
        self._await_exit(2.0, lambda: False)
        status = self.exit_status()
        if status is None:
            return "closed its channel"
        if status >= 0:
            return f"exited with code {status}"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = "unknown"
        return f"killed by signal {-status} ({name})"

    def _await_exit(self, seconds: float, hurry: Callable[[], bool]) -> bool:
        until = time.monotonic() + seconds
        pause = 0.001
        while self.exit_status() is None:
            if time.monotonic() >= until or hurry():
                return False
            time.sleep(pause)
            pause = min(0.02, pause * 2)
        return True

    # -- ending ----------------------------------------------------------------------------------------------

    def leave(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """Ask an idle worker to end by itself; after ``seconds``, or as soon as ``hurry()``, it is killed."""
        with contextlib.suppress(OSError):
            os.write(self._commands, encode("leave"))
        self._await_exit(seconds, hurry)
        self.kill()

    def stop(self, grace: float, hurry: Callable[[], bool]) -> None:
        """SIGTERM to the whole group, then SIGKILL after ``grace`` seconds or as soon as ``hurry()``."""
        relatives = self._descendants()
        if grace > 0:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # a stopped process takes the signal only when it goes on
            self._await_exit(grace, hurry)
        self._kill(relatives)

    def kill(self) -> None:
        """SIGKILL to the whole group and to descendants that left it. Returns when the process is reaped."""
        self._kill(self._descendants())

    def signal_kill(self) -> None:
        """SIGKILL to the group without reaping: for a thread other than the one that drives this worker."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Release the handles of an ended worker."""
        self._close_handles()

    def _kill(self, relatives: list[psutil.Process]) -> None:
        self._signal(signal.SIGKILL)
        for relative in relatives:
            with contextlib.suppress(psutil.Error):
                relative.kill()  # psutil compares the start time: a number used again is not touched
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            # Only a driver in the kernel can hold a killed process (a lost network disk, a GPU); waiting
            # helps nobody.
            logger.warning(
                "worker %d was killed but has not ended after 5 s; leaving it to the system", self.pid
            )

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            # macOS refuses permission for a group whose processes have all ended.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _descendants(self) -> list[psutil.Process]:
        if self._process.returncode is not None:  # reaped: its number may be a stranger's by now
            return []
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.Error:
            return []


def _pipe(
    undo: contextlib.ExitStack, childs_ends: contextlib.ExitStack, *, driver_reads: bool
) -> tuple[int, int]:
    """A pipe whose driver's end is closed by ``undo`` and whose other end by ``childs_ends``."""
    read_end, write_end = os.pipe()
    driver, child = (read_end, write_end) if driver_reads else (write_end, read_end)
    undo.callback(os.close, driver)
    childs_ends.callback(os.close, child)
    return read_end, write_end


# -- memory --------------------------------------------------------------------------------------------------


def memory_used(pid: int, limit: int) -> int:
    """Bytes of memory of the process ``pid`` and its descendants, exact where it matters (above ``limit``).

    Mapped files do not count: the system can drop their pages at any time, and a big data set may be mapped.
    Forked children share pages with their parent; when the plain sum is above the limit, shared pages are
    divided by the number of their users. Outside Linux the sum of resident sizes is all there is.
    """
    if not sys.platform.startswith("linux"):
        return _resident_sum(pid)
    family = _family(pid)
    used = sum(map(_resident, family))
    if used > limit and len(family) > 1:
        shares = {
            member: _fields(f"/proc/{member}/smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")) for member in family
        }
        # One that has no share and no memory either has ended meanwhile; others have a share that cannot be read.
        if all(share or not _resident(member) for member, share in shares.items()):
            used = min(used, sum(shares.values()))
    return used


def _resident(pid: int) -> int:
    return _fields(f"/proc/{pid}/status", ("RssAnon:", "RssShmem:"))


def _family(pid: int) -> list[int]:
    """``pid`` and its descendants; a tenth of the cost of psutil, which reads every process of the machine."""
    found = [pid]
    for member in found:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{member}/task"):
                with open(f"/proc/{member}/task/{thread}/children") as file:
                    found += map(int, file.read().split())
    return found


def _fields(path: str, names: tuple[str, ...]) -> int:
    """Sum in bytes of the named lines of a /proc file in kB; 0 for a process that ended."""
    try:
        with open(path, errors="replace") as file:
            lines = file.readlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(names))


def _resident_sum(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        return sum(int(member.memory_info().rss) for member in (process, *process.children(recursive=True)))
    except psutil.Error:
        return 0


def out_of_memory_kills() -> int:
    """How often the kernel has killed a process for want of memory since boot (Linux; elsewhere always 0)."""
    try:
        with open("/proc/vmstat") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0
