"""Recipes for clusters: what can be checked without a cloud, a Kubernetes and a Slurm."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from nas.cli.search import search
from nas.executors.ray_targets import split_ray_target

RECIPES = Path(__file__).parents[1] / "recipes" / "cluster"
IMAGE = re.compile(r"^(rayproject/ray:[\d.]+-py3\d+|nas-toolkit:latest)$")


def ray_up() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((RECIPES / "ray-up.yaml").read_text())
    return loaded


def kuberay() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RECIPES / "kuberay.yaml").read_text()))


def searches() -> list[list[str]]:
    """Every command of the recipes that begins with "nas search"."""
    texts = [path.read_text() for path in RECIPES.iterdir()]
    texts.append(str(kuberay()[1]["spec"]["entrypoint"]))
    found = [match for text in texts for match in re.findall(r"nas search (--[^'\n&]*)", text)]
    return [shlex.split(arguments) for arguments in found if "$" not in arguments]


def test_no_recipe_names_a_machine() -> None:
    for path in RECIPES.iterdir():
        text = path.read_text()
        assert not re.search(r"\b\d{1,3}(\.\d{1,3}){3}\b", text), path
        assert not re.search(r"/(work|tmp|mnt)/", text), path


def test_the_options_of_the_searches_exist() -> None:
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(search).parameters}
    assert len(searches()) >= 2
    for command in searches():
        assert {word for word in command if word.startswith("--")} <= known


def test_ray_up_is_what_ray_expects() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="Ray is not installed")
    util.validate_config(util.prepare_config(ray_up()))


def test_ray_up_has_one_target_that_trains_nothing() -> None:
    config = ray_up()
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert IMAGE.match(config["docker"]["image"])
    assert [name for name, kind in types.items() if kind["resources"]["CPU"]] == ["train"]
    assert types["target"]["min_workers"] == types["target"]["max_workers"] == 1
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in types.values())


def test_targets_of_the_searches_are_resources_of_the_recipes() -> None:
    offered = set(ray_up()["available_node_types"]["target"]["resources"])
    for command in searches():
        if "--target" in command:
            resource, rest = split_ray_target(command[command.index("--target") + 1])
            assert resource in offered
            assert rest == "cpu:1"


def test_the_kubernetes_manifest_is_whole() -> None:
    claim, job = kuberay()
    assert (claim["kind"], claim["apiVersion"]) == ("PersistentVolumeClaim", "v1")
    assert (job["kind"], job["apiVersion"]) == ("RayJob", "ray.io/v1")
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    volume = head["template"]["spec"]["volumes"][0]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    mount = head["template"]["spec"]["containers"][0]["volumeMounts"][0]
    assert mount["name"] == volume["name"]
    command = shlex.split(job["spec"]["entrypoint"])
    assert command[command.index("--out") + 1].startswith(mount["mountPath"] + "/")
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"train", "target"}
    for group in [head, *groups.values()]:
        (container,) = group["template"]["spec"]["containers"]
        assert IMAGE.match(container["image"])
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), (
            "KubeRay wants strings"
        )
    # As the shell of the pod reads it.
    (resources,) = shlex.split(groups["target"]["rayStartParams"]["resources"])
    assert yaml.safe_load(resources) == {"target": 1}
    assert groups["target"]["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-cpus"] == "0"


STUBS = {
    "scontrol": 'case $1 in show) printf "node-a\\nnode-b\\nnode-c\\n";; *) echo "scontrol $*" >> "$CALLS";; esac',
    # A step holds until it is told to end, as "ray start --block" does; it notes its call when it can be told to.
    "srun": 'trap "echo ended >> $CALLS; exit 0" TERM; echo "srun $*" >> "$CALLS"; while :; do sleep 0.05; done',
    "ray": 'echo "ray $*" >> "$CALLS"',
    # It waits for all nodes, as the program in the recipe does.
    "python": 'for _ in {1..1000}; do (( $(grep -c ^srun "$CALLS") < SLURM_JOB_NUM_NODES )) || break; sleep 0.05; '
    'done; echo "python ${*: -2}" >> "$CALLS"; [[ -z ${LATE:-} ]] || kill -USR1 $PPID',
    "nas": 'trap "echo parked >> $CALLS; exit 143" TERM; echo "nas $*" >> "$CALLS"; '
    "n=0; while (( n++ < ${NAS_TURNS:-1} )); do sleep 0.05; done; exit ${NAS_CODE:-0}",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of three nodes, with Slurm, Ray and nas replaced by scripts that note their calls."""
    for name, body in STUBS.items():
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "node-[a-c]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_CPUS_ON_NODE": "16",
    }


