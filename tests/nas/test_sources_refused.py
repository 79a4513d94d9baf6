"""Files that name a model in an unusual way: read where that is possible, else the way out is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.errors import UserMistake
from nas.run_directory import RunDirectory
from nas.sources import load_source
from tests.nas.faults.test_damaged_weights import trained_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return trained_run(tmp_path_factory.mktemp("refused") / "run")


def refused(text: str | Path, size: str | None = None) -> str:
    with pytest.raises(UserMistake) as caught:
        load_source(str(text), size=size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- records of a run --------------------------------------------------------------------------------------------------


def test_the_record_of_a_trial_is_read_through_its_run(
    trained: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = trained.path / "trials" / "1" / "architecture.json"
    assert record.is_file()
    expected = load_source(f"{trained.path}#1")
    source = load_source(str(record))
    assert (source.key, source.name) == (expected.key, str(record))
    generator = torch.Generator().manual_seed(0)
    assert source.make_inputs(2, generator)[0].shape == (2, 1, 4, 4)
    monkeypatch.chdir(record.parent)
    assert load_source("architecture.json").key == expected.key


def test_a_copy_of_such_a_record_says_what_to_give(trained: RunDirectory, tmp_path: Path) -> None:
    for name in ("architecture.json", "other.json"):
        shutil.copy(trained.path / "trials" / "1" / "architecture.json", tmp_path / name)
        assert "this one is of trial 1 of a run: give RUN#NUMBER" in refused(tmp_path / name)


def test_an_export_in_a_folder_called_like_a_trial(trained: RunDirectory, tmp_path: Path) -> None:
    place = tmp_path / "trials" / "1"
    place.mkdir(parents=True)
    (place / "architecture.json").write_text('{"space": "efficient_transformer"}')
    assert "must hold an object with space" in refused(place / "architecture.json")


# -- bundles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "compressed.json"])
@pytest.mark.parametrize("onnx", [True, False])
def test_a_bundle_says_what_to_give(tmp_path: Path, text: str, *, onnx: bool) -> None:
    (tmp_path / "compressed.json").write_text("{}")
    if onnx:
        (tmp_path / "model.onnx").write_bytes(b"")
    told = refused(tmp_path / text)
    assert "is a bundle of 'nas compress'; give " in told
    assert f"(compress.load('{tmp_path}').model, inputs)" in told
    assert (f"{tmp_path / 'model.onnx'} with a --target such as cpu:1+onnxruntime, or" in told) == onnx


# -- damage and mistakes in descriptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: not JSON or cut short (Expecting property name"),
        ("", "is damaged: it is empty"),
        ("\0\0", "is damaged: it is empty"),
    ],
)
def test_a_damaged_description(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    told = refused(path)
    assert told.startswith(f"model '{path}': {path} {message}")
    assert "CorruptFile" not in told


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        (3, "signature: 'int' object"),
        ({"task": "translation", "sauce": 1}, "signature: "),
        ({"task": "x"}, "its signature is for an unknown task 'x'"),
    ],
)
def test_a_signature_of_no_kind(tmp_path: Path, signature: Any, message: str) -> None:
    path = tmp_path / "a.json"
    described = {"space": "vanillanet", "architecture": {"a": 1}, "signature": signature}
    from spaces import get_space

    described["architecture"] = next(iter(get_space("vanillanet").published.values()))
    path.write_text(json.dumps(described))
    assert message in refused(path)


def test_damaged_weights_of_an_export(trained: RunDirectory, tmp_path: Path) -> None:
    from nas.export import export_trial
    from nas.reader import read_run

    found = read_run(trained.path)
    place = export_trial(found, found.trial(1), tmp_path / "export")
    weights = place / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "weights.safetensors is damaged" in refused(place)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_a_size_that_timm_builds_and_does_not_run() -> None:
    told = refused("timm:test_vit", "33")
    assert told.startswith("--size 33: model 'timm:test_vit' does not take such images (Input height (33)")
    assert told.endswith("give another size, or leave it out for 160x160")


def test_a_length_that_a_program_was_not_made_for(tmp_path: Path) -> None:
    length = torch.export.Dim("length", min=4, max=20)
    tokens = torch.randint(0, 7, (1, 5))
    program = torch.export.export(torch.nn.Embedding(7, 4), (tokens,), dynamic_shapes=({1: length},))
    path = str(tmp_path / "a.pt2")
    torch.export.save(program, path)
    generator = torch.Generator().manual_seed(0)
    assert load_source(path, size="20").make_inputs(1, generator)[0].shape == (1, 20)
    for size, near in (("21", 20), ("3", 4)):
        with pytest.raises(
            UserMistake, match=rf"dimension 1 of size 4 to 20 .* not {size}; .*--size.* {near}"
        ):
            load_source(path, size=size).make_inputs(1, generator)
