"""What is said of latencies that do not compare, that are not to be trusted, and of budgets that they leave open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nas.report.formats import one_line

if TYPE_CHECKING:
    from nas.report.data import RunReport, TrialRow

__all__ = ["UNTRUSTED", "differing", "measured_on", "notes", "short_conditions"]

UNTRUSTED = "?"
"""Behind a latency that was measured while the machine was out of bounds."""

_NAMED = 8
_DIGITS = 8


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Conditions in which two identities differ, as ``driver: Linux 6.1, now Linux 6.8``; none: their figures compare.

    Args:
        before, now: JSON forms of a ``nas.latency.identity.Identity``. Batch, input sizes and the architecture's key
            are not looked at, and of the versions only those that both tell: some runtimes tell more of a model.
    """
    names = [name for name in {**before, **now} if name not in ("key", "batch", "inputs", "versions")]
    pairs = {name: (_plain(name, before.get(name)), _plain(name, now.get(name))) for name in names}
    old, new = before.get("versions") or {}, now.get("versions") or {}
    pairs.update({f"version of {name}": (old[name], new[name]) for name in old if name in new})
    return [f"{name}: {one_line(a, 40)}, now {one_line(b, 40)}" for name, (a, b) in pairs.items() if a != b]


def _plain(name: str, value: Any) -> Any:
    """Which cores they were does not matter, only how many."""
    return len(value) if name == "affinity" and value is not None else value


def short_conditions(conditions: str | None) -> str:
    """``60f15749-wall`` of a digest and its clock; ``unknown`` where a record holds none."""
    if conditions is None:
        return "unknown"
    digest, dash, clock = one_line(conditions, 60).partition("-")
    return f"{digest[:_DIGITS]}{dash}{clock}"


def measured_on(report: RunReport) -> str:
    """Where and under which conditions the finalists were measured again; empty where no record says it."""
    for found in report.finalists or ():
        name = (found.get("identity") or {}).get("device_name")
        conditions = found.get("conditions")
        texts = [one_line(name, 40)] if name else []
        texts += [f"conditions {short_conditions(conditions)}"] if conditions else []
        if texts:
            return ", ".join(texts)
    return ""


def notes(report: RunReport) -> list[str]:
    """What must be read beside the front: whose latencies are not in it, which are in doubt, which budget is open."""
    return [text for text in (_elsewhere(report), _untrusted(report), _budget(report)) if text]


def _elsewhere(report: RunReport) -> str:
    groups = report.groups()
    if len(groups) < 2:
        return ""
    (main, kept), *others = groups
    texts = [
        f"{len(rows)} measured under {short_conditions(name)} ({_numbers(rows)})" for name, rows in others
    ]
    return (
        f"Latencies of other conditions do not compare: this is of the {len(kept)} candidates measured under "
        f"{short_conditions(main)}; not in it: {', '.join(texts)}."
    )


def _untrusted(report: RunReport) -> str:
    rows = report.usable()
    doubtful = [row for row in rows if not row.trusted]
    if not doubtful:
        return ""
    reasons = Counter(str(reason) for row in doubtful for reason in (row.latency or {}).get("reasons") or ())
    why = f"; most often: {one_line(reasons.most_common(1)[0][0], 200)}" if reasons else ""
    return (
        f"{UNTRUSTED} untrusted: measured while the machine was out of bounds, {len(doubtful)} of {len(rows)} "
        f"latencies ({_numbers(doubtful)}){why}."
    )


def _budget(report: RunReport) -> str:
    doubts = [(row, report.budget_doubt(row)) for row in report.front()]
    texts = []
    if open_ := [row for row, doubt in doubts if doubt == "untrusted"]:
        texts.append(f"not known to hold for {_numbers(open_)}, whose latency is untrusted")
    if over := [row for row, doubt in doubts if doubt == "over"]:
        texts.append(f"not held by {_numbers(over)} when measured again")
    return f"The latency budget of {report.latency_budget:g} ms is {', and '.join(texts)}." if texts else ""


def _numbers(rows: Iterable[TrialRow]) -> str:
    numbers: Sequence[int] = [row.number for row in rows]
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return ", ".join(f"#{number}" for number in numbers[:_NAMED]) + more
