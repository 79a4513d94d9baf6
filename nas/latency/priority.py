"""Real-time priority and cores of its own for a measurement, where the system permits; everything is put back.

The gain is large: on a machine loaded five times over, times of models repeat with Kendall tau 1.00 under real-time
priority, with 0.72 without.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from nas.errors import UserMistake
from nas.latency.cores import choose_cores, fastest_kind
from nas.latency.machine import own_cores, read_cpu_times, read_siblings, read_top_frequencies

__all__ = ["Granted", "Kind", "undisturbed"]

logger = logging.getLogger(__name__)

Kind = Literal["realtime", "nice", "none"]

REALTIME_PRIORITY = 10
"""Above every normal process and every unset real-time one; below the kernel's own threads (50 and 99)."""

RUN_SECONDS = 0.1
"""How long real-time threads run before ``pause`` rests."""

REST_SHARE = 0.125
"""Rest for each second of running: 8/9 = 89 % of the time is used. The kernel takes a real-time thread off its core
when less than 5 % of a second is left to others, in the middle of a sample."""

LONGEST_REST = 0.125
"""Seconds. What ran beyond a second is not repaid: the kernel counts each second anew."""

LOOK_SECONDS = 0.1
"""How long the cores are watched before the least busy are chosen."""

_NICEST = -20


@dataclass(frozen=True)
class _Settings:
    """How one thread is scheduled; ``policy`` and ``cores`` are None where the system has no such thing."""

    policy: int | None
    priority: int
    nice: int
    cores: frozenset[int] | None


@dataclass(frozen=True)
class _Wish:
    """What every thread shall get; None leaves it what it has."""

    policy: int | None = None
    nice: int | None = None
    cores: frozenset[int] | None = None

    def applied_to(self, found: _Settings) -> _Settings:
        cores = found.cores if self.cores is None else self.cores
        nice = found.nice if self.nice is None else min(found.nice, self.nice)
        # A thread that somebody has made real-time by hand keeps its own rank.
        if self.policy is None or _is_realtime(found):
            return replace(found, nice=nice, cores=cores)
        return _Settings(self.policy, REALTIME_PRIORITY, nice, cores)

    def taken_from(self, found: _Settings, base: _Settings) -> _Settings:
        """What a thread would have without us, where it inherited something from the thread that started it."""
        if found.policy == self.policy:
            found = replace(found, policy=base.policy, priority=base.priority)
        if found.nice == self.nice:
            found = replace(found, nice=base.nice)
        return replace(found, cores=base.cores) if found.cores == self.cores else found


