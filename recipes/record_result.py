"""Summarise a finished run as JSON with hardware and versions, and copy its picture.

nas search --recipe recipes/digits.yaml --out runs/digits
python recipes/record_result.py runs/digits recipes/results/digits.json --command "nas search ..." --picture
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import nas
from nas.files import atomic_write_text


def summarise(run: Path, command: str) -> dict[str, Any]:
    """The facts of a run that its README figures need."""
    report = nas.read_run(run).report()
    members = {row.number for row in report.front()}
    name, direction = report.objectives[0]
    sign = 1 if direction == "maximize" else -1
    best = max(report.front(), key=lambda row: sign * row.values[name], default=None)
    return {
        "command": command,
        "verdict": report.verdict(),
        "seconds": _wall_seconds(run / "run.log"),
        "candidates": {state: len(report.in_state(state)) for state in ("complete", "pruned", "failed")},
        "space": report.space,
        "task": report.task_description,
        "target": report.target,
        "test_value_of_the_best_by_validation": report.test_value(best) if best else None,
        "test_metric": report.test_metric,
        "baseline": report.baseline,
        "finalists": report.finalists,
        "trials": [
            {
                "number": row.number,
                "name": row.name,
                "state": row.state,
                "on_front": row.number in members,
                "values": row.values,
                "latency": row.latency,
                "params": row.metrics.get("params"),
                "macs": row.metrics.get("macs"),
                "seconds": row.seconds,
                "curve": [{k: v for k, v in point.items() if k != "quality"} for point in row.curve],
                "architecture": row.architecture,
            }
            for row in report.trials
        ],
        "recipe": {key: value for key, value in report.recipe.items() if key != "data"},
        "environment": report.environment,
    }


def _wall_seconds(log: Path) -> float | None:
    """From the first to the last line of the run's log; None when there are not two."""
    stamps = re.findall(
        r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})", log.read_text(encoding="utf-8"), re.MULTILINE
    )
    times = [datetime.fromisoformat(f"{day}.{milliseconds}000") for day, milliseconds in stamps]
    return (times[-1] - times[0]).total_seconds() if len(times) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--command", required=True, help="the command that made the run")
    parser.add_argument("--picture", action="store_true", help="copy pareto.png beside the JSON")
    arguments = parser.parse_args()
    facts = summarise(arguments.run, arguments.command)
    atomic_write_text(arguments.out, json.dumps(facts, indent=1) + "\n")
    if arguments.picture:
        shutil.copyfile(arguments.run / "pareto.png", arguments.out.with_suffix(".png"))
    print(facts["verdict"])


if __name__ == "__main__":
    main()
