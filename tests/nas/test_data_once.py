"""Data are decoded once on a machine, whoever asks for them how often, and all processes look at the same pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nas.executors import LocalExecutor
from tests.conformance.executor import value_of
from tests.nas.data_jobs import DATA_JOBS

IMAGES, SIDE = 60, 32


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Noise in two classes."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = tmp_path / "data" / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def loaded(executor: Any, data: Path, folder: Path, places: int, **more: Any) -> list[dict[str, Any]]:
    payload = {"data": str(data), "folder": str(folder), "places": places, **more}
    futures = [executor.submit(f"{DATA_JOBS}load", payload) for _ in range(places)]
    return [value_of(future.result(60)) for future in futures]


def decodings(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "marks").read_text().splitlines()]


def check_shared(found: list[dict[str, Any]]) -> None:
    """All hold the same whole arrays, in pages of one file."""
    assert len({one["pid"] for one in found}) == len(found)
    assert len({one["sum"] for one in found}) == 1
    assert len({one["inode"] for one in found}) == 1
    assert found[0]["inode"] is not None
    for one in found:
        assert one["mapped_kib"] >= IMAGES * SIDE * SIDE * 3 // 1024
        assert one["own_kib"] == 0


def test_local_workers_decode_once_and_share_the_pages(data: Path, tmp_path: Path) -> None:
    with LocalExecutor(3) as executor:
        found = loaded(executor, data, tmp_path, 3)
        check_shared(found)
        assert len(decodings(tmp_path)) == 1
        assert {one["sum"] for one in loaded(executor, data, tmp_path, 3)} == {found[0]["sum"]}
    assert len(decodings(tmp_path)) == 1
    with LocalExecutor(1) as executor:  # the next run
        loaded(executor, data, tmp_path, 1)
    assert len(decodings(tmp_path)) == 1


def test_a_decoder_that_is_killed_leaves_nothing_and_another_takes_over(data: Path, tmp_path: Path) -> None:
    with LocalExecutor(2) as executor:
        found = loaded(executor, data, tmp_path, 2, deadly=True)
    check_shared(found)
    killed, finished = decodings(tmp_path)
    assert killed[1] not in {str(one["pid"]) for one in found}
    assert finished[1] in {str(one["pid"]) for one in found}
    assert sorted(path.name[:4] for path in (tmp_path / "cache").iterdir()) == [".loc", "data"]
