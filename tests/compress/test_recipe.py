"""The second example of the README, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(name: str, *arguments: str, place: Path) -> subprocess.CompletedProcess[str]:
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "no cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / name), *arguments],
        cwd=place,
        env={**os.environ, **settings, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_without_a_network_it_says_how_to_go_on(tmp_path: Path) -> None:
    done = run("compress_deit.py", place=tmp_path)
    assert done.returncode == 2
    assert "deit_small_patch16_224 cannot be downloaded (" in done.stderr
    assert "give --weights FILE (recipes/train_small_deit.py makes one)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("compress_deit.py", ("--weights", "none.safetensors"), "weights none.safetensors: no such file"),
        ("train_small_deit.py", ("--data", "nonsense"), "nonsense"),
    ],
)
def test_a_mistake_is_one_line(script: str, arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run(script, *arguments, place=tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{script}: error: ")
    assert said in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_whole_way_offline(tmp_path: Path) -> None:
    done = run("train_small_deit.py", "--epochs", "1", place=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = ("--weights", "small_deit.safetensors", "--epochs", "1")
    done = run("compress_deit.py", *weights, "--budget", "macs=0.6", "--out", "fast", place=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "written: fast" in done.stdout
    assert {"compressed.json", "model.onnx", "latency.json"} <= {
        one.name for one in (tmp_path / "fast").iterdir()
    }
    assert "of original" in done.stdout
