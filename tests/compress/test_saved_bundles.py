"""Saved results that are odd, of another version or hostile; what was frozen; and what a killed writer leaves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress import compress, load
from compress.origins import base_of
from compress.result import CompressionResult, staged
from nas.errors import UserMistake
from nas.files import CorruptFile, read_record, write_record
from tests.compress.models import batches, small_vit

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
LEFT = ".old.999999999.tmp"


def made(
    model: nn.Module | None = None, text: str = "token_merging:r=2", **options: Any
) -> CompressionResult:
    return compress(model or small_vit(), text, measure_seconds=0, example=X[:1], **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made().save(tmp_path_factory.mktemp("bundles") / "saved")


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def reseal(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = read_record(place / "compressed.json")
    change(record)
    write_record(place / "compressed.json", record)


# -- records that no version writes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["missing", None, 3])
@pytest.mark.parametrize(
    "name", ["origin", "structure", "weights_sha256", "example_sha256", "steps", "target", "facts"]
)
def test_an_entry_that_is_missing_or_of_another_kind(place: Path, name: str, value: Any) -> None:
    reseal(place, lambda record: record.pop(name) if value == "missing" else record.update({name: value}))
    with pytest.raises(CorruptFile, match=rf"compressed\.json is damaged: its {name} is ") as found:
        load(place)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("digest", [None, "", "0" * 63, 7])
def test_weights_are_never_loaded_unchecked(place: Path, digest: Any) -> None:
    reseal(place, lambda record: record.update(weights_sha256=digest))
    with pytest.raises(CorruptFile, match=r"its weights_sha256 is .*, not 64 hex digits"):
        load(place)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([], "its steps is .*, not a list of steps"),
        ([{}], "step 0: its name is 'missing'"),
        ([3], "not a list of steps"),
        ({"0": {}}, "not a list of steps"),
    ],
)
def test_odd_steps(place: Path, steps: Any, text: str) -> None:
    reseal(place, lambda record: record.update(steps=steps))
    with pytest.raises(CorruptFile, match=text):
        load(place)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("name", None),
        ("params", -1),
        ("macs", "many"),
        ("metrics", {"accuracy": None}),
        ("latency", {"median_ms": 1.0}),
        ("ratio", 0.5),
        ("notes", "a note"),
        ("uncounted", None),
        ("colour", "blue"),
    ],
)
def test_an_odd_entry_of_a_step(place: Path, entry: str, value: Any) -> None:
    reseal(place, lambda record: record["steps"][1].update({entry: value}))
    with pytest.raises(CorruptFile, match=rf"compressed\.json is damaged: step 1: its '?{entry}"):
        load(place)


def squeeze_shape(record: dict[str, Any], shape: Any) -> None:
    record["structure"] = {"tensors": {"pos_embed": ["parameter", shape, "float32", True]}}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: squeeze_shape(record, [1, -17, 48]),
        lambda record: squeeze_shape(record, [2**62, 2**62]),
        lambda record: squeeze_shape(record, ["a"]),
        lambda record: squeeze_shape(record, 7),
        lambda record: record.update(structure={"tensors": {"pos_embed": ["parameter"]}}),
        lambda record: record.update(structure={"tensors": 3}),
        lambda record: record.update(structure={"children": {"blocks": 3}}),
        lambda record: record.update(structure={"unset": ["nothing"]}),
        lambda record: record.update(origin={"kind": "timm"}),
        lambda record: record.update(origin={}),
        lambda record: record["origin"].update(kwargs=3),
    ],
)
def test_structures_that_cannot_be(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    reseal(place, change)
    with pytest.raises((UserMistake, CorruptFile), match=r"compressed\.json") as found:
        load(place)
    assert "\n" not in str(found.value)


def test_directories_in_the_place_of_files(place: Path) -> None:
    (place / "weights.safetensors").unlink()
    (place / "weights.safetensors").mkdir()
    with pytest.raises(UserMistake, match=r"weights\.safetensors: no such file"):
        load(place)
    (place / "compressed.json").unlink()
    (place / "compressed.json").mkdir()
    with pytest.raises(UserMistake, match=r"holds no file compressed\.json"):
        load(place)


def test_an_example_of_other_names(place: Path) -> None:
    from nas.weights import save_tensors

    digest = save_tensors({"x": X[:1]}, place / "example.safetensors")
    reseal(place, lambda record: record.update(example_sha256=digest))
    with pytest.raises(CorruptFile, match=r"example\.safetensors is damaged: holds x, not 0"):
        load(place)


# -- names that lead elsewhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "hf_hub:foo/bar",
        "hf-hub:timm/resnet18.a1_in1k",
        "local-dir:/etc",
        "timm/resnet18",
        "resnet18./etc",
        "resnet18.hf:foo",
        "resnet18.a.b",
        "resnet18\n",
        "resnet0",
        "",
        None,
        ["resnet18"],
    ],
)
def test_only_names_of_timm_itself_are_built(place: Path, name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("was asked"))
    reseal(place, lambda record: record.update(origin={"kind": "timm", "name": name, "kwargs": {}}))
    with pytest.raises(
        UserMistake, match=r"compressed\.json: origin: timm name .* has no such model"
    ) as found:
        load(place)
    assert "\n" not in str(found.value)


def test_names_with_a_tag_are_built() -> None:
    size = {"img_size": 32, "depth": 1, "num_classes": 5}
    for name in ("deit_tiny_patch16_224", "deit_tiny_patch16_224.fb_in1k"):
        model = base_of({"kind": "timm", "name": name, "kwargs": size})
        assert type(model).__name__ == "VisionTransformer"


# -- what was frozen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "structured:epochs=0",
        "low_rank:epochs=0,keep=anyway,rank=4",
        "token_merging:r=2",
        "class_token_last_block",
        "emoe:experts=8,k=2,layers=[0],keep=anyway,epochs=0",
    ],
)
def test_what_was_frozen_is_frozen_after_loading(text: str, tmp_path: Path) -> None:
    model: Any = small_vit(depth=2)
    model.blocks[0].requires_grad_(False)
    model.pos_embed.requires_grad_(False)
    model.blocks[1].attn.qkv.bias.requires_grad_(False)
    result = made(model, text)
    wanted = {name: one.requires_grad for name, one in result.model.named_parameters()}
    assert not wanted["pos_embed"]
    assert not any(learns for name, learns in wanted.items() if name.startswith("blocks.0."))
    assert wanted["head.weight"]
    again = load(result.save(tmp_path / "saved"))
    assert {name: one.requires_grad for name, one in again.model.named_parameters()} == wanted
    assert load(again.save(tmp_path / "twice")).model.head.weight.requires_grad  # type: ignore[union-attr]


def test_older_files_know_nothing_of_that(place: Path) -> None:
    reseal(place, lambda record: record.pop("frozen"))
    assert all(one.requires_grad for one in load(place).model.parameters())
    reseal(place, lambda record: record.update(frozen=["blocks.9.weight"]))
    with pytest.raises(CorruptFile, match=r"names 'blocks\.9\.weight' as frozen"):
        load(place)
    reseal(place, lambda record: record.update(frozen="head.weight"))
    with pytest.raises(CorruptFile, match="its frozen is 'head"):
        load(place)


# -- models with dropped patches, killed writers -----------------------------------------------------------------------


def test_a_vit_that_drops_patches(tmp_path: Path) -> None:
    model: Any = small_vit(patch_drop_rate=0.25)
    result = made(model, "structured:epochs=1", train=batches(1), savable=True)
    again: Any = load(result.save(tmp_path / "saved")).model
    assert again.patch_drop.prob == 0.25
    with torch.no_grad():
        assert torch.equal(again(X), result.model(X))


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / LEFT).mkdir()
    (tmp_path / LEFT / "weights.safetensors").write_bytes(b"x")
    result = made()
    result.save(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.slow
def test_a_bundle_sweeps_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.bundle._SECONDS", 0.5)
    (tmp_path / LEFT).mkdir()
    made().export(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_writers_of_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    with staged(tmp_path / "a") as first, staged(tmp_path / "b"):
        (first / "x").write_text("x")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/x", "b"]


def test_what_cannot_be_swept_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory: Path) -> int:
        raise PermissionError(directory)

    monkeypatch.setattr("compress.result.sweep_temporary", refuse)
    with staged(tmp_path / "a"):
        pass
    assert (tmp_path / "a").is_dir()


def test_a_writer_that_runs_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = tmp_path / f".theirs.{other.pid}.tmp"
        theirs.mkdir()
        made().save(tmp_path / "a")
        assert theirs.is_dir()
        other.communicate(b"\n")
