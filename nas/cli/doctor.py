"""``nas doctor``: what is installed, which devices there are, what would fail and how to mend it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nas.errors import UserMistake

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["register"]

_TARGET = "cpu:1"
_SECONDS = 20.0


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    repair: Path | None = typer.Option(None, help="Mend this run directory: a damaged study or recipe."),
    latency: bool = typer.Option(False, "--latency", help="Measure ten known models twice: do they repeat?"),
    target: str | None = typer.Option(
        None, show_default=_TARGET, help="With --latency: where to measure them."
    ),
    seconds: float | None = typer.Option(
        None, min=2.0, show_default=str(_SECONDS), help="With --latency: for each of the two measurements."
    ),
    json_file: Path | None = typer.Option(None, "--json", help="With --latency: also write the result here."),
) -> None:
    """Examine the installation and the devices; exit code 1 when something will fail."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nas import doctor as library
    from nas.cli._arguments import check_writable

    given = {"--target": target, "--seconds": seconds, "--json": json_file}
    _check(repair, latency, [option for option, value in given.items() if value is not None])
    check_writable({"--json": json_file})
    console = Console(highlight=False)
    if repair is not None:
        lines = library.repair(repair)
        for line in lines or [f"{repair}: nothing to mend"]:
            console.print(Text(line), soft_wrap=True)
        return
    if latency:
        _latency(
            console,
            _TARGET if target is None else target,
            _SECONDS if seconds is None else seconds,
            json_file,
        )
        return
    table = Table.grid(padding=(0, 2))
    findings = library.examine()
    styles = {"ok": "green", "missing": "yellow", "broken": "bold red"}
    for finding in findings:
        remedy = f"-> {finding.remedy}" if finding.remedy else ""
        table.add_row(
            Text(finding.status, style=styles[finding.status]),
            finding.subject,
            Text(f"{finding.text} {remedy}"),
        )
    console.print(table)
    broken = [finding for finding in findings if finding.status == "broken"]
    if broken:
        console.print(
            Text(f"{len(broken)} will fail: {', '.join(f.subject for f in broken)}", style="bold red")
        )
        raise typer.Exit(1)


def _check(repair: Path | None, latency: bool, given: list[str]) -> None:
    """Nothing that was asked for is left undone without a word. Raises UserMistake."""
    if repair is not None and latency:
        raise UserMistake("--repair and --latency: are two things; ask for one at a time")
    if given and not latency:
        verb = "belongs" if len(given) == 1 else "belong"
        raise UserMistake(
            f"{', '.join(given)}: {verb} to --latency; give --latency too, or leave out {given[0]}"
        )


def _latency(console: Console, target: str, seconds: float, json_file: Path | None) -> None:
    """Exit code 1 when figures from this machine may not be called measured."""
    from rich.table import Table
    from rich.text import Text

    from nas.environment import describe_environment
    from nas.files import atomic_write_json
    from nas.latency.self_test import LEAST_TAU, MOST_DEVIATION, self_test
    from nas.latency.target import Target

    with console.status("measuring ten models twice") if console.is_terminal else contextlib.nullcontext():
        found = self_test(Target.parse(target), max_seconds=seconds)
    table = Table("model", "first (ms)", "second (ms)", "difference", box=None, padding=(0, 2, 0, 0))
    for name, first in found.first_ms.items():
        second = found.second_ms[name]
        table.add_row(name, f"{first:.3f}", f"{second:.3f}", f"{second / first - 1:+.1%}")
    console.print(table)
    for reason in found.reasons:
        console.print(Text(f"out of bounds: {reason}", style="yellow"), soft_wrap=True)
    if json_file is not None:
        atomic_write_json(json_file, {**found.to_dict(), "environment": describe_environment()})
    line = (
        f"{found.target}: Kendall tau {found.tau:.3f} (at least {LEAST_TAU}), median deviation "
        f"{found.median_deviation:.2%} (at most {MOST_DEVIATION:.0%}), clock {found.clock}, priority {found.priority}"
    )
    console.print(Text(line), soft_wrap=True)
    if not found.passed:
        text = "Latencies taken here must not be called measured: stop other programs, or permit real-time priority"
        console.print(Text(text, style="bold red"), soft_wrap=True)
        raise typer.Exit(1)
    if found.reasons:
        text = "Latencies taken here repeat, but the machine was out of bounds (see above): such results are untrusted"
        console.print(Text(text, style="yellow"), soft_wrap=True)
        return
    console.print(Text("Latencies taken here may be called measured.", style="green"))
