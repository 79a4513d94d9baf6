"""The table of a result's steps: a row for each where the console is wide enough, else a few lines for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["StepsTable"]

_ANY_WIDTH = 100_000  # columns


class StepsTable(Table):
    """Names and figures as they are, whole at every width: what is cut short is another name, or no figure at all.

    Args:
        title: above it.
        heads: of the columns, the first of the names.
        rows: as many cells each as there are heads.
    """

    def __init__(self, title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]):
        super().__init__(title=Text(title, style="table.title"))
        self._heads, self._cells = tuple(heads), [tuple(row) for row in rows]
        for number, head in enumerate(self._heads):
            self.add_column(Text(head), justify="right" if number else "left", no_wrap=True)
        for cells in self._cells:
            # As Text, because a list among a pass' options is markup to rich, and would not be shown.
            self.add_row(*(Text(cell) for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update_width(_ANY_WIDTH), self).maximum
        if needed <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._lines()

    def _lines(self) -> Iterable[Text]:
        yield Text(str(self.title), style="table.title")
        space = max(len(head) for head in self._heads[1:])
        for name, *figures in self._cells:
            yield Text(name, style="bold", overflow="fold")
            for head, figure in zip(self._heads[1:], figures, strict=True):
                yield Text(f"  {head.ljust(space)}  {figure}", overflow="fold")
