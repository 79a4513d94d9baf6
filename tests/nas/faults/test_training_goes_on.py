"""What was trained when a worker or the driver is killed is not trained again, and the result is as if nothing was."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nas.config import SearchConfig
from nas.environment import usable_cpus
from nas.errors import TrialFailure
from nas.files import read_record
from nas.resolve import resolve
from nas.trial import run_trial
from nas.trial_parts import checkpoint_of
from spaces import get_space
from tests.nas.faults.bench import Bench, wait_until

NET = Path(__file__).parents[1] / "toys" / "net.py"
TASK = "tests.nas.faults.tasks:CountedDigits"
EPOCHS = 4
PATIENCE = 300.0  # latency is measured, too, which waits for a machine that is busy


class Died(BaseException):
    """Of the process, as far as the code that runs can tell."""


class Told:
    """The driver's end of a trial; it dies after some epoch."""

    def __init__(self, dies_after: int | None = None):
        self.epochs: list[int] = []
        self._dies_after = dies_after

    def event(self, message: dict[str, Any]) -> None:
        pass

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.epochs.append(message["epoch"])
        if message["epoch"] == self._dies_after:
            raise Died
        return {"stop": False}


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAS_FAULTS_EPOCHS", str(tmp_path / "epochs"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a gate of its own: others may measure meanwhile
    monkeypatch.setattr(
        "nas.trial.measure_candidate", lambda *_: {"median_ms": 1.0, "low_ms": 1.0, "high_ms": 1.0}
    )
    return tmp_path / "epochs"


def trained(marks: Path) -> list[int]:
    return [int(line.split()[1]) for line in marks.read_text().splitlines()]


def payload_in(directory: Path, **more: Any) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    # As many workers as processors leave one thread each: two on a busy machine wait for each other at every step.
    settings = {"space": f"{NET}:SPACE", "task": TASK, "epochs": EPOCHS, "workers": usable_cpus()}
    config = resolve(
        SearchConfig.parse({**settings, "target": "cpu:1", "training": {"train_fraction": 0.2}, **more})
    )
    architecture = {"depth": 2, "width": 8}
    return {
        "number": 0,
        "key": get_space(f"{NET}:SPACE").key(architecture),
        "architecture": architecture,
        "seed": 7,
        "directory": str(directory),
        "config": config.dump(),
        "objectives": [["accuracy", "maximize"]],
        "scale": str(directory / "scale"),
    }


def test_an_interrupted_trial_goes_on_from_its_last_epoch(tmp_path: Path, marks: Path) -> None:
    whole = run_trial(payload_in(tmp_path / "whole"), Told())
    marks.unlink()
    payload = payload_in(tmp_path / "trial")
    with pytest.raises(Died):
        run_trial(payload, Told(dies_after=2))
    assert trained(marks) == [0, 1]
    checkpoint = checkpoint_of(tmp_path / "trial", payload["key"])
    assert {path.name for path in checkpoint.glob("*.json")} == {"epoch-0001.json", "epoch-0002.json"}

    told = Told()
    found = run_trial(payload, told)
    assert trained(marks) == [0, 1, 2, 3]
    assert told.epochs == [1, 2, 3, 4]  # the driver that died may have been another one: all are told again
    for name in ("values", "metrics", "weights_sha256"):
        assert found[name] == whole[name]

    def timeless(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in point.items() if name != "seconds"} for point in curve]

    assert timeless(found["curve"]) == timeless(whole["curve"])
    assert not (tmp_path / "trial" / "checkpoint").exists()
    assert not (tmp_path / "whole" / "checkpoint").exists()


def test_what_another_architecture_has_left_is_not_taken_up(tmp_path: Path, marks: Path) -> None:
    """A number, and so a directory, that a damaged study gives away again."""
    payload = payload_in(tmp_path / "trial")
    with pytest.raises(Died):
        run_trial(payload, Told(dies_after=3))
    architecture = {"depth": 1, "width": 4}
    key = get_space(f"{NET}:SPACE").key(architecture)
    found = run_trial({**payload, "architecture": architecture, "key": key}, Told())
    assert found["state"] == "complete"
    assert trained(marks) == [0, 1, 2, 0, 1, 2, 3]
    assert not (tmp_path / "trial" / "checkpoint").exists()


