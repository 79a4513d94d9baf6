"""The executor that runs jobs in the driver itself."""

from __future__ import annotations

import os
from typing import Any

import pytest

from nas.errors import TrialFailure, UserMistake
from nas.executors import Executor, InlineExecutor
from tests.conformance.executor import ExecutorConformance, failure_of, value_of
from tests.nas._executors import run


class TestInlineConformance(ExecutorConformance):
    def make_executor(self) -> Executor:
        return InlineExecutor()


class TestInline:
    def test_it_takes_what_no_other_process_can_import(self) -> None:
        factor = 3

        def closure(payload: dict[str, Any], channel: Any) -> dict[str, Any]:
            return {"pid": os.getpid(), "x": payload["x"] * factor}

        outcome = InlineExecutor().submit(closure, {"x": 2}).result(0)
        assert value_of(outcome) == {"pid": os.getpid(), "x": 6}

    def test_a_time_limit_is_noticed_when_the_job_talks(self) -> None:
        outcome = run(InlineExecutor(), "chatter", time_limit=0.05)
        assert failure_of(outcome).reason == "ran longer than 0.05 s"
        assert failure_of(outcome).kind == "timeout"

    def test_a_job_that_hides_the_end_of_its_time_has_failed_all_the_same(self) -> None:
        def stubborn(payload: dict[str, Any], channel: Any) -> dict[str, Any]:
            while True:
                try:
                    channel.event({})
                except TrialFailure:
                    return {"fine": True}

        assert failure_of(InlineExecutor().submit(stubborn, {}, time_limit=0.01).result(0)).kind == "timeout"

    def test_closing_it_from_the_callback_interrupts_the_job(self) -> None:
        executor = InlineExecutor()
        outcome = run(executor, "chatter", on_event=lambda event: executor.close())
        assert failure_of(outcome).kind == "interrupted"

    def test_ctrl_c_is_not_swallowed(self) -> None:
        def interrupted(payload: dict[str, Any], channel: Any) -> dict[str, Any]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            InlineExecutor().submit(interrupted, {})

    def test_a_function_that_is_none_is_refused(self) -> None:
        with pytest.raises(UserMistake, match="function=3 must be a callable"):
            InlineExecutor().submit(3, {})  # type: ignore[arg-type]