COMMAND = ["bash", str(RECIPES / "slurm.sh"), "--recipe", "my recipe.yaml", "--out", "runs/x"]


def test_slurm_starts_ray_on_every_node_and_then_the_search(slurm: dict[str, str]) -> None:
    done = subprocess.run(COMMAND, env=slurm, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    calls = Path(slurm["CALLS"]).read_text().splitlines()
    steps = [call for call in calls if call.startswith("srun")]
    address = "node-a:24567"
    steps.sort(key=lambda step: step.partition("--nodelist=")[2])  # they start side by side
    assert re.search(r"--nodelist=node-a ray start .*--head --port=24567 --num-cpus=0", steps[0])
    assert steps[0].endswith('--resources={"target": 1}')
    for step, node in zip(steps[1:], ("node-b", "node-c"), strict=True):
        assert re.search(rf"--nodelist={node} ray start .*--address={address} --num-cpus=16", step)
    assert f"python {address} 3" in calls
    assert (
        f"nas search --target ray:target/cpu:1 --recipe my recipe.yaml --out runs/x --ray {address}" in calls
    )
    assert calls.count("ended") == 3, "no step is left behind"
    assert not any("requeue" in call for call in calls)


def test_slurm_ends_with_the_code_of_the_search(slurm: dict[str, str]) -> None:
    done = subprocess.run(
        COMMAND, env=slurm | {"NAS_CODE": "2"}, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert Path(slurm["CALLS"]).read_text().count("ended") == 3


def test_slurm_parks_the_search_and_queues_again_when_time_is_over(slurm: dict[str, str]) -> None:
    job = subprocess.Popen(COMMAND, env=slurm | {"NAS_TURNS": "1000"}, stderr=subprocess.PIPE, text=True)
    calls = Path(slurm["CALLS"])
    deadline = time.monotonic() + 60
    while not (calls.exists() and "nas search" in calls.read_text()):
        assert time.monotonic() < deadline, "the search did not start"
        time.sleep(0.05)
    # The script knows whom to park only when it has begun to wait for the search.
    while psutil.Process(job.pid).status() != psutil.STATUS_SLEEPING:
        assert time.monotonic() < deadline, "the script does not wait"
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=60)
    assert "out of time; job 1234567 goes back into the queue" in errors
    assert "parked" in calls.read_text()
    assert "scontrol requeue 1234567" in calls.read_text()
    assert calls.read_text().count("ended") == 3


def test_slurm_queues_again_when_time_is_over_before_the_search_begins(slurm: dict[str, str]) -> None:
    late = slurm | {"LATE": "1"}
    done = subprocess.run(COMMAND, env=late, capture_output=True, text=True, timeout=60, check=False)
    assert "out of time; job 1234567 goes back into the queue" in done.stderr
    assert done.returncode == 0
    calls = Path(slurm["CALLS"]).read_text()
    assert "nas search" not in calls
    assert "scontrol requeue 1234567" in calls
    assert calls.count("ended") == 3


def test_slurm_refuses_a_single_node(slurm: dict[str, str]) -> None:
    alone = slurm | {"SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(COMMAND, env=alone, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--nodes=1 must be at least 2" in done.stderr
