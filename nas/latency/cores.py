"""Which cores of a machine a measurement is given: alike, and as little used as can be."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nas.latency.machine import CpuTimes

__all__ = ["choose_cores", "fastest_kind"]


def choose_cores(
    count: int,
    allowed: Collection[int],
    before: Mapping[int, CpuTimes],
    after: Mapping[int, CpuTimes],
    siblings: Mapping[int, frozenset[int]],
) -> tuple[int, ...]:
    """The least busy cores, one hardware thread of each as long as there are enough.

    Args:
        count: cores wanted; all allowed ones if there are not more.
        allowed: to choose from.
        before, after: counters of the cores; a core that is missing counts as idle.
        siblings: hardware threads that share a core with this one, itself among them; work on one slows the others.

    Returns:
        Numbers of cores, sorted.
    """

    def busy(core: int) -> float:
        if core not in before or core not in after:
            return 0.0
        total = after[core].total - before[core].total
        # A hypervisor that takes a core away makes it as bad as a process that uses it.
        work = after[core].busy - before[core].busy + after[core].steal - before[core].steal
        return work / total if total > 0 else 0.0

    def shared_with(core: int) -> frozenset[int]:
        return siblings.get(core, frozenset()) | {core}

    order = sorted(allowed, key=lambda core: (sum(busy(one) for one in shared_with(core)), busy(core), core))
    chosen: list[int] = []
    for core in order:
        if not shared_with(core).intersection(chosen):
            chosen.append(core)
    chosen += [core for core in order if core not in chosen]
    return tuple(sorted(chosen[:count]))


def fastest_kind(count: int, allowed: Collection[int], top: Mapping[int, int]) -> tuple[int, ...]:
    """The cores of the highest top frequency, where a processor has several kinds and ``count`` of them are enough.

    Two measurements on cores of unlike kinds would not be comparable.
    """
    most = max((top.get(core, 0) for core in allowed), default=0)
    alike = tuple(core for core in allowed if top.get(core, 0) == most)
    return alike if len(alike) >= count else tuple(allowed)
