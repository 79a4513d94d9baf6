"""The worker process: waits for jobs on a pipe, runs one at a time, reports, and never outlives its driver.

Its imports are few and small on purpose: this module decides how soon a worker is up. What jobs print goes to
descriptors 1 and 2, which never carry messages; Ctrl-C and closed terminals are the driver's business alone.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, NamedTuple

from nas.executors.wire import Decoder, encode, first_misfit

__all__ = ["KINDS", "Report", "Target", "main", "perform"]

KINDS = frozenset({"error", "nan", "memory", "timeout", "killed", "budget", "interrupted"})
"""The kinds of nas.errors.FailureKind, repeated because importing them would import the search spaces too."""

_LEAST_MEMORY = 16 << 20  # without some, not even the error could be told
_MEMORY_TEXTS = ("can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed")
_POISON_TEXTS = ("cuda error", "device-side assert", "cudnn_status", "cublas_status")
# Processes that libraries start once and keep: they serve the next job too, and end with the worker.
_HELPERS = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "torch/_inductor/compile_worker",
)

Target = Callable[[dict[str, Any], Any], Any]


def main(commands: int, results: int, lifeline: int) -> None:
    """Serve jobs until told to leave. The arguments are descriptors inherited from the driver.

    ``commands`` and ``results`` carry messages in and out; the driver alone holds the other end of
    ``lifeline``.
    """
    _reset_signals()
    _tie_to_driver(lifeline)
    _adopt_orphans()
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Line by line, so that the log of a killed job ends where the job ended.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    link = _Link(commands, results)
    hello = link.read()
    if hello is None:
        return
    try:
        if hello["body"]["setup"]:
            import_module(hello["body"]["setup"])
    except BaseException as error:
        _print_traceback(error)
        link.write("unready", _describe(error))
        return
    link.write("ready")
    _serve(link, hello["body"]["address_space"])


def _reset_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What the driver ignores or blocks would be inherited: a worker must die of SIGTERM and see its children end.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _tie_to_driver(lifeline: int) -> None:
    """Have the whole process group killed as soon as the driver is gone, however it ended.

    On Linux the kernel itself sends SIGKILL to the group when the driver's end of the pipe closes, which
    works on stopped processes and on C code that never releases the interpreter. PR_SET_PDEATHSIG is left
    out: it reaches only this process, possibly before the pipe closes, and the grandchildren would then be
    orphans. Elsewhere (macOS has no F_SETSIG) a thread waits for the end of the pipe, which needs an
    interpreter that still runs.
    """
    import fcntl
    import select

    def kill_group() -> None:
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def watch() -> None:
        os.read(lifeline, 1)
        kill_group()

    if not hasattr(fcntl, "F_SETSIG"):
        threading.Thread(target=watch, name="lifeline", daemon=True).start()
        return
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    if poll.poll(0):  # the driver was gone before the pipe was armed
        kill_group()


def _adopt_orphans() -> None:
    """Have processes that a job starts in the background become children of this one, where they can be found.

    Linux only (PR_SET_CHILD_SUBREAPER). Elsewhere, and without ctypes, such a process ends with the worker.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        return


class _Link:
    """Both pipes to the driver, for one reader and one writer at a time."""

    def __init__(self, commands: int, results: int):
        self._commands = commands
        self._results = results
        self._decoder = Decoder()

    def read(self) -> dict[str, Any] | None:
        """The next message; None when the driver closed the pipe."""
        while (message := self._decoder.pop()) is None:
            data = os.read(self._commands, 1 << 16)
            if not data:
                return None
            self._decoder.feed(data)
        return message

    def write(self, kind: str, body: Any = None, *, name: str = "message", retire: str = "") -> None:
        """Send one message. Raises TypeError, and sends nothing, when ``body`` is not JSON or too big."""
        frame = memoryview(encode(kind, body, name=name, retire=retire))
        while frame:
            frame = frame[os.write(self._results, frame) :]


class _JobChannel:
    """The channel of one job; a thread that the job left behind cannot speak, or hear, for the next one."""

    def __init__(self, link: _Link):
        self._link = link
        self._ask_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._open = True

    def event(self, message: dict[str, Any]) -> None:
        self._send("event", message)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with self._ask_lock:
            self._send("ask", message)
            reply = self._link.read()
        if reply is None:
            raise ConnectionError("the driver closed the channel")
        body: dict[str, Any] = reply["body"]
        return body

    def close(self) -> None:
        """Refuse further messages, after an answer that is under way has arrived."""
        with self._ask_lock, self._send_lock:
            self._open = False

    def _send(self, kind: str, message: dict[str, Any]) -> None:
        if not isinstance(message, dict):
            raise TypeError(f"a message must be a dict, got {type(message).__name__}")
        with self._send_lock:
            if not self._open:
                raise RuntimeError("this job has ended, its channel is closed")
            self._link.write(kind, message)


