"""What ``nas search`` and ``nas resume`` share: signals, the log file, the last lines and the exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from rich.console import Console

from nas.cli._view import RunView
from nas.report.data import RunReport
from nas.report.tables import failures_table, finalists_table, front_table
from nas.session import Session, Stopped

__all__ = ["print_report", "run_session"]


def run_session(out: Path, given: Mapping[str, Any]) -> None:
    """Run a session to its end and exit with a code that tells the truth about it."""
    console = Console(highlight=False)
    view = RunView(console)
    session = Session(out, view)
    received = _handle_signals(session)
    report: RunReport | None = None
    handler = _LateFileHandler(session.run_directory.log)
    logging.getLogger("nas").addHandler(handler)
    if not os.environ.get("NAS_DEBUG"):
        logging.getLogger("nas").setLevel(logging.INFO)
    try:
        report = session.run(given)
    except Stopped:
        pass
    finally:
        view.close()
        logging.getLogger("nas").removeHandler(handler)
        handler.close()
    if report is not None:
        print_report(console, report, out)
    if received:
        name = signal.Signals(received[0]).name
        if report is None:
            console.print(f"stopped by {name} before the search began; nothing was written", style="yellow")
        else:
            console.print(f"stopped by {name}; go on with: nas resume {out}", style="yellow", soft_wrap=True)
        raise typer.Exit(128 + received[0])
    assert report is not None  # no signal, no exception: there is a report
    if not report.comparable():
        raise typer.Exit(1)


def _handle_signals(session: Session) -> list[int]:
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:  # the second time: at once; the workers follow by losing their driver
            os._exit(128 + number)
        received.append(number)
        session.stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    return received


def print_report(console: Console, report: RunReport, out: Path) -> None:
    """The front, the finalists, the failures, and the one sentence that may be claimed."""
    failed = report.in_state("failed")
    if report.front():
        console.print(front_table(report))
        if report.finalists:
            console.print(finalists_table(report))
    if failed:
        console.print(failures_table(report))
    counts = {state: len(report.in_state(state)) for state in ("complete", "pruned", "failed", "waiting")}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "complete")
    lines = [(report.verdict(), "bold"), (f"{text}; everything is in {out} (open report.html)", "")]
    if not report.front():  # why nothing succeeded is what a person must not overlook
        lines = [lines[1], (lines[0][0], "bold red")]
    for line, style in lines:
        console.print(line, style=style, markup=False, soft_wrap=True)


class _LateFileHandler(logging.Handler):
    """Appends to ``run.log`` once the run directory exists; what comes before is held back until then."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        self._held: list[str] = []
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._held.append(self.format(record))
        if not (self._path.parent / "recipe.yaml").exists():
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in self._held))
            self._held.clear()
        except OSError as error:  # a full disk must not stop a search for the sake of its log
            sys.stderr.write(f"{self._path}: {error.strerror}\n")
