"""``nas profile``: parameters, multiply-accumulates and activations, by three counters that have to agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from nas.profile import Comparison

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("profile")(profile)


def profile(
    model: str = typer.Argument(
        help="timm:NAME, an architecture.json, RUN#TRIAL, a .pt2 file or module:function."
    ),
    size: str | None = typer.Option(None, help="Input size, such as 224, 224x192, or a length."),
    batch: int = typer.Option(1, min=1, help="Samples in one call."),
    per_module: bool = typer.Option(False, "--per-module", help="Also show every module that does work."),
    json_file: Path | None = typer.Option(None, "--json", metavar="FILE", help="Write everything to FILE."),
) -> None:
    """Count parameters, MACs and activations by fvcore, thop and torch; exit code 1 when they disagree."""
    import torch
    from rich.console import Console
    from rich.text import Text

    from nas.cli._arguments import check_writable
    from nas.errors import UserMistake
    from nas.files import atomic_write_json
    from nas.profile import compare
    from nas.profile.skeleton import packed_modules
    from nas.sources import load_source

    check_writable({"--json": json_file})
    source = load_source(model, size=size)
    if source.model is None:
        raise UserMistake(
            f"{model}: an ONNX file has no modules to count; give the model that it was exported from"
        )
    try:
        inputs = source.make_inputs(batch, torch.Generator().manual_seed(0))
        comparison = compare(source.model, inputs)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        raise UserMistake(
            f"--batch {batch}: {model} called with it does not fit into memory; give a smaller one"
        ) from None
    console = Console(highlight=False)
    shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
    console.print(Text(f"{source.name} called with {shapes}"), soft_wrap=True)
    console.print(_totals(comparison))
    if per_module:
        console.print(_modules(comparison, source.model))
    packed = packed_modules(source.model)
    _remarks(console, comparison, packed)
    if json_file is not None:
        facts: dict[str, Any] = {"model": source.name, "key": source.key, "packed": packed}
        facts["inputs"] = [list(x.shape) for x in inputs]
        atomic_write_json(json_file, {**facts, **comparison.to_dict()})
    if comparison.disagreements or comparison.failures:
        raise typer.Exit(1)


def _out_of_memory(error: Exception) -> bool:
    """torch has no kind of its own for memory of the CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text


def _totals(comparison: Comparison) -> Table:
    table = _table("counter", "parameters", "MACs", "activations")
    for name, count in comparison.counts.items():
        table.add_row(name, *(f"{value:,}" for value in (count.params, count.macs, count.activations)))
    return table


def _modules(comparison: Comparison, model: nn.Module) -> Table:
    """Every module that does work, with all modules in it; one column a figure, or a counter where they disagree."""
    from rich.text import Text

    from nas.profile import inclusive
    from nas.profile.skeleton import uncompiled_name

    counts = {name: inclusive(count.modules) for name, count in comparison.counts.items()}
    columns = list(counts) if comparison.disagreements else list(counts)[:1]
    names = sorted({name for modules in counts.values() for name in modules}, key=_natural)
    params = {
        uncompiled_name(name): sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
    }
    suffixes = [f" {name}" for name in columns] if len(columns) > 1 else [""]
    heads = [f"{figure}{suffix}" for figure in ("MACs", "activations") for suffix in suffixes]
    table = _table("module", "parameters", *heads)
    wrong = {found.module for found in comparison.disagreements}
    for name in names:
        works = [counts[column].get(name) for column in columns]
        figures = [f"{work.macs:,}" if work else "0" for work in works]
        figures += [f"{work.activations:,}" if work else "0" for work in works]
        label = Text(name or "(the model)", style="bold red" if name in wrong else "")
        table.add_row(label, f"{params.get(name, 0):,}", *figures)
    return table


def _natural(name: str) -> list[Any]:
    """blocks.10 after blocks.9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".") if part]


def _remarks(console: Console, comparison: Comparison, packed: list[str]) -> None:
    from rich.text import Text

    def line(text: str, style: str) -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    for name, reason in comparison.failures.items():
        line(f"warning: {name} cannot count this model: {reason}", "bold red")
    for found in comparison.disagreements:
        line(f"warning: the counters disagree on {found}", "bold red")
    if comparison.uncounted:
        line(f"not counted: {', '.join(comparison.uncounted)}", "yellow")
    if packed:
        names = ", ".join(name or "the model itself" for name in packed)
        line(f"not among the parameters, because they are packed: the quantized weights of {names}", "yellow")
    if any(count.method == "data" for count in comparison.counts.values()):
        line("counted with data: the figures hold for inputs like these", "yellow")
    if not comparison.disagreements and not comparison.failures:
        line(f"{', '.join(comparison.counts)} agree exactly, module by module", "green")


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table
