"""``nas spaces``: what can be searched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from spaces import SearchSpace

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("spaces")(spaces)


def spaces(
    name: str | None = typer.Argument(None, help="NAME, NAME:SCALE, module:ATTRIBUTE or file.py:ATTRIBUTE."),
) -> None:
    """List the search spaces, or show one: its parameters, its exact size, its published variants."""
    from rich.console import Console

    from spaces import get_space, list_spaces

    console = Console(highlight=False)
    if name is None:
        _list(console)
        return
    scales = list_spaces().get(name)
    _show(console, get_space(name))
    if scales and len(scales) > 1:
        console.print(
            f"scales: {', '.join(f'{name}:{scale}' for scale in scales)}", markup=False, soft_wrap=True
        )


def _list(console: Console) -> None:
    from rich import box
    from rich.table import Table

    from nas.cli._view import size_text
    from spaces import get_space, list_spaces

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("space", "task", "architectures", "published"):
        table.add_column(column)
    for name, scales in list_spaces().items():
        for scale in scales:
            full = name if scale == "default" else f"{name}:{scale}"
            space = get_space(f"{name}:{scale}")
            count = size_text(space).split(" (")[0]
            table.add_row(full, space.task or "", count, str(len(space.published)))
    console.print(table)


def _show(console: Console, space: SearchSpace) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from nas.cli._view import size_text
    from nas.report.words import summarize

    console.print(Text(f"{space.name}: {size_text(space)} architectures"), soft_wrap=True)
    if space.description:
        console.print(Text(space.description))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("parameter", "values", "condition"):
        table.add_column(column, overflow="fold")
    for name, parameter in space.parameters.items():
        table.add_row(Text(name), Text(parameter.allowed()), "" if parameter.when is None else "conditional")
    console.print(table)
    for name, architecture in space.published.items():
        label = f"{name} (baseline)" if name == space.baseline else name
        console.print(Text(f"{label}: {summarize(architecture)}"), soft_wrap=True)
