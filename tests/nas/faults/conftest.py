"""Drivers that start quickly, and what an undisturbed run of the toy space finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nas.faults.bench import Bench, Zygote, zygote


@pytest.fixture(scope="session")
def drivers() -> Iterator[Zygote]:
    with zygote() as made:
        yield made


@pytest.fixture(scope="session")
def expected(drivers: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Architectures and values of an uninterrupted run with seed 0, six trials and one worker."""
    bench = Bench(tmp_path_factory.mktemp("reference"))
    assert drivers.run(bench) == 0, bench.log.read_text()
    found = bench.values()
    bench.check_finished(found)
    assert len(found) == bench.trials
    return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)
