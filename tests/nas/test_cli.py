"""The command ``nas`` as a user types it: mistakes are one line and exit code 2, and what is printed is true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nas.cli.main import main

TOY = Path(__file__).parent / "toys" / "toy.py"
SPACE = ["--space", f"{TOY}:SPACE"]
EVALUATOR = [
    "--evaluator",
    f"{TOY}:evaluate",
    "--objective",
    "score:maximize",
    "--objective",
    "cost:minimize",
]


def nas(*arguments: str, cwd: Path, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "nas", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search"], r"--space is required"),
        (["search", "--foo"], r"No such option: --foo"),
        (["serach"], r"No such command 'serach'"),
        (["search", "--space", "nonsense"], r"unknown search space 'nonsense'.*known: "),
        (["search", "--space", "efficient_transformr"], r"did you mean 'efficient_transformer'"),
        (["search", "--space", "missing.py:SPACE"], r"there is no file 'missing\.py'"),
        (["search", "--space", f"{TOY}:SPAC"], r"has no attribute 'SPAC' \(did you mean 'SPACE'\?\)"),
        (["search", *SPACE, *EVALUATOR, "--device", "tpu"], r"--device tpu: must be cpu, cuda or cuda:N"),
        (["search", *SPACE, *EVALUATOR, "--target", "gpu"], r"target 'gpu'"),
        (["search", *SPACE, *EVALUATOR, "--target", "cpu:1024"], r"asks for 1024 threads"),
        (["search", *SPACE, *EVALUATOR, "--trials", "many"], r"Invalid value for '--trials'"),
        (["search", *SPACE, *EVALUATOR, "--trials", "0"], r"trials: .*greater than or equal to 1"),
        (["search", *SPACE, *EVALUATOR, "--time-budget", "soon"], r"'soon' is not a duration"),
        (
            ["search", *SPACE, *EVALUATOR, "--controller", "tp"],
            r"unknown controller 'tp' \(did you mean 'tpe'\?\)",
        ),
        (["search", *SPACE, "--evaluator", f"{TOY}:evaluate"], r"such as --objective score:maximize"),
        (["search", *SPACE, *EVALUATOR, "--recipe", "none.yaml"], r"--recipe none\.yaml: cannot be read"),
        (["search", *SPACE, *EVALUATOR, "--out", "/dev/null/x"], r"--out /dev/null/x: cannot be written"),
        (["search", *SPACE, *EVALUATOR, "--gpu", "--device", "cpu"], r"--gpu and --device cpu contradict"),
        (
            ["search", *SPACE, *EVALUATOR, "--storage", "postgres://u:secret@h/x"],
            r"--storage postgres://\*\*\*@h/x",
        ),
        (["resume", "nowhere"], r"nowhere: not a run directory"),
        (["report"], r"no run below runs/"),
        (["show", "0", "--run", "nowhere"], r"nowhere: not a run directory"),
        (["export", "nowhere"], r"nowhere: not a run directory"),
        (["spaces", "cnvnext"], r"unknown search space 'cnvnext'"),
        (["doctor", "--repair", "nowhere"], r"--repair nowhere: not a directory"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2, said.err
    lines = said.err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert "secret" not in said.err
    assert "Traceback" not in said.out + said.err
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_gpu_where_there_is_none(tmp_path: Path) -> None:
    result = nas("search", "--space", "efficient_transformer", "--gpu", cwd=tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*--gpu.*torch sees none.*nas doctor.*\n", result.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(600)  # six commands, each of which imports everything anew
def test_a_run_from_start_to_export(tmp_path: Path) -> None:
    result = nas("search", *SPACE, *EVALUATOR, "--trials", "8", "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "120 architectures" in result.stdout
    assert sum(bool(re.match(r"#\d+ ", line)) for line in result.stdout.splitlines()) >= 8
    assert "8 complete; everything is in run" in result.stdout
    assert result.stderr == ""
    log = (tmp_path / "run" / "run.log").read_text()
    assert len(re.findall(r"INFO #\d+", log)) == 8

    report = nas("report", "run", cwd=tmp_path)
    assert report.returncode == 0
    assert "Pareto front" in report.stdout

    shown = nas("show", "run", "0", "--json", cwd=tmp_path)
    facts = json.loads(shown.stdout)
    assert facts["state"] == "complete"
    assert facts["architecture"]["depth"] == 2

    again = nas("search", *SPACE, *EVALUATOR, "--trials", "8", "--out", "run", cwd=tmp_path)
    assert again.returncode == 0
    assert "resuming: 8 of 8 trials are finished" in again.stdout
    assert not re.search(r"^#8 ", again.stdout, re.MULTILINE)

    more = nas("resume", "run", "--trials", "10", cwd=tmp_path)
    assert more.returncode == 0
    assert "10 complete" in more.stdout

    refused = nas("export", "run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "weights were not kept" in refused.stderr
    assert not list((tmp_path / "run").glob("export*"))


def test_a_run_in_which_all_fail(tmp_path: Path) -> None:
    evaluator = ["--evaluator", f"{TOY}:always_fails", "--objective", "score:maximize"]
    result = nas("search", *SPACE, *evaluator, "--trials", "5", "--out", "run", cwd=tmp_path)
    assert result.returncode == 1
    assert "RuntimeError: the data set is on fire" in result.stdout
    assert "Found" not in result.stdout
    assert "No candidate succeeded: 5 failed" in result.stdout


def test_a_damaged_recipe_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"space: {TOY}:SPACE\ntrails: 3\n")
    result = nas("search", "--recipe", "r.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert "unknown key 'trails' (did you mean 'trials'?)" in result.stderr


def test_version_and_help(tmp_path: Path) -> None:
    assert re.fullmatch(r"nas-toolkit \d+\.\d+\.\d+\n", nas("--version", cwd=tmp_path).stdout)
    helped = nas("search", "--help", cwd=tmp_path)
    assert helped.returncode == 0
    for flag in ("--space", "--task", "--data", "--gpu", "--target", "--trials", "--time-budget", "--controller",
                 "--epochs", "--latency-budget", "--seed", "--workers", "--out", "--recipe"):  # fmt: skip
        assert flag in helped.stdout


def test_spaces_are_listed_and_shown(tmp_path: Path) -> None:
    listed = nas("spaces", cwd=tmp_path)
    assert listed.returncode == 0
    assert "efficient_transformer" in listed.stdout
    shown = nas("spaces", "efficient_transformer:cifar10", cwd=tmp_path)
    assert "428,402,028,846,790,283,203,125" in shown.stdout
    assert "searched_87.4_softmax" in shown.stdout


def test_doctor_names_what_is_missing(tmp_path: Path) -> None:
    result = nas("doctor", cwd=tmp_path)
    assert result.returncode in (0, 1)
    for subject in ("python", "torch", "optuna", "cpu", "memory", "disk"):
        assert re.search(rf"^(ok|missing|broken)\s+{subject}\b", result.stdout, re.MULTILINE)
