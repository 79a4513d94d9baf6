"""``nas doctor``: what is installed, which devices there are, what would fail and how to mend it."""

from __future__ import annotations

from pathlib import Path

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    repair: Path | None = typer.Option(None, help="Mend this run directory: a damaged study or recipe."),
) -> None:
    """Examine the installation and the devices; exit code 1 when something will fail."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nas import doctor as library

    console = Console(highlight=False)
    if repair is not None:
        lines = library.repair(repair)
        for line in lines or [f"{repair}: nothing to mend"]:
            console.print(Text(line), soft_wrap=True)
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
