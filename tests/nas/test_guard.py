"""The guard's judgement, on readings made up for each bound."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nas.latency import guard
from nas.latency.guard import Reading, judge
from nas.latency.nvml import Gpu
from nas.latency.target import Target
from tests.nas._guard_readings import CPU, CUDA, LATER, QUIET, QUIET_GPU


def judged(
    after: Reading = LATER,
    before: Reading = QUIET,
    target: Target = CPU,
    *,
    clock: str = "wall",
    ratio: float | None = 1.0,
    priority: str = "none",
) -> list[str]:
    return judge(before, after, target, clock=clock, wall_cpu_ratio=ratio, priority=priority)


class TestJudge:
    def test_a_quiet_machine_is_trusted(self) -> None:
        for clock in ("wall", "cpu", "events"):
            for priority in ("realtime", "nice", "none"):
                assert judged(clock=clock, priority=priority) == []

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            (
                {"steal_ticks": ((0, 10), (1, 120))},
                "the hypervisor took 7% of the time of core 1 (steal, bound 5%)",
            ),
            ({"throttled": 5}, "the control group's quota stopped it in 2 periods (bound 0)"),
            (
                {"throttled": 4, "quota_cpus": 1.5},
                "the control group's quota of 1.5 CPUs stopped it in 1 periods (bound 0)",
            ),
            ({"thermal_throttles": 4}, "the processor slowed down for heat 2 times at 50 degrees (bound 0)"),
        ],
    )
    def test_what_slows_the_core_counts_by_any_clock(self, changes: dict[str, Any], text: str) -> None:
        after = dataclasses.replace(LATER, **changes)
        for clock in ("wall", "cpu"):
            for priority in ("realtime", "none"):
                assert judged(after, clock=clock, priority=priority) == [text]

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"load": 2.6}, "load 2.6 on 2 cores (bound 2) without real-time priority"),
            (
                {"thread_switches": 1600},
                "each measuring thread was interrupted 60 times a second (involuntary switches, bound 50) "
                "without real-time priority",
            ),
        ],
    )
    def test_others_count_without_priority_and_with_a_wall_clock(
        self, changes: dict[str, Any], text: str
    ) -> None:
        after = dataclasses.replace(LATER, **changes)
        assert judged(after, ratio=None) == [text]
        assert judged(after, priority="nice", ratio=None) == [text]
        assert judged(after, clock="events", ratio=None) == [text]
        assert judged(after, clock="cpu", ratio=None) == []

    def test_real_time_priority_excuses_load_but_no_interruptions(self) -> None:
        assert judged(dataclasses.replace(LATER, load=40.0), priority="realtime", ratio=None) == []
        text = (
            "each measuring thread was interrupted 60 times a second (involuntary switches, bound 50) "
            "under real-time priority"
        )
        after = dataclasses.replace(LATER, load=40.0, thread_switches=1600)
        assert judged(after, priority="realtime") == [text]
        assert judged(after, priority="realtime", clock="cpu") == []
        several = dataclasses.replace(LATER, load=40.0, process_switches=5000 + 50000)
        [found] = judged(several, target=Target.parse("cpu:2"), ratio=None, priority="realtime")
        assert "interrupted 2500 times a second" in found

    def test_the_load_before_counts_too(self) -> None:
        assert judged(before=dataclasses.replace(QUIET, load=4.0), ratio=None) == [
            "load 4.0 on 2 cores (bound 2) without real-time priority"
        ]

    def test_one_thread_tells_by_itself_what_the_mean_load_of_a_minute_only_guesses(self) -> None:
        before, after = (dataclasses.replace(reading, load=4.0) for reading in (QUIET, LATER))
        assert judged(after, before) == []
        assert judged(after, before, ratio=1.2) != []

    def test_wall_over_cpu(self) -> None:
        text = "wall time is 1.30 times the CPU time (bound 1.05): other work ran on the core"
        assert judged(ratio=1.3) == [text]
        assert judged(ratio=1.3, priority="realtime") == [text]
        assert judged(ratio=1.3, clock="cpu") == []
        assert judged(ratio=1.05) == []
        assert judged(ratio=None) == []
        assert len(judged(ratio=float("nan"))) == 1

    def test_clocks(self) -> None:
        slow = dataclasses.replace(LATER, mhz=2000, governor="powersave")
        assert judged(slow, clock="cpu", priority="realtime") == [
            "the cores run at 2000 of 3000 MHz (bound 75%), governor powersave",
            "the clock fell from 3000 to 2000 MHz (bound 75%), governor powersave",
        ]
        assert judged(dataclasses.replace(slow, nominal_mhz=None, governor=None)) == [
            "the clock fell from 3000 to 2000 MHz (bound 75%)"
        ]
        assert judged(dataclasses.replace(slow, mhz=2300)) == []

    def test_the_clock_before_counts_as_well(self) -> None:
        low = dataclasses.replace(QUIET, mhz=1000)
        assert judged(before=low) == [
            "the cores ran at 1000 of 3000 MHz (bound 75%), governor performance",
            "the clock rose from 1000 to 3000 MHz (bound 75%), governor performance",
        ]
        assert judged(before=dataclasses.replace(low, nominal_mhz=None)) == [
            "the clock rose from 1000 to 3000 MHz (bound 75%), governor performance"
        ]
        assert judged(dataclasses.replace(LATER, mhz=None), low) == [
            "the cores ran at 1000 of 3000 MHz (bound 75%), governor performance"
        ]
        assert judged(before=dataclasses.replace(QUIET, mhz=2300)) == []
        assert judged(before=dataclasses.replace(QUIET, mhz=None)) == []

    def test_one_tick_of_steal_in_a_short_session_is_no_reason(self) -> None:
        short = dataclasses.replace(QUIET, seconds=100.1, steal_ticks=((0, 11), (1, 50)))
        assert judged(short) == []
        assert judged(dataclasses.replace(short, steal_ticks=((0, 12), (1, 50)))) == [
            "the hypervisor took 20% of the time of core 0 (steal, bound 5%)"
        ]

    def test_three_switches_in_a_short_session_are_no_reason(self) -> None:
        short = dataclasses.replace(QUIET, seconds=100.01, thread_switches=1003)
        assert judged(short) == []
        assert len(judged(dataclasses.replace(short, thread_switches=1004))) == 1

    def test_steal_of_cores_used_only_before_pinning_is_ignored(self) -> None:
        assert judged(dataclasses.replace(LATER, steal_ticks=((0, 10),))) == []
        assert len(judged(dataclasses.replace(LATER, steal_ticks=((0, 900),)))) == 1

    def test_switches_of_several_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        after = dataclasses.replace(LATER, process_switches=5000 + 1600)
        assert judged(after) == []
        assert len(judged(after, target=Target.parse("cpu:2"))) == 1
        assert judged(after, target=Target.parse("cpu:4")) == []

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"mhz": 1200}, "the GPU runs at 1200 of 1980 MHz (bound 75%)"),
            (
                {"slowdowns": ("hardware slowdown",)},
                "the GPU holds its clocks back: hardware slowdown (bound: none)",
            ),
            ({"other_processes": 2}, "2 other compute process(es) on the GPU (bound 0)"),
            ({"temperature": 90}, "the GPU is at 90 degrees (it slows down at 89)"),
        ],
    )
    def test_gpu(self, changes: dict[str, Any], text: str) -> None:
        after = dataclasses.replace(LATER, gpu=dataclasses.replace(QUIET_GPU, **changes))
        assert judged(after, target=CUDA, clock="events", ratio=None) == [text]
        assert judged(after, target=CUDA, clock="events", ratio=None, priority="realtime") == [text]

    def test_the_clock_of_a_resting_gpu_says_nothing(self) -> None:
        resting = dataclasses.replace(QUIET_GPU, mhz=345, idle=True)
        assert judged(dataclasses.replace(LATER, gpu=resting), target=CUDA, clock="events") == []
        before = dataclasses.replace(QUIET, gpu=resting)
        assert judged(before=before, target=CUDA, clock="events") == []

    def test_mistakes_of_the_caller(self) -> None:
        with pytest.raises(ValueError, match="is not later"):
            judged(QUIET)
        with pytest.raises(ValueError, match="clock='gpu'"):
            judged(clock="gpu")
        with pytest.raises(ValueError, match="priority='high'"):
            judged(priority="high")


def _maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


COUNTS = st.integers(0, 2000)
MHZ = st.floats(100, 5000)
SLOWDOWNS = ("hardware slowdown", "power brake")
GPUS = st.builds(
    Gpu, mhz=_maybe(MHZ), max_mhz=_maybe(MHZ), temperature=_maybe(st.floats(20, 110)),
    slowdown_temperature=_maybe(st.floats(80, 95)), idle=_maybe(st.booleans()),
    slowdowns=_maybe(st.sets(st.sampled_from(SLOWDOWNS)).map(tuple)), other_processes=_maybe(st.integers(0, 3)),
)  # fmt: skip


def readings(seconds: st.SearchStrategy[float]) -> st.SearchStrategy[Reading]:
    return st.builds(
        Reading, seconds=seconds, cores=st.just((0, 1)), machine_cores=_maybe(st.integers(1, 8)),
        load=_maybe(st.floats(0, 20)),
        steal_ticks=_maybe(st.tuples(COUNTS, COUNTS).map(lambda both: ((0, both[0]), (1, both[1])))),
        throttled=_maybe(COUNTS), mhz=_maybe(MHZ), nominal_mhz=_maybe(MHZ),
        governor=st.sampled_from([None, "powersave", "performance"]), thermal_throttles=_maybe(COUNTS),
        thread_switches=_maybe(COUNTS), process_switches=_maybe(COUNTS), gpu=_maybe(GPUS),
    )  # fmt: skip


def _more(value: Any, by: float) -> Any:
    return None if value is None else value + by


def _worse_gpu(gpu: Gpu | None, by: float) -> Gpu | None:
    if gpu is None:
        return None
    return dataclasses.replace(
        gpu,
        mhz=None if gpu.mhz is None else gpu.mhz / (1 + by),
        temperature=_more(gpu.temperature, by),
        slowdowns=None if gpu.slowdowns is None else (*gpu.slowdowns, "power brake"),
        other_processes=_more(gpu.other_processes, 1),
    )


def _slower(reading: Reading, by: float) -> Reading:
    return dataclasses.replace(reading, mhz=None if reading.mhz is None else reading.mhz / (1 + by))


WORSE = {
    "load": lambda r, by: {"load": _more(r.load, by)},
    "steal": lambda r, by: {
        "steal_ticks": r.steal_ticks and tuple((core, ticks + round(by)) for core, ticks in r.steal_ticks)
    },
    "throttled": lambda r, by: {"throttled": _more(r.throttled, 1 + round(by))},
    "heat": lambda r, by: {"thermal_throttles": _more(r.thermal_throttles, 1 + round(by))},
    "thread": lambda r, by: {"thread_switches": _more(r.thread_switches, round(by))},
    "process": lambda r, by: {"process_switches": _more(r.process_switches, round(by))},
    "gpu": lambda r, by: {"gpu": _worse_gpu(r.gpu, by)},
}


@given(
    before=readings(st.just(50.0)),
    after=readings(st.floats(50.001, 80)),
    target=st.sampled_from([CPU, Target.parse("cpu:2"), CUDA]),
    clock=st.sampled_from(["wall", "cpu", "events"]),
    ratio=_maybe(st.floats(0.5, 3)),
    priority=st.sampled_from(["realtime", "nice", "none"]),
    how=st.sampled_from([*WORSE, "slower", "slower after", "ratio", "priority", "clock name"]),
    by=st.floats(0, 1000),
)
def test_worse_never_becomes_trusted(
    before: Reading,
    after: Reading,
    target: Target,
    clock: str,
    ratio: float | None,
    priority: str,
    how: str,
    by: float,
) -> None:
    first = judged(after, before, target, clock=clock, ratio=ratio, priority=priority)
    assert all(reason and "\n" not in reason for reason in first)
    if how == "ratio":
        ratio = _more(ratio, by)
    elif how == "priority":
        priority = "none"
    elif how == "clock name":
        clock = "wall"
    elif how == "slower":
        before, after = _slower(before, by), _slower(after, by)
    elif how == "slower after":
        # A clock that rose is out of bounds, too; one that is lower by less is better.
        assume(before.mhz is None or after.mhz is None or after.mhz <= before.mhz)
        after = _slower(after, by)
    else:
        after = dataclasses.replace(after, **WORSE[how](after, by))
    second = judged(after, before, target, clock=clock, ratio=ratio, priority=priority)
    assert len(second) >= len(first)


@given(
    after=readings(st.floats(50.001, 80)),
    before=readings(st.just(50.0)),
    field=st.sampled_from(sorted([*WORSE, "clock"])),
)
def test_what_is_not_told_is_no_reason(after: Reading, before: Reading, field: str) -> None:
    names = {
        "load": "load", "steal": "steal_ticks", "throttled": "throttled", "heat": "thermal_throttles", "clock": "mhz",
        "thread": "thread_switches", "process": "process_switches", "gpu": "gpu",
    }  # fmt: skip
    silent = dataclasses.replace(after, **{names[field]: None})
    assert len(judged(silent, before)) <= len(judged(after, before))


def test_bounds_are_those_of_the_text() -> None:
    assert (guard.WALL_CPU, guard.STEAL_SHARE, guard.CLOCK_SHARE) == (1.05, 0.05, 0.75)
