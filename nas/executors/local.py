"""Jobs in processes of this machine: a candidate that crashes, hangs or eats the memory takes nothing else along."""

from __future__ import annotations

import itertools
import logging
import os
import re
import resource
import sys
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from nas.errors import RunStopped, UserMistake
from nas.executors.base import OnEvent, Outcome, check_job
from nas.executors.process import HANDLES
from nas.executors.slot import CannotStart, Job, Limits, Slot
from nas.executors.wire import encode

__all__ = ["LocalExecutor"]

logger = logging.getLogger(__name__)

SPARE_HANDLES = 24
"""File handles left to the rest of the driver: its database, its logs, a worker that is just being started."""

_KILL_SECONDS = 5.0


class LocalExecutor:
    """Runs jobs in worker processes that are reused while healthy and replaced when not.

    A worker is started when a job first needs it, or ahead of time by :meth:`warm`. Jobs that a signal or an
    exit took down are tried again on a fresh worker; jobs that ran out of time or memory are not. When the
    driver ends, even by ``kill -9``, the workers and their process groups end at once (a process that a job puts
    into a session of its own ends with its job, but not with a driver that was killed).

    Args:
        workers: how many jobs may run at the same time, at least 1. Fewer are used, with a logged warning,
            when the system refuses more processes or file handles; :attr:`capacity` then says how many.
        memory_limit_bytes: memory that one job may use, with its child processes and everything that its
            worker holds already (imported libraries, but no mapped files); looked at ten times a second.
        retries: how often a job whose worker died is tried again.
        grace_seconds: time between SIGTERM and SIGKILL for a job that is ended.
        log_directory: folder for one log per job; a job whose payload names a file under "log" writes there.
            With None such logs are kept only as long as their last lines are wanted for a failure.
        environment: variables set in the workers on top of the driver's own (OMP_NUM_THREADS is a usual one).
        setup: module that each worker imports before its first job.
        address_space_limit: also let the system refuse memory beyond ``memory_limit_bytes``, so that a job
            ends with a traceback in its log. Only sensible on CPU (CUDA reserves address space it never
            uses), and mapped files count. Linux only; elsewhere memory is watched but not refused.

    Raises UserMistake for arguments out of range, and when there are too few file handles for even one
    worker.

    Example:
        with LocalExecutor(2) as executor:
            outcome = executor.submit("my_jobs.py:train", {"depth": 4}, time_limit=60).result()
        print(outcome.value or outcome.failure)
    """

    def __init__(
        self,
        workers: int,
        *,
        memory_limit_bytes: int | None = None,
        retries: int = 2,
        grace_seconds: float = 3.0,
        log_directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
        setup: str | None = None,
        address_space_limit: bool = False,
    ):
        _check_range("workers", workers, 1)
        _check_range("retries", retries, 0)
        _check_range("grace_seconds", grace_seconds, 0)
        if memory_limit_bytes is not None:
            _check_range("memory_limit_bytes", memory_limit_bytes, 1)
        if log_directory is not None:
            try:
                log_directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserMistake(
                    f"log_directory={str(log_directory)!r} cannot be made: {error.strerror}"
                ) from error
        self._room = _affordable(workers)
        self._limits = Limits(
            memory=memory_limit_bytes,
            retries=retries,
            grace=grace_seconds,
            environment={**os.environ, **(environment or {})},
            # '' stands for the current directory, which may be another one when a worker starts.
            import_path=[os.path.abspath(entry) for entry in sys.path],
            hello={"setup": setup, "address_space": memory_limit_bytes if address_space_limit else None},
        )
        self._log_directory = log_directory
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._slots: list[Slot] = []
        self._busy = 0
        self._warm = False
        self._closing = False
        self._killing = False
        self._broken: str | None = None
        self._owner = os.getpid()

    @property
    def capacity(self) -> int:
        """Number of jobs that can run at the same time; less than ``workers`` if the system refused some."""
        return self._room

    def submit(
        self,
        function: str,
        payload: dict[str, Any],
        *,
        on_event: OnEvent | None = None,
        time_limit: float | None = None,
        tag: str = "",
    ) -> Future[Outcome]:
        """Queue one job; see :meth:`nas.executors.base.Executor.submit`. A queued job can be cancelled.

        ``on_event`` runs in a thread of this executor.
        """
        check_job(payload, time_limit)
        number = next(self._numbers)
        log = self._log_path(payload, number, tag)
        place = _absolute(function)
        try:
            frame = encode(
                "job", payload, name="payload", function=place, log=None if log is None else str(log)
            )
        except TypeError as error:
            raise UserMistake(str(error)) from None
        job = Job(frame, tag or f"job {number}", log, on_event, time_limit)
        with self._changed:
            if self._closing or self._broken:
                raise RunStopped(self._broken or "this executor is closed; make a new one")
            self._queue.append(job)
            if len(self._slots) - self._busy < len(self._queue):
                self._add_slot()
            self._changed.notify()
        return job.future

    def warm(self) -> None:
        """Start all workers now, without waiting for them, and later replace lost ones before a job needs them."""
        with self._changed:
            self._warm = True
            while not self._closing and self._add_slot():
                continue
            self._changed.notify_all()

    def close(self, *, kill: bool = False) -> None:
        """Stop now; see :meth:`nas.executors.base.Executor.close`. Every future is done when this returns."""
        if os.getpid() != self._owner:  # a forked child has a copy of this object, but none of its workers
            return
        with self._changed:
            self._closing = True
            self._killing = self._killing or kill
            queued = list(self._queue)
            self._queue.clear()
            slots = [slot for slot in self._slots if slot is not threading.current_thread()]
            self._changed.notify_all()
        for job in queued:
            job.interrupt("the executor was closed before it ran")
        for slot in slots:
            slot.join(_KILL_SECONDS + (0 if kill else self._limits.grace))
            if slot.is_alive():
                logger.warning(
                    "%s has not ended in time (a callback that does not return?); its job ends without it",
                    slot.name,
                )
                slot.abandon()

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- for the slots ---------------------------------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """Whether jobs must end."""
        return self._closing

    @property
    def killing(self) -> bool:
        """Whether they must end without grace."""
        return self._killing

    @property
    def warming(self) -> bool:
        """Whether workers are started before a job needs them."""
        return self._warm

    def take(self) -> Job | None:
        """The next job for a slot, waiting for one; None when the executor closes."""
        with self._changed:
            while not self._closing:
                while self._queue:
                    job = self._queue.popleft()
                    if job.begin():
                        self._busy += 1
                        return job
                self._changed.wait()
            return None

    def release(self) -> None:
        """The job that was taken is about to end: the slot that took it will take another.

        Called before the job's future is done, so that whoever waits for that and submits the next job meets a
        slot that is known to be free, and not one worker more is started.
        """
        with self._changed:
            self._busy -= 1

    def give_up(self, slot: Slot, job: Job | None, error: CannotStart) -> None:
        """A slot got no worker: its job goes to the others, or, if it was the last one, everything queued fails."""
        with self._changed:
            self._slots.remove(slot)
            self._busy -= job is not None
            # The system refused this one, so it is not asked for those that have not been tried either.
            self._room = len(self._slots)
            orphans = [] if job is None else [job]
            if self._room == 0:
                self._broken = f"no worker process can be started: {error}; {error.advice}"
                orphans += self._queue
                self._queue.clear()
            elif not self._closing:
                self._queue.extendleft(orphans)
                orphans.clear()
                self._changed.notify_all()
        if self._room and not self._closing:
            logger.warning("%s cannot be started: %s; going on with %d", slot.name, error, self._room)
        for orphan in orphans:
            if self._closing:
                orphan.interrupt("the executor was closed")
            else:
                orphan.fail(RunStopped(self._broken))

    def _add_slot(self) -> bool:
        """Start the thread of one more slot if there may be another. Called with the lock held."""
        if len(self._slots) >= self._room:
            return False
        slot = Slot(self, self._limits, len(self._slots))
        try:
            slot.start()
        except RuntimeError as error:  # the system refuses another thread
            self._room = len(self._slots)
            if not self._room:
                self._broken = f"no thread can be started: {error}; raise the limit with `ulimit -u`"
                raise RunStopped(self._broken) from error
            logger.warning("%s cannot be started: %s; going on with %d", slot.name, error, self._room)
            return False
        self._slots.append(slot)
        return True

    def _log_path(self, payload: Mapping[str, Any], number: int, tag: str) -> Path | None:
        named = payload.get("log")
        if isinstance(named, str):
            return Path(named).absolute()
        if self._log_directory is None:
            return None
        name = re.sub(r"[^\w.-]+", "-", f"{number:05d} {tag}".strip())[:80]
        return self._log_directory.absolute() / f"{name}.log"


