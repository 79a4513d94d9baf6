"""Spaces by name, from modules, files and entry points."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import spaces.sequence
from spaces import (
    Int,
    SearchSpace,
    SpaceError,
    UnknownNameError,
    UserMistake,
    get_space,
    list_spaces,
    register_space,
    registry,
)
from spaces.registry import load_object

SPACE = """
from spaces import Int, SearchSpace, register_space

@register_space({name!r})
def first():
    return SearchSpace("first of {name}", {{"depth": Int(1, 3)}}, task="translation")

@register_space({name!r}, scale="small")
def second():
    return SearchSpace("second of {name}", {{"depth": Int(1, 2)}}, task="image_classification")
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test registers or imports outlives it, and no built-in space is imported for it."""
    for name in ("_factories", "_made"):
        monkeypatch.setattr(registry, name, {})
    monkeypatch.setattr(registry, "_walked", set())
    for package in ("vision", "sequence", "video"):
        monkeypatch.setattr(importlib.import_module(f"spaces.{package}"), "__path__", [])
    before = set(sys.modules)
    yield
    made_here = ("spaces.", "_nas_file_", "a_distribution", "a_module", "third_party")
    for name in set(sys.modules) - before:
        if name.startswith(made_here):
            del sys.modules[name]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules are in ``spaces.sequence`` for the time of a test."""
    folder = tmp_path / "sequence"
    folder.mkdir()
    monkeypatch.setattr(spaces.sequence, "__path__", [str(folder)])
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


# -- names and scales


def test_a_name_stands_for_its_first_scale_or_for_that_of_the_task(package: Path) -> None:
    write(package / "alpha.py", SPACE.format(name="alpha"))
    assert get_space("alpha").name == "first of alpha"
    assert get_space("alpha", "image_classification").name == "second of alpha"
    assert get_space("alpha", "segmentation").name == "first of alpha"
    assert get_space("alpha:small", "translation").name == "second of alpha"
    assert get_space("alpha:default") is get_space("alpha")


def test_asking_for_one_space_imports_no_other(package: Path) -> None:
    write(package / "alpha.py", SPACE.format(name="alpha"))
    write(package / "beta.py", "raise SystemError('beta must not be imported')")
    assert get_space("alpha:small").name == "second of alpha"
    assert "spaces.sequence.beta" not in sys.modules


def test_a_space_is_found_in_a_module_of_another_name(package: Path) -> None:
    write(package / "_private.py", "raise SystemError('private modules hold no spaces')")
    write(package / "several.py", SPACE.format(name="alpha") + SPACE.format(name="beta"))
    assert get_space("beta:small").name == "second of beta"
    assert list_spaces() == {"alpha": ["default", "small"], "beta": ["default", "small"]}


def test_unknown_names_are_answered_with_the_nearest_and_the_list(package: Path) -> None:
    write(package / "alpha.py", SPACE.format(name="alpha"))
    with pytest.raises(
        UnknownNameError, match=r"unknown search space 'alpa' \(did you mean 'alpha'\?\); known: alpha"
    ):
        get_space("alpa")
    with pytest.raises(UnknownNameError, match=r"unknown search space 'alpa' \(did you mean"):
        get_space("alpa:small")
    with pytest.raises(
        UnknownNameError, match=r"scale of search space 'alpha' 'smal' \(did you mean 'small'\?\)"
    ):
        get_space("alpha:smal")
    with pytest.raises(UserMistake, match=r"'no/such/space' is neither a known name \(alpha\)"):
        get_space("no/such/space")
    with pytest.raises(UnknownNameError, match="unknown search space ''"):
        get_space("")


