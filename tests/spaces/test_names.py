"""The registry that every kind of named thing shares."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from spaces.errors import UnknownNameError
from spaces.names import Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package ``shapes`` with two modules that register a class each."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from spaces.names import Registry\nNAMES = Registry('shape', 'shapes')\n"
    )
    for name in ("circle", "square"):
        (folder / f"{name}.py").write_text(
            f"from shapes import NAMES\n@NAMES.register({name!r})\nclass {name.title()}: pass\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "shapes"]:
        monkeypatch.delitem(sys.modules, name)
    return "shapes"


def names(package: str) -> Registry[type]:
    registry: Registry[type] = importlib.import_module(package).NAMES
    return registry


def test_a_name_imports_its_own_module_alone(package: str) -> None:
    assert names(package).get("circle").__name__ == "Circle"
    assert "shapes.square" not in sys.modules


def test_all_names_are_found_without_a_list(package: str) -> None:
    assert names(package).names() == ["circle", "square"]


def test_an_unknown_name_is_told_the_nearest(package: str) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown shape 'cirle' \(did you mean 'circle'\?\); known: circle, square"
    ):
        names(package).get("cirle")


def test_a_name_cannot_be_taken_twice(package: str) -> None:
    names(package).get("circle")
    with pytest.raises(
        ValueError, match=r"shape 'circle' is registered twice, by shapes\.circle\.Circle and "
    ):

        @names(package).register("circle")
        class Other:
            pass


def test_another_distribution_adds_names(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("triangle", "collections:OrderedDict", package)
    monkeypatch.setattr("spaces.names.entry_points", lambda group: [point] if group == package else [])
    assert names(package).names() == ["circle", "square", "triangle"]
    assert names(package).get("triangle").__name__ == "OrderedDict"
