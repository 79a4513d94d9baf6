"""``nas chaos``: kill drivers at random for some minutes and count what that costs. Hidden: it is for developers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command, which no list of commands shows."""
    app.command("chaos", hidden=True)(chaos)


def chaos(
    minutes: float = typer.Option(4.0, min=0.05, help="How long."),
    seed: int = typer.Option(0, help="Decides which kill comes when."),
    storage: str = typer.Option("sqlite", help="sqlite or journal."),
    workers: int = typer.Option(2, min=1, help="Candidates at a time."),
    out: Path | None = typer.Option(
        None, help="JSON file for the result; another storage's result in it is kept."
    ),
) -> None:
    """Kill a driver and its candidates at random moments, type the same command again, and look at what is left.

    Ends in one line, such as: kills 60, lost 0, duplicated 0, unreadable 0. Exit code 1 if one of these is not 0.
    """
    import json
    import time
    from dataclasses import asdict

    from rich.console import Console
    from rich.text import Text

    from nas.chaos import run_chaos
    from nas.environment import describe_environment
    from nas.errors import UserMistake
    from nas.files import atomic_write_json

    if storage not in ("sqlite", "journal"):
        raise UserMistake(f"--storage {storage}: must be sqlite or journal")
    console = Console(highlight=False)
    began = time.monotonic()
    with console.status("killing drivers") if console.is_terminal else contextlib.nullcontext():
        count, folder = run_chaos(minutes, seed, "journal" if storage == "journal" else "sqlite", workers)
    if out is not None:
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        found[storage] = {
            "command": f"nas chaos --minutes {minutes:g} --seed {seed} --storage {storage} --workers {workers}",
            "line": count.line(),
            "kills": count.kills,
            **asdict(count),
            "seconds": round(time.monotonic() - began, 1),
            "environment": describe_environment(),
        }
        atomic_write_json(out, found)
    for problem in count.problems:
        console.print(Text(problem), soft_wrap=True)
    if folder is not None:
        console.print(Text(f"what is left of it: {folder}"), soft_wrap=True)
    console.print(count.line(), style="bold" if count.sound else "bold red")
    raise typer.Exit(0 if count.sound else 1)
