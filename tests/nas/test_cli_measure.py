"""``nas measure``: what is asked of the library, what is printed, written and drawn, and the exit codes."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

import nas.measure_sources
from nas.cli.main import main
from nas.cli.measure import _Progress
from nas.latency.per_layer import LayerTime, LayerTimes
from nas.latency.result import LatencyResult, Session
from nas.report import latency_table as report

FUNCTION = (
    "import torch\nfrom torch import nn\n"
    "def small(): return nn.Linear(8, 8), (torch.rand(1, 8),)\n"
    "def broken(): raise RuntimeError('no way')\n"
)

PROGRESS = [
    {"visit": "a"}, {"visit": "b"}, {"wait": "device"}, {"visit": "a"}, {"visit": "reference"}, {"visit": "b"},
    {"round": 1}, {"visit": "a"}, {"failed": "c", "reason": "hangs\x1b[2J"},
]  # fmt: skip


def result(median: float, **changes: Any) -> dict[str, Any]:
    plain = {
        "target": "cpu:1", "clock": "wall", "median_ms": median, "low_ms": median * 0.99, "high_ms": median * 1.01,
        "raw_median_ms": median * 1.1, "raw_low_ms": median, "raw_high_ms": median * 1.2, "ratio": median / 2,
        "ratio_low": median / 2 * 0.99, "ratio_high": median / 2 * 1.01, "reference_ms": 2.0,
        "session_reference_ms": 2.2, "p90_ms": median * 1.3, "p99_ms": None, "samples": 120, "rounds": 40, "runs": 130,
        "warmup_runs": 10, "stopped": "precision", "half_width": 0.01, "drift": 1.02, "splits": 0,
        "first_call_ms": 9.0, "wall_ms": median, "cpu_ms": median, "wall_cpu_ratio": 1.0, "contended": False,
        "threads": 1, "priority": "realtime", "trusted": True, "reasons": [], "identity": {"device": "cpu"},
        "seconds": 3.0, "peak_memory_bytes": None, "energy_mj": None,
    }  # fmt: skip
    rest = {field.name: 0 for field in dataclasses.fields(LatencyResult)}  # what no report here shows
    return LatencyResult.from_dict({**rest, **plain, **changes}).to_dict()


def made(**changes: Any) -> Session:
    plain = {
        "target": "cpu:1",
        "results": {"a": result(3.21), "b": result(3.37, trusted=False, reasons=["load 11.2 is above 2"])},
        "failures": {"c": "killed by signal 9\nand more"},
        "pairs": [
            {"first": "a", "second": "b", "ratio": 0.9525, "low": 0.94, "high": 0.9649,
             "verdict": "faster", "margin": 0.01, "rounds": 40}
        ],
        "drift": [[0.0, 2.0], [1.0, 2.1]],
    }  # fmt: skip
    return Session.from_dict({**plain, **changes})


@pytest.fixture
def nas_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, dict[str, Any]]]:
    """Runs the command with a measurement that gives the session handed over; returns code, output and what it got."""
    monkeypatch.setenv("COLUMNS", "150")

    def run(session: Session, *arguments: str) -> tuple[int, str, dict[str, Any]]:
        asked: dict[str, Any] = {}

        def measure_sources(texts: list[str], target: str, **options: Any) -> Session:
            for event in PROGRESS:
                options["on_progress"](event)
            asked.update(options, texts=texts, target=target)
            return session

        monkeypatch.setattr(nas.measure_sources, "measure_sources", measure_sources)
        with pytest.raises(SystemExit) as ended:
            main(["measure", *arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.err + printed.out, asked

    return run


Run = Callable[..., tuple[int, str, dict[str, Any]]]


def test_what_is_asked(nas_measure: Run) -> None:
    code, _, asked = nas_measure(
        made(), "a", "b", "--target", "cpu:1@8", "--size", "64", "--precision", "0.02", "--max-seconds", "5",
        "--seed", "3", "--compare", "--memory",
    )  # fmt: skip
    assert code == 0
    assert (asked["texts"], asked["target"], asked["size"]) == (["a", "b"], "cpu:1@8", "64")
    plan = asked["plan"]
    assert (plan.precision, plan.max_seconds, plan.seed) == (0.02, 5.0, 3)
    assert (asked["compare"], asked["memory"], asked["energy"]) == (True, True, False)


def test_what_is_printed(nas_measure: Run) -> None:
    _, text, _ = nas_measure(made(), "a", "b", "c", "--compare")
    assert "3.210 ms [3.178, 3.242]" in text
    assert "not enough samples" in text
    line = (
        "target cpu:1; wall clock; realtime priority; p99: not enough samples; the machine drifted by +2.0 %"
    )
    assert line in text
    assert "a against b: ratio 0.953 [0.940, 0.965] faster (40 rounds)" in text
    # What must not be overlooked comes last.
    assert text.splitlines()[-2:] == [
        "untrusted: b: load 11.2 is above 2",
        "failed: c: killed by signal 9 and more",
    ]
    assert "memory" not in text


def test_without_a_terminal_each_model_is_a_line_that_does_not_mix_with_the_figures(
    nas_measure: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text, _ = nas_measure(made(), "a", "b", "c")
    first = text.splitlines()[:3]
    assert first[:2] == ["measuring a", "measuring b"]
    assert first[2].startswith("left out c: hangs")
    assert "\x1b" not in text


def test_what_was_asked_for_and_is_not_offered_is_said(nas_measure: Run) -> None:
    _, text, _ = nas_measure(made(), "a", "b", "--energy", "--memory")
    assert text.count("not known") == 4


def test_exit_code_when_none_could_be_measured(nas_measure: Run, tmp_path: Path) -> None:
    session = made(results={}, pairs=[])
    code, text, _ = nas_measure(
        session, "c", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")
    )
    assert code == 1
    assert "failed: c: killed by signal 9 and more" in text
    assert json.loads((tmp_path / "a.json").read_text())["failures"] == session.failures
    assert not (tmp_path / "a.png").exists()


def test_json_gives_the_session_back(nas_measure: Run, tmp_path: Path) -> None:
    nas_measure(made(), "a", "b", "--json", str(tmp_path / "a.json"))
    found = json.loads((tmp_path / "a.json").read_text())
    assert found.pop("format") == report.FORMAT
    assert Session.from_dict(found) == made()


@pytest.mark.parametrize("count", [1, 2, 40])
def test_plot(nas_measure: Run, tmp_path: Path, count: int) -> None:
    names = {f"$m_{number}$" + "x" * number * 3: result(number + 0.5) for number in range(count)}
    nas_measure(made(results=names), "a", "--plot", str(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 900
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20  # something was drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"Missing argument 'MODEL\.\.\.'"),
        (["a", "--json", "/nowhere/a.json"], r"--json /nowhere/a\.json: /nowhere is not a directory"),
        (["a", "--plot", "."], r"--plot \.: is a directory; give the path of a file"),
        (["a", "--per-layer", "--target", "cpu+compile"], r"--per-layer with target 'cpu\+compile'"),
        (["a", "--precision", "0"], r"Invalid value for '--precision'"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    nas_measure: Run, arguments: list[str], message: str
) -> None:
    code, text, asked = nas_measure(made(), *arguments)
    assert code == 2
    assert not asked
    assert len(text.splitlines()) == 1
    assert re.search(message, text)


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("JPG", b"\xff\xd8"), ("eps", b"%!PS")],
)
def test_a_plot_is_what_its_suffix_says(nas_measure: Run, tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    nas_measure(made(), "a", "--plot", str(path))
    assert path.read_bytes().startswith(start)


# -- by module ---------------------------------------------------------------------------------------------------------


def layers() -> LayerTimes:
    parts = (
        LayerTime("", "Net", 0, 1.0, 10.0, 0.1, 1),
        LayerTime("body", "Sequential", 1, 1.95, 9.0, 0.195, 1),
        LayerTime("body.0", "Linear", 2, 7.0, 7.0, 0.7, 3),
        LayerTime("body.1", "ReLU", 2, 0.05, 0.05, 0.005, 3),
    )
    return LayerTimes("cpu:1", "cpu", parts, 9.8, 10.3, 0.051, 20)


def printed(thing: Any, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_layers_are_a_tree_with_the_small_ones_in_one_row() -> None:
    lines = [line.rstrip() for line in printed(report.layers_table("net", layers())).splitlines()]
    rows = [line.split() for line in lines]
    assert ["body", "Sequential", "1.95", "ms", "19.5", "9", "ms", "90.0", "1"] in rows
    assert any(line.lstrip().startswith("0 ") and "70.0" in line and line.endswith("3") for line in lines)
    assert any("1 modules below 1 %" in line and "0.05 ms" in line for line in lines)


def test_a_module_in_a_list_that_is_not_called_keeps_the_lists_name() -> None:
    names = ("", "layers.0", "layers.0.fc", "layers.10", "head")
    parts = tuple(LayerTime(name, "T", 0, 1.0, 1.0, 0.2, 1) for name in names)
    text = printed(report.layers_table("net", LayerTimes("cpu:1", "cpu", parts, 5.0, 5.0, 0.0, 3)))
    labels = [line.rstrip().partition(" T ")[0].rstrip() for line in text.splitlines() if " T " in line]
    assert labels == [" (the model)", "   layers.0", "     fc", "   layers.10", "   head"]


def test_the_cost_of_the_hooks_is_stated() -> None:
    line = report.layers_line(layers())
    assert "9.8 ms without hooks, 10.3 ms with them (+5.1 %); the modules sum to 10 ms" in line
    assert "rough" not in line
    odd = LayerTimes("cpu:1", "wall", layers().layers, 20.0, 21.0, 0.05, 20)
    assert "read the shares as rough" in report.layers_line(odd)


def test_per_layer_in_table_and_json(nas_measure: Run, tmp_path: Path) -> None:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTION)
    name = f"{path}:small"
    session = made(results={name: result(0.1), f"{name} (2)": result(0.1)}, pairs=[])
    _, text, _ = nas_measure(
        session, name, name, "--target", "cpu:1", "--per-layer", "--json", str(tmp_path / "a.json")
    )
    assert text.count("(the model)") == 1  # a copy is not taken apart again
    assert "CPU time of the thread, median of 20 calls" in text
    (found,) = json.loads((tmp_path / "a.json").read_text())["layers"].items()
    assert found[0] == name
    assert [layer["type"] for layer in found[1]["layers"]] == ["Linear"]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3.21, "3.210 ms [3.178, 3.242]"),
        (0.01234, "0.01234 ms [0.01222, 0.01246]"),
        (45.678, "45.68 ms [45.22, 46.13]"),
        (9.9999, "10.00 ms [9.90, 10.10]"),
        (1234.5, "1,234 ms [1,222, 1,247]"),
        (999.96, "1,000 ms [990, 1,010]"),
    ],
)
def test_intervals_have_as_many_decimals_in_all_numbers(value: float, expected: str) -> None:
    assert report.interval_ms(value, value * 0.99, value * 1.01) == expected


def everything(name: str) -> Session:
    changes = {"p99_ms": 45.678, "peak_memory_bytes": 123_456_789, "energy_mj": 123.4, "stopped": "time"}
    return made(results={name: result(12.34567, half_width=0.2, **changes), "b": result(0.0123456)}, pairs=[])


@pytest.mark.parametrize("name", ["a", "timm:vit_base_patch16_rope_reg1_gap_256.sbb_in1k"])
@pytest.mark.parametrize("width", [30, 40, 60, 70, 80, 100, 120, 200])
def test_no_figure_is_cut_and_the_status_is_there(name: str, width: int) -> None:
    text = printed(report.latency_table(everything(name), memory=True, energy=True), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    words = " ".join(text.split())
    figures = [
        "12.35",
        "12.22, 12.47]",
        "0.01235 ms",
        "13.6 ms",
        "16 ms",
        "45.7 ms",
        "120",
        "123 MB",
        "123 mJ",
    ]
    assert not [figure for figure in [*figures, "trusted, wide", "not known"] if figure not in words]
    assert words.count("trusted") == 2
    first_table = text[: text.rindex("p99")] if width == 80 else text
    assert "trusted, wide" in first_table  # beside the latency, not below


def test_a_wide_terminal_has_one_table() -> None:
    text = printed(report.latency_table(everything("a"), memory=True, energy=True), 140)
    assert text.count("model") == 1
    (heads,) = [line.split() for line in text.splitlines() if "model" in line]
    assert heads == [
        "model",
        "latency",
        "[95",
        "%]",
        "raw",
        "p90",
        "p99",
        "runs",
        "memory",
        "energy",
        "status",
    ]


def test_figures_of_modules_are_not_cut() -> None:
    text = printed(report.layers_table("net", layers()), 80)
    assert "…" not in text
    assert "9 ms" in text


def test_foreign_names_cannot_steer_the_terminal() -> None:
    session = made(results={"a\x1b[2J\n[red]b": result(1.0, trusted=False, reasons=["x\x1b[1m"])}, pairs=[])
    texts = [printed(report.latency_table(session)), *report.caution_lines(session)]
    assert not any("\x1b" in text for text in texts)
    assert "[red]" in texts[0]


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"wait": "device", "held_by": 123}, "waiting for the device (held by process 123)\n"),
        ({"wait": "device", "held_by": None}, "waiting for the device\n"),
        ({"wait": "device"}, ""),
    ],
)
def test_who_is_waited_for_is_said_without_a_terminal(
    capsys: pytest.CaptureFixture[str], event: dict[str, Any], said: str
) -> None:
    _Progress(Console(file=io.StringIO())).tell(event)
    assert capsys.readouterr().err == said


def test_a_wide_interval_is_named() -> None:
    session = made(results={"a": result(1.0, stopped="time", half_width=0.031)})
    assert report.caution_lines(session) == ["wide: a: the time was up at +-3.1 %; give more --max-seconds"]


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "functions.py").write_text(FUNCTION)
    name = f"{tmp_path / 'functions.py'}:small"
    with pytest.raises(SystemExit) as ended:
        main(
            ["measure", name, name, "--compare", "--target", "cpu:1", "--max-seconds", "1",
             "--json", str(tmp_path / "a.json")]
        )  # fmt: skip
    assert not ended.value.code
    session = json.loads((tmp_path / "a.json").read_text())
    assert set(session["results"]) == {name, f"{name} (2)"}
    [pair] = session["pairs"]
    assert (pair["first"], pair["second"], pair["verdict"]) == (name, f"{name} (2)", "cannot tell")
    assert capsys.readouterr().out
