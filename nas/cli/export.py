"""``nas export``: hand a found model over."""

from __future__ import annotations

from pathlib import Path

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    words: list[str] | None = typer.Argument(
        None,
        metavar="[RUN] [TRIAL]",
        help="Run directory and trial; by default the newest run and the front's best in its first objective.",
    ),
    run: Path | None = typer.Option(None, help="Run directory; the newest below runs/ by default."),
    to: Path | None = typer.Option(None, help="New directory for the files (default RUN/export-TRIAL)."),
    onnx: bool = typer.Option(
        False,
        "--onnx",
        help="Also write model.onnx, for any batch size, compared with the model in onnxruntime.",
    ),
) -> None:
    """Write weights.safetensors and architecture.json; nas.load_model(DIRECTORY) gives the model back."""
    from rich.console import Console

    from nas.cli._arguments import run_and_trial
    from nas.export import best_trial, export_trial

    found, number = run_and_trial(words or [], run)
    trial = best_trial(found) if number is None else found.trial(number)
    out = export_trial(found, trial, to or found.directory.path / f"export-{trial.number}", onnx=onnx)
    console = Console(highlight=False)
    console.print(
        f"trial {trial.number} exported to {out}; load it with nas.load_model({str(out)!r})",
        markup=False,
        soft_wrap=True,
    )