def test_a_broken_module_does_not_hide_the_others(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(package / "alpha.py", SPACE.format(name="alpha"))
    write(package / "beta.py", "import no_such_library")
    with caplog.at_level(logging.WARNING):
        assert list(list_spaces()) == ["alpha"]
    assert "beta" in caplog.text
    assert "No module named 'no_such_library'" in caplog.text
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        get_space("beta")


def test_two_functions_may_not_take_one_name() -> None:
    @register_space("taken")
    def first() -> SearchSpace:
        return SearchSpace("s", {"a": Int(0, 1)})

    register_space("taken")(first)
    with pytest.raises(SpaceError, match=r"'taken:default' is registered by .*first and again by .*<lambda>"):
        register_space("taken")(lambda: first())


@pytest.mark.parametrize("name", ["", "a:b", "a.b", "a/b", "ä"])
def test_names_that_would_be_ambiguous_are_refused(name: str) -> None:
    with pytest.raises(SpaceError, match="must consist of letters"):
        register_space(name)
    with pytest.raises(SpaceError, match="register_space: scale="):
        register_space("fine", scale=name)


def test_a_factory_must_return_a_space() -> None:
    register_space("wrong")(lambda: 3)  # type: ignore[type-var]
    with pytest.raises(SpaceError, match="returned int, not a SearchSpace"):
        get_space("wrong")


# -- files and modules


def test_a_space_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
        from __future__ import annotations
        from dataclasses import dataclass
        from spaces import Int, SearchSpace

        @dataclass
        class Size:
            low: int = 1

        SPACE = SearchSpace("mine", {"depth": Int(Size().low, 3)})

        def make():
            return SPACE

        NUMBER = 3
    """
    file = write(tmp_path / "mine.py", text)
    space = get_space(f"{file}:SPACE")
    assert space.name == "mine"
    monkeypatch.chdir(tmp_path)
    assert get_space("mine.py:SPACE") is space
    assert get_space("./mine.py:make") is space
    assert "mine" not in sys.modules
    with pytest.raises(UserMistake, match=r"no attribute 'SPAC' \(did you mean 'SPACE'\?\)"):
        get_space("mine.py:SPAC")
    with pytest.raises(SpaceError, match=r"'mine.py:NUMBER' must be a SearchSpace or a function .* not int"):
        get_space("mine.py:NUMBER")
    with pytest.raises(UserMistake, match=r"there is no file 'other.py'"):
        get_space("other.py:SPACE")
    with pytest.raises(UserMistake, match=r"as in 'mine.py:SPACE'"):
        get_space("mine.py")


def test_a_changed_file_is_loaded_anew(tmp_path: Path) -> None:
    line = 'from spaces import Int, SearchSpace\nSPACE = SearchSpace("{}", {{"depth": Int(1, 3)}})\n'
    file = write(tmp_path / "mine.py", line.format("before"))
    assert get_space(f"{file}:SPACE").name == "before"
    write(file, line.format("after the change"))
    assert get_space(f"{file}:SPACE").name == "after the change"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("x = 1\ny = x +\n", r"broken\.py, line 2: SyntaxError: invalid syntax"),
        ("import json\n\njson.loads('{')\n", r"broken\.py, line 3: JSONDecodeError: Expecting property name"),
        (
            "import no_such_library\n",
            r"broken\.py, line 1: ModuleNotFoundError: No module named 'no_such_library'",
        ),
        ("raise SystemExit(3)\n", r"broken\.py, line 1: SystemExit: 3"),
        ("raise ValueError('two\\nlines')\n", r"broken\.py, line 1: ValueError: two lines$"),
    ],
)
def test_a_file_that_cannot_be_imported_is_told_with_its_line(tmp_path: Path, text: str, cause: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserMistake, match=cause):
        get_space(f"{file}:SPACE")
    file.write_text(SPACE.format(name="mended"), encoding="utf-8")
    assert get_space(f"{file}:second").name == "second of mended"


def test_a_space_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a_distribution"
    folder.mkdir()
    write(folder / "__init__.py", "")
    write(folder / "good.py", SPACE.format(name="good"))
    write(folder / "bad.py", "\n1 / 0\n")
    write(tmp_path / "a_module.py", SPACE.format(name="module"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_space("a_distribution.good:first").name == "first of good"
    assert get_space("a_module:second").name == "second of module"
    with pytest.raises(UserMistake, match=r"bad\.py, line 2: ZeroDivisionError"):
        get_space("a_distribution.bad:SPACE")
    with pytest.raises(UserMistake, match=r"'a_distribution.ugly' is neither a known name"):
        get_space("a_distribution.ugly:SPACE")
    with pytest.raises(UserMistake, match=r"good\.py has no attribute 'third'"):
        get_space("a_distribution.good:third")


def test_load_object_gives_anything_that_a_text_names(tmp_path: Path) -> None:
    file = write(tmp_path / "job.py", "def run(payload, channel):\n    return payload\n")
    assert load_object(f"{file}:run")({"a": 1}, None) == {"a": 1}
    assert load_object("textwrap:dedent") is textwrap.dedent
    for name in ("textwrap", "textwrap:", ":dedent", ""):
        with pytest.raises(
            UserMistake, match=r"must be 'package\.module:ATTRIBUTE' or 'path/to/file\.py:ATTRIBUTE'"
        ):
            load_object(name)
    with pytest.raises(UserMistake, match=r"there is no module 'no_such_module' on the Python path"):
        load_object("no_such_module:run")


# -- entry points


def install(folder: Path, entry_points: str) -> None:
    info = folder / "third_party-1.0.dist-info"
    info.mkdir()
    write(info / "METADATA", "Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    write(info / "entry_points.txt", "[nas.spaces]\n" + entry_points)


def test_spaces_of_other_distributions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(
        tmp_path / "third_party.py",
        SPACE.format(name="theirs") + "\nfactory = second\nready = first()\nnumber = 3\n",
    )
    install(
        tmp_path,
        "theirs = third_party\nmade = third_party:factory\nready = third_party:ready\n"
        "number = third_party:number\nabsent = third_party_absent\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_space("theirs:small").name == "second of theirs"
    assert get_space("made").name == "second of theirs"
    assert get_space("ready").name == "first of theirs"
    with pytest.raises(SpaceError, match=r"'number': entry point 'third_party:number' .* not int"):
        get_space("number")
    with pytest.raises(UserMistake, match=r"'absent': entry point 'third_party_absent': ModuleNotFoundError"):
        get_space("absent")
    with caplog.at_level(logging.WARNING):
        assert list(list_spaces()) == ["made", "ready", "theirs"]
    assert "'absent' is not available" in caplog.text


def test_importing_spaces_imports_no_heavy_library() -> None:
    code = (
        "import sys, spaces\n"
        "print([name for name in ('torch', 'timm', 'torchvision', 'matplotlib', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
