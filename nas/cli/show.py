"""``nas show``: everything known about one trial."""

from __future__ import annotations

import json
from pathlib import Path

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("show")(show)


def show(
    words: list[str] = typer.Argument(
        metavar="[RUN] TRIAL", help="Trial number, after its run directory if not the newest."
    ),
    run: Path | None = typer.Option(None, help="Run directory; the newest below runs/ by default."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show one trial: architecture, objectives, latency, counts, learning curve, failure."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nas.cli._arguments import run_and_trial
    from nas.errors import UserMistake
    from nas.report.formats import format_interval, format_seconds, format_value, one_line

    found, number = run_and_trial(words, run)
    if number is None:
        raise UserMistake(
            f"{' '.join(words)}: give the number of a trial, such as 'nas show {found.directory.path} 0'"
        )
    trial = found.trial(number)
    result = trial.result
    console = Console(highlight=False)
    if as_json:
        facts = {"number": number, "state": trial.state, "key": trial.key, "architecture": trial.architecture}
        console.print_json(json.dumps({**facts, "result": result.to_dict() if result else None}))
        return
    rows: list[tuple[str, str]] = [
        ("trial", f"{number} {trial.name or ''}".strip()),
        ("state", trial.state),
        ("key", trial.key),
    ]
    rows += [(name, one_line(value)) for name, value in trial.architecture.items()]
    if result is not None:
        rows += [(f"objective {name}", format_value(name, value)) for name, value in result.values.items()]
        rows += [(name, one_line(value)) for name, value in result.metrics.items()]
        if result.latency:
            median, low, high = (result.latency[key] for key in ("median_ms", "low_ms", "high_ms"))
            text = format_interval(median, low, high, unit="ms")
            rows.append(("latency", f"{text} on {found.config.target}, {result.latency['samples']} samples"))
            if "conditions" in result.latency:
                rows.append(("conditions", one_line(result.latency["conditions"])))
            if result.latency.get("trusted") is False:
                rows.append(("untrusted", one_line("; ".join(map(str, result.latency["reasons"])))))
        rows.append(("time", format_seconds(result.seconds)))
        if result.failure:
            rows.append((str(result.failure["kind"]), one_line(result.failure["reason"])))
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(text))
    console.print(table)
    if result is not None and result.failure and result.failure.get("log_tail"):
        console.print(Text(result.failure["log_tail"], style="dim"))
