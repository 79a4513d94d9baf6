"""Measuring in a process of its own: mistakes come back as such, and a model that hangs is left out in its own time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nas.measure_sources
from nas.errors import UserMistake
from nas.executors import Outcome
from nas.latency.gate import PATIENCE_SECONDS, DeviceGate
from nas.latency.result import Session
from nas.latency.rounds import Plan
from nas.measure_sources import _held, _Watch, job, measure_sources

FUNCTIONS = """
import time
import torch
from torch import nn

class Hang(nn.Module):
    def forward(self, x):
        while True:
            time.sleep(0.1)

def small(): return nn.Linear(8, 8), (torch.rand(1, 8),)
def wide(): return nn.Linear(16, 8), (torch.rand(1, 16),)
def double(): return nn.Linear(8, 8).double(), (torch.rand(1, 8).double(),)
def hanging(): return Hang(), (torch.rand(1, 8),)
def never(): time.sleep(1000)
def alone(): return nn.Linear(8, 8), ()
"""

LIMIT = 0.5


class Heard:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, message: dict[str, Any]) -> None:
        self.events.append(message)


@pytest.fixture
def functions(tmp_path: Path) -> str:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return str(tmp_path / "functions.py")


def asked(texts: dict[str, str], **changes: Any) -> dict[str, Any]:
    plan = {"max_seconds": 0.1, "precision": 0.5, "seed": 0}
    plain = {
        "target": "cpu:1", "size": None, "plan": plan, "compare": False, "against": None, "margin": None,
        "options": {"priority": "off", "energy": False}, "scale": None, "texts": texts,
    }  # fmt: skip
    return {**plain, **changes}


# -- silence -----------------------------------------------------------------------------------------------------------


def watch(*, max_seconds: float = 1.0) -> _Watch:
    return _Watch(["a", "b"], LIMIT, max_seconds, lambda event: None)


class Clock:
    """The time of a watch: it passes while the watch waits, and what is planned happens meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self._planned: list[tuple[float, Callable[[], object]]] = []
        monkeypatch.setattr(nas.measure_sources, "wait", self.wait)
        monkeypatch.setattr(nas.measure_sources, "time", SimpleNamespace(monotonic=lambda: self.now))

    def at(self, seconds: float, what: Callable[[], object]) -> None:
        self._planned.append((seconds, what))

    def wait(self, futures: Iterable[Future[Outcome]], timeout: float) -> Any:
        self.now += timeout
        due = [what for seconds, what in self._planned if seconds <= self.now]
        self._planned = [(seconds, what) for seconds, what in self._planned if seconds > self.now]
        for what in due:
            what()
        return SimpleNamespace(done={future for future in futures if future.done()})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def waited(watching: _Watch, clock: Clock, seconds: float = 5.0) -> Outcome | None:
    """What is found of a job that would answer after ``seconds``."""
    future: Future[Outcome] = Future()
    clock.at(seconds, lambda: future.set_result(Outcome({}, None, 0.0, 1)))
    return watching.outcome(future)


def test_silence_after_a_visit_is_blamed_on_that_model(clock: Clock) -> None:
    found = watch()
    found.on_event({"visit": "a"})
    found.on_event({"visit": "b"})
    assert waited(found, clock) is None
    assert LIMIT <= clock.now < 2 * LIMIT
    assert found.touched == "b"
    assert found.silence() == "hangs: no sign of life for 0.5 s while it was built and first called; left out"


def test_every_sign_of_life_gives_new_time(clock: Clock) -> None:
    found = watch()
    found.on_event({"visit": "a"})
    for number in range(1, 12):
        clock.at(0.1 * number, lambda: found.on_event({"visit": "a"}))
    assert waited(found, clock, 1.2) is not None  # more than twice the limit


@pytest.mark.parametrize(
    "event", [{"wait": "device"}, {"visit": "reference"}], ids=["another has the device", "in the rounds"]
)
def test_other_steps_have_other_limits(event: dict[str, Any], clock: Clock) -> None:
    found = watch()
    found.on_event({"visit": "b"})
    found.on_event(event)
    assert waited(found, clock, 2 * LIMIT) is not None
    assert found.touched == "b"
    assert found._limit == (PATIENCE_SECONDS if "wait" in event else 1.0) + LIMIT


def test_the_start_of_the_process_is_nobodys_fault(clock: Clock) -> None:
    assert waited(watch(), clock, 2 * LIMIT) is not None


def test_the_others_go_on_without_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    tried: list[list[str]] = []

    def attempt(payload: dict[str, Any], texts: dict[str, str], watch: _Watch) -> Session | str:
        tried.append(list(texts))
        if "b" in texts:
            watch.on_event({"visit": "b"})
            return watch.silence()
        return Session(target="cpu:1", results={}, failures={})

    monkeypatch.setattr(nas.measure_sources, "_attempt", attempt)
    found = measure_sources(["a", "b", "c"], "cpu:1", on_progress=told.append)
    assert tried == [["a", "b", "c"], ["a", "c"]]
    assert list(found.failures) == ["b"]
    assert told[-1] == {"failed": "b", "reason": found.failures["b"]}


