"""When a measurement is trusted: the machine's state, the quiet part of a session, the scale that sessions share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nas.latency import Options, Target, measure
from nas.latency.guard import displaced
from nas.latency.reference import ReferenceTimes, reference_workload
from tests.nas import _runtime_models
from tests.nas._runtime_models import ONE

_one_thread = _runtime_models.one_thread  # a fixture is found by a name in the module of its tests


def deep(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))


def machine_is(monkeypatch: pytest.MonkeyPatch, verdict: Callable[[], list[str]]) -> None:
    """The guard's verdict, whatever the machine under the tests does."""
    measuring = sys.modules["nas.latency.measure"]
    monkeypatch.setattr(measuring, "judge", lambda *a, **k: verdict())
    monkeypatch.setattr(measuring, "unsettled", lambda share: [])
    monkeypatch.setattr(measuring, "unsteady", lambda **session: [])
    monkeypatch.setattr(measuring, "displaced", lambda *a, **k: [])
    wall_clock(monkeypatch)


def wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other work on its core a session may be read by CPU time, which has a scale of its own."""
    monkeypatch.setattr(sys.modules["nas.latency.measure"], "clock_of", lambda target, calls: "wall")


def test_one_scale_serves_all_measurements_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_is(monkeypatch, list)
    options = Options(scale=tmp_path / "reference.json")
    model, x = deep(3), (torch.randn(1, 64),)
    first, second = (measure(model, x, ONE, max_seconds=0.1, options=options) for _ in range(2))
    assert first.reference_ms == second.reference_ms
    assert second.median_ms == pytest.approx(second.ratio * first.reference_ms)
    assert len(json.loads((tmp_path / "reference.json").read_text())) == 1
    other = measure(model, x, Target.parse("cpu:1+bf16"), max_seconds=0.1, options=options)
    assert other.reference_ms != first.reference_ms
    (tmp_path / "reference.json").write_text("{torn")
    assert measure(model, x, ONE, max_seconds=0.1, options=options).median_ms > 0


def test_a_disturbed_session_is_nobodys_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(scale=tmp_path / "reference.json", retries=0)
    machine_is(monkeypatch, lambda: ["throttled"])
    assert not measure(nn.Linear(4, 4), (torch.randn(1, 4),), ONE, max_seconds=0.02, options=options).trusted
    assert not (tmp_path / "reference.json").exists()


def test_a_session_on_another_level_than_the_scale_is_untrusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall_clock(monkeypatch)
    options = Options(scale=tmp_path / "reference.json", retries=0)
    model, x = deep(3), (torch.randn(1, 64),)
    with monkeypatch.context() as patched:
        machine_is(patched, list)
        measure(model, x, ONE, max_seconds=0.05, options=options)
    [(digest, usual)] = json.loads((tmp_path / "reference.json").read_text()).items()
    for factor, said in ((0.1, "the machine was slower throughout"), (10.0, "that one was slow")):
        (tmp_path / "reference.json").write_text(json.dumps({digest: factor * usual}))
        result = measure(model, x, ONE, max_seconds=0.05, options=options)
        assert not result.trusted
        assert any(said in reason for reason in result.reasons)


def test_levels_of_the_reference() -> None:
    assert displaced(2.0, None) == displaced(2.0, 2.2) == displaced(2.2, 2.0) == []
    assert len(displaced(2.0, 2.5)) == len(displaced(2.5, 2.0)) == 1
    # Two models of one fast session are as comparable as ever; those of a slow one are not.
    assert displaced(2.0, 2.5, ratios_only=True) == []
    assert len(displaced(2.5, 2.0, ratios_only=True)) == 1


def test_reference_times_that_make_no_sense_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    path.write_text('{"a": 1.5, "b": "x", "c": -1, "d": NaN}')
    kept = ReferenceTimes(path)
    assert [kept.get(name) for name in "abcde"] == [1.5, None, None, None, None]
    assert ReferenceTimes(None).get("a") is None


def test_the_reference_is_always_the_same() -> None:
    (one, x), (two, y) = reference_workload(ONE), reference_workload(ONE)
    assert torch.equal(one(*x), two(*y))


def test_what_was_out_of_bounds_is_measured_again_and_then_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([["a"], []])
    machine_is(monkeypatch, lambda: next(verdicts))
    x = (torch.randn(1, 4),)
    assert measure(nn.Linear(4, 4), x, ONE, max_seconds=0.02).trusted
    machine_is(monkeypatch, lambda: ["steal 9 %, allowed 5 %"])
    result = measure(nn.Linear(4, 4), x, ONE, max_seconds=0.02)
    assert (result.trusted, result.reasons) == (False, ("steal 9 %, allowed 5 %",))


def test_a_reference_that_is_hardly_ever_near_its_best_is_a_reason_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine_is(monkeypatch, list)
    monkeypatch.setattr(sys.modules["nas.latency.measure"], "unsettled", lambda share: [f"{share:.0%} quiet"])
    result = measure(nn.Linear(4, 4), (torch.randn(1, 4),), ONE, max_seconds=0.02, options=Options(retries=0))
    assert not result.trusted
    assert len(result.reasons) == 1
    assert result.reasons[0].endswith("% quiet")
