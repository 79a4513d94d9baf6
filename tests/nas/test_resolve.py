"""From what was asked for to a configuration in which nothing is left open."""

from __future__ import annotations

from pathlib import Path

import pytest

from nas.config import SearchConfig
from nas.errors import UserMistake
from nas.resolve import changed_keys, openmp_settings, probe_architectures, resolve
from spaces import Choice, Constraint, Int, SearchSpace


def test_a_constraint_that_excludes_the_corners_does_not_stop_the_sizing() -> None:
    cap = Constraint(
        "cap", lambda a: 10 <= a["depth"] * a["width"] <= 128, "depth times width from 10 to 128"
    )
    space = SearchSpace("c", {"depth": Int(1, 6), "width": Choice([8, 16, 64])}, constraints=[cap])
    found = probe_architectures(space, seed=0)
    assert found
    for architecture in found:
        space.validate(architecture)


def test_the_corners_are_among_what_is_sized() -> None:
    space = SearchSpace("c", {"depth": Int(1, 6), "width": Choice([8, 16, 64])})
    found = probe_architectures(space, seed=0)
    assert {"depth": 1, "width": 8} in found
    assert {"depth": 6, "width": 64} in found


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.parquet").touch()
    config = resolve(
        SearchConfig.parse({"space": "x", "data": "train.parquet", "storage": "journal:study.log"})
    )
    assert config.data == str(tmp_path / "train.parquet")
    assert config.storage == f"journal:{tmp_path / 'study.log'}"
    assert resolve(SearchConfig.parse({"space": "x", "data": "CIFAR10"})).data == "CIFAR10"


@pytest.mark.parametrize("device", ["cpu:1", "cuda+bf16", "cuda@8", "tpu", "gpu"])
def test_a_device_is_not_a_target(device: str) -> None:
    with pytest.raises(UserMistake, match=r"--device .*must be cpu, cuda or cuda:N"):
        resolve(SearchConfig.parse({"space": "x", "device": device}))


def test_what_a_resumed_command_may_change() -> None:
    recorded = resolve(SearchConfig.parse({"space": "x", "trials": 5, "seed": 1}))
    assert changed_keys({"space": "x", "trials": 9, "workers": 1}, recorded) == []
    assert changed_keys({"seed": 2, "target": "cpu:1"}, recorded) == ["seed: 1 -> 2"]


def test_a_target_may_be_given_by_its_fields() -> None:
    fields = {"device": "cpu", "threads": 1, "dtype": "bf16", "batch": 8}
    config = resolve(SearchConfig.parse({"space": "x", "target": fields}))
    assert config.target == "cpu:1+bf16@8"
    with pytest.raises(UserMistake, match=r"^recipe: target: dtype='fp7'; allowed: fp32"):
        SearchConfig.parse({"space": "x", "target": {"device": "cpu", "dtype": "fp7"}}, "recipe")


def test_a_search_takes_the_inputs_of_its_task() -> None:
    with pytest.raises(
        UserMistake, match=r"--target cpu:1/224: a search measures with the task's own inputs"
    ):
        resolve(SearchConfig.parse({"space": "x", "target": "cpu:1/224"}))


@pytest.mark.parametrize(
    ("settings", "environment", "expected"),
    [
        ({"target": "cpu:1"}, {}, "PASSIVE"),
        ({"target": "ray:board/cpu:1", "ray": "auto"}, {}, "PASSIVE"),
        ({"target": "cpu:2"}, {}, None),
        ({"target": "cpu:1"}, {"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ({"target": "cpu:1"}, {"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_threads_of_workers_wait_asleep_unless_that_would_be_measured(
    settings: dict[str, str], environment: dict[str, str], expected: str | None
) -> None:
    config = SearchConfig.parse({"space": "efficient_transformer", **settings})
    found = openmp_settings(config, environment)
    assert found.get("OMP_WAIT_POLICY") == expected
    assert int(found["OMP_NUM_THREADS"]) >= 1