def test_a_failed_training_can_be_read_off_its_last_epochs_until_the_driver_knows(
    tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nas.tasks.image_classification import ImageClassification

    loss = ImageClassification.loss
    monkeypatch.setattr(
        ImageClassification,
        "loss",
        lambda *given: loss(*given) * (float("nan") if len(trained(marks)) == 2 else 1.0),
    )
    marks.touch()
    payload = payload_in(tmp_path / "trial")
    with pytest.raises(TrialFailure, match="loss became nan at epoch 3"):
        run_trial(payload, Told())
    assert checkpoint_of(tmp_path / "trial", payload["key"]).exists()


# -- the whole program -------------------------------------------------------------------------------------------------


class TrainingBench(Bench):
    """A run that trains a tiny net on the digits."""

    def arguments(self) -> list[str]:
        return [
            "search", "--space", f"{NET}:SPACE", "--task", TASK, "--objective", "accuracy:maximize",
            "--trials", str(self.trials), "--workers", str(self.workers), "--epochs", str(EPOCHS),
            "--pruner", "none", "--controller", "random", "--out", str(self.out), *self.extra,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        # A gate of its own: nothing here depends on how long something takes, and others may measure on this machine.
        gate = self.folder.with_name(f"{self.folder.name}-temporary")
        gate.mkdir(exist_ok=True)
        return {**super().environment(), "NAS_FAULTS_EPOCHS": str(self.marks), "TMPDIR": str(gate)}

    def epochs(self) -> dict[str, list[int]]:
        """Seed of the trial -> epochs in the order in which they were trained."""
        found: dict[str, list[int]] = {}
        for line in self.marks.read_text().splitlines() if self.marks.exists() else ():
            seed, epoch, _ = line.split()
            found.setdefault(seed, []).append(int(epoch))
        return found

    def saved(self, trial: int, epoch: int) -> list[Path]:
        return list(self.out.glob(f"trials/{trial}/checkpoint/*/epoch-{epoch:04d}.json"))

    def results(self) -> list[Any]:
        records = [
            read_record(path)
            for path in sorted(self.out.glob("trials/*/result.json"), key=lambda path: int(path.parent.name))
        ]
        return [
            [record[name] for name in ("key", "state", "values", "metrics", "weights_sha256")]
            for record in records
        ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    bench = TrainingBench(tmp_path_factory.mktemp("undisturbed"), trials=2)
    code, text = bench.run(seconds=PATIENCE)
    assert code == 0, text
    assert list(bench.epochs().values()) == [list(range(EPOCHS))] * 2
    return bench.results()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_no_epoch_is_trained_twice(undisturbed: list[Any], tmp_path: Path, victim: str) -> None:
    bench = TrainingBench(tmp_path, trials=2, extra_environment={"NAS_FAULTS_HOLD": str(EPOCHS + 2)})
    process = bench.start()
    wait_until(
        lambda: bench.saved(1, 2) or process.poll() is not None, PATIENCE, "two epochs of the second trial"
    )
    if victim == "driver":
        process.kill()
        process.communicate()
        bench.check_no_orphans()
        assert len(bench.saved(1, 2)) == 1
        bench.go.touch()
        code, text = bench.run(["resume", str(bench.out)], PATIENCE)
    else:
        os.kill(int(bench.marks.read_text().split()[-1]), signal.SIGKILL)
        bench.go.touch()
        text, _ = process.communicate()
        code = process.returncode
    assert code == 0, text
    assert list(bench.epochs().values()) == [list(range(EPOCHS))] * 2
    assert bench.results() == undisturbed
    assert not list(bench.out.glob("trials/*/checkpoint"))
    bench.check_no_leftovers()
    bench.check_no_orphans()


@pytest.mark.slow
def test_a_candidate_that_is_given_up_leaves_no_checkpoint(tmp_path: Path) -> None:
    bench = TrainingBench(tmp_path, trials=1, extra_environment={"NAS_FAULTS_DEADLY": "2"})
    bench.run(seconds=PATIENCE)
    [trial] = bench.stored()
    assert trial.state == "failed"
    assert trial.result is not None
    assert trial.result.failure is not None
    assert "3 attempts" in trial.result.failure["reason"]
    assert list(bench.epochs().values()) == [[0, 1]]
    assert not list(bench.out.glob("trials/*/checkpoint"))
    # As after a driver that died between the result and the removal.
    (bench.out / "trials" / "0" / "checkpoint" / "left").mkdir(parents=True)
    bench.run(["resume", str(bench.out)], PATIENCE)
    assert not list(bench.out.glob("trials/*/checkpoint"))
