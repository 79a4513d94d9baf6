"""The main job on real images: search, finalists on test data, export, and the exported model is the trained one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import nas
from nas.export import export_trial
from nas.files import CorruptFile, read_record, sha256_file
from nas.tasks import make_task

pytestmark = pytest.mark.timeout(600)  # a measurement of somebody else's may hold the device for a while

SETTINGS = {
    "trials": 3,
    "epochs": 2,
    "workers": 1,
    "seed": 1,
    "pruner": "none",
    "params_budget": 500_000,
    "training": {"train_fraction": 0.5},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    nas.search("efficient_transformer", out=out, **SETTINGS)
    return out


def test_the_run_has_measured_counted_and_judged(run: Path) -> None:
    report = nas.read_run(run).report()
    assert report.trials[0].name == "softmax_baseline"
    complete = report.in_state("complete")
    assert complete
    for row in complete:
        assert row.latency is not None
        assert 0 < row.latency["low_ms"] <= row.latency["median_ms"] <= row.latency["high_ms"]
        assert row.values == {"accuracy": row.metrics["accuracy"], "latency_ms": row.latency["median_ms"]}
        assert len(row.curve) == 2
    for row in report.in_state("pruned"):
        assert row.failure is not None
        assert "params exceed the budget of 500,000" in row.failure["reason"]
    judged = read_record(run / "finalists.json")["finalists"]
    assert {entry["number"] for entry in judged} >= {row.number for row in report.front()}
    assert all(0 <= entry["test"]["accuracy"] <= 1 for entry in judged)
    assert report.task_description["splits"] == {"train": 1079, "validation": 359, "test": 359}


def test_the_exported_model_gives_the_recorded_accuracy(run: Path, tmp_path: Path) -> None:
    read = nas.read_run(run)
    trial = read.trial(0)
    assert trial.result is not None
    model = nas.load_model(export_trial(read, trial, tmp_path / "export"))
    task = make_task("image_classification")
    metrics = task.evaluate(model, "validation", torch.device("cpu"))
    assert metrics["accuracy"] == pytest.approx(trial.result.values["accuracy"], abs=1e-6)
    described = json.loads((tmp_path / "export" / "architecture.json").read_text())
    assert described["architecture"] == trial.architecture
    with pytest.raises(nas.UserMistake, match=r"not an empty directory; give a new one"):
        export_trial(read, trial, tmp_path / "export")


def test_the_exported_onnx_file_gives_the_recorded_accuracy(run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    read = nas.read_run(run)
    trial = read.trial(0)
    assert trial.result is not None
    out = export_trial(read, trial, tmp_path / "export", onnx=True)
    told = read_record(out / "architecture.json")["onnx"]
    assert told["sha256"] == sha256_file(out / "model.onnx")
    assert told["inputs"] == {"input_0": ["batch", 1, 8, 8]}
    assert max(told["largest_difference"].values()) < 1e-4
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])

    class Engine(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {"input_0": image.numpy()})[0])

    task = make_task("image_classification")
    metrics = task.evaluate(Engine(), "validation", torch.device("cpu"))
    assert metrics["accuracy"] == pytest.approx(trial.result.values["accuracy"], abs=1e-6)
    assert isinstance(nas.load_model(out), torch.nn.Module)


@pytest.mark.parametrize("name", ["architecture.json", "weights.safetensors"])
def test_a_flipped_byte_in_an_export_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    read = nas.read_run(run)
    out = export_trial(read, read.trial(0), tmp_path / "export")
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises((CorruptFile, nas.UserMistake), match=name.replace(".", r"\.")):
        nas.load_model(out)


def test_a_budget_that_nothing_can_meet_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        nas.UserMistake, match=r"--params-budget 10: the smallest architecture of the space takes"
    ):
        nas.search("efficient_transformer", out=tmp_path / "run", params_budget=10, workers=1)
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_is_a_mistake_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(nas.UserMistake, match=r"missing\.tar") as caught:
        nas.search(
            "efficient_transformer", out=tmp_path / "run", data=str(tmp_path / "missing.tar"), workers=1
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_search_on_a_gpu(tmp_path: Path) -> None:
    report = nas.search("efficient_transformer", out=tmp_path / "run", trials=3, epochs=2, device="cuda")
    assert report.target == "cuda"
    assert report.front()
