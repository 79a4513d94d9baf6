"""What the Ray executor does without a Ray: targets, needs, messages, settings, the carrying of files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from nas.config import SearchConfig
from nas.errors import UserMistake
from nas.executors import RayExecutor
from nas.executors.ray_cluster import Cluster, Need, _mistake
from nas.executors.ray_files import CHUNK, Mirror, carried, listing, read_part, write_all
from nas.executors.ray_slot import RayJob, _is_gpu_full
from nas.executors.ray_targets import split_ray_target
from nas.resolve import changed_keys, resolve


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("cpu:1", (None, "cpu:1")),
        (" cuda:0+bf16@8/224 ", (None, "cuda:0+bf16@8/224")),
        ("ray:jetson/cpu", ("jetson", "cpu")),
        ("ray:my-phone_2.b/cpu:4+onnxruntime@8/224x192", ("my-phone_2.b", "cpu:4+onnxruntime@8/224x192")),
        ("rays", (None, "rays")),
    ],
)
def test_the_resource_of_a_target(text: str, parts: tuple[str | None, str]) -> None:
    assert split_ray_target(text) == parts


@pytest.mark.parametrize(
    "text", ["ray:", "ray:jetson", "ray:/cpu", "ray:jetson/", "ray:a b/cpu", "ray:2x/cpu"]
)
def test_a_target_without_resource_or_rest_is_refused(text: str) -> None:
    with pytest.raises(UserMistake, match=r"must be ray:RESOURCE/TARGET"):
        split_ray_target(text)


def test_a_processor_is_no_custom_resource() -> None:
    with pytest.raises(
        UserMistake, match=r"GPU is not a custom resource; name one that a node was started with"
    ):
        split_ray_target("ray:GPU/cuda")


@pytest.mark.parametrize(
    ("need", "resources", "times"),
    [
        (Need(1), {"CPU": 4.0}, 4),
        (Need(3), {"CPU": 8.0}, 2),
        (Need(0.1), {"CPU": 0.3}, 3),  # 0.3 / 0.1 is 2.9999999999999996
        (Need(1, 0.25), {"CPU": 16.0, "GPU": 2.0}, 8),
        (Need(1, 1), {"CPU": 16.0}, 0),
        (Need(2, 0, "jetson"), {"CPU": 16.0, "jetson": 1.0}, 1),
        (Need(0, 0, "jetson"), {"jetson": 3.0}, 3),
        (Need(0), {"CPU": 4.0}, 0),
    ],
)
def test_how_often_a_need_fits(need: Need, resources: dict[str, float], times: int) -> None:
    assert need.times_in(resources) == times


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, r"workers=0 must be from 1 to 4096"),
        ({"cpus_per_trial": 0}, r"cpus_per_trial=0 must be more than 0"),
        ({"gpus_per_trial": -1}, r"gpus_per_trial=-1 must be 0, a fraction below 1, or a whole number"),
        ({"gpus_per_trial": 1.5}, r"gpus_per_trial=1\.5 must be"),
        ({"retries": -1}, r"retries=-1 must be at least 0"),
        ({"grace_seconds": -1}, r"grace_seconds=-1 must be at least 0"),
        ({"memory_limit_bytes": 0}, r"memory_limit_bytes=0 must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused_before_ray_is_asked(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserMistake, match=message):
        RayExecutor(**options)


def test_without_ray_the_way_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserMistake, match=r"--ray auto: Ray is not installed; pip install 'nas-toolkit\[ray\]'"
    ):
        Cluster("auto")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            ConnectionError("Could not find any running Ray instance. Please specify the one to connect to."),
            "--ray auto: no Ray runs on this machine; start one with 'ray start --head', or give --ray local",
        ),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9\n    Python: 3.10"),
            "--ray auto: Version mismatch: The cluster was started with: Ray: 2.9 Python: 3.10; allowed: local, auto, "
            "HOST:PORT or ray://HOST:PORT",
        ),
    ],
)
def test_what_ray_says_becomes_one_line(raised: Exception, told: str) -> None:
    assert str(_mistake("auto", raised)) == told


@pytest.mark.parametrize(
    "text", ["CUDA out of memory. Tried", "CUDA error: out of memory", "x CUBLAS_STATUS_ALLOC_FAILED"]
)
def test_a_full_gpu_is_told_from_a_full_machine(text: str) -> None:
    assert _is_gpu_full(f"OutOfMemoryError: {text}")
    assert not _is_gpu_full("used 300 MB of memory, more than the limit of 200 MB")


def test_the_order_of_a_job_survives_as_json() -> None:
    payload = {"text": "\ud800 ä", "loss": float("inf"), "directory": "runs/a"}
    job = RayJob("m:f", payload, "trial 3", None, 5.0, None)
    order = json.loads(job.order("[attempt 1]"))
    assert (order["function"], order["payload"], order["time_limit"], order["note"]) == (
        "m:f",
        payload,
        5.0,
        "[attempt 1]",
    )
    assert job.directory == Path.cwd() / "runs/a"


class TestResolve:
    """What the cluster changes of a configuration before it is reached."""

    def resolve(self, **given: Any) -> SearchConfig:
        return resolve(SearchConfig.parse({"space": "toy", "ray": "auto", **given}))

    def test_the_workers_stay_open_until_the_room_is_known(self) -> None:
        assert self.resolve().workers is None
        assert self.resolve(workers=3).workers == 3
        assert self.resolve(ray=None).workers is not None

    def test_the_gpus_of_the_nodes_are_not_looked_for_here(self) -> None:
        config = self.resolve(device="cuda")
        assert (config.gpus_per_trial, config.target) == (1.0, "cuda")
        assert self.resolve(device="cuda", gpus_per_trial=0.25).gpus_per_trial == 0.25

    def test_a_target_keeps_its_resource(self) -> None:
        assert self.resolve(target="ray:jetson/cpu:1+bf16").target == "ray:jetson/cpu:1+bf16"
        with pytest.raises(
            UserMistake, match=r"--target ray:jetson/cpu: needs a cluster; give --ray ADDRESS as well"
        ):
            self.resolve(ray=None, target="ray:jetson/cpu")

    def test_a_run_may_go_on_with_another_cluster(self) -> None:
        recorded = self.resolve(target="ray:jetson/cpu")
        assert changed_keys({"ray": "10.0.0.1:6379", "target": "ray:jetson/cpu"}, recorded) == []
        assert changed_keys({"target": "ray:phone/cpu"}, recorded) == [
            "target: ray:jetson/cpu -> ray:phone/cpu"
        ]

    def test_the_working_directory_is_written_down_absolute(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert self.resolve(ray_runtime_env={"working_dir": "."}).ray_runtime_env == {
            "working_dir": str(tmp_path)
        }

    @pytest.mark.parametrize("values", [{"cpus_per_trial": 0}, {"gpus_per_trial": -1}, {"ray": ""}])
    def test_values_out_of_range(self, values: dict[str, Any]) -> None:
        with pytest.raises(UserMistake, match=next(iter(values))):
            self.resolve(**values)


class TestMirror:
    """Both sides of the carrying of files, in one process."""

    @pytest.fixture
    def here(self, tmp_path: Path) -> Path:
        (tmp_path / "here").mkdir()
        return tmp_path / "here"

    @pytest.fixture
    def there(self, tmp_path: Path) -> Path:
        (tmp_path / "there" / "checkpoint").mkdir(parents=True)
        return tmp_path / "there"

    def pull(self, mirror: Mirror, there: Path, small: dict[str, bytes] | None = None) -> list[str]:
        asked: list[str] = []

        def read(name: str, stamp: tuple[int, int], offset: int) -> bytes | None:
            asked.append(name)
            return read_part(there / name, stamp, offset)

        mirror.pull(listing(there), small or {}, read)
        return asked

    def test_files_of_any_size_arrive_whole(self, here: Path, there: Path) -> None:
        data = os.urandom(CHUNK + 17)
        (there / "weights.safetensors").write_bytes(data)
        (there / "checkpoint" / "epoch-0001.json").write_bytes(b"{}")
        (there / "empty").touch()
        assert self.pull(Mirror(here), there).count("weights.safetensors") == 2
        assert (here / "weights.safetensors").read_bytes() == data
        assert set(listing(here)) == {"weights.safetensors", "checkpoint/epoch-0001.json", "empty"}

    def test_records_come_after_what_they_speak_of_and_the_result_last(self, here: Path, there: Path) -> None:
        for name in ("result.json", "a.json", "z.safetensors", "checkpoint/epoch-0001.json"):
            (there / name).write_text("x")
        assert self.pull(Mirror(here), there) == [
            "z.safetensors",
            "a.json",
            "checkpoint/epoch-0001.json",
            "result.json",
        ]

    def test_what_has_come_already_is_not_asked_for_again(self, here: Path, there: Path) -> None:
        mirror = Mirror(here)
        (there / "a").write_text("1")
        assert self.pull(mirror, there, {"a": b"1"}) == []
        assert self.pull(mirror, there) == []
        (there / "a").write_text("12")
        assert self.pull(mirror, there) == ["a"]
        assert (here / "a").read_text() == "12"

    def test_files_that_were_taken_along_do_not_come_back_unchanged(self, here: Path, there: Path) -> None:
        (here / "checkpoint").mkdir()
        (here / "checkpoint" / "epoch-0003.json").write_text("3")
        write_all(there, carried(here))
        assert (there / "checkpoint" / "epoch-0003.json").read_text() == "3"
        assert self.pull(Mirror(here), there) == []

    def test_an_old_checkpoint_goes_on_both_sides_and_what_is_ours_stays(
        self, here: Path, there: Path
    ) -> None:
        (here / "ours").touch()
        mirror = Mirror(here)
        (there / "checkpoint" / "epoch-0001.json").write_text("1")
        self.pull(mirror, there)
        (there / "checkpoint" / "epoch-0001.json").unlink()
        self.pull(mirror, there)
        assert set(listing(here)) == {"ours"}

    def test_a_file_that_changes_while_it_is_read_is_left_out(self, here: Path, there: Path) -> None:
        (there / "a").write_bytes(b"1" * (CHUNK + 5))

        def read(name: str, stamp: tuple[int, int], offset: int) -> bytes | None:
            part = read_part(there / name, stamp, offset)
            (there / name).write_bytes(b"2" * 9)
            return part

        Mirror(here).pull(listing(there), {}, read)
        assert list(here.iterdir()) == []

    @pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
    def test_nothing_is_written_outside_the_directory(self, here: Path, name: str) -> None:
        Mirror(here).pull({name: (1, 1)}, {name: b"x"}, lambda *_: b"x")
        assert [path.name for path in here.parent.rglob("*") if path.is_file()] == []

    def test_unfinished_files_are_nobodys_business(self, there: Path) -> None:
        (there / ".a.123-1.tmp").touch()
        assert listing(there) == {}
