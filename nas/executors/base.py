"""The interface of an executor: a job goes in as a function's name and JSON, its outcome comes back as a future."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nas.errors import UserMistake
from nas.executors.wire import first_misfit

if TYPE_CHECKING:
    from nas.errors import FailureKind

__all__ = ["Channel", "Executor", "Failure", "OnEvent", "Outcome", "check_job"]

OnEvent = Callable[[dict[str, Any]], dict[str, Any] | None]
"""Called in the driver with each event or question of a job; what it returns answers a question."""


class Channel(Protocol):
    """What a job is given to talk with the driver while it runs. It is closed when the job ends."""

    def event(self, message: dict[str, Any]) -> None:
        """Send ``message`` (JSON) one way."""

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send ``message`` (JSON) and wait for what the driver's ``on_event`` returns (None becomes ``{}``)."""


@dataclass(frozen=True)
class Failure:
    """Why a job has no value.

    ``kind`` is one of :data:`nas.errors.FailureKind`; ``reason`` is one line; ``log_tail`` the last lines
    that the job printed ("" where the executor captures nothing).
    """

    kind: FailureKind
    reason: str
    log_tail: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: exactly one of ``value`` and ``failure`` is set.

    ``seconds`` is the wall time that the job itself took, all attempts together, without waiting in the queue
    and without the start of a worker; ``attempts`` counts how often it was started (0: never, the executor
    was closed).
    """

    value: dict[str, Any] | None
    failure: Failure | None
    seconds: float
    attempts: int


class Executor(Protocol):
    """Runs jobs, at most ``capacity`` at a time. A job that fails is an :class:`Outcome`, never an exception.

    A future carries an exception only when the executor itself cannot go on (:class:`nas.errors.RunStopped`).
    """

    @property
    def capacity(self) -> int:
        """Number of jobs that can run at the same time now (at least 1 while the executor is usable)."""

    def submit(
        self,
        function: str,
        payload: dict[str, Any],
        *,
        on_event: OnEvent | None = None,
        time_limit: float | None = None,
        tag: str = "",
    ) -> Future[Outcome]:
        """Queue one job.

        ``function`` is "package.module:callable" or "path.py:callable", called as ``callable(payload,
        channel)`` and returning a dict; ``payload`` and the dict are JSON, in which NaN and the infinities
        are allowed and survive. ``on_event`` is called by one thread at a time for this job; an exception in
        it fails this job only. ``time_limit`` is in wall seconds per attempt (None: unlimited). ``tag`` names
        the job in logs.

        Raises :class:`nas.errors.UserMistake` for arguments that no worker could use and
        :class:`nas.errors.RunStopped` when the executor is closed.
        """

    def close(self, *, kill: bool = False) -> None:
        """Stop now: queued and running jobs end as failures of kind "interrupted", and nothing is left
        behind.

        Running jobs get a short grace to end themselves, none with ``kill``. May be called more than once.
        """


def check_job(payload: object, time_limit: float | None) -> None:
    """Raise UserMistake unless ``payload`` is a JSON dict and ``time_limit`` is None or more than 0 seconds."""
    if not isinstance(payload, dict):
        raise UserMistake(f"payload must be a dict, got {type(payload).__name__}")
    if misfit := first_misfit(payload, "payload"):
        raise UserMistake(misfit)
    if time_limit is not None and not time_limit > 0:
        raise UserMistake(f"time_limit={time_limit!r} must be more than 0 seconds, or None for no limit")
