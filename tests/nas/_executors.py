"""Local executors that are closed behind a test, and the jobs that tests give them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import psutil
import pytest

from nas.executors import Executor, LocalExecutor, Outcome
from tests.conformance.executor import JOBS

__all__ = ["PATIENCE", "alive", "begin", "make", "run", "wait_until"]

PATIENCE = 60.0


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def make() -> Iterator[Callable[..., LocalExecutor]]:
    made: list[LocalExecutor] = []

    def build(workers: int = 1, **options: Any) -> LocalExecutor:
        made.append(LocalExecutor(workers, **{"grace_seconds": 0.5, **options}))
        return made[-1]

    yield build
    for executor in made:
        executor.close(kill=True)


def run(executor: Executor, name: str, payload: dict[str, Any] | None = None, **options: Any) -> Outcome:
    return executor.submit(JOBS + name, payload or {}, **options).result(PATIENCE)


def begin(executor: Executor, name: str, payload: dict[str, Any] | None = None, **options: Any) -> Started:
    started = Started()
    started.future = executor.submit(JOBS + name, payload or {}, on_event=started.hear, **options)
    return started


class Started:
    """A job that runs, and the first event it sent."""

    def __init__(self) -> None:
        self.future: Future[Outcome] = Future()
        self.events: list[dict[str, Any]] = []

    def hear(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def first(self) -> dict[str, Any]:
        wait_until(lambda: self.events or self.future.done())
        assert self.events, self.future.result()
        return self.events[0]
