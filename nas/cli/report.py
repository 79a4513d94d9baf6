"""``nas report``: the front of a run as a table and as files."""

from __future__ import annotations

from pathlib import Path

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)


def report(
    run: Path | None = typer.Argument(None, help="Run directory; the newest below runs/ by default."),
) -> None:
    """Print the front and write pareto.csv, pareto.png and report.html anew; also while a search is running."""
    from rich.console import Console

    from nas.cli._run import print_report
    from nas.conclude import write_report_files
    from nas.reader import newest_run, read_run

    directory = run or newest_run()
    found = read_run(directory)
    built = found.report()
    write_report_files(built, found.directory)
    print_report(Console(highlight=False), built, directory)
