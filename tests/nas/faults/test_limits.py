"""Fault 17 and the disk: few file handles, a directory that is taken away or made read-only during a run."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from tests.nas.faults.bench import HELD, Bench, Zygote, wait_until

Expected = dict[str, dict[str, float]]


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_64_file_handles_mean_fewer_workers(drivers: Zygote, tmp_path: Path, storage: str) -> None:
    bench = Bench(tmp_path, storage, workers=16)
    code, text = drivers.start(bench, handles=64, report=True).finish()
    assert code == 0, text
    assert "Traceback" not in text
    assert [trial.state for trial in bench.stored()] == ["complete"] * bench.trials
    assert "of 16 workers: only" in (bench.out / "run.log").read_text()
    assert "raise the limit with `ulimit -n 1024`" in text
    bench.check_no_leftovers()
    bench.check_no_orphans()


@pytest.mark.parametrize("limit", [32, pytest.param(20, marks=pytest.mark.slow)])
def test_too_few_file_handles_are_a_clear_refusal(tmp_path: Path, limit: int) -> None:
    bench = Bench(tmp_path)
    code, text = bench.run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
    assert code == 2, text
    assert len(text.strip().splitlines()) == 1, text
    assert f"of {limit} file handles are free" in text
    assert "`ulimit -n 1024`" in text
    assert not bench.out.exists()


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_directory_deleted_during_the_run(drivers: Zygote, tmp_path: Path, storage: str) -> None:
    bench = Bench(tmp_path, storage, evaluator=HELD)
    process = drivers.start(bench)
    wait_until(lambda: sum(bench.evaluations().values()) >= 3, 60, "the third evaluation")
    shutil.rmtree(bench.out)
    bench.go.touch()
    code, text = process.finish()
    assert code == 1, text
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: "), text
    assert "cannot be written: " in last
    assert str(bench.out) in last
    assert "Traceback" not in text
    assert not bench.out.exists(), "it was made again"
    bench.check_no_orphans()


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_storage_deleted_during_the_run(
    drivers: Zygote, expected: Expected, tmp_path: Path, storage: str
) -> None:
    bench = Bench(tmp_path, storage, evaluator=HELD)
    process = drivers.start(bench)
    wait_until(lambda: sum(bench.evaluations().values()) >= 3, 60, "the third evaluation")
    for suffix in ("", "-wal", "-shm"):
        Path(f"{bench.study_file}{suffix}").unlink(missing_ok=True)
    bench.go.touch()
    code, text = process.finish()
    assert code == 1, text
    assert "cannot be written: " in text.strip().splitlines()[-1]
    assert not bench.study_file.exists(), "it was made again"
    bench.check_no_orphans()
    before, recorded = bench.evaluations(), bench.recorded()
    assert drivers.run(bench) == 0, bench.log.read_text()
    bench.check_finished(expected)
    bench.check_evaluations(before, recorded, kills=1)


def change_modes(bench: Bench, folders: int, files: int) -> None:
    for path in [bench.folder, *bench.folder.rglob("*")]:
        if path not in (bench.marks, bench.log):
            path.chmod(folders if path.is_dir() else files)


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_directory_made_read_only_during_the_run(
    drivers: Zygote, expected: Expected, tmp_path: Path, storage: str
) -> None:
    bench = Bench(tmp_path, storage, evaluator=HELD)
    process = drivers.start(bench, obey=True)
    wait_until(lambda: sum(bench.evaluations().values()) >= 3, 60, "the third evaluation")
    change_modes(bench, 0o555, 0o444)
    bench.go.touch()
    try:
        code, text = process.finish()
    finally:
        change_modes(bench, 0o777, 0o666)
    assert code == 1, text
    assert "cannot be written: " in text.strip().splitlines()[-1], text
    assert "Traceback" not in text
    bench.check_no_orphans()
    before, recorded = bench.evaluations(), bench.recorded()
    assert drivers.run(bench) == 0, bench.log.read_text()
    bench.check_finished(expected)
    bench.check_evaluations(before, recorded, kills=1)


@pytest.mark.parametrize("place", ["read-only/run", "file/run", "file"])
def test_a_place_that_cannot_be_written(drivers: Zygote, tmp_path: Path, place: str) -> None:
    (tmp_path / "read-only").mkdir(mode=0o555)
    (tmp_path / "file").write_text("")
    bench = Bench(tmp_path)
    bench.out = tmp_path / place
    code, text = drivers.start(bench, obey=True).finish()
    assert code == 2, text
    assert len(text.strip().splitlines()) == 1, text
    assert "directory" in text
    assert str(bench.out) in text
