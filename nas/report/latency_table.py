"""Measured latencies for people and programs: terminal tables, lines, the JSON form and a picture with intervals."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from nas.errors import UserMistake
from nas.files import atomic_write_bytes
from nas.report.formats import format_count, format_ms, one_line
from nas.report.picture import BASELINE, FRONT, OTHER

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from nas.latency.per_layer import LayerTimes
    from nas.latency.result import LatencyResult, Pair, Session

__all__ = [
    "NOT_ENOUGH",
    "caution_lines",
    "failure_lines",
    "interval_ms",
    "latency_table",
    "layers_line",
    "layers_table",
    "pair_line",
    "picture_format",
    "session_json",
    "session_line",
    "write_latency_picture",
]

NOT_ENOUGH = "not enough samples"
_TAILS = ("p90", "p99")
FORMAT = 1
"""Of the JSON form."""

_CLOCKS = {"wall": "wall clock", "events": "device time (CUDA events)", "cpu": "CPU time of the thread"}
_LEAST_SHARE = 0.01
_PARTS_DIFFER = 0.1
_NAME_WIDTH = 20  # to which a name is folded before a column goes elsewhere
_PICTURES = ("png", "pdf", "svg", "jpg", "jpeg", "webp", "tif", "tiff", "eps", "ps")
_UNDATED = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


def interval_ms(value: float, low: float, high: float) -> str:
    """``3.210 ms [3.181, 3.248]``: four significant digits, in all three numbers as many decimals."""
    decimals = 0 if value >= 999.95 else next(d for d in range(1, 8) if value * 10**d >= 999.5 or d == 7)
    return f"{value:,.{decimals}f} ms [{low:,.{decimals}f}, {high:,.{decimals}f}]"


# -- tables ------------------------------------------------------------------------------------------------------------


def latency_table(session: Session, *, memory: bool = False, energy: bool = False) -> RenderableType:
    """One row per model that could be measured, in the order given; with ``memory`` and ``energy`` columns for them.

    No figure is ever cut: where it is printed, what finds no room beside latency and status follows in further tables.
    """
    results = list(session.results.values())
    tails = [name for name in _TAILS if any(getattr(r, f"{name}_ms") is not None for r in results)]
    lesser = {"raw": [format_ms(r.raw_median_ms) for r in results]}
    lesser |= {name: [_tail(getattr(r, f"{name}_ms")) for r in results] for name in tails}
    lesser["runs"] = [f"{r.samples:,}" for r in results]
    if memory:
        lesser["memory"] = [_memory(r.peak_memory_bytes) for r in results]
    if energy:
        lesser["energy"] = ["not known" if r.energy_mj is None else f"{r.energy_mj:.3g} mJ" for r in results]
    return _Fitted(
        _Column("model", [Text(one_line(name)) for name in session.results], "left"),
        _Column(
            "latency [95 %]", [Text(interval_ms(r.median_ms, r.low_ms, r.high_ms)) for r in results], "right"
        ),
        [_Column(head, [Text(cell) for cell in cells], "right") for head, cells in lesser.items()],
        _Column("status", [_status(r) for r in results], "left"),
    )


@dataclass(frozen=True)
class _Column:
    head: str
    cells: list[Text]
    justify: Literal["left", "right"]

    @property
    def width(self) -> int:
        return max(cell_len(self.head), *(cell.cell_len for cell in self.cells), 0)


class _Fitted:
    """A table for the terminal that it meets: ``name``, ``main``, what fits of ``lesser``, ``last``; below it the rest.

    Only names are folded. Where not even ``main`` and ``last`` fit, each cell is a line.
    """

    def __init__(self, name: _Column, main: _Column, lesser: list[_Column], last: _Column):
        self._name, self._main, self._lesser, self._last = name, main, lesser, last

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if not self._fit([self._main, self._last], width):
            yield from self._lines()
            return
        beside, rest = self._fill([self._main, self._last], self._lesser, width)
        yield self._table([self._main, *beside[2:], self._last])
        while rest:
            group, rest = self._fill(rest[:1], rest[1:], width)
            yield self._table(group)

    def _fill(
        self, group: list[_Column], columns: list[_Column], width: int
    ) -> tuple[list[_Column], list[_Column]]:
        """``group`` with the first of ``columns`` that fit, and those that do not."""
        count = 0
        while count < len(columns) and self._fit([*group, *columns[: count + 1]], width):
            count += 1
        return [*group, *columns[:count]], columns[count:]

    def _fit(self, columns: list[_Column], width: int) -> bool:
        name = min(self._name.width, _NAME_WIDTH)
        return sum(column.width for column in columns) + name + 3 * len(columns) + 2 <= width

    def _table(self, columns: list[_Column]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(self._name.head, overflow="fold")
        for column in columns:
            table.add_column(column.head, justify=column.justify, no_wrap=True, min_width=column.width)
        for number, name in enumerate(self._name.cells):
            table.add_row(name, *(column.cells[number] for column in columns))
        return table

    def _lines(self) -> Iterator[Text]:
        for number, name in enumerate(self._name.cells):
            yield name
            for column in (self._main, self._last, *self._lesser):
                yield Text.assemble(f"  {column.head}: ", column.cells[number])


def _tail(milliseconds: float | None) -> str:
    return NOT_ENOUGH if milliseconds is None else format_ms(milliseconds)


def _memory(count: int | None) -> str:
    return "not known" if count is None else f"{format_count(count)}B" if count >= 1000 else f"{count} B"


def _status(result: LatencyResult) -> Text:
    if not result.trusted:
        return Text("untrusted", style="bold yellow")
    return Text("trusted", style="green") if result.precise else Text("trusted, wide", style="yellow")


def session_line(session: Session) -> str:
    """The target, the clocks that the figures are made of, and how steady the machine was."""
    parts = [f"target {session.target}"]
    clocks = sorted({result.clock for result in session.results.values()})
    parts += [" and ".join(_CLOCKS.get(clock, clock) for clock in clocks)] if clocks else []
    priorities = sorted({result.priority for result in session.results.values()} - {"none"})
    parts += [f"{' and '.join(priorities)} priority"] if priorities else []
    missing = [
        name
        for name in _TAILS
        if session.results and all(getattr(r, f"{name}_ms") is None for r in session.results.values())
    ]
    parts += [f"{' and '.join(missing)}: {NOT_ENOUGH}"] if missing else []
    if session.results:
        drift = max((result.drift for result in session.results.values()), key=lambda value: abs(value - 1))
        parts.append(f"the machine drifted by {100 * (drift - 1):+.1f} %")
    return "; ".join(parts)


def pair_line(pair: Pair) -> str:
    """``A against B: ratio 0.95 [0.94, 0.96] faster``."""
    first, second = one_line(pair.first), one_line(pair.second)
    figures = f"ratio {pair.ratio:.3f} [{pair.low:.3f}, {pair.high:.3f}]"
    return f"{first} against {second}: {figures} {pair.verdict} ({pair.rounds} rounds)"


def caution_lines(session: Session) -> list[str]:
    """What must be known of the figures before they are used: untrusted ones with their reasons, wide intervals."""
    lines = []
    for name, result in session.results.items():
        if not result.trusted:
            why = "; ".join(one_line(reason) for reason in result.reasons) or "no reason was recorded"
            lines.append(f"untrusted: {one_line(name)}: {why}")
        elif not result.precise:
            width = f"+-{100 * result.half_width:.1f} %"
            lines.append(f"wide: {one_line(name)}: the time was up at {width}; give more --max-seconds")
    return lines


def failure_lines(session: Session) -> list[str]:
    """One line for each model that could not be measured."""
    return [f"failed: {one_line(name)}: {one_line(why)}" for name, why in session.failures.items()]


def layers_table(name: str, times: LayerTimes, least_share: float = _LEAST_SHARE) -> Table:
    """Modules as a tree; those below ``least_share`` of the time are one row at the end."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(one_line(name)), title_justify="left")
    for column in ("module", "type"):
        table.add_column(column, overflow="fold")
    for column in ("self", "self %", "total", "total %", "calls"):
        table.add_column(column, justify="right", no_wrap=True)
    whole = sum(layer.self_ms for layer in times.layers)
    shown = [layer for layer in times.layers if layer.total_ms >= least_share * whole]
    for layer, label in zip(shown, _tree_labels([layer.name for layer in shown]), strict=True):
        figures = (
            format_ms(layer.self_ms),
            f"{100 * layer.share:.1f}",
            format_ms(layer.total_ms),
            f"{100 * layer.total_ms / whole:.1f}",
            str(layer.calls),
        )
        table.add_row(Text(label), Text(one_line(layer.type)), *figures)
    rest = [layer for layer in times.layers if layer.total_ms < least_share * whole]
    if rest:
        own = sum(layer.self_ms for layer in rest)
        label = f"{len(rest)} modules below {100 * least_share:g} %"
        table.add_row(Text(label, style="dim"), "", format_ms(own), f"{100 * own / whole:.1f}", "", "", "")
    return table


