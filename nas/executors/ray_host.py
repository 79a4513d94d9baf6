"""What runs on a node of a Ray cluster: an actor that holds one worker process and speaks for it.

The actor is ours and small; candidates run in the worker process of a :class:`nas.executors.local.LocalExecutor`,
so that a crash, a hang or a leak costs the actor nothing, and what a worker has loaded (data sets above all) stays
loaded from one trial to the next. Messages are JSON, as on the pipes of a local worker.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from nas.errors import RunStopped, UserMistake
from nas.executors.base import Failure, Outcome
from nas.executors.local import LocalExecutor
from nas.executors.ray_files import Stamp, listing, read_part, write_all
from nas.files import is_running

__all__ = ["ONCE", "POLL_SECONDS", "Answer", "Host"]

POLL_SECONDS = 5.0
"""A node that has nothing to say says so this often: one that does not is not well."""

ONCE = ", 1 attempt"
"""How a reason ends when the worker process died, so that another attempt may fare better."""

_PACE_BYTES = 4 << 20
_SMALL_FILE = 64 << 10
_SMALL_FILES = 1 << 20
_SCRATCH = "nas-ray-"
_KEYS_WITH_PATHS = ("space", "evaluator", "data")

Answer = tuple[bytes, dict[str, bytes]]
"""A message in JSON, and the contents of small files."""


class Host:
    """The actor. Its methods are called by one slot of :class:`nas.executors.ray.RayExecutor`, each in a thread.

    ``options``: import_path and folder (the driver's), memory (bytes; None: the share of the node's memory that cpus
    and gpus are of its processors), grace, environment, setup; see LocalExecutor.
    """

    def __init__(self, options: Mapping[str, Any]):
        here = set(map(os.path.abspath, sys.path))
        sys.path += [path for path in options["import_path"] if path not in here and os.path.isdir(path)]
        self._folder = str(options["folder"])
        self._closing = threading.Event()
        self._out: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._in: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._scratch: Path | None = None
        self._trial: Path | None = None
        self._executor = LocalExecutor(
            1,
            memory_limit_bytes=options["memory"] or _memory_share(options["cpus"], options["gpus"]),
            retries=0,
            grace_seconds=options["grace"],
            environment=options["environment"],
            setup=options["setup"],
        )
        self._executor.warm()

    def facts(self) -> dict[str, Any]:
        """Which node this is, and the processes by which it can be found there."""
        import ray

        context = ray.get_runtime_context()
        return {
            "node_id": context.get_node_id(),
            "node": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "pace": self.pace(),
        }

    def pace(self) -> float:
        """Seconds that a fixed piece of work takes on this node now, the best of three."""
        data = bytes(_PACE_BYTES)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            hashlib.sha256(data).digest()
            times.append(time.perf_counter() - began)
        return min(times)

    def watch(self) -> None:
        """Returns when the host is closed; fails when it dies."""
        self._closing.wait()

    def sees(self, marker: str, token: str) -> bool:
        """Whether the driver's file ``marker`` is here too: then the directory around it is shared."""
        try:
            return Path(marker).read_text(encoding="utf-8") == token
        except (OSError, UnicodeDecodeError):
            return False

    # -- one job ---------------------------------------------------------------------------------------------

    def start(self, order: bytes, files: Mapping[str, tuple[Stamp, bytes]] | None) -> Answer:
        """Begin a job and return the first message; ``files``: its directory, when that is not shared, else None."""
        job = json.loads(order)
        payload = job["payload"]
        self._out, self._in = queue.SimpleQueue(), queue.SimpleQueue()
        self._drop_trial()
        if files is not None:
            payload = self._moved(payload, files)
        payload, function = self._localised(payload), self._local_name(job["function"])
        if job["note"] and isinstance(payload.get("log"), str):
            _note(Path(payload["log"]), job["note"])
        try:
            future = self._executor.submit(
                function,
                payload,
                on_event=self._forward,
                time_limit=job["time_limit"],
                tag=job["name"],
            )
        except (
            UserMistake,
            RunStopped,
        ) as error:  # a file that is not on this node, no worker can be started
            self._out.put(("done", Outcome(None, Failure("error", str(error)), 0.0, 1)))
        else:
            future.add_done_callback(self._ended)
        return self._next()

    def step(self, reply: bytes | None) -> Answer:
        """Answer the last message, if it wanted an answer, and return the next one."""
        if reply is not None:
            self._in.put(json.loads(reply))
        return self._next()

    def read(self, name: str, stamp: Stamp, offset: int) -> bytes | None:
        """Part of a file of the trial; None when it has changed since it was listed."""
        return None if self._trial is None else read_part(self._trial / name, stamp, offset)

    def close(self, kill: bool) -> None:
        """End the job, the worker process and the temporary files."""
        self._in.put(None)
        self._executor.close(kill=kill)
        self._drop_trial()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._closing.set()

    def _forward(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """Runs in the thread of the worker; waits for the driver with it."""
        self._out.put(("talk", body))
        reply = self._in.get()
        if reply is None or "abort" in reply:
            raise RuntimeError("the driver ended the job")
        answer: dict[str, Any] = reply["body"]
        return answer

    def _ended(self, future: Future[Outcome]) -> None:
        error = future.exception()
        if error is not None:  # this node cannot start a worker: the next job finds the same
            self._out.put(("broken", str(error)))
        else:
            self._out.put(("done", future.result()))

    def _next(self) -> Answer:
        try:
            kind, body = self._out.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return json.dumps({"type": "quiet"}).encode("ascii"), {}
        message: dict[str, Any] = {"type": kind, "body": body, "files": {}}
        if kind == "done":
            failure = body.failure
            told = None if failure is None else [failure.kind, failure.reason, failure.log_tail]
            message["body"] = {"value": body.value, "failure": told, "seconds": body.seconds}
        small: dict[str, bytes] = {}
        if self._trial is not None:
            message["files"] = listing(self._trial)
            if kind == "done":
                small = self._small_files(message["files"])
        return json.dumps(message, separators=(",", ":")).encode("ascii"), small

    # -- its files -------------------------------------------------------------------------------------------

    def _moved(self, payload: dict[str, Any], files: Mapping[str, tuple[Stamp, bytes]]) -> dict[str, Any]:
        """The payload with a directory of this node in place of the driver's, filled with ``files``."""
        there = str(payload["directory"])
        # The last part stays: a function may take the trial's number from it.
        self._trial = self._own_folder() / Path(there).name
        write_all(self._trial, files)
        moved = dict(payload)
        for key, value in payload.items():
            if isinstance(value, str) and (value == there or value.startswith(there + os.sep)):
                moved[key] = str(self._trial) + value[len(there) :]
        return moved

    def _own_folder(self) -> Path:
        if self._scratch is None:
            _sweep_scratch()
            self._scratch = Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-"))
        return self._scratch

    def _drop_trial(self) -> None:
        if self._trial is not None:
            shutil.rmtree(self._trial, ignore_errors=True)
            self._trial = None

    def _small_files(self, files: Mapping[str, Stamp]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        room = _SMALL_FILES
        for name, stamp in files.items():
            if stamp[0] > min(_SMALL_FILE, room):
                continue
            data = self.read(name, stamp, 0)
            if data is not None and len(data) == stamp[0]:
                found[name] = data
                room -= len(data)
        return found

    def _localised(self, payload: dict[str, Any]) -> dict[str, Any]:
        scale = payload.get("scale")
        if isinstance(scale, str) and (self._trial is not None or not os.path.isdir(os.path.dirname(scale))):
            # Long-run times belong to the machine they were measured on.
            payload = {**payload, "scale": str(self._own_folder() / Path(scale).name)}
        config = payload.get("config")
        if not isinstance(config, dict):
            return payload
        names = {key: config[key] for key in _KEYS_WITH_PATHS if isinstance(config.get(key), str)}
        return {**payload, "config": {**config, **{key: self._local_name(names[key]) for key in names}}}

    def _local_name(self, text: str) -> str:
        """A path of the driver's folder in this folder (a runtime environment's working_dir) if only that exists."""
        path, separator, attribute = text.rpartition(":") if ".py:" in text else (text, "", "")
        if not os.path.isabs(path) or os.path.exists(path):
            return text
        inside = os.path.relpath(path, self._folder)
        local = os.path.abspath(inside)
        if inside.startswith(os.pardir) or not os.path.exists(local):
            return text
        return f"{local}{separator}{attribute}"


def _memory_share(cpus: float, gpus: float) -> int:
    import psutil
    import ray

    own = ray.get_runtime_context().get_node_id()
    found: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["NodeID"] == own]
    resources = found[0] if found else {}
    share = max(cpus / resources.get("CPU", cpus or 1.0), gpus / resources.get("GPU", gpus or 1.0))
    return int(psutil.virtual_memory().total * 0.8 * min(1.0, share or 1.0))


def _note(log: Path, text: str) -> None:
    """One line into the trial's own log, unless that is impossible, which the job itself will say."""
    with contextlib.suppress(OSError):
        log.parent.mkdir(exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def _sweep_scratch() -> None:
    """Remove what actors that were killed have left on this node."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*-*"):
        owner = path.name.removeprefix(_SCRATCH).partition("-")[0]
        if path.is_dir() and owner.isdecimal() and not is_running(int(owner)):
            shutil.rmtree(path, ignore_errors=True)
