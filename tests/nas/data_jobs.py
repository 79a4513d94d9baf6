"""Jobs that load data as a task does, and tell how: how often the data are decoded, and where the arrays lie."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from nas.executors import Channel
from nas.tasks import image_data

__all__ = ["DATA_JOBS", "load"]

DATA_JOBS = "tests.nas.data_jobs:"

_decode = image_data.decode_all


def load(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Load ``data`` with the cache ``cache`` of this node, when all ``places`` are ready to do so.

    Every decoding leaves its node and process in the file ``marks``; ``deadly``: the first one is killed in its midst.
    The result tells of the mapping of the training images: its file, and KiB copied for this process alone.
    """
    node = os.environ.get("NAS_TEST_NODE", "")
    folder, cache = Path(payload["folder"]), Path(payload["folder"]) / f"cache{node}"
    marks = folder / "marks"

    def decode(source: Any, image_size: tuple[int, int] | None, place: Path) -> dict[str, Any]:
        with open(marks, "a", encoding="ascii") as file:
            file.write(f"{node or '-'} {os.getpid()}\n")
        facts = _decode(source, image_size, place)
        if payload.get("deadly") and len(marks.read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)  # so that the others come while this one is at it
        return facts

    image_data.decode_all = decode
    (folder / f"ready{os.getpid()}").touch()
    until = time.monotonic() + 60
    while len(list(folder.glob("ready*"))) < payload["places"] and time.monotonic() < until:
        time.sleep(0.01)
    found = image_data.load_images(payload["data"], data_root=None, cache_dir=cache)
    total = int(found.images["train"].sum(dtype="int64"))
    (folder / f"loaded{node}-{os.getpid()}").touch()
    return {"node": node, "pid": os.getpid(), "sum": total, **_mapping("train-images.npy")}


def _mapping(name: str) -> dict[str, Any]:
    """Inode and pages of a mapped file: KiB of it in memory, and of those that were copied for this process."""
    inode, inside, kib = None, False, {"Rss:": 0, "Anonymous:": 0}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            inside = line.endswith(name)
            inode = words[4] if inside else inode
        elif inside and words[0] in kib:
            kib[words[0]] += int(words[1])
    return {"inode": inode, "mapped_kib": kib["Rss:"], "own_kib": kib["Anonymous:"]}