def _tree_labels(names: Sequence[str]) -> list[str]:
    """Each name after that of the nearest module above it, which need not be its parent: lists are never called."""
    labels = []
    for name in names:
        above = [other for other in names if other and name.startswith(f"{other}.")]
        rest = name[len(max(above, key=len)) + 1 :] if above else name
        labels.append("  " * (len(above) + bool(name)) + (one_line(rest) if name else "(the model)"))
    return labels


def layers_line(times: LayerTimes) -> str:
    """What the figures by module were taken with, what the hooks cost, and whether the parts make the whole."""
    parts = sum(layer.self_ms for layer in times.layers)
    line = (
        f"by {_CLOCKS.get(times.clock, times.clock)}, median of {times.repeats} calls: {format_ms(times.plain_ms)} "
        f"without hooks, {format_ms(times.hooked_ms)} with them ({100 * times.overhead:+.1f} %); "
        f"the modules sum to {format_ms(parts)}"
    )
    if abs(parts / times.plain_ms - 1) > _PARTS_DIFFER:
        line += (
            ", which is not the whole: the hooks weigh on short modules or change what runs, or the machine is busy; "
            "read the shares as rough"
        )
    return line


# -- files -------------------------------------------------------------------------------------------------------------


def session_json(session: Session, layers: dict[str, LayerTimes] | None = None) -> dict[str, Any]:
    """``Session.to_dict`` with ``format``, and ``layers`` by model where they were asked for."""
    described: dict[str, Any] = {"format": FORMAT, **session.to_dict()}
    if layers is not None:
        described["layers"] = {name: times.to_dict() for name, times in layers.items()}
    return described


