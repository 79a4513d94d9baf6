"""Mistakes in ``nas measure``, ``nas profile`` and ``nas doctor``: one line and exit code 2 before anything is done."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import typer

import nas.doctor
import nas.latency.self_test
import nas.measure_sources
import nas.profile
from nas.cli import main as cli
from nas.cli._arguments import check_writable
from nas.errors import UserMistake

FUNCTION = (
    "import torch\nfrom torch import nn\n"
    "def small(): return nn.Linear(8, 8), (torch.rand(1, 8),)\n"
    "def wide(): return nn.Linear(16, 8), (torch.rand(1, 16),)\n"
)


@pytest.fixture(autouse=True)
def nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would take its time fails the test."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("this came too late")

    for module, name in (
        (nas.measure_sources, "_attempt"),
        (nas.profile, "compare"),
        (nas.latency.self_test, "self_test"),
        (nas.doctor, "examine"),
        (nas.doctor, "repair"),
    ):
        monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("functions.py").write_text(FUNCTION)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that is printed."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert ended.value.code == 2, text
    assert len(text.splitlines()) == 1, text
    return text


# -- help --------------------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    cli._load_commands()
    return sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", commands())
def test_every_help_shows_every_option(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    printed = capsys.readouterr().out
    assert not ended.value.code
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    options = [text for parameter in command.params for text in parameter.opts + parameter.secondary_opts]
    assert not [text for text in options if text.startswith("--") and text not in printed]


def test_brackets_in_the_help_are_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["measure", "--help"])
    assert "[:THREADS] [+bf16|+fp16] [+RUNTIME] [@BATCH] [/SIZE]" in capsys.readouterr().out


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"print('hello')\n", r"is a damaged scale file, or another kind of file"),
        (b'{"0123456789abcdef-wall": 2.', r"is a damaged scale file, or another kind of file"),
        (b"", r"is a damaged scale file, or another kind of file"),
        (b"\x89PNG\r\n", r"cannot be read \(is not text\)"),
        (b'{"target": "cpu:1", "results": {}}', r"is not a file of an earlier --scale"),
        (b'{"0123456789abcdef-wall": -1.0}', r"is not a file of an earlier --scale"),
        (b"[]", r"is not a file of an earlier --scale"),
    ],
)
def test_only_a_scale_file_is_used_as_one(
    here: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (here / "mine").write_bytes(content)
    text = refused(capsys, "measure", "functions.py:small", "--scale", "mine")
    assert re.search(rf"--scale mine: {message}; it is left as it is: give .* another file, or delete", text)
    assert (here / "mine").read_bytes() == content
    with pytest.raises(UserMistake, match="--scale"):
        nas.measure_sources.measure_sources(["functions.py:small"], "cpu:1", scale=here / "mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "same", "--plot", "./same"], r"--json and --plot: both name same; give each"),
        (["--json", "same", "--scale", "same"], r"--json and --scale: both name same"),
        (["--plot", "x.docx"], r"--plot x\.docx: the suffix says what is drawn; give one of \.png, \.pdf"),
        (["--plot", "x"], r"--plot x: the suffix says"),
        (["--json", "/dev/null"], r"--json /dev/null: is no ordinary file"),
        (["--json", "functions.py/x"], r"--json functions\.py/x: functions\.py is not a directory that can"),
    ],
)
def test_files_that_cannot_be_written(
    here: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert re.search(message, refused(capsys, "measure", "functions.py:small", *options))


@pytest.mark.parametrize("command", [["profile", "functions.py:small"], ["doctor", "--latency"]])
@pytest.mark.parametrize(
    ("path", "message"), [(".", "is a directory"), ("/nope/x", "/nope is not a directory that can be")]
)
def test_json_is_looked_at_first(
    here: Path, capsys: pytest.CaptureFixture[str], command: list[str], path: str, message: str
) -> None:
    assert f"--json {path}: {message}" in refused(capsys, *command, "--json", path)


def test_files_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("{}")
    check_writable({"--json": tmp_path / "old", "--plot": None, "--scale": tmp_path / "new"})


@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.figure"])
def test_a_picture_that_cannot_be_drawn_is_told_before_the_measurement(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)  # a part that is there already is found without the whole
    monkeypatch.setitem(sys.modules, missing, None)
    text = refused(capsys, "measure", "functions.py:small", "--plot", "a.png")
    assert "--plot: matplotlib cannot be imported (" in text
    assert "; pip install matplotlib, or leave --plot out" in text


def test_a_batch_that_does_not_fit_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "profile", "functions.py:small", "--batch", str(10**15))
    assert f"--batch {10**15}: functions.py:small called with it does not fit into memory; give a" in text


# -- doctor ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "f"], r"--json: belongs to --latency; give --latency too"),
        (["--target", "cpu:1"], r"--target: belongs to --latency"),
        (["--seconds", "20", "--json", "f"], r"--seconds, --json: belong to --latency"),
        (["--repair", "run", "--json", "f"], r"--json: belongs to --latency"),
        (["--repair", "run", "--latency"], r"--repair and --latency: are two things"),
    ],
)
def test_what_doctor_would_not_heed_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert re.search(message, refused(capsys, "doctor", *options))


# -- models and sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("abc", r"--size abc: must be such as 224"),
        ("", r"--size '': must be such as 224"),
        ("16-16", r"--size 16-16: allowed: '224', '224x192', a range"),
    ],
)
def test_sizes_are_read_before_a_process_starts(
    here: Path, capsys: pytest.CaptureFixture[str], size: str, message: str
) -> None:
    assert re.search(message, refused(capsys, "measure", "functions.py:small", "--size", size))


def test_a_comparison_needs_two(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "measure", "functions.py:small", "--compare")
    assert "--compare: functions.py:small is the only model; give another one" in text


@pytest.mark.parametrize(
    ("model", "content", "options", "message"),
    [
        ("bad.json", "{", [], r"model 'bad\.json': bad\.json is damaged: not JSON or cut short"),
        (
            "timm:test_vit",
            "",
            ["--size", "33"],
            r"--size 33: model 'timm:test_vit' does not take such images",
        ),
    ],
)
def test_profile_of_what_cannot_be_loaded(
    here: Path, capsys: pytest.CaptureFixture[str], model: str, content: str, options: list[str], message: str
) -> None:
    if content:
        (here / model).write_text(content)
    text = refused(capsys, "profile", model, *options)
    assert re.search(message, text)
    assert "CorruptFile" not in text
