"""Jobs in the driver's own process: for functions that no other process can import, and for a debugger."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn

from nas.errors import RunStopped, TrialFailure, UserMistake
from nas.executors.base import Failure, OnEvent, Outcome, check_job
from nas.executors.wire import first_misfit
from nas.executors.worker import Target, perform

__all__ = ["InlineExecutor"]


class InlineExecutor:
    """Runs each job inside ``submit``, which returns a future that is done.

    There is no isolation: a crash, a leak or a job that never ends is the driver's own. A time limit is
    noticed only when the job next uses its channel; memory is not limited; what the job prints goes where the
    driver prints. Ctrl-C raises KeyboardInterrupt out of ``submit``. Values are copied as JSON allows, as
    other executors do.
    """

    def __init__(self) -> None:
        self._closed = False

    @property
    def capacity(self) -> int:
        """Always 1."""
        return 1

    def submit(
        self,
        function: str | Target,
        payload: dict[str, Any],
        *,
        on_event: OnEvent | None = None,
        time_limit: float | None = None,
        tag: str = "",
    ) -> Future[Outcome]:
        """Run one job now; see :meth:`nas.executors.base.Executor.submit`. ``function`` may be the callable itself."""
        check_job(payload, time_limit)
        if self._closed:
            raise RunStopped("this executor is closed; make a new one")
        if not isinstance(function, str) and not callable(function):
            raise UserMistake(f"function={function!r} must be a callable or the text that names one")
        channel = _InlineChannel(on_event, time_limit, lambda: self._closed)
        began = time.monotonic()
        traces: list[str] = []

        def keep_trace(error: BaseException) -> None:
            traces.extend("".join(traceback.format_exception(error)).splitlines())

        report = perform(function, _copied(payload), channel, keep_trace, keep_interrupt=True)
        channel.close()
        seconds = time.monotonic() - began
        failed = channel.failure
        if failed is None and report.kind == "failed":
            failed = Failure(report.body["kind"], report.body["reason"], "\n".join(traces[-20:]))
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()
        future.set_result(Outcome(None if failed else _copied(report.body), failed, seconds, 1))
        return future

    def close(self, *, kill: bool = False) -> None:
        """Refuse further jobs. A job that calls this from its own callback ends at its next use of the channel."""
        self._closed = True


class _InlineChannel:
    """Calls ``on_event`` directly; ``failure`` is set once the job may not go on, even if it hides the exception."""

    def __init__(self, on_event: OnEvent | None, time_limit: float | None, closed: Callable[[], bool]):
        self.failure: Failure | None = None
        self._on_event = on_event
        self._time_limit = time_limit
        self._deadline = float("inf") if time_limit is None else time.monotonic() + time_limit
        self._executor_closed = closed
        self._open = True

    def event(self, message: dict[str, Any]) -> None:
        self._call(message)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._call(message)

    def close(self) -> None:
        self._open = False

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        if not self._open:
            raise RuntimeError("this job has ended, its channel is closed")
        if not isinstance(message, dict):
            raise TypeError(f"a message must be a dict, got {type(message).__name__}")
        if misfit := first_misfit(message, "message"):
            raise TypeError(misfit)
        if time.monotonic() >= self._deadline:
            self._end(Failure("timeout", f"ran longer than {self._time_limit:g} s"))
        reply = self._answer(_copied(message))
        if self._executor_closed():
            self._end(Failure("interrupted", "the executor was closed"))
        return reply

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            reply = None if self._on_event is None else self._on_event(message)
            if reply is not None and not isinstance(reply, dict):
                raise TypeError(f"must return a dict or None, got {type(reply).__name__}")
            if misfit := first_misfit(reply, "its reply"):
                raise TypeError(misfit)
        except Exception as error:
            text = " ".join(str(error).split())
            self._end(Failure("error", f"the callback on_event raised {type(error).__name__}: {text}"), error)
        answer: dict[str, Any] = _copied(reply or {})
        return answer

    def _end(self, failure: Failure, cause: BaseException | None = None) -> NoReturn:
        self.failure = self.failure or failure
        raise TrialFailure(failure.kind, failure.reason) from cause


def _copied(value: Any) -> Any:
    """What the other side of a pipe would have got: nobody's later changes, lists for tuples."""
    return json.loads(json.dumps(value))
