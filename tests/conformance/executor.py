"""What every executor must do. Inherit, give ``make_executor``, and the tests run against yours."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nas.errors import RunStopped, UserMistake
from nas.executors import Executor, Failure, Outcome

__all__ = ["JOBS", "ExecutorConformance", "failure_of", "value_of"]

JOBS = "tests.nas.executor_jobs:"
_PATIENCE = 60.0


def value_of(outcome: Outcome) -> dict[str, Any]:
    """The value of an outcome that must have one, and nothing else."""
    assert outcome.failure is None, outcome.failure
    assert outcome.value is not None
    return outcome.value


def failure_of(outcome: Outcome) -> Failure:
    """The failure of an outcome that must have one, and nothing else."""
    assert outcome.value is None, outcome.value
    assert outcome.failure is not None
    assert "\n" not in outcome.failure.reason
    return outcome.failure


class ExecutorConformance:
    """The contract of :class:`nas.executors.Executor`, as tests."""

    def make_executor(self) -> Executor:
        """A new executor, able to run at least one job."""
        raise NotImplementedError

    @pytest.fixture
    def executor(self) -> Iterator[Executor]:
        executor = self.make_executor()
        yield executor
        executor.close(kill=True)

    def run(
        self, executor: Executor, name: str, payload: dict[str, Any] | None = None, **options: Any
    ) -> Outcome:
        return executor.submit(JOBS + name, payload or {}, **options).result(_PATIENCE)

    def test_a_job_returns_its_value(self, executor: Executor) -> None:
        outcome = self.run(executor, "double", {"x": 21})
        assert value_of(outcome) == {"x": 42}
        assert outcome.attempts == 1
        assert 0 <= outcome.seconds < _PATIENCE

    def test_capacity_is_positive(self, executor: Executor) -> None:
        assert executor.capacity >= 1

    def test_many_more_jobs_than_capacity_each_get_their_own_value(self, executor: Executor) -> None:
        futures = [executor.submit(JOBS + "double", {"x": x}) for x in range(10 * executor.capacity + 3)]
        values = [value_of(future.result(_PATIENCE))["x"] for future in futures]
        assert values == [2 * x for x in range(len(futures))]

    def test_values_and_payloads_survive_the_journey(self, executor: Executor) -> None:
        payload = {
            "text": "äöü \U0001f40d \ud800 \n\0",
            "list": [1, [2.5, None], {"a": True}],
            "big": 2**100,
            "": {},
        }
        assert value_of(self.run(executor, "echo", payload)) == payload

    def test_not_a_number_and_infinities_survive(self, executor: Executor) -> None:
        value = value_of(self.run(executor, "give_nan"))
        assert math.isnan(value["loss"])
        assert value["curve"] == [math.inf, -math.inf, 1.5]

    def test_the_job_cannot_change_the_callers_payload(self, executor: Executor) -> None:
        payload: dict[str, Any] = {"list": [1]}
        value = value_of(self.run(executor, "echo", payload))
        value["list"].append(2)
        assert payload == {"list": [1]}

    def test_an_exception_is_a_failure_with_type_and_text(self, executor: Executor) -> None:
        failure = failure_of(self.run(executor, "fail"))
        assert (failure.kind, failure.reason) == ("error", "ValueError: learning rate is negative")

    def test_the_next_job_after_an_exception_runs(self, executor: Executor) -> None:
        self.run(executor, "fail")
        assert value_of(self.run(executor, "double", {"x": 1})) == {"x": 2}

    def test_kind_and_reason_of_a_trial_failure_are_kept(self, executor: Executor) -> None:
        failure = failure_of(self.run(executor, "refuse", {"kind": "nan", "reason": "loss is NaN at step 3"}))
        assert (failure.kind, failure.reason) == ("nan", "loss is NaN at step 3")

    def test_an_unknown_kind_is_an_ordinary_error(self, executor: Executor) -> None:
        failure = failure_of(self.run(executor, "refuse", {"kind": "strange", "reason": "r"}))
        assert (failure.kind, failure.reason) == ("error", "Refused: r")

    @pytest.mark.parametrize(
        "text",
        [
            "[enforce fail] DefaultCPUAllocator: can't allocate memory",
            "CUDA out of memory. Tried to allocate",
        ],
    )
    def test_torchs_memory_errors_are_told_apart(self, executor: Executor, text: str) -> None:
        failure = failure_of(self.run(executor, "say_it_ran_out_of_memory", {"text": text}))
        assert failure.kind == "memory"
        assert text in failure.reason

    @pytest.mark.parametrize(
        ("job", "reason"),
        [
            ("give_unserialisable", r"result\['metrics'\]\['accuracy'\] is a complex"),
            ("give_number_keys", r"result\['per_epoch'\] has the key 1"),
            ("give_list", "must return a dict, got list"),
            ("give_itself", "nested too deeply, or contains itself"),
            ("send_bytes", r"message\['weights'\] is a bytes"),
            ("leave_by_sys_exit", "SystemExit: enough"),
        ],
    )
    def test_what_is_no_result_is_a_failure(self, executor: Executor, job: str, reason: str) -> None:
        failure = failure_of(self.run(executor, job))
        assert failure.kind == "error"
        with pytest.raises(ValueError, match=reason):
            raise ValueError(failure.reason)

    @pytest.mark.parametrize("function", ["tests.nas.executor_jobs:absent", "absent_module:run"])
    def test_a_function_that_is_not_there_is_a_failure(self, executor: Executor, function: str) -> None:
        assert failure_of(executor.submit(function, {}).result(_PATIENCE)).kind == "error"

    def test_events_arrive_in_order_and_before_the_value(self, executor: Executor) -> None:
        steps: list[int] = []
        self.run(executor, "report_steps", {"steps": 100}, on_event=lambda event: steps.append(event["step"]))
        assert steps == list(range(100))

    def test_events_without_a_callback_are_dropped(self, executor: Executor) -> None:
        assert value_of(self.run(executor, "report_steps", {"steps": 3})) == {"steps": 3}

    def test_a_question_gets_what_the_callback_returns(self, executor: Executor) -> None:
        outcome = self.run(
            executor, "ask_until_told_to_stop", on_event=lambda event: {"stop": event["step"] == 5}
        )
        assert value_of(outcome) == {"stopped_at": 5}

    def test_a_question_without_an_answer_gets_an_empty_one(self, executor: Executor) -> None:
        assert value_of(self.run(executor, "ask_once")) == {"reply": {}}
        assert value_of(self.run(executor, "ask_once", on_event=lambda event: None)) == {"reply": {}}

    def test_several_threads_of_a_job_get_their_own_answers(self, executor: Executor) -> None:
        threads_seen: set[int] = set()

        def answer(event: dict[str, Any]) -> dict[str, Any]:
            threads_seen.add(event["thread"])
            return event

        value_of(self.run(executor, "chat_from_threads", {"threads": 4, "steps": 25}, on_event=answer))
        assert threads_seen == {0, 1, 2, 3}

    @pytest.mark.parametrize("job", ["report_steps", "ask_once"])
    def test_an_exception_in_the_callback_fails_that_job_only(self, executor: Executor, job: str) -> None:
        def broken(event: dict[str, Any]) -> None:
            raise KeyError("no such trial")

        failure = failure_of(self.run(executor, job, {"steps": 5}, on_event=broken))
        assert failure.kind == "error"
        assert failure.reason == "the callback on_event raised KeyError: 'no such trial'"
        assert value_of(self.run(executor, "double", {"x": 1})) == {"x": 2}

    @pytest.mark.parametrize("answer", ["stop", {"stop": object()}])
    def test_an_answer_that_is_not_json_fails_that_job_only(self, executor: Executor, answer: Any) -> None:
        failure = failure_of(self.run(executor, "ask_once", on_event=lambda event: answer))
        assert failure.kind == "error"
        assert failure.reason.startswith("the callback on_event raised TypeError")

    def test_the_channel_of_an_ended_job_is_closed(self, executor: Executor, tmp_path: Any) -> None:
        file = tmp_path / "said"
        value_of(self.run(executor, "leave_a_talking_thread", {"file": str(file)}))
        waited = threading.Event()
        for _ in range(600):
            if file.exists() and file.read_text():
                break
            waited.wait(0.1)
        assert "this job has ended" in file.read_text()

    @pytest.mark.parametrize(
        ("payload", "message"),
        [
            ({"model": object()}, r"payload\['model'\] is a object"),
            ({"layers": [{1: 2}]}, r"payload\['layers'\]\[0\] has the key 1"),
            ([1], "payload must be a dict, got list"),
        ],
    )
    def test_a_payload_that_is_not_json_is_refused_at_once(
        self, executor: Executor, payload: Any, message: str
    ) -> None:
        with pytest.raises(UserMistake, match=message):
            executor.submit(JOBS + "echo", payload)

    @pytest.mark.parametrize("limit", [0, -1.0, math.nan])
    def test_a_time_limit_must_be_positive(self, executor: Executor, limit: float) -> None:
        with pytest.raises(UserMistake, match=r"time_limit=.* must be more than 0 seconds"):
            executor.submit(JOBS + "echo", {}, time_limit=limit)

    def test_nothing_is_accepted_after_close(self, executor: Executor) -> None:
        executor.close()
        with pytest.raises(RunStopped, match="this executor is closed"):
            executor.submit(JOBS + "echo", {})

    def test_close_ends_every_future_and_may_be_repeated(self, executor: Executor) -> None:
        futures = [executor.submit(JOBS + "double", {"x": x}) for x in range(20)]
        executor.close()
        assert all(future.done() for future in futures)
        for x, future in enumerate(futures):
            outcome = future.result()
            if outcome.failure is None:
                assert outcome.value == {"x": 2 * x}
            else:
                assert failure_of(outcome).kind == "interrupted"
        executor.close()
        executor.close(kill=True)
