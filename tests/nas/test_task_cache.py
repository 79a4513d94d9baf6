"""The cache of decoded data: made once, mended when damaged, clean after failures and kills."""

from __future__ import annotations

import errno
import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nas.errors import UserMistake
from nas.tasks.cache import ArrayWriter, cached
from tests.nas._images import check, corpus, load, write_folder


def test_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = corpus({"": 3})
    data, cache = write_folder(tmp_path / "data", images), tmp_path / "cache"
    load(data, cache)
    monkeypatch.setattr("nas.tasks.image_decoding._opened", None)
    check(load(data, cache), images, {"train": ""})
    monkeypatch.undo()
    images["", "ant"][0] ^= 255
    time.sleep(0.01)
    write_folder(data, images)
    check(load(data, cache), images, {"train": ""})


@pytest.mark.parametrize("name", ["train-images.npy", "train-labels.npy", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_found_and_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: str
) -> None:
    images = corpus({"": 3})
    data, cache = write_folder(tmp_path / "data", images), tmp_path / "cache"
    load(data, cache)
    (file,) = cache.rglob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "flip":
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING, "nas.tasks.cache"):
        check(load(data, cache), images, {"train": ""})
    assert len(caplog.records) == 1
    assert "is damaged" in caplog.text
    check(load(data, cache), images, {"train": ""})
    assert len(caplog.records) == 1
    assert sorted(path.name for path in cache.iterdir())[0] == ".lock"
    assert len(list(cache.iterdir())) == 2


def test_concurrent_users_decode_once(tmp_path: Path) -> None:
    calls = []

    def make(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        time.sleep(0.05)
        np.save(folder / "x.npy", np.arange(5))
        return {"n": 5}

    found: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(int(cached(tmp_path, "x", {"k": 1}, make).arrays["x"].sum()))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [10] * 4
    assert len(calls) == 1


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def full(folder: Path) -> dict[str, Any]:
        (folder / "x.npy").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        UserMistake, match=r"cache_dir='.*' cannot be written \(No space left on device\); give another"
    ):
        cached(tmp_path, "x", {}, full)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserMistake, match=r"cache_dir='.*file' cannot be written"):
        cached(tmp_path / "file", "x", {}, full)


def test_killed_writer_is_cleaned_up(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from nas.tasks.cache import cached\n"
        "def make(folder):\n"
        "    (folder / 'x.npy').write_bytes(b'half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "cached(pathlib.Path(sys.argv[1]), 'other', {'k': 2}, make)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(list(tmp_path.glob(".*.partial"))) == 1

    def make(folder: Path) -> dict[str, Any]:
        np.save(folder / "x.npy", np.arange(3))
        return {}

    assert cached(tmp_path, "x", {}, make).arrays["x"].tolist() == [0, 1, 2]
    assert not list(tmp_path.glob(".*.partial"))


def test_array_writer(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (137, 2, 3), dtype=np.uint8)
    with ArrayWriter(tmp_path / "x.npy", (2, 3), np.uint8) as writer:
        for row in rows:
            writer.append(row)
        with pytest.raises(ValueError, match=r"row \(3, 2\) uint8 does not fit \(2, 3\) uint8"):
            writer.append(rows[0].T)
    assert np.array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), rows)