def _check_range(name: str, value: float, low: int) -> None:
    if not value >= low:
        raise UserMistake(f"{name}={value!r} must be at least {low}")


def _absolute(function: str) -> str:
    """``function`` in a form that means the same in every directory. Raises UserMistake."""
    source, separator, attribute = str(function).rpartition(":")
    if not (isinstance(function, str) and separator and source and attribute):
        raise UserMistake(
            f'function={function!r} must be text such as "package.module:callable" or "path.py:callable"'
        )
    if not source.endswith(".py"):
        return function
    path = Path(source).expanduser().absolute()
    if not path.is_file():
        raise UserMistake(f"function={function!r}: there is no file {path}")
    return f"{path}:{attribute}"


def _affordable(workers: int) -> int:
    """As many of ``workers`` as the process's file handles allow. Raises UserMistake when that is none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return workers
    # Linux lists the handles in /proc, macOS in /dev/fd.
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    free = limit - len(os.listdir(folder))
    room = (free - SPARE_HANDLES) // HANDLES
    if room >= workers:
        return workers
    advice = "raise the limit with `ulimit -n 1024`"
    if room < 1:
        raise UserMistake(
            f"workers={workers}: only {free} of {limit} file handles are free, one worker needs "
            f"{SPARE_HANDLES + HANDLES}; {advice}"
        )
    logger.warning(
        "%d of %d workers: only %d of %d file handles are free; %s", room, workers, free, limit, advice
    )
    return room
