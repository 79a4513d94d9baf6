"""Optuna's own tools open the study of a run as it is: optuna-dashboard, the ``optuna`` command, ``load_study``."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest

from nas.run_directory import RunDirectory
from tests.nas.toys.runs import STATES, architectures, made_run, opened, toy_result

optuna_dashboard = pytest.importorskip("optuna_dashboard")


def fetch(app: Any, path: str) -> Any:
    """GET ``path`` from a WSGI application, as JSON."""
    environment: dict[str, Any] = {"PATH_INFO": path, "QUERY_STRING": "after=0", "wsgi.input": io.BytesIO()}
    setup_testing_defaults(environment)
    status: list[str] = []
    body = b"".join(app(environment, lambda text, headers, *rest: status.append(text)))
    assert status[0].startswith("200"), (status, body)
    return json.loads(body)


def optuna_storage(run: RunDirectory, storage: str) -> Any:
    if storage == "sqlite":
        return optuna.storages.RDBStorage(f"sqlite:///{run.database}")
    backend = optuna.storages.journal.JournalFileBackend(storage.removeprefix("journal:"))
    return optuna.storages.JournalStorage(backend)


@pytest.fixture(params=["sqlite", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "sqlite" if request.param == "sqlite" else f"journal:{tmp_path / 'journal'}"


def test_the_dashboard_shows_the_study(tmp_path: Path, storage: str) -> None:
    run = made_run(tmp_path / "run", None if storage == "sqlite" else storage)
    app = optuna_dashboard.wsgi(optuna_storage(run, storage))
    studies = fetch(app, "/api/studies")["study_summaries"]
    assert [study["study_name"] for study in studies] == ["run"]
    found = fetch(app, f"/api/studies/{studies[0]['study_id']}")
    assert found["directions"] == ["maximize", "minimize"]
    assert found["objective_names"] == ["score", "cost"]
    names = {"complete": "Complete", "failed": "Fail", "pruned": "Pruned"}
    assert [trial["state"] for trial in found["trials"]] == [names[state] for state in STATES]
    for trial, architecture in zip(found["trials"], architectures(), strict=False):
        shown = {param["name"]: param["param_external_value"] for param in trial["params"]}
        assert shown == {name: str(value) for name, value in architecture.items()}
        assert ("values" in trial) == (trial["state"] == "Complete")


def test_the_dashboard_reads_while_a_driver_writes(tmp_path: Path, storage: str) -> None:
    url = None if storage == "sqlite" else storage
    run = made_run(tmp_path / "run", url)
    study, _ = opened(run, url)
    app = optuna_dashboard.wsgi(optuna_storage(run, storage))
    identifier = fetch(app, "/api/studies")["study_summaries"][0]["study_id"]
    for architecture in architectures()[6:8]:
        trial = study.suggest(architecture)
        study.record(trial, toy_result(trial))
        # It keeps what it has read for ten seconds.
        assert len(fetch(app, f"/api/studies/{identifier}")["trials"]) >= len(STATES)
    assert len(optuna.load_study(study_name="run", storage=optuna_storage(run, storage)).trials) == 8
    run.release()
    again, lines = opened(run, url)
    run.release()
    assert lines == []
    assert len(again.trials()) == 8


def test_optuna_loads_the_study_and_knows_its_best_trials(tmp_path: Path, storage: str) -> None:
    run = made_run(tmp_path / "run", None if storage == "sqlite" else storage)
    study = optuna.load_study(study_name="run", storage=optuna_storage(run, storage))
    assert [trial.number for trial in study.trials] == list(range(len(STATES)))
    assert {trial.number for trial in study.best_trials} <= {0, 1, 3, 5}
    assert study.trials[0].params == architectures()[0]
    assert study.trials[0].values is not None


def test_the_optuna_command_lists_the_study(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    command = [sys.executable, "-c", "from optuna.cli import main; raise SystemExit(main())"]
    command += ["studies", "--storage", f"sqlite:///{run.database}", "--format", "json"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [entry["name"] for entry in json.loads(text)] == ["run"]
    assert json.loads(text)[0]["n_trials"] == len(STATES)
