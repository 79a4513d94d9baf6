"""Jobs on the nodes of a Ray cluster, with the isolation of local workers on each of them."""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from nas.errors import RunStopped, UserMistake
from nas.executors.base import OnEvent, Outcome, check_job
from nas.executors.local import _absolute
from nas.executors.ray_cluster import Cluster, Need
from nas.executors.ray_host import Host
from nas.executors.ray_slot import RayJob, RaySlot
from nas.executors.wire import encode

__all__ = ["RayExecutor"]

logger = logging.getLogger(__name__)

MAX_WORKERS = 4096

_KILL_SECONDS = 5.0
_LOOK_SECONDS = 5.0
_WAITING_SECONDS = 30.0
_HEADLESS_SECONDS = (
    35.0  # a head that is replicated is back by then, and Ray ends programs without one after 60
)
_START_ATTEMPTS = 3
_STRAGGLER = 3.0
_CALLS_AT_A_TIME = 4  # a conversation, the files of its trial, the watch, and a close


class RayExecutor:
    """Runs each job in a worker process on some node; one actor per place, kept from job to job.

    Places are ordinary actors with ordinary resources, so that an autoscaler sees what is missing; a place whose
    node is lost asks for another. A job whose worker or node died, whose GPU was full, or that ran out of time on a
    node that is much slower than the others, is tried again on another node where there is one. What else a job
    raises or exceeds is its own failure, as with :class:`nas.executors.local.LocalExecutor`, which runs on the nodes.

    Args:
        workers: places, 1 to 4096; None: as many as the cluster has room for, also when nodes join later.
        address: ``local``, ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``; see :class:`Cluster`. A connection that
            the program has already is used and left open.
        cpus_per_trial, gpus_per_trial: what a place takes of a node; fractions are allowed, of GPUs below 1.
        runtime_env: Ray's description of what nodes need to import our code; see Ray's documentation.
        measure_on: custom resource of the nodes where jobs submitted with ``where`` of that name run: one at a time
            per unit of the resource. Their processors are kept free of other places when the cluster has other nodes.
        memory_limit_bytes: as in LocalExecutor; None: a place's share of its node's memory.
        retries: how often a job is tried again that a lost worker, a lost node or a full GPU has failed.
        grace_seconds, environment, setup: as in LocalExecutor.
        shared: whether the nodes see the driver's disk; None: found out. Where they do not, the files of a job's
            directory (``payload["directory"]``) are carried: there at the start, back with each message and the end.
        announce: send ``{"stage": "placed", "node": ..., "node_id": ..., "attempt": ...}`` to ``on_event`` when a
            job that has a directory starts, and write the node into its log.
        local_options: further arguments of ``ray.init`` for a local cluster.

    Raises UserMistake for arguments out of range, for an address without a cluster, and for a need that no node has.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        address: str = "local",
        cpus_per_trial: float = 1.0,
        gpus_per_trial: float = 0.0,
        runtime_env: Mapping[str, Any] | None = None,
        measure_on: str | None = None,
        memory_limit_bytes: int | None = None,
        retries: int = 2,
        grace_seconds: float = 3.0,
        environment: Mapping[str, str] | None = None,
        setup: str | None = None,
        shared: bool | None = None,
        announce: bool = False,
        local_options: Mapping[str, Any] | None = None,
    ):
        _check(workers, cpus_per_trial, gpus_per_trial, retries, grace_seconds, memory_limit_bytes)
        self.retries = retries
        self.shared = shared
        self.announce = announce
        self.closing = threading.Event()
        self._grace = grace_seconds
        self._fixed = workers is not None
        self._need = Need(cpus_per_trial, gpus_per_trial)
        self._options = {
            # '' stands for the current directory.
            "import_path": [os.path.abspath(entry) for entry in sys.path],
            "folder": os.getcwd(),
            "memory": memory_limit_bytes,
            "cpus": cpus_per_trial,
            "gpus": gpus_per_trial,
            "grace": grace_seconds,
            "environment": dict(environment or {}),
            "setup": setup,
        }
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._changed: dict[str | None, threading.Condition] = {}
        self._queues: dict[str | None, deque[RayJob]] = {}
        self._needs: dict[str | None, Need] = {}
        self._slots: list[RaySlot] = []
        self._measuring: frozenset[str] = frozenset()
        self._start_failures = 0
        self._started = False
        self._broken: str | None = None
        self._headless = False
        self._cluster = Cluster(address, runtime_env, local_options)
        try:
            if measure_on is not None:
                self._open_place(measure_on)
            self._add_queue(None, self._need)
            self._add_slots(None, workers or self._room())
        except BaseException:
            self.close(kill=True)
            raise
        self._keeper = threading.Thread(target=self._keep, name="ray keeper", daemon=True)
        self._keeper.start()

    @property
    def capacity(self) -> int:
        """Places for training that are ready now; 1 while none is."""
        with self._lock:
            return max(1, sum(slot.alive for slot in self._slots if slot.where is None))

    @property
    def workers(self) -> int:
        """Places for training that were asked for, ready or not."""
        with self._lock:
            return sum(slot.where is None for slot in self._slots)

    def submit(
        self,
        function: str,
        payload: dict[str, Any],
        *,
        on_event: OnEvent | None = None,
        time_limit: float | None = None,
        tag: str = "",
        where: str | None = None,
    ) -> Future[Outcome]:
        """Queue one job; see :meth:`nas.executors.base.Executor.submit`. A queued job can be cancelled.

        ``where``: custom resource of the node on which the job runs alone, in place of any node. Files named by the
        payload's "directory" (and below it, as "log") are brought to the node and back where the disk is not shared.
        Raises UserMistake as well when no node has the resource.
        """
        check_job(payload, time_limit)
        place = _absolute(function)
        try:
            encode("job", payload, name="payload", function=place)
        except TypeError as error:
            raise UserMistake(str(error)) from None
        job = RayJob(place, payload, tag or f"job {next(self._numbers)}", on_event, time_limit, where)
        with self._lock:
            if self.closing.is_set() or self._broken:
                raise RunStopped(self._broken or "this executor is closed; make a new one")
            if where not in self._queues:
                self._open_place(str(where))
            self._queues[where].append(job)
            self._changed[where].notify()
        return job.future

    def close(self, *, kill: bool = False) -> None:
        """Stop now; see :meth:`nas.executors.base.Executor.close`. Every future is done when this returns."""
        with self._lock:
            first = not self.closing.is_set()
            self.closing.set()
            queued = [job for jobs in self._queues.values() for job in jobs]
            for jobs in self._queues.values():
                jobs.clear()
            slots = [slot for slot in self._slots if slot is not threading.current_thread()]
            self._wake()
        for job in queued:
            job.interrupt("the executor was closed before it ran")
        if first and not self._headless:
            self._dismiss(slots, kill)
        for slot in slots:
            slot.join(_KILL_SECONDS)
            if slot.is_alive():
                logger.warning("%s has not ended in time; its job ends without it", slot.name)
                slot.abandon()
        if first and not self._headless:  # without its head, Ray waits a long time for nothing
            self._cluster.close()

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- for the slots ---------------------------------------------------------------------------------------

    def is_slow(self, slot: RaySlot, pace: float) -> bool:
        """Whether a node of this pace is much slower than the other nodes were when they began."""
        with self._lock:
            others = {
                other.node: other.pace for other in self._slots if other.alive and other.node != slot.node
            }
        return bool(others) and pace > _STRAGGLER * statistics.median(others.values())

    def make_actor(self, slot: RaySlot) -> Any:
        """A new actor for the slot, which may have to wait for its place; None when the executor closes."""
        import ray

        need = self._needs[slot.where]
        options: dict[str, Any] = {
            **need.options(),
            "max_concurrency": _CALLS_AT_A_TIME,
            "scheduling_strategy": "SPREAD",
        }
        if self._cluster.runtime_env:
            options["runtime_env"] = self._cluster.runtime_env
        with self._lock:
            if self.closing.is_set() or self._broken:
                return None
            slot.actor = ray.remote(Host).options(**options).remote(self._options)
            return slot.actor

    def ready(self, slot: RaySlot) -> None:
        """The slot can take jobs."""
        with self._lock:
            self._started = True
            self._start_failures = 0
            self._wake()

    def cannot_start(self, slot: RaySlot, why: str) -> None:
        """An attempt to start an actor has failed; when none has ever succeeded, that stops the run."""
        logger.warning("%s cannot be started: %s", slot.name, why)
        with self._lock:
            self._start_failures += 1
            if self._started or self._start_failures < _START_ATTEMPTS:
                return
            self._broken = (
                f"no worker can be started on the cluster: {why}; the nodes need this package and your code, "
                "installed or by ray_runtime_env"
            )
        self._fail_all(self._broken)

    def take(self, slot: RaySlot) -> RayJob | None:
        """The next job for a slot, waiting for one; None when the slot is lost or the executor closes."""
        with self._lock:
            while not self.closing.is_set() and slot.alive:
                job = self._pick(slot)
                if job is not None:
                    return job
                self._changed[slot.where].wait()
            return None

    def again(self, job: RayJob) -> None:
        """Put a job back, in front of the others."""
        with self._lock:
            if not self.closing.is_set():
                self._queues[job.where].appendleft(job)
                self._changed[job.where].notify_all()
                return
        job.interrupt("the executor was closed")

    def wake(self) -> None:
        """Something has changed for those who wait."""
        with self._lock:
            self._wake()

    def kill(self, actor: Any) -> None:
        """End an actor at once."""
        import ray

        if ray.is_initialized():
            try:
                ray.kill(actor)
            except Exception as error:  # it is gone already, or the cluster is
                logger.debug("an actor could not be killed: %s", error)

    def _pick(self, slot: RaySlot) -> RayJob | None:
        jobs = self._queues[slot.where]
        index = 0
        while index < len(jobs):
            job = jobs[index]
            if slot.node in job.avoid and self._elsewhere(job):
                index += 1
                continue
            del jobs[index]
            if job.begin():
                return job
        return None

    def _elsewhere(self, job: RayJob) -> bool:
        """Whether there is a place on a node where the job has not failed yet, free or not."""
        return any(
            slot.alive and slot.node not in job.avoid for slot in self._slots if slot.where == job.where
        )

    def _wake(self) -> None:
        for condition in self._changed.values():
            condition.notify_all()

    # -- places ----------------------------------------------------------------------------------------------

    def _room(self) -> int:
        room = self._cluster.room(self._need, except_nodes=self._measuring)
        if room < 1:
            need = f"--cpus-per-trial {self._need.cpus:g} --gpus-per-trial {self._need.gpus:g}"
            raise UserMistake(
                f"{need}: no node of the cluster has as much; give less, or --workers N to wait for nodes that an "
                "autoscaler adds"
            )
        return min(room, MAX_WORKERS)

    def _open_place(self, resource: str) -> None:
        """Places for jobs that have to run on nodes with ``resource``, one for each unit of it."""
        nodes = self._cluster.with_resource(resource)
        names = frozenset(str(node["NodeID"]) for node in nodes)
        units = [int(node["Resources"][resource]) for node in nodes]
        cpus = 0.0
        others = self._cluster.room(self._need, except_nodes=names | self._measuring)
        if others and None not in self._queues:
            # The processors of those nodes are taken as well, so that nothing is trained where latency counts.
            cpus = min(
                node["Resources"].get("CPU", 0.0) / count for node, count in zip(nodes, units, strict=True)
            )
            self._measuring |= names
        with self._lock:
            self._add_queue(resource, Need(float(int(cpus)) if cpus > 1 else cpus, 0.0, resource))
            self._add_slots(resource, sum(units))

    def _add_queue(self, where: str | None, need: Need) -> None:
        self._queues[where] = deque()
        self._changed[where] = threading.Condition(self._lock)
        self._needs[where] = need

    def _add_slots(self, where: str | None, count: int) -> None:
        with self._lock:
            for _ in range(count):
                slot = RaySlot(self, len(self._slots), where)
                self._slots.append(slot)
                slot.start()

    def _keep(self) -> None:
        """Have the places grow with the cluster, and say what they wait for."""
        seen = complete = time.monotonic()
        told = False
        while not self.closing.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if not self._cluster.head_answers():
                if now - seen >= _HEADLESS_SECONDS:
                    self._lose_head(now - seen)
                    return
                continue
            seen = now
            with self._lock:
                waiting = sum(not slot.alive for slot in self._slots)
                total = len(self._slots)
            complete, told = (complete, told) if waiting else (now, False)
            if not told and now - complete >= _WAITING_SECONDS:
                told = True
                logger.warning("%d of %d places wait for a node that has room for them", waiting, total)
            if not self._fixed:
                self._grow()

    def _lose_head(self, seconds: float) -> None:
        """Stop the run while it can still be said why: Ray itself would end the program without a word of ours."""
        self._headless = True
        self._broken = (
            f"the head of the Ray cluster has not answered for {seconds:.0f} s; go on with 'nas resume RUN' when it "
            "is back, or with another cluster by --ray ADDRESS"
        )
        self._fail_all(self._broken)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            orphans = [job for jobs in self._queues.values() for job in jobs]
            for jobs in self._queues.values():
                jobs.clear()
            orphans += [slot.job for slot in self._slots if slot.job is not None]
        for job in orphans:
            job.fail(RunStopped(why))

    def _grow(self) -> None:
        try:
            room = self._cluster.room(self._need, except_nodes=self._measuring)
        except Exception as error:  # the head does not answer: the slots will hear of it
            logger.debug("the cluster could not be asked: %s", error)
            return
        missing = min(room, MAX_WORKERS) - self.workers
        if missing > 0 and not self.closing.is_set():
            logger.info("%d more places: nodes have joined", missing)
            self._add_slots(None, missing)

    def _dismiss(self, slots: list[RaySlot], kill: bool) -> None:
        """Have the actors end their jobs and clean up, and end them."""
        import ray

        if not ray.is_initialized():
            return
        actors = [slot.actor for slot in slots if slot.actor is not None]
        ends = [slot.actor.close.remote(kill) for slot in slots if slot.actor is not None and slot.alive]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=_KILL_SECONDS + (0.0 if kill else self._grace))
        for actor in actors:
            self.kill(actor)


def _check(
    workers: int | None,
    cpus: float,
    gpus: float,
    retries: int,
    grace: float,
    memory: int | None,
) -> None:
    if workers is not None and not 1 <= workers <= MAX_WORKERS:
        raise UserMistake(f"workers={workers!r} must be from 1 to {MAX_WORKERS}, or None for all that fit")
    if not cpus > 0:
        raise UserMistake(f"cpus_per_trial={cpus!r} must be more than 0; a fraction is allowed")
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise UserMistake(f"gpus_per_trial={gpus!r} must be 0, a fraction below 1, or a whole number")
    for name, value in (("retries", retries), ("grace_seconds", grace)):
        if not value >= 0:
            raise UserMistake(f"{name}={value!r} must be at least 0")
    if memory is not None and memory < 1:
        raise UserMistake(f"memory_limit_bytes={memory!r} must be at least 1")
