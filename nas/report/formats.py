"""Numbers, names and foreign texts as people are to read them, and what an objective's name tells."""

from __future__ import annotations

import math

import numpy as np

__all__ = [
    "as_number",
    "format_count",
    "format_interval",
    "format_ms",
    "format_seconds",
    "format_value",
    "is_cost",
    "is_latency",
    "objective_label",
    "one_line",
]

# Names that say what a model costs; every other objective says how good it is.
_COST_NAMES = frozenset({"params", "macs", "flops", "memory", "peak_memory", "energy"})


def is_latency(name: str) -> bool:
    """Whether the objective ``name`` is a measured latency."""
    return name.startswith("latency")


def is_cost(name: str) -> bool:
    """Whether the objective ``name`` says what a model costs rather than how good it is."""
    return is_latency(name) or name in _COST_NAMES


def one_line(text: object, length: int | None = None) -> str:
    """``text`` on one line, without control characters so that it cannot steer a terminal, cut at ``length``."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if length is None or len(line) <= length else f"{line[: length - 1]}…"


def as_number(value: object) -> float | None:
    """``value`` as a finite float; None for anything else (text, None, bool, NaN, infinity)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def format_count(value: float) -> str:
    """Three significant digits with a unit: ``512``, ``34.1 k``, ``3.4 M``, ``1.25 G``, ``2 T``."""
    scaled, unit = float(value), ""
    for larger in ("k", "M", "G", "T"):
        if abs(float(f"{scaled:.3g}")) < 1000:
            break
        scaled, unit = scaled / 1000, larger
    digits = f"{scaled:.3g}" if abs(scaled) < 1000 else f"{scaled:,.0f}"
    return f"{digits} {unit}".rstrip()


def format_ms(milliseconds: float) -> str:
    """A latency with three significant digits: ``0.42 ms``, ``12.3 ms``, ``1,234 ms``."""
    digits = f"{milliseconds:,.0f}" if abs(milliseconds) >= 999.5 else f"{milliseconds:.3g}"
    return f"{digits} ms"


def format_seconds(seconds: float | None) -> str:
    """A duration: ``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 05 min``; an empty text for None."""
    if seconds is None:
        return ""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_interval(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """``0.42 ms (0.41-0.43)``: as many decimals as the interval's width supports, at least two digits."""
    unit = f" {unit}" if unit else ""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return f"{value:.3g}{unit}"
    enough = 1 - math.floor(math.log10(abs(value))) if value else 2
    supported = math.ceil(-math.log10(high - low)) if high > low else enough + 2
    decimals = max(0, enough, min(supported, enough + 2))
    return f"{value:,.{decimals}f}{unit} ({low:,.{decimals}f}-{high:,.{decimals}f})"


def format_value(name: str, value: float) -> str:
    """One objective or metric, by its name: milliseconds, counts, otherwise about four digits."""
    if name.endswith("_ms"):
        return format_ms(value)
    if name in _COST_NAMES:
        return format_count(value)
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return f"{value:.3g}"
    return f"{value:.{4 if size < 1 else 3 if size < 10 else 2}f}"


def objective_label(name: str) -> str:
    """A name for people, with its unit: ``latency_ms`` -> ``latency (ms)``, ``params`` -> ``parameters``."""
    if name.endswith("_ms"):
        return f"{name[:-3].replace('_', ' ')} (ms)"
    return {"params": "parameters", "macs": "MACs", "flops": "FLOPs"}.get(name, name.replace("_", " "))