def _serve(link: _Link, address_space: int | None) -> None:
    home = os.getcwd()
    own_pid = os.getpid()
    own_log = os.dup(1)
    while (job := link.read()) is not None and job["type"] == "job":
        _log_to(job["log"], own_log)
        channel = _JobChannel(link)
        report = perform(job["function"], job["body"], channel, _print_traceback, address_space=address_space)
        if os.getpid() != own_pid:
            os._exit(0)  # the job forked and its child came back here: only the parent may report
        channel.close()
        retire = report.retire or _leftovers()
        _reset_signals()
        with contextlib.suppress(OSError):  # the folder was deleted under a running driver
            os.chdir(home)
        _log_to(None, own_log)
        try:
            link.write(report.kind, report.body, name="result", retire=retire)
        except TypeError as error:  # it is too big
            link.write("failed", {"kind": "error", "reason": str(error)}, retire=retire)


class Report(NamedTuple):
    """How a job ended: ``kind`` "done" with its value, or "failed" with kind and reason, as ``body``.

    ``retire`` says why this process should not run another job ("" if it may).
    """

    kind: Literal["done", "failed"]
    body: dict[str, Any]
    retire: str


def perform(
    function: str | Target,
    payload: dict[str, Any],
    channel: Any,
    show: Callable[[BaseException], None],
    *,
    address_space: int | None = None,
    keep_interrupt: bool = False,
) -> Report:
    """Run one job. Nothing that it raises gets out of here, but ``show`` is called with it.

    ``address_space``: bytes of memory beyond which the system refuses more. ``keep_interrupt``: let
    KeyboardInterrupt through, where Ctrl-C is not somebody else's business.
    """
    lift_limit = _limit_address_space(address_space)
    try:
        call = _load_function(function) if isinstance(function, str) else function
        value = call(payload, channel)
        if not isinstance(value, dict):
            raise TypeError(f"{function} must return a dict, got {type(value).__name__}")
        if misfit := first_misfit(value, "result"):
            raise TypeError(misfit)
    except BaseException as error:
        lift_limit()  # the error still holds what the job allocated, and telling about it takes memory too
        if keep_interrupt and isinstance(error, KeyboardInterrupt):
            raise
        failure = _describe(error)
        show(error)
        return Report("failed", failure, _reason_to_retire(error, failure))
    lift_limit()
    return Report("done", value, "")


def _load_function(name: str) -> Target:
    """The callable that ``name`` ("package.module:callable" or "path.py:callable") stands for."""
    from spaces.loading import load_object

    found = load_object(name)
    if not callable(found):
        raise TypeError(f"{name} is a {type(found).__name__}, not a function")
    target: Target = found
    return target


def _describe(error: BaseException) -> dict[str, str]:
    """Kind and reason of an exception: its own where it has them, and memory errors are told from the rest."""
    kind = getattr(error, "kind", None)
    reason = getattr(error, "reason", None)
    if kind not in KINDS or not isinstance(reason, str):
        kind = "memory" if _is_memory_error(error) else "error"
        reason = f"{type(error).__name__}: {_text(error)}".removesuffix(": ")
    return {"kind": kind, "reason": " ".join(reason.split())[:500]}


def _reason_to_retire(error: BaseException, failure: dict[str, str]) -> str:
    if failure["kind"] == "memory":
        return "it ran out of memory"
    damaged = any(mark in _text(error).lower() for mark in _POISON_TEXTS)
    return "its CUDA context is damaged" if damaged else ""


def _is_memory_error(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, RuntimeError) and any(mark in _text(error).lower() for mark in _MEMORY_TEXTS):
        return True
    return error.__cause__ is not None and _is_memory_error(error.__cause__)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its message cannot be shown"


def _print_traceback(error: BaseException) -> None:
    import traceback

    trace = error.__traceback__
    if trace is not None and trace.tb_next is not None:
        trace = trace.tb_next  # the first line is ours and says nothing about the job
    try:
        traceback.print_exception(type(error), error, trace)
    except Exception:  # a full disk under the log must not hide the job's own error
        return


def _log_to(path: str | None, own_log: int) -> None:
    """Point stdout and stderr at the job's log, or back at the worker's own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    target = own_log
    if path is not None:
        target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    if target != own_log:
        os.close(target)


def _limit_address_space(memory: int | None) -> Callable[[], None]:
    """Let this process map no more than takes it to ``memory`` bytes in use; returns what lifts the limit again.

    What it maps beyond what it uses (libraries, reserves of threads) was mapped before the job and is not counted.
    Only on Linux: macOS accepts RLIMIT_AS and ignores it.
    """
    if memory is None or not sys.platform.startswith("linux"):
        return lambda: None
    import resource

    with open("/proc/self/statm") as file:
        mapped, resident, of_files = (
            int(pages) * resource.getpagesize() for pages in file.read().split()[:3]
        )
    limit = mapped + max(_LEAST_MEMORY, memory - (resident - of_files))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _leftovers() -> str:
    """Why the children that a job left running forbid another job here; "" when there are none."""
    if not any(map(_running_name, _children())):
        return ""
    import gc

    gc.collect()  # loaders end their processes when they are collected, and an error's traceback may hold them
    names = [name for name in map(_running_name, _children()) if name]
    return f"it left processes running: {', '.join(names)[:200]}" if names else ""


def _children() -> list[str]:
    """Process ids of the direct children, from Linux's /proc; elsewhere unknown until the group is killed."""
    found: list[str] = []
    try:
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/children") as file:
                found += file.read().split()
    except OSError:
        return found
    return found


def _running_name(pid: str) -> str:
    """The command of a child that runs and is no library's helper, else "" (an ended child holds nothing)."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
    return "" if any(helper in command for helper in _HELPERS) else command
