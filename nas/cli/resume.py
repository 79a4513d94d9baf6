"""``nas resume``: go on with a run that was stopped, killed, or is to be longer."""

from __future__ import annotations

from pathlib import Path

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("resume")(resume)


def resume(
    run: Path = typer.Argument(help="Run directory."),
    storage: str | None = typer.Option(
        None,
        help="Where the study is, to make a run directory that is not there (another machine) again from it; RUN must "
        "have the study's name then.",
    ),
    trials: int | None = typer.Option(None, help="Another total number of candidates."),
    time_budget: str | None = typer.Option(None, help="Time for this session: 90s, 3m, 1h."),
    workers: int | None = typer.Option(None, help="Candidates at a time."),
    ray: str | None = typer.Option(None, help="Go on with another Ray cluster: auto, local or HOST:PORT."),
) -> None:
    """Go on where a run was interrupted; what is finished is neither lost nor done again."""
    from nas.cli._run import run_session
    from nas.recorded import restore
    from nas.run_directory import RunDirectory

    if storage is not None and not RunDirectory(run).holds_run():
        restore(RunDirectory(run), storage)
    RunDirectory.existing(run)
    changes = {
        "trials": trials,
        "time_budget": time_budget,
        "workers": workers,
        "storage": storage,
        "ray": ray,
    }
    run_session(run, {key: value for key, value in changes.items() if value is not None})
