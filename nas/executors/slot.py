"""One place of the local executor: a thread that drives one worker process at a time, and replaces it when needed."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nas.executors.base import Failure, OnEvent, Outcome
from nas.executors.process import Log, WorkerGone, WorkerProcess, memory_used, out_of_memory_kills
from nas.executors.wire import encode

if TYPE_CHECKING:
    from nas.errors import FailureKind

__all__ = ["CannotStart", "Job", "Limits", "Pool", "Slot"]

logger = logging.getLogger(__name__)

TICK = 0.1
"""Seconds between two looks at a running job: its memory, its log, its time, the end of its process."""

START_SECONDS = 300.0
"""A worker that has not imported its setup by then never will: a cold disk and a loaded machine take a minute."""

_TALK = ("event", "ask")
_START_PAUSES = (0.1, 0.2, 0.4, 0.8)
_ADVICE = {
    errno.EMFILE: "raise the limit of open files with `ulimit -n 1024`",
    errno.ENFILE: "the whole machine has too many open files; close some programs",
    errno.EAGAIN: "raise the limit of processes with `ulimit -u`, or end other programs",
    errno.ENOMEM: "free some memory",
}


class CannotStart(Exception):
    """The system refuses another worker process; ``advice`` says what to do about it."""

    def __init__(self, error: OSError):
        super().__init__(error.strerror or str(error))
        self.advice = _ADVICE.get(error.errno or 0, "check that Python and its temporary folder can be used")


class _Failed(Exception):
    """This attempt failed. ``grace``: seconds until its worker is killed (None: the worker is healthy and stays)."""

    def __init__(self, kind: FailureKind, reason: str, *, grace: float | None, retry: bool = False):
        super().__init__(reason)
        self.kind: FailureKind = kind
        self.reason = reason
        self.grace = grace
        self.retry = retry
        self.log_tail = ""


@dataclass(frozen=True)
class Limits:
    """What holds for all workers of one executor; see :class:`nas.executors.local.LocalExecutor`."""

    memory: int | None
    retries: int
    grace: float
    environment: Mapping[str, str]
    import_path: list[str]
    hello: dict[str, Any]


class Job:
    """A job on its way to its outcome."""

    def __init__(
        self, frame: bytes, name: str, log: Path | None, on_event: OnEvent | None, time_limit: float | None
    ):
        self.frame = frame
        self.name = name
        self.log = log
        self.on_event = on_event
        self.time_limit = time_limit
        self.future: Future[Outcome] = Future()
        self.attempts = 0
        self.seconds = 0.0
        self._begun = False

    def begin(self) -> bool:
        """Whether the job is to run (again); from then on it cannot be cancelled."""
        self._begun = self._begun or self.future.set_running_or_notify_cancel()
        return self._begun

    def settle(self, value: dict[str, Any] | None, failure: Failure | None) -> None:
        """Give the future its outcome, unless it was cancelled or given up before."""
        with contextlib.suppress(InvalidStateError):
            if self.begin():
                self.future.set_result(Outcome(value, failure, self.seconds, self.attempts))

    def interrupt(self, reason: str) -> None:
        """End the job because the executor ends."""
        self.settle(None, Failure("interrupted", reason))

    def fail(self, error: BaseException) -> None:
        """End the job because the executor itself cannot go on."""
        with contextlib.suppress(InvalidStateError):
            if self.begin():
                self.future.set_exception(error)


class Pool(Protocol):
    """What a slot needs to know of its executor."""

    @property
    def closing(self) -> bool:
        """Whether jobs must end."""

    @property
    def killing(self) -> bool:
        """Whether they must end without grace."""

    @property
    def warming(self) -> bool:
        """Whether workers are started before a job needs them."""

    def take(self) -> Job | None:
        """The next job, waiting for one; None when the executor closes."""

    def release(self) -> None:
        """The job that was taken is about to end: the slot that took it will take another."""

    def give_up(self, slot: Slot, job: Job | None, error: CannotStart) -> None:
        """``slot`` ends because it got no worker, and leaves ``job`` unfinished."""


class Slot(threading.Thread):
    """Takes jobs from its executor and runs them, one at a time, until the executor closes."""

    def __init__(self, pool: Pool, limits: Limits, index: int):
        super().__init__(name=f"worker {index}", daemon=True)
        self._pool = pool
        self._limits = limits
        self._worker: WorkerProcess | None = None
        self._ready = False
        self._job: Job | None = None
        self._deadline = float("inf")
        self._next_look = 0.0

    def run(self) -> None:
        """The thread's life; not to be called."""
        try:
            while True:
                if self._pool.warming and self._worker is None and not self._pool.closing:
                    self._start()
                self._job = self._pool.take()
                if self._job is None:
                    return
                self._serve(self._job)
                self._job = None
        except CannotStart as error:
            self._pool.give_up(self, self._job, error)
        finally:
            self._dismiss()

    def abandon(self) -> None:
        """End the job and the processes of a slot whose thread is held up. Called by another thread."""
        worker, job = self._worker, self._job
        if worker is not None:
            worker.signal_kill()
        if job is not None:
            job.interrupt("the executor was closed")

    # -- one job ---------------------------------------------------------------------------------------------

    def _serve(self, job: Job) -> None:
        try:
            value, failure = self._run_job(job)
        except CannotStart:
            raise
        except Exception as error:  # a mistake of ours must not leave a future that nobody ever completes
            logger.exception("%s: the executor failed", job.name)
            self._discard()
            self._pool.release()
            job.fail(error)
        else:
            self._pool.release()
            job.settle(value, failure)

    def _run_job(self, job: Job) -> tuple[dict[str, Any] | None, Failure | None]:
        while True:
            job.attempts += 1
            try:
                return self._attempt(job), None
            except _Failed as failed:
                if not failed.retry:
                    return None, Failure(failed.kind, failed.reason, failed.log_tail)
                if job.attempts > self._limits.retries:
                    tries = f"{job.attempts} attempt{'s' if job.attempts > 1 else ''}"
                    return None, Failure(failed.kind, f"{failed.reason}, {tries}", failed.log_tail)
                logger.warning("%s: %s; trying again", job.name, failed.reason)

    def _attempt(self, job: Job) -> dict[str, Any]:
        worker = self._living_worker()
        log = worker.log
        kills_before = out_of_memory_kills()
        try:
            self._await_ready(worker)
            log = self._open_log(job, worker)
            return self._converse(job, worker, log)
        except _Failed as failed:
            self._conclude(failed, log)
            raise
        except WorkerGone as gone:
            explained = self._explain(str(gone), worker, kills_before)
            self._conclude(explained, log)
            raise explained from None
        finally:
            if log is not worker.log:
                log.shorten()
                log.close()

    def _conclude(self, failed: _Failed, log: Log) -> None:
        if failed.grace is not None and self._worker is not None:
            self._worker.stop(failed.grace, self._hurry)
        failed.log_tail = log.tail()
        if failed.grace is not None:
            self._discard()

    def _explain(self, how: str, worker: WorkerProcess, kills_before: int) -> _Failed:
        if self._pool.closing:
            return _Failed("interrupted", "the executor was closed", grace=0.0)
        if worker.exit_status() == -signal.SIGKILL and out_of_memory_kills() > kills_before:
            reason = "killed by the system, which ran out of memory"
            return _Failed("memory", reason, grace=0.0)
        return _Failed("killed", how, grace=0.0, retry=True)

    def _open_log(self, job: Job, worker: WorkerProcess) -> Log:
        worker.log.clear()
        if job.log is None:
            return worker.log
        try:
            return Log.open(job.log)
        except OSError as error:
            reason = f"its log {job.log} cannot be opened: {error.strerror}"
            raise _Failed("error", reason, grace=None) from error

    def _converse(self, job: Job, worker: WorkerProcess, log: Log) -> dict[str, Any]:
        """Send the job, answer what it asks, until it reports; the value that it reports."""
        began = time.monotonic()
        self._deadline = began + job.time_limit if job.time_limit is not None else float("inf")

        def look() -> None:
            self._look(job, worker, log)

        try:
            worker.send(job.frame, look, TICK)
            while (message := self._receive(worker, look))["type"] in _TALK:
                reply = self._call_back(job, message["body"])
                if message["type"] == "ask":
                    worker.send(reply, look, TICK)
        finally:
            job.seconds += time.monotonic() - began
        if message["type"] == "failed":
            grace = 0.0 if message["retire"] else None
            raise _Failed(message["body"]["kind"], message["body"]["reason"], grace=grace)
        if message["retire"]:
            logger.info("%s: its worker is replaced: %s", job.name, message["retire"])
            self._discard()
        value: dict[str, Any] = message["body"]
        return value

    def _receive(self, worker: WorkerProcess, look: Callable[[], None]) -> dict[str, Any]:
        while True:
            message = worker.receive(TICK)
            if message is not None:
                # A job that never stops talking is watched all the same; one that has ended needs it no more.
                if message["type"] in _TALK and time.monotonic() >= self._next_look:
                    look()
                return message
            look()
            # A grandchild can hold the pipe open, so that its end does not tell when the worker has died.
            if worker.exit_status() is not None and (message := worker.receive(0)) is None:
                raise WorkerGone(worker.epitaph())

    def _call_back(self, job: Job, body: dict[str, Any]) -> bytes:
        """The frame that answers ``body``."""
        try:
            reply = None if job.on_event is None else job.on_event(body)
            if reply is not None and not isinstance(reply, dict):
                raise TypeError(f"must return a dict or None, got {type(reply).__name__}")
            return encode("reply", reply or {}, name="its reply")
        except BaseException as error:
            logger.exception("%s: on_event failed", job.name)
            text = " ".join(str(error).split())
            reason = f"the callback on_event raised {type(error).__name__}: {text}"
            raise _Failed("error", reason, grace=self._limits.grace) from error

    def _look(self, job: Job, worker: WorkerProcess, log: Log) -> None:
        """Raise if the job must end now."""
        if self._pool.closing:
            raise _Failed("interrupted", "the executor was closed", grace=self._limits.grace)
        now = time.monotonic()
        if now >= self._deadline:
            raise _Failed("timeout", f"ran longer than {job.time_limit:g} s", grace=self._limits.grace)
        if now < self._next_look:
            return
        self._next_look = now + TICK
        log.shorten()
        limit = self._limits.memory
        if limit is not None and (used := memory_used(worker.pid, limit)) > limit:
            reason = f"used {used / 2**20:.0f} MB of memory, more than the limit of {limit / 2**20:.0f} MB"
            raise _Failed("memory", reason, grace=0.0)

    # -- the worker ------------------------------------------------------------------------------------------

    def _living_worker(self) -> WorkerProcess:
        if self._worker is not None and self._worker.exit_status() is not None:
            self._discard()  # it was killed while it had nothing to do
        return self._worker or self._start()

    def _start(self) -> WorkerProcess:
        limits = self._limits
        pauses = list(_START_PAUSES)
        self._ready = False
        while True:
            try:
                self._worker = WorkerProcess(limits.environment, limits.import_path, limits.hello)
                return self._worker
            except OSError as error:
                if not pauses or self._pool.closing:
                    raise CannotStart(error) from error
                time.sleep(pauses.pop(0))

    def _await_ready(self, worker: WorkerProcess) -> None:
        until = time.monotonic() + START_SECONDS
        while not self._ready:
            message = worker.receive(TICK)
            if message is None:
                if self._pool.closing:
                    raise _Failed("interrupted", "the executor was closed", grace=0.0)
                if time.monotonic() >= until:
                    reason = f"its worker did not start within {START_SECONDS:g} s"
                    raise _Failed("timeout", reason, grace=0.0)
                if worker.exit_status() is not None and (message := worker.receive(0)) is None:
                    raise WorkerGone(worker.epitaph())
            if message is not None and message["type"] == "unready":
                setup = self._limits.hello["setup"]
                raise _Failed("error", f"setup {setup!r} failed: {message['body']['reason']}", grace=0.0)
            self._ready = message is not None

    def _hurry(self) -> bool:
        return self._pool.killing

    def _discard(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.close()
            self._worker = None

    def _dismiss(self) -> None:
        if self._worker is None:
            return
        if not self._pool.killing:
            self._worker.leave(self._limits.grace, self._hurry)
        self._discard()
