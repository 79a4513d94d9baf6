"""Fault 12: weights that are damaged, cut short, of another model or gone, when they are to be exported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nas.doctor import repair
from nas.errors import UserMistake
from nas.export import describe_signature, export_trial, load_model
from nas.files import CorruptFile
from nas.reader import read_run
from nas.recorded import write_start
from nas.run_directory import RunDirectory
from nas.study import Study, TrialResult
from spaces.signature import ImageSignature
from tests.nas.faults.bench import Bench
from tests.nas.toys.runs import toy_config

torch = pytest.importorskip("torch")

SIGNATURE = ImageSignature(channels=1, height=4, width=4, classes=3)
NET = Path(__file__).parents[1] / "toys" / "net.py"


def trained_run(path: Path) -> RunDirectory:
    """A run of two trained candidates of different widths."""
    from nas.weights import save_weights
    from tests.nas.toys.net import SPACE

    run = RunDirectory(path)
    config = toy_config(space=f"{NET}:SPACE", evaluator="train", objectives=["accuracy:maximize"])
    run.acquire()
    facts = {
        "objective": None,
        "candidates": {},
        "task": {},
        "epochs": 1,
        "signature": describe_signature(SIGNATURE),
    }
    facts = write_start(run, config, facts)
    study = Study.create(run, SPACE, [("accuracy", "maximize")], config.dump(), facts)
    for width in (4, 8):
        trial = study.suggest({"depth": 1, "width": width})
        torch.manual_seed(width)
        model = SPACE.build(trial.architecture, SIGNATURE)
        digest = save_weights(model, run.trial(trial.number) / "weights.safetensors")
        values = {"accuracy": width / 10}
        study.record(trial, TrialResult("complete", values=values, metrics=values, weights_sha256=digest))
    run.release()
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return trained_run(tmp_path_factory.mktemp("weights") / "run")


@pytest.fixture
def run(original: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(original.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def weights(run: RunDirectory, number: int = 0) -> Path:
    return run.trial(number) / "weights.safetensors"


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGES = {
    "a flipped bit in the payload": flip(-3),
    "a flipped bit in the header": flip(20),
    "cut short": lambda data: data[:-5],
    "cut in the header": lambda data: data[:40],
    "empty": lambda data: b"",
    "a header of 1 TB": lambda data: (1 << 40).to_bytes(8, "little") + data[8:],
    "something else": lambda data: b"PK\x03\x04" + data,
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_weights_are_refused(run: RunDirectory, change: Callable[[bytes], bytes]) -> None:
    weights(run).write_bytes(change(weights(run).read_bytes()))
    found = read_run(run.path)
    out = run.path / "export"
    with pytest.raises(CorruptFile, match=r"trials/0/weights\.safetensors is damaged: its SHA-256 is not "):
        export_trial(found, found.trial(0), out)
    assert not out.exists()
    assert export_trial(found, found.trial(1), out) == out
    assert sorted(os.listdir(out)) == [
        "architecture.json",
        "weights.safetensors",
        "weights.safetensors.sha256",
    ]
    lines = repair(run.path)
    assert len(lines) == 1
    assert "trials/0/weights.safetensors is damaged and cannot be mended" in lines[0]


def test_weights_of_another_trial_are_refused(run: RunDirectory) -> None:
    for name in ("weights.safetensors", "weights.safetensors.sha256"):
        shutil.copy(run.trial(1) / name, run.trial(0) / name)
    found = read_run(run.path)
    with pytest.raises(CorruptFile, match="its SHA-256 is not"):
        export_trial(found, found.trial(0), run.path / "export")
    assert not (run.path / "export").exists()


def test_weights_that_are_gone(run: RunDirectory) -> None:
    weights(run).unlink()
    found = read_run(run.path)
    with pytest.raises(UserMistake, match="trial 0: its weights were not kept"):
        export_trial(found, found.trial(0), run.path / "export")
    assert not (run.path / "export").exists()


def test_a_directory_that_is_not_empty_is_left_alone(run: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    found = read_run(run.path)
    with pytest.raises(UserMistake, match="not an empty directory"):
        export_trial(found, found.trial(0), out)
    assert os.listdir(out) == ["thesis.txt"]


@pytest.mark.parametrize("name", ["weights.safetensors", "architecture.json"])
def test_a_damaged_export_is_not_loaded(run: RunDirectory, name: str) -> None:
    found = read_run(run.path)
    out = export_trial(found, found.trial(0), run.path / "export")
    assert not load_model(out).training
    data = (out / name).read_bytes()
    (out / name).write_bytes(flip(len(data) // 2)(data))
    with pytest.raises(CorruptFile, match=name):
        load_model(out)


def test_signature_comes_from_the_copy_when_the_facts_are_damaged(run: RunDirectory) -> None:
    run.environment.write_bytes(b"")
    found = read_run(run.path)
    export_trial(found, found.trial(0), run.path / "export")


def test_the_command_says_one_line(run: RunDirectory) -> None:
    weights(run).write_bytes(flip(-1)(weights(run).read_bytes()))
    before = sorted(path.name for path in run.path.iterdir())
    code, text = Bench(run.path.parent).nas("export", str(run.path), "0")
    assert code == 1, text
    assert len(text.strip().splitlines()) == 1, text
    assert f"{weights(run)} is damaged" in text
    assert sorted(path.name for path in run.path.iterdir()) == before