def test_a_runtime_that_compiles_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def attempt(payload: dict[str, Any], texts: dict[str, str], watch: _Watch) -> Session:
        watch.on_event({"visit": "a"})
        limits.append(watch._limit)
        return Session(target="cpu:1", results={}, failures={})

    monkeypatch.setattr(nas.measure_sources, "_attempt", attempt)
    measure_sources(["a"], "cpu:1")
    measure_sources(["a"], "cpu:1+compile")
    measure_sources(["a"], "cpu:1", stall_seconds=7.0)
    assert limits == [300.0, 900.0, 7.0]


def test_who_has_the_device_is_told_to_those_who_wait(tmp_path: Path) -> None:
    gate, other = DeviceGate("cpu", tmp_path), DeviceGate("cpu", tmp_path)
    assert _held(gate) == {}
    with other.exclusive():
        assert _held(gate) == {"held_by": os.getpid()}
    with other.shared():
        assert _held(gate) == {}  # who trains leaves at the next step
    assert _held(gate) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hanging", "never"])
def test_a_hanging_model_for_real(functions: str, name: str) -> None:
    good, bad = f"{functions}:small", f"{functions}:{name}"
    found = measure_sources([bad, good], "cpu:1", plan=Plan(0.5), stall_seconds=15.0)
    assert list(found.results) == [good]
    assert found.failures[bad].startswith("hangs: no sign of life for 15 s while it was built")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "inputs"), [("wide", "1x16 float32"), ("double", "1x8 float64")], ids=["shape", "dtype"]
)
def test_models_with_different_inputs_are_not_compared(functions: str, other: str, inputs: str) -> None:
    texts = {name: f"{functions}:{name}" for name in ("small", other)}
    refused = job(asked(texts, compare=True), Heard())
    assert refused == {
        "mistake": "--compare: models with different inputs cannot be compared: 'small' takes 1x8 float32, "
        f"{other!r} takes {inputs}; give one --size that fits both, or leave --compare out"
    }


def test_different_inputs_are_measured_without_comparing(
    functions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(models: dict[str, Any], *_: object, pairs: bool, **__: object) -> Session:
        assert not pairs
        heard.event({"measured": list(models)})
        return Session(target="cpu:1", results={}, failures={})

    monkeypatch.setattr(nas.measure_sources, "measure_together", measured)
    monkeypatch.setattr(DeviceGate, "exclusive", lambda gate: contextlib.nullcontext())
    monkeypatch.setattr(nas.measure_sources, "_held", lambda gate: {"held_by": 7})
    heard = Heard()
    texts = {name: f"{functions}:{name}" for name in ("small", "wide")}
    Session.from_dict(job(asked(texts), heard))
    assert heard.events == [  # both are loaded before the device is asked for
        {"visit": "small"}, {"visit": "wide"}, {"wait": "device", "held_by": 7}, {"measured": ["small", "wide"]}
    ]  # fmt: skip


def test_a_batch_that_a_program_was_not_made_for(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(torch.nn.Linear(4, 2), (torch.rand(3, 4),), dynamic_shapes=({0: batch},))
    path = str(tmp_path / "a.pt2")
    torch.export.save(program, path)
    for target, way_out in (("cpu:1@100", "not 100; choose such a target, as in @64"), ("cpu:1", "@2")):
        (told,) = job(asked({path: path}, target=target), Heard()).values()
        assert "made for batches of 2 to 64 (input ? x 4)" in told
        assert way_out in told


def test_a_size_that_no_target_has_is_a_mistake_of_the_size() -> None:
    with pytest.raises(UserMistake, match=r"^--size 16-16: allowed: "):
        measure_sources(["a"], "cpu:1", size="16-16")
    assert "size='x'" in job(asked({"a": "a"}, size="x"), Heard())["mistake"]


def test_a_model_without_inputs_is_named(tmp_path: Path, functions: str) -> None:
    (tmp_path / "empty.onnx").write_bytes(b"")  # onnx reads it as a model of nothing
    for text in (str(tmp_path / "empty.onnx"), f"{functions}:alone"):
        told = job(asked({"m": text}, target="cpu:1+onnxruntime"), Heard())["mistake"]
        assert told.startswith(f"model {text!r}: takes no inputs; ")


def test_a_runtime_that_reads_no_onnx_says_so_first(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    path.write_bytes(b"whatever")
    with pytest.raises(
        UserMistake, match=r"^target 'cpu:1': .*two\.onnx is an ONNX file, which eager does not read"
    ):
        measure_sources([str(path)], "cpu:1")
