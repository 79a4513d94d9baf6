"""Every compression pass on the models of timm that people bring: does it work there, and is the result faster?

    python -m recipes.benchmarks.compression_timm build      # runs the passes, writes results to --work
    python -m recipes.benchmarks.compression_timm measure    # against the model itself, batch 1, one thread
    python -m recipes.benchmarks.compression_timm table

Both go on where they stopped: what --out already holds is not done again, and no new piece is begun after --seconds.
Weights are random and training is a batch of random images, so nothing is learnt about accuracy here; structure, size,
exactness, saving and latency do not depend on it. Passes that would measure by themselves whether they help are told
not to (``keep_anyway``, ``keep=anyway``), because their results are measured here like all others.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from compress import PassFailed, compress, list_passes, load
from compress.measuring import measure_against
from compress.outputs import relative_gap
from nas.environment import describe_environment
from nas.errors import UserMistake
from nas.files import atomic_write_json, read_json
from nas.latency import Target

MODELS = (
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit_small_patch16_224",
    "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "deit_base_patch16_224",
    "vit_base_patch16_224",
)
TEXTS = {
    "emoe": ["emoe:keep=anyway"],
    "dynamic_quantization": ["dynamic_quantization:keep_anyway=true"],
    "low_rank": ["low_rank:keep=anyway"],
    "structured": ["structured", "structured:units=mlp"],
    "token_merging": ["token_merging:r=8"],
}
TARGET = "cpu:1"
TOGETHER = 6
"""Results in one session: with more, a slow model would have too few rounds in the time."""
ROUNDS = 9
"""Below this no interval is believed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("build", "measure", "table"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--passes", nargs="+", default=passes(), metavar="PASS")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing new after this")
    parser.add_argument("--measure", type=float, default=30.0, help="seconds for the models of one session")
    parser.add_argument("--work", type=Path, default=Path("compression_timm"), help="where results are kept")
    parser.add_argument("--out", type=Path, default=Path("recipes/results/compression_timm.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + given.seconds
    record = read_json(given.out) if given.out.exists() else {"rows": []}
    if given.stage == "build":
        build(record, given, until)
    elif given.stage == "measure":
        measure(record, given, until)
    show(record["rows"])


def passes() -> list[str]:
    """All of ours; those that only pass on to another package are left out where that is missing."""
    known = [name for name in list_passes() if name != "nni" or importlib.util.find_spec("nni")]
    return [text for name in known for text in TEXTS.get(name, [name])]


def build(record: dict[str, Any], given: argparse.Namespace, until: float) -> None:
    """One row for each model and pass; results that work are saved."""
    done = {(row["model"], row["pass"]) for row in record["rows"]}
    for name in given.models:
        for text in given.passes:
            if (name, text) in done or time.monotonic() > until:
                continue
            row = {"model": name, "pass": text, **outcome(name, text, place_of(given.work, name, text))}
            print(name, text, row["outcome"], row.get("reason", ""), f"{row['seconds']:.0f} s", flush=True)
            record["rows"].append(row)
            store(record, given.out)


def outcome(name: str, text: str, place: Path) -> dict[str, Any]:
    """What the pass does to the model, with figures, or the sentence of its refusal."""
    started = time.perf_counter()
    shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped between saving and noting it
    model = original(name)
    generator = torch.Generator().manual_seed(1)
    size = model.default_cfg["input_size"]  # type: ignore[index]
    data = [(torch.randn(2, *size, generator=generator), torch.tensor([1, 2]))]
    try:
        result = compress(model, text, train=data, epochs=1, measure_seconds=0, savable=True)
    except (UserMistake, PassFailed) as refusal:
        return {"outcome": "refuses", "reason": str(refusal), "seconds": time.perf_counter() - started}
    result.save(place)
    again, x = load(place).model, torch.randn(3, *size, generator=generator)
    with torch.no_grad():
        usual, now, loaded, alone = model(x), result.model(x), again(x), result.model(x[:1])
    return {
        "outcome": "works",
        "params_ratio": result.final.params / result.original.params,
        "macs_ratio": result.final.macs / result.original.macs,
        "change_of_outputs": relative_gap(now, usual),
        "change_by_saving": relative_gap(loaded, now),
        "change_by_batch": relative_gap(alone, now[:1]),
        "notes": list(result.final.notes),
        "seconds": time.perf_counter() - started,
    }


def measure(record: dict[str, Any], given: argparse.Namespace, until: float) -> None:
    """Latency of each model's results against it, some in one session with it; those that had too few rounds again."""
    for name in given.models:
        rows = [row for row in record["rows"] if row["model"] == name and row["outcome"] == "works"]
        waiting = [row for row in rows if row.get("latency", {}).get("rounds", 0) < ROUNDS]
        for start in range(0, len(waiting), TOGETHER):
            if time.monotonic() > until:
                return
            measure_together(name, waiting[start : start + TOGETHER], given)
            store(record, given.out)
            print(name, "measured", flush=True)


def measure_together(name: str, rows: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """One session; its figures are put into the rows."""
    results = {row["pass"]: load(place_of(given.work, name, row["pass"])) for row in rows}
    models = {text: result.model for text, result in results.items()}
    example = next(iter(results.values())).example
    session = measure_against(
        {"original": original(name), **models},
        "original",
        example,
        Target.parse(TARGET),
        seconds=given.measure,
    )
    for row in rows:
        pair = session.pair(row["pass"], "original")
        row["latency"] = {
            "ratio": pair.ratio,
            "low": pair.low,
            "high": pair.high,
            "verdict": pair.verdict,
            "rounds": pair.rounds,
            "median_ms": session.results[row["pass"]].median_ms,
            "original_ms": session.results["original"].median_ms,
        }


def original(name: str) -> nn.Module:
    """timm's model with random weights, the same ones each time."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name).eval()
    return model


def place_of(work: Path, name: str, text: str) -> Path:
    """Directory of a result."""
    return work / name / "".join(letter if letter.isalnum() else "-" for letter in text)


def store(record: dict[str, Any], out: Path) -> None:
    """Write what is known so far."""
    order = list(MODELS)
    record["rows"].sort(
        key=lambda row: (order.index(row["model"]) if row["model"] in order else 99, row["pass"])
    )
    record.update(
        what="each compression pass on models of timm: works or refuses, and the measured latency",
        target=f"{TARGET}, batch 1",
        setting="random weights, one batch of two random images to train on",
        environment=describe_environment(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(out, record)


def show(rows: list[dict[str, Any]]) -> None:
    """One line for each row; ``!`` where a pass works but is not measured to be faster."""
    for row in rows:
        head = f"{row['model']:<34}{row['pass']:<40}"
        if row["outcome"] == "refuses":
            print(f"{head}refuses: {row['reason']}")
            continue
        figures = f"params {row['params_ratio']:.3f}  MACs {row['macs_ratio']:.3f}"
        if latency := row.get("latency"):
            mark = "" if latency["verdict"] == "faster" else f"  ! {latency['verdict']}"
            figures += f"  latency {latency['ratio']:.3f} [{latency['low']:.3f}, {latency['high']:.3f}]{mark}"
        print(f"{head}{figures}")


if __name__ == "__main__":
    main()
