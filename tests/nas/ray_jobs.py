"""Functions that the tests of the Ray executor run as jobs on nodes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.executors import Channel
from nas.executors.ray_host import Host

__all__ = [
    "RAY_JOBS",
    "EvenHost",
    "NoHost",
    "SlowHost",
    "load_once",
    "name_actor",
    "name_node",
    "overlap",
    "train",
    "write_files",
]

RAY_JOBS = "tests.nas.ray_jobs:"

_loaded: list[str] = []


def overlap(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """How many of these jobs run at the same time, itself included."""
    folder = Path(payload["folder"])
    mine = folder / str(os.getpid())
    mine.touch()
    most = 0
    for _ in range(20):
        most = max(most, len(list(folder.iterdir())))
        time.sleep(0.01)
    mine.unlink()
    return {"at_a_time": most}


def load_once(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Leaves a file for each time that its data are loaded."""
    if not _loaded:
        _loaded.append("data")
        (Path(payload["folder"]) / str(os.getpid())).touch()
    return {}


def write_files(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """A large file, a small one, one in a folder of its own, and one that is not finished."""
    print("writing")
    directory = Path(payload["directory"])
    with open(directory / "weights.safetensors", "wb") as file:
        for _ in range(payload["megabytes"]):
            file.write(os.urandom(1 << 20))
    (directory / "sub").mkdir()
    (directory / "sub" / "note").write_text("n")
    (directory / ".left.1-1.tmp").touch()
    (directory / "result.json").write_text("{}")
    return {"directory": str(directory)}


def train(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Epochs with a checkpoint after each, of which the last is kept, as in a training."""
    folder = Path(payload["directory"]) / "checkpoint"
    folder.mkdir(exist_ok=True)
    saved = folder / "epoch.json"
    done = json.loads(saved.read_text())["epoch"] if saved.exists() else 0
    for epoch in range(done + 1, payload["epochs"] + 1):
        time.sleep(0.1)
        saved.write_text(json.dumps({"epoch": epoch}))
        channel.ask({"stage": "report", "epoch": epoch, "pid": os.getpid()})
    return {"epochs": payload["epochs"]}


def name_actor(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Tells the process of the actor, which is the parent of this one."""
    channel.ask({"actor": os.getppid()})
    return {}


def name_node(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """The name that a test gave to the node, after a while; after a hundred times that on the node ``slow``."""
    node = os.environ.get("NAS_TEST_NODE")
    time.sleep(payload.get("seconds", 0.0) * (100 if node == payload.get("slow") else 1))
    return {"node": node}


class NoHost(Host):
    """An actor on a node where our code is not installed."""

    def __init__(self, options: Mapping[str, Any]):
        raise ModuleNotFoundError("No module named 'mine'")


class EvenHost(Host):
    """An actor that is as fast as all others, whatever else its machine does."""

    def pace(self) -> float:
        return 0.01


class SlowHost(Host):
    """An actor that is slow on the node that a test has called 0."""

    def pace(self) -> float:
        return 5.0 if os.environ.get("NAS_TEST_NODE") == "0" else 0.01
