"""``nas measure``: how fast models are, with intervals, and which of them is faster."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from nas.errors import UserMistake
from nas.report.formats import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from nas.latency.per_layer import LayerTimes
    from nas.latency.result import Session

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("measure")(measure)


def measure(
    models: list[str] = typer.Argument(
        metavar="MODEL...",
        help="timm:NAME, architecture.json or an exported directory, RUN#TRIAL, a .pt2 or .onnx file, module:function.",
    ),
    target: str = typer.Option(
        "cpu",
        help=escape(
            "DEVICE and any of [:THREADS] [+bf16|+fp16] [+RUNTIME] [@BATCH] [/SIZE], as in cpu:1+bf16@8."
        ),
    ),
    compare: bool = typer.Option(
        False, "--compare", help="Say of each pair which is faster, or 'cannot tell'."
    ),
    size: str | None = typer.Option(None, help="Input size: 224, 224x192, or lengths as 128 or 16-128."),
    precision: float = typer.Option(0.01, min=1e-4, max=0.5, help="Stop at this half-width of the interval."),
    max_seconds: float = typer.Option(
        60.0, min=0.1, help="Time of the rounds at the most, all models together."
    ),
    seed: int = typer.Option(0, min=0, help="Of the inputs and of the order of the rounds."),
    per_layer: bool = typer.Option(False, "--per-layer", help="Also show where the time goes, by module."),
    memory: bool = typer.Option(
        False, "--memory", help="Also the peak memory of a call, where it can be read."
    ),
    energy: bool = typer.Option(False, "--energy", help="Also the energy of a call, where it can be read."),
    scale: Path | None = typer.Option(
        None, metavar="FILE", help="Keep the reference's time here: sessions that share it can be compared."
    ),
    json_file: Path | None = typer.Option(None, "--json", metavar="FILE", help="Write everything as JSON."),
    plot: Path | None = typer.Option(None, metavar="FILE", help="Draw the intervals: .png, .pdf, .svg, ..."),
) -> None:
    """Measure models together, interleaved; exit code 1 when none could be measured."""
    from rich.console import Console
    from rich.text import Text

    from nas.cli._arguments import check_writable
    from nas.files import atomic_write_json
    from nas.latency import Plan, Target
    from nas.latency.per_layer import check_layers
    from nas.latency.reference import check_scale_file
    from nas.measure_sources import measure_sources
    from nas.report import latency_table as report

    check_writable({"--json": json_file, "--plot": plot, "--scale": scale})
    if plot is not None:
        report.picture_format(plot)
        _check_drawing()
    if scale is not None:
        check_scale_file(scale)
    if compare and len(models) == 1:
        raise UserMistake(f"--compare: {models[0]} is the only model; give another one, or leave it out")
    if per_layer:
        check_layers(Target.parse(target))
    console = Console(highlight=False)
    with _Progress(console) as progress:
        session = measure_sources(
            models,
            target,
            size=size,
            plan=Plan(max_seconds, precision, seed=seed),
            compare=compare,
            memory=memory,
            energy=energy,
            scale=scale,
            on_progress=progress.tell,
        )
    _print(console, session, memory=memory, energy=energy)
    if json_file is not None:
        atomic_write_json(json_file, report.session_json(session, None))
    if plot is not None and session.results:
        report.write_latency_picture(session, plot)
    if per_layer:
        # Last, and in this process: whatever happens there, the measurement is on screen and on disk already.
        with _Progress(console) as progress:
            layers = _layers(session, models, target, size, seed, progress)
        for name, times in layers.items():
            console.print(report.layers_table(name, times))
            console.print(Text(report.layers_line(times)), soft_wrap=True)
        if json_file is not None:
            atomic_write_json(json_file, report.session_json(session, layers))
    if not session.results:
        raise typer.Exit(1)


def _check_drawing() -> None:
    """Raises UserMistake where nothing can be drawn: a measurement takes minutes, and the picture comes last."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as missing:
        raise UserMistake(
            f"--plot: matplotlib cannot be imported ({missing}); pip install matplotlib, or leave --plot out"
        ) from None


def _layers(
    session: Session, models: list[str], target: str, size: str | None, seed: int, progress: _Progress
) -> dict[str, LayerTimes]:
    """Of the models that could be measured; one that cannot be taken apart is named."""
    from nas.latency import Target
    from nas.latency.per_layer import per_layer_of

    found = {}
    for name in dict.fromkeys(models):
        if name not in session.results:
            continue
        progress.tell({"visit": f"{name}, by module"})
        try:
            found[name] = per_layer_of(name, Target.parse(target), size=size, seed=seed)
        except UserMistake as mistake:
            progress.note(str(mistake))
    return found


def _print(console: Console, session: Session, *, memory: bool, energy: bool) -> None:
    """Tables first; what must not be overlooked comes last."""
    from rich.text import Text

    from nas.report import latency_table as report

    console.print(Text(report.session_line(session)), soft_wrap=True)
    if session.results:
        console.print(report.latency_table(session, memory=memory, energy=energy))
    for pair in session.pairs:
        style = {"faster": "green", "slower": "red"}.get(pair.verdict, "")
        console.print(Text(report.pair_line(pair), style=style), soft_wrap=True)
    for line in report.caution_lines(session):
        console.print(Text(line, style="yellow"), soft_wrap=True)
    for line in report.failure_lines(session):
        console.print(Text(line, style="red"), soft_wrap=True)


class _Progress:
    """What is being measured: on a terminal one line that goes when it is over, elsewhere a line a model on stderr."""

    def __init__(self, console: Console):
        self._console = console
        self._status: Any = console.status("starting") if console.is_terminal else None
        self._round = 0
        self._visit = ""
        self._said: set[str] = set()
        self._loaded = False  # before that a mistake of the user is still to be told, and alone

    def __enter__(self) -> _Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, event: Mapping[str, Any]) -> None:
        """What ``measure_sources`` reports: the model it turns to, what it waits for, the round it has done, ..."""
        from rich.text import Text

        from nas.latency.reference import REFERENCE_NAME

        self._round = int(event.get("round", self._round))
        self._visit = str(event.get("visit", self._visit))
        if self._status is not None:
            at_work = f"round {self._round + 1}: {one_line(self._visit, 60)}"
            self._status.update(Text(_waiting(event) or at_work))
        elif "failed" in event:
            self._say(f"left out {one_line(event['failed'])}: {one_line(event['reason'])}")
        elif "wait" in event:
            self._loaded = True
            if waiting := _waiting(event):
                self._say(waiting)
        elif self._loaded and "visit" in event and self._visit != REFERENCE_NAME:
            self._say(f"measuring {one_line(self._visit)}")

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            typer.echo(line, err=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        from rich.text import Text

        self._console.print(Text(text, style="yellow"), soft_wrap=True)


def _waiting(event: Mapping[str, Any]) -> str:
    """What is said of a device that another process has; nothing while nobody has it."""
    if "held_by" not in event:
        return ""
    holder = event["held_by"]
    return f"waiting for the device{'' if holder is None else f' (held by process {holder})'}"