def picture_format(path: Path) -> str:
    """What the suffix of ``path`` says that a picture is to be. Raises UserMistake for what cannot be drawn."""
    found = path.suffix.lower().removeprefix(".")
    if found not in _PICTURES:
        raise UserMistake(
            f"--plot {path}: the suffix says what is drawn; give one of {', '.join(f'.{name}' for name in _PICTURES)}"
        )
    return found


def write_latency_picture(session: Session, path: Path) -> None:
    """Draw each model's latency with its interval to ``path``, the fastest at the top; untrusted ones hollow.

    Raises UserMistake for a suffix that ``picture_format`` does not know.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = picture_format(path)
    rows = sorted(session.results.items(), key=lambda item: item[1].median_ms, reverse=True)
    figure = Figure(figsize=(9, 1.6 + 0.36 * max(len(rows), 3)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (_, result) in enumerate(rows):
        color = FRONT if result.trusted else BASELINE
        axes.errorbar(
            [result.median_ms],
            [place],
            xerr=[
                [max(0.0, result.median_ms - result.low_ms)],
                [max(0.0, result.high_ms - result.median_ms)],
            ],
            fmt="o",
            color=color,
            markerfacecolor=color if result.trusted else "white",
            capsize=4,
        )
        axes.plot([result.raw_median_ms], [place], marker="|", ms=18, mew=2, color=OTHER, zorder=1)
    axes.set_yticks(range(len(rows)), [_picture_label(name) for name, _ in rows], parse_math=False)
    if rows:
        axes.set_ylim(-0.6, len(rows) - 0.4)
        if _spread([result.median_ms for _, result in rows]) > 20:
            axes.set_xscale("log")
    axes.set_xlabel("latency (ms) with 95 % interval; grey: by the clock alone; hollow: untrusted")
    axes.set_title(f"target {one_line(session.target, 80)}", parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
        figure.savefig(buffer, format=kind, metadata=_UNDATED.get(kind))
    atomic_write_bytes(path, buffer.getvalue())


def _picture_label(name: str) -> str:
    line = one_line(name)
    return line if len(line) <= 48 else f"…{line[-47:]}"  # paths differ at their ends


def _spread(values: Sequence[float]) -> float:
    return max(values) / min(values) if min(values) > 0 else 1.0
