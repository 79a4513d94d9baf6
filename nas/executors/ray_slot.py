"""One place of the Ray executor: a thread that drives one actor at a time, and asks for another when it is lost."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nas.executors.base import Failure
from nas.executors.ray_files import Mirror, Stamp, carried
from nas.executors.ray_host import ONCE, Answer
from nas.executors.slot import Job
from nas.executors.wire import first_misfit
from nas.files import WriteFailed

if TYPE_CHECKING:
    from nas.executors.base import OnEvent

__all__ = ["SILENCE_SECONDS", "HostLost", "RayJob", "RayPool", "RaySlot"]

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 90.0
"""An actor speaks every few seconds; one that has not for so long is on a node that hangs or cannot be reached."""

_START_PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
_GPU_FULL = ("cuda out of memory", "cuda error: out of memory", "cublas_status_alloc_failed")
_ABORT = b'{"abort": true}'


class HostLost(Exception):
    """The actor is gone, or as good as gone; the text says how that is known."""


class RayJob(Job):
    """A job that may go from node to node; ``avoid`` are the nodes on which it has failed."""

    def __init__(
        self,
        function: str,
        payload: dict[str, Any],
        name: str,
        on_event: OnEvent | None,
        time_limit: float | None,
        where: str | None,
    ):
        super().__init__(b"", name, None, on_event, time_limit)
        self.where = where
        self.avoid: set[str] = set()
        directory = payload.get("directory")
        self.directory = Path(directory).absolute() if isinstance(directory, str) else None
        self._order = {"function": function, "payload": payload, "time_limit": time_limit, "name": name}

    def order(self, note: str) -> bytes:
        """What the actor is told; ``note`` goes into the log of the trial."""
        return json.dumps({**self._order, "note": note}, separators=(",", ":")).encode("ascii")


class RayPool(Protocol):
    """What a slot needs to know of its executor."""

    retries: int
    shared: bool | None
    announce: bool
    closing: threading.Event

    def is_slow(self, slot: RaySlot, pace: float) -> bool:
        """Whether a node of this pace is much slower than the other nodes are."""

    def make_actor(self, slot: RaySlot) -> Any:
        """A new actor for the slot, which may have to wait for its place; None when the executor closes."""

    def ready(self, slot: RaySlot) -> None:
        """The slot can take jobs."""

    def cannot_start(self, slot: RaySlot, why: str) -> None:
        """An attempt to start an actor has failed."""

    def take(self, slot: RaySlot) -> RayJob | None:
        """The next job for a slot, waiting for one; None when the slot is lost or the executor closes."""

    def again(self, job: RayJob) -> None:
        """Put a job back, in front of the others."""

    def wake(self) -> None:
        """Something has changed for those who wait."""

    def kill(self, actor: Any) -> None:
        """End an actor at once."""


class RaySlot(threading.Thread):
    """Takes jobs from its executor and has one actor run them, one at a time, until the executor closes."""

    def __init__(self, pool: RayPool, index: int, where: str | None):
        super().__init__(name=f"ray worker {index}", daemon=True)
        self.where = where
        self.node = ""
        self.address = ""
        self.pace = 0.0
        self.actor: Any = None
        self._pool = pool
        self.job: RayJob | None = None
        self._watch: Future[None] | None = None
        self._shared: dict[Path, bool] = {}

    @property
    def alive(self) -> bool:
        """Whether it has an actor that runs."""
        return self._watch is not None and not self._watch.done()

    def run(self) -> None:
        """The thread's life; not to be called."""
        while not self._pool.closing.is_set():
            if not self._start():
                return
            self._pool.ready(self)
            while (job := self._pool.take(self)) is not None:
                self.job = job
                try:
                    self._serve(job)
                except Exception as error:  # a mistake of ours must not leave a future that nobody completes
                    logger.exception("%s: the executor failed", job.name)
                    self._forsake()
                    job.fail(error)
                self.job = None
            if not self._pool.closing.is_set():
                self._forsake()

    def abandon(self) -> None:
        """End the job of a slot whose thread is held up. Called by another thread."""
        job = self.job
        if job is not None:
            job.interrupt("the executor was closed")

    # -- the actor -------------------------------------------------------------------------------------------

    def _start(self) -> bool:
        """Get an actor, waiting for a place in the cluster as long as that takes; False when the executor closes."""
        pauses = list(_START_PAUSES)
        while not self._pool.closing.is_set():
            try:
                self.actor = self._pool.make_actor(self)
                if self.actor is None:
                    return False
                facts = self._result(self._send("facts"), None)
                watch: Future[None] = self._send("watch").future()
            except Exception as error:  # the actor is lost already, or Ray refuses to make one
                self._forsake()
                if self._pool.closing.is_set():
                    return False
                self._pool.cannot_start(self, str(error) if isinstance(error, HostLost) else _short(error))
                self._pool.closing.wait(pauses[0] if len(pauses) == 1 else pauses.pop(0))
                continue
            self.node, self.address, self.pace = facts["node_id"], facts["node"], facts["pace"]
            self._shared.clear()
            self._watch = watch
            watch.add_done_callback(lambda _: self._pool.wake())
            logger.info("%s: on node %s, process %d", self.name, self._place(), facts["pid"])
            return True
        return False

    def _forsake(self) -> None:
        self._watch = None
        if self.actor is not None:
            self._pool.kill(self.actor)
        self.actor = None

    def _place(self) -> str:
        return f"{self.address} ({self.node[:8]})"

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._result(self._send(method, *arguments))

    def _send(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self.actor, method).remote(*arguments)
        except Exception as error:  # no connection, or an object store without room for the arguments
            raise HostLost(_short(error)) from error

    def _result(self, reference: Any, patience: float | None = SILENCE_SECONDS) -> Any:
        future: Future[Any] = reference.future()
        try:
            return future.result(patience)
        except NoAnswer:
            raise HostLost(f"did not answer for {patience:g} s") from None
        except (
            Exception
        ) as error:  # whatever Ray raises for a process or node that is gone, or our actor for itself
            raise HostLost(_short(error)) from error

    # -- one job ---------------------------------------------------------------------------------------------

    def _serve(self, job: RayJob) -> None:
        job.attempts += 1
        began = time.monotonic()
        try:
            value, failure = self._converse(job)
            late = failure is not None and failure.kind == "timeout"
            straggler = late and self._pool.is_slow(self, self._call("pace"))
        except HostLost as lost:
            job.seconds += time.monotonic() - began
            logger.info("%s: its actor on node %s is lost: %s", job.name, self._place(), lost)
            self._forsake()
            self._once_more(job, Failure("killed", f"its worker on node {self.address} was lost: {lost}"))
            return
        except WriteFailed as error:
            job.settle(None, Failure("error", str(error)))
            return
        if failure is not None and failure.reason.endswith(ONCE):
            reason = f"{failure.reason.removesuffix(ONCE)} on node {self.address}"
            self._once_more(job, Failure(failure.kind, reason, failure.log_tail))
        elif failure is not None and failure.kind == "memory" and _is_gpu_full(failure.reason):
            self._once_more(job, failure)
        elif failure is not None and straggler:
            reason = f"{failure.reason} on node {self.address}, which is much slower than the others"
            self._once_more(job, Failure("timeout", reason, failure.log_tail))
        else:
            job.settle(value, failure)

    def _once_more(self, job: RayJob, failure: Failure) -> None:
        """Have the job run on another node, unless it has failed too often."""
        if self._pool.closing.is_set():
            job.interrupt("the executor was closed")
        elif job.attempts > self._pool.retries:
            tries = f"{job.attempts} attempt{'s' if job.attempts > 1 else ''}"
            job.settle(None, Failure(failure.kind, f"{failure.reason}, {tries}", failure.log_tail))
        else:
            logger.warning("%s: %s; trying again elsewhere", job.name, failure.reason)
            job.avoid.add(self.node)
            self._pool.again(job)

    def _converse(self, job: RayJob) -> tuple[dict[str, Any] | None, Failure | None]:
        broken = self._announce(job)
        if broken is not None:
            return None, broken
        mirror, files = self._mirror(job)
        note = f"[attempt {job.attempts} on node {self._place()}]" if self._pool.announce else ""
        message, small = self._opened(self._call("start", job.order(note), files))
        while message["type"] in ("quiet", "talk"):
            reply = None
            if message["type"] == "talk":
                reply, failed = self._answer(job, message["body"])
                broken = broken or failed
            next_message = self._send("step", reply)
            if mirror is not None:  # while the job goes on
                mirror.pull(message["files"], {}, self._read)
            message, small = self._opened(self._result(next_message))
        if message["type"] == "broken":
            raise HostLost(message["body"])
        if mirror is not None:
            mirror.pull(message["files"], small, self._read)
        body = message["body"]
        job.seconds += body["seconds"]
        if broken is not None:
            tail = body["failure"][2] if body["failure"] else ""
            return None, Failure(broken.kind, broken.reason, tail)
        return body["value"], Failure(*body["failure"]) if body["failure"] else None

    @staticmethod
    def _opened(answer: Answer) -> tuple[dict[str, Any], dict[str, bytes]]:
        text, small = answer
        message: dict[str, Any] = json.loads(text)
        return message, small

    def _announce(self, job: RayJob) -> Failure | None:
        logger.info("%s: attempt %d on node %s", job.name, job.attempts, self._place())
        if not self._pool.announce or job.directory is None:
            return None
        placed = {
            "stage": "placed",
            "node": self.address,
            "node_id": self.node,
            "attempt": job.attempts,
        }
        return self._answer(job, placed)[1]

    def _answer(self, job: RayJob, body: dict[str, Any]) -> tuple[bytes, Failure | None]:
        """The frame that answers ``body``, and the failure if the callback broke."""
        try:
            reply = None if job.on_event is None else job.on_event(body)
            if reply is not None and not isinstance(reply, dict):
                raise TypeError(f"must return a dict or None, got {type(reply).__name__}")
            if misfit := first_misfit(reply, "its reply"):
                raise TypeError(misfit)
            return json.dumps({"body": reply or {}}).encode("ascii"), None
        except BaseException as error:
            logger.exception("%s: on_event failed", job.name)
            text = " ".join(str(error).split())
            return _ABORT, Failure("error", f"the callback on_event raised {type(error).__name__}: {text}")

    # -- its files -------------------------------------------------------------------------------------------

    def _mirror(self, job: RayJob) -> tuple[Mirror, dict[str, tuple[Stamp, bytes]]] | tuple[None, None]:
        """What is needed to carry the job's directory to the actor and back; nothing where both see the same disk."""
        if job.directory is None or self._sees(job.directory):
            return None, None
        job.directory.mkdir(exist_ok=True)
        return Mirror(job.directory), carried(job.directory)

    def _sees(self, directory: Path) -> bool:
        if self._pool.shared is not None:
            return self._pool.shared
        parent = directory.parent
        if parent not in self._shared:
            # In the job's own directory, where the next driver sweeps what a killed one has left.
            directory.mkdir(exist_ok=True)
            token = secrets.token_hex(16)
            marker = directory / f".seen-{token}.{os.getpid()}.tmp"
            marker.write_text(token, encoding="utf-8")
            try:
                self._shared[parent] = bool(self._call("sees", str(marker), token))
            finally:
                marker.unlink(missing_ok=True)
        return self._shared[parent]

    def _read(self, name: str, stamp: Stamp, offset: int) -> bytes | None:
        part: bytes | None = self._call("read", name, stamp, offset)
        return part


def _short(error: BaseException) -> str:
    """Ray's reason in one line: its messages are paragraphs, of which the last sentences tell."""
    with contextlib.suppress(Exception):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [
            line
            for line in lines
            if not line.startswith(("class_name:", "actor_id:", "namespace:", "pid:", "ip:"))
        ]
        if "error raised in its creation task" in str(error) or lines[-1:] != told[-1:]:
            return " ".join(lines[-1].split())[:300]
        return " ".join(" ".join(told[1:3] or told[:1]).split())[:300]
    return type(error).__name__


def _is_gpu_full(reason: str) -> bool:
    return any(mark in reason.lower() for mark in _GPU_FULL)