class Granted:
    """What was granted for the time of ``undisturbed``.

    Attributes:
        kind: ``realtime`` (all threads of the process run before everything that is not real-time), ``nice`` (they get
            a larger share) or ``none``.
        affinity: the cores that the process was pinned to, sorted; None when it was not.
        why: one line, why it is not more; empty under ``realtime`` with pinning.
    """

    def __init__(
        self,
        kind: Kind,
        affinity: tuple[int, ...] | None,
        why: str,
        *,
        renew: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.kind: Kind = kind
        self.affinity = affinity
        self.why = why
        self._renew = renew
        self._clock = clock
        self._sleep = sleep
        self._rested = clock()

    def renew(self) -> None:
        """Give threads that were started meanwhile the same priority and cores.

        To be called after warm-up: OpenMP and oneDNN start their threads at the first call, and a new thread of a
        real-time one begins as a normal one (so that no process started by mistake is ever left in real time).
        """
        if self._renew is not None:
            self._renew()

    def pause(self) -> float:
        """Let others run for a moment if real-time threads may have had the cores for 0.1 s; call it between samples.

        Without it nothing else would run on these cores, and the kernel would stop the process in the middle of a
        sample once in a second. A single call of a second or more cannot be helped.

        Returns:
            Seconds slept; 0 when no rest was due or there is no real-time priority.
        """
        if self.kind != "realtime":
            return 0.0
        ran = self._clock() - self._rested
        if ran < RUN_SECONDS:
            return 0.0
        rest = min(ran * REST_SHARE, LONGEST_REST)
        self._sleep(rest)
        self._rested = self._clock()
        return rest


@contextlib.contextmanager
def undisturbed(threads: int, policy: str = "auto") -> Iterator[Granted]:
    """Run before the other processes of the machine for as long as the context lasts.

    Real-time priority (SCHED_FIFO 10) is asked for first, for every thread of the process; with it the process is
    pinned to the ``threads`` cores with the least work on them. Refused, the lowest niceness that is permitted is
    taken, without pinning: a pinned thread of normal priority could not leave a core that others use.

    At the end every thread gets back what it had; threads that were started meanwhile get what the calling thread had.
    Nested use, from any thread, changes nothing and yields what the outermost was granted; the last to leave restores.
    Processes that are started inside keep the cores (under niceness, that too): compile and start workers before.

    Args:
        threads: that compute at the same time, at least 1.
        policy: ``auto``, or ``off``, which changes nothing.

    Raises:
        UserMistake: ``threads`` or ``policy`` is not among the allowed.
    """
    if threads < 1:
        raise UserMistake(f"threads={threads} must be at least 1; give the threads that compute at a time")
    if policy not in ("auto", "off"):
        raise UserMistake(f"priority policy {policy!r} is not known; allowed: auto, off")
    if policy == "off":
        yield Granted("none", None, "priority was switched off")
        return
    token = object()
    # Entering is inside, so that a Ctrl-C between the two cannot skip the way out.
    try:
        yield _scheduler.enter(token, threads)
    finally:
        _scheduler.leave(token)


class _Scheduler:
    """The scheduling of this process: one change at most, however many contexts are open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: set[object] = set()
        self._granted: Granted | None = None
        self._wish = _Wish()
        self._base: _Settings | None = None
        self._kept: dict[int, _Settings] = {}

    def enter(self, token: object, threads: int) -> Granted:
        with self._lock:
            self._inside.add(token)
            if self._granted is None:
                self._granted = self._ask(threads)
            return self._granted

    def leave(self, token: object) -> None:
        with self._lock:
            self._inside.discard(token)
            if self._inside:
                return
            self._granted = None
            try:
                self._restore()
            except BaseException:  # Ctrl-C in the middle: no thread may be left in real time
                self._restore()
                raise

    def after_fork(self) -> None:
        """A child has one thread, with normal priority already, but niceness and cores of its parent."""
        base, wish = self._base, self._wish
        self._lock = threading.Lock()
        self._inside, self._kept = set(), {}
        self._granted = self._base = None
        self._wish = _Wish()
        if base is not None:
            with contextlib.suppress(OSError):
                found = _read(0)
                _write(0, wish.taken_from(found, base), found)

    def _ask(self, threads: int) -> Granted:
        base = self._base = _read(0)
        self._kept = {tid: settings for tid, settings in _all_threads()}
        refused = self._ask_realtime(base)
        if refused is None:
            cores, why = self._pin(threads)
            return Granted("realtime", cores, why, renew=self._renew)
        nice = self._ask_nice(base)
        if nice is None:
            return Granted("none", None, f"{refused}; lower niceness was refused too")
        return Granted("nice", None, f"{refused}; niceness {nice} instead", renew=self._renew)

    def _ask_realtime(self, base: _Settings) -> str | None:
        """Change all threads; returns why not, with everything as before."""
        if base.policy is None:
            return "this system has no real-time priority for threads"
        # Where somebody has set it already (chrt -f), it is the other threads' that is missing, if any.
        refusal = self._try(_Wish(policy=os.SCHED_FIFO | os.SCHED_RESET_ON_FORK))
        return refusal and (
            f"real-time priority was refused ({refusal}); it needs root, the capability CAP_SYS_NICE or "
            f"'ulimit -r {REALTIME_PRIORITY}'"
        )

    def _ask_nice(self, base: _Settings) -> int | None:
        """The lowest niceness that is permitted, set for all threads; None when none below the present one is."""
        for nice in range(_NICEST, base.nice):
            if self._try(_Wish(nice=nice)) is None:
                return nice
        return base.nice if base.nice <= _NICEST else None

    def _pin(self, threads: int) -> tuple[tuple[int, ...] | None, str]:
        allowed = own_cores() or ()
        if threads >= len(allowed):
            return allowed, ""
        before, _ = read_cpu_times()
        time.sleep(LOOK_SECONDS)
        after, _ = read_cpu_times()
        alike = fastest_kind(threads, allowed, read_top_frequencies(allowed))
        cores = choose_cores(threads, alike, before, after, read_siblings(allowed))
        refusal = self._try(replace(self._wish, cores=frozenset(cores)))
        return (cores, "") if refusal is None else (None, f"pinning to cores was refused ({refusal})")

    def _try(self, wish: _Wish) -> str | None:
        """Grant a wish to all threads, or to none of them: returns the reason then."""
        earlier, self._wish = self._wish, wish
        try:
            self._change()
        except OSError as error:
            self._restore_threads()
            self._wish = earlier
            self._change()
            return error.strerror or str(error)
        return None

    def _renew(self) -> None:
        with self._lock:
            self._change()

    def _change(self) -> None:
        """Bring every thread to what is wished; what each had before is kept."""
        if self._base is None:
            return
        for tid, found in _all_threads():
            self._kept.setdefault(tid, self._wish.taken_from(found, self._base))
            with contextlib.suppress(ProcessLookupError):  # it has ended
                _write(tid, self._wish.applied_to(found), found)

    def _restore(self) -> None:
        self._restore_threads()
        self._kept, self._base, self._wish = {}, None, _Wish()

    def _restore_threads(self) -> None:
        if self._base is None:
            return
        # Threads may be started by threads that are not restored yet, so look until no new one is found.
        done: set[int] = set()
        while new := {tid: found for tid, found in _all_threads() if tid not in done}:
            done.update(new)
            for tid, found in new.items():
                wanted = self._kept.get(tid) or self._wish.taken_from(found, self._base)
                try:
                    _write(tid, wanted, found)
                except ProcessLookupError:
                    continue
                except OSError as error:
                    logger.warning("thread %d does not get its scheduling back: %s", tid, error)


_scheduler = _Scheduler()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_scheduler.after_fork)


def _all_threads() -> Iterator[tuple[int, _Settings]]:
    """The threads of this process and their settings; only the calling one (0) where the system does not tell."""
    try:
        tids = sorted(int(name) for name in os.listdir("/proc/self/task"))
    except OSError:
        tids = [0]
    for tid in tids:
        with contextlib.suppress(ProcessLookupError):
            yield tid, _read(tid)


def _read(tid: int) -> _Settings:
    nice = os.getpriority(os.PRIO_PROCESS, tid)
    if not hasattr(os, "sched_getscheduler"):
        return _Settings(None, 0, nice, None)
    return _Settings(
        os.sched_getscheduler(tid),
        os.sched_getparam(tid).sched_priority,
        nice,
        frozenset(os.sched_getaffinity(tid)),
    )


def _write(tid: int, wanted: _Settings, found: _Settings) -> None:
    """Change what differs. Raises OSError when it is refused."""
    if (wanted.policy, wanted.priority) != (found.policy, found.priority) and wanted.policy is not None:
        _set_policy(tid, wanted.policy, wanted.priority)
    if wanted.nice != found.nice:
        os.setpriority(os.PRIO_PROCESS, tid, wanted.nice)
    if wanted.cores != found.cores and wanted.cores is not None:
        os.sched_setaffinity(tid, wanted.cores)


def _set_policy(tid: int, policy: int, priority: int) -> None:
    try:
        os.sched_setscheduler(tid, policy, os.sched_param(priority))
    except PermissionError:
        # Who may use real time by 'ulimit -r' only may not take the flag off again; it does no harm to keep it.
        if policy & os.SCHED_RESET_ON_FORK:
            raise
        os.sched_setscheduler(tid, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))


def _is_realtime(settings: _Settings) -> bool:
    if settings.policy is None:
        return False
    # SCHED_DEADLINE (6) has no name in Python and cannot be set again from here, so it is left alone as well.
    return settings.policy & ~os.SCHED_RESET_ON_FORK in (os.SCHED_FIFO, os.SCHED_RR, 6)
