"""Our passes against ToMe and Torch-Pruning: accuracy at equal latency, accuracy and latency at equal MACs, ratios.

    python -m recipes.benchmarks.compression_peers --data DIR/mnist --out recipes/results/compression_peers.json

``--part sit``: a teacher of a small DeiT for each seed; SiT and ToMe at settings that make it 1.7 and 3 times as fast
by measurement, each fine-tuned alike; where SiT slims is chosen by the first seed's validation images. ``--part ofb``:
OFB and Torch-Pruning (GroupTaylor, GroupMagnitude) at half of the MACs, each fine-tuned for the same number of epochs;
and OFB once more with its epoch of search taken off its fine-tuning. ``--part ratios``: what every pass saves in time
on DeiT-Ti with random weights. ``--stage train`` computes; ``plan`` (settings of equal latency, before; it goes on
where it was ended) and ``measure`` (after) need a quiet machine.

At batches of 64 and more set ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296`` first: without them the ratios
of one session scattered by up to a third, with them by some hundredths.

Every finished run is in ``--out`` at once, and is not done again; a run that is ended goes on from there. Needs
torch_pruning, and ToMe (else our own ``token_merging`` stands in for it, and the result says so).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.finetune import finetune
from compress.passes import parse_pass
from nas.environment import describe_environment
from nas.errors import UserMistake
from nas.files import atomic_write_json
from nas.latency import Target
from recipes.benchmarks import _compression_lessons as lessons
from recipes.benchmarks._compression_latency import BASE, figures, of_widths, slimmed, widths_of
from recipes.benchmarks._compression_others import merged, merging_tool, pruned_to_macs, pruning_tool
from recipes.benchmarks._compression_plan import decided, first_guess
from recipes.benchmarks._compression_ratios import half_the_macs, models_of

SPEEDS = (1.7, 3.0)
SHARE, LENIENT = 0.5, 0.52
DENSE = "dense, trained on, rate 0.0005"
_RATE = ", rate "
OFB_SEARCH = 1
OFB_FINETUNE = {"OFB": lessons.EPOCHS, "OFB, search counted": lessons.EPOCHS - OFB_SEARCH}
"""What is called so -> epochs of fine-tuning after those of the search."""


class Record:
    """The JSON file: what was found so far."""

    def __init__(self, path: Path, command: str):
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.found.setdefault("commands", [])
        if command not in self.found["commands"]:
            self.found["commands"].append(command)

    def section(self, *names: str) -> dict[str, Any]:
        place = self.found
        for name in names:
            place = place.setdefault(name, {})
        return place

    def save(self) -> None:
        self.found["summary"] = summary(self.found)
        self.found["environment"] = describe_environment()
        # glibc that hands large blocks back after each call seems to be what scatters latencies.
        self.found["allocator"] = {
            name: text for name, text in os.environ.items() if name.startswith("MALLOC_")
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.path, self.found)


class Clock:
    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def goes_on(self) -> bool:
        return time.monotonic() < self.end


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="mnist", help="folder of MNIST or CIFAR-10, or another source of the task"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--part", choices=["sit", "ofb", "ratios"], action="append", help="all by default")
    parser.add_argument("--stage", choices=["plan", "train", "measure", "all"], default="all")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/compression_peers"), help="teachers and caches"
    )
    parser.add_argument("--out", type=Path, default=Path("recipes/results/compression_peers.json"))
    parser.add_argument("--minutes", type=float, default=600.0, help="start nothing new after this time")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each final measurement")
    parser.add_argument("--batch", type=int, default=64, help="at which latencies are made equal")
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts = given.part or ["sit", "ofb", "ratios"]
    record = Record(
        given.out, f"python -m recipes.benchmarks.compression_peers --data {Path(given.data).name}"
    )
    clock = Clock(given.minutes)
    if given.stage in ("plan", "all") and "sit" in parts:
        plan(given, record, clock)
    if given.stage in ("train", "all"):
        train_all(given, parts, record, clock)
    if given.stage in ("measure", "all"):
        measure_all(given, parts, record)
    print(json.dumps(summary(record.found), indent=1))


def plan(given: argparse.Namespace, record: Record, clock: Clock) -> None:
    """Find, by measuring, the settings at which SiT and ToMe are equally fast."""
    lesson = lessons.make_lesson(given.data, 0, given.work)
    model, example = lessons.build(lesson.task).eval(), lesson.task.example_inputs(1, lessons.CPU)
    if "first_guess" not in record.found:
        record.found["first_guess"] = first_guess(model, example, SPEEDS, given.batch, given.seconds)
        record.save()
    found = record.section("equal_latency")
    for speed, guess in record.found["first_guess"]["speeds"].items():
        if speed not in found and clock.goes_on():
            found[speed] = decided(model, example, guess, given.batch, given.seconds / 2)
            record.save()


def train_all(given: argparse.Namespace, parts: list[str], record: Record, clock: Clock) -> None:
    """Everything that computes; ends early, between two runs, when the time is over."""
    if "ratios" in parts:
        passes = record.section("ratios", "passes")
        passes |= half_the_macs(print, passes)
        record.save()
    if set(parts) == {"ratios"}:
        return
    if "sit" in parts and len(record.section("equal_latency")) < len(SPEEDS):
        raise UserMistake(f"{given.out}: has no settings of equal latency yet; run --stage plan first")
    # The higher rate is mostly the better one; what the teacher itself gains from more epochs is the least urgent.
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    high, low = (methods(parts, rate) for rate in sorted(lessons.RATES, reverse=True))
    for names, seed in itertools.product((high, low, [DENSE]), seeds):
        if not clock.goes_on():
            return
        lesson = lessons.make_lesson(given.data, seed, given.work)
        found = lessons.teacher_of(lesson, clock.goes_on)
        if found is None:
            return
        teacher, facts = found
        record.found["setup"] = setup(lesson)
        runs = record.section("runs", f"seed {seed}")
        if "teacher" not in runs:
            runs["teacher"] = {**lessons.judged(teacher, lesson), **facts}
            record.save()
        if "sit" in parts and not choose(teacher, lesson, record, clock):
            return
        for name in names:
            if name not in runs and clock.goes_on():
                runs[name] = run(name, teacher, lesson, record.section("equal_latency"))
                print(f"seed {seed}: {name}: {runs[name]}", flush=True)
                record.save()


def choose(teacher: nn.Module, lesson: lessons.Lesson, record: Record, clock: Clock) -> bool:
    """Whether it is known where SiT slims; if not, the first seed's validation images tell, at the higher rate."""
    for speed, plan in record.section("equal_latency").items():
        if "sit" in plan:
            continue
        tried = record.section("sit_places", speed)
        for place, setting in plan["candidates"].items():
            if place not in tried:
                if not clock.goes_on():
                    return False
                tried[place] = run(tuned_sit(speed), teacher, lesson, {speed: {"sit": setting}})
                print(f"SiT {speed} {place}: {tried[place]['validation']}", flush=True)
                record.save()
        best = max(tried, key=lambda place: tried[place]["validation"])
        plan["sit"] = plan["candidates"][best]
        for place, found in tried.items():
            if place != best:
                found.pop("test", None)  # of what validation did not choose nobody needs to know it
        record.section("runs", f"seed {lesson.seed}")[tuned_sit(speed)] = tried[best]
        record.save()
    return True


def tuned_sit(speed: str) -> str:
    """Name of the run by which a place is chosen."""
    return f"SiT {speed}{_RATE}{max(lessons.RATES):g}"


def methods(parts: list[str], rate: float) -> list[str]:
    """Names of the runs of one seed at one learning rate."""
    names = []
    if "sit" in parts:
        names += [f"{kind} {speed:g}x" for speed in SPEEDS for kind in ("SiT", "ToMe")]
    if "ofb" in parts:
        names += [*OFB_FINETUNE, "Torch-Pruning GroupTaylor", "Torch-Pruning GroupMagnitude"]
    return [f"{name}{_RATE}{rate:g}" for name in names]


def setup(lesson: lessons.Lesson) -> dict[str, Any]:
    return {
        "data": lesson.task.describe(),
        "model": {**lessons.SHAPE, "patch_size": 4},
        "batch": lessons.BATCH,
        "teacher": {"epochs": lessons.TEACHER_EPOCHS, "learning_rate": lessons.TEACHER_RATE},
        "every_method": {
            "epochs": lessons.EPOCHS,
            "learning_rates": lessons.RATES,
            "teacher": "the same checkpoint",
        },
        "ofb": {"search_epochs": OFB_SEARCH, "finetune_epochs": OFB_FINETUNE},
        "merging": merging_tool(),
        "pruning": pruning_tool(),
    }


def run(name: str, teacher: nn.Module, lesson: lessons.Lesson, settings: dict[str, Any]) -> dict[str, Any]:
    """One method from the teacher to its figures."""
    context, began = lessons.context_of(lesson, teacher), time.process_time()
    method, _, rate = name.partition(_RATE)
    kind, _, speed = method.partition(" ")
    facts: dict[str, Any] = {}
    if kind == "SiT":
        places = settings[f"{speed}"]["sit"]
        text = f"sit:slim_after={places['slim_after']},tokens={places['tokens']},learning_rate={rate}"
        made, facts["pass"] = parse_pass(text).apply(teacher, context), text
    elif method in OFB_FINETUNE:
        text = f"ofb:target={SHARE},measure=macs,epochs={OFB_SEARCH},finetune_epochs={OFB_FINETUNE[method]}"
        text += f",learning_rate={rate}"
        made, facts["pass"] = parse_pass(text).apply(teacher, context), text
        facts["widths"] = widths_of(made)
    else:
        if kind == "ToMe":
            made = merged(teacher, settings[f"{speed}"]["merging"]["r"])
            facts["untrained"] = lessons.judged(made, lesson)["validation"]
        elif kind == "Torch-Pruning":
            made, facts["ratio"] = pruned_to_macs(teacher, speed, LENIENT, context, bottleneck=True)
            facts["untrained"] = lessons.judged(made, lesson)["validation"]
            facts["widths"] = widths_of(made)
        else:
            made = copy.deepcopy(teacher).requires_grad_(True)
        finetune(made, context, epochs=lessons.EPOCHS, learning_rate=float(rate))
    seconds = time.process_time() - began
    return {**lessons.judged(made, lesson), **facts, "cpu_seconds": round(seconds, 1)}


def measure_all(given: argparse.Namespace, parts: list[str], record: Record) -> None:
    """The latencies of everything that was found, all models of one table in the same rounds."""
    latency = record.section("latency")
    if "ratios" in parts:
        measure_ratios(record.section("ratios"), record, given.seconds)
    if set(parts) == {"ratios"}:
        return
    lesson = lessons.make_lesson(given.data, 0, given.work)
    model, example = lessons.build(lesson.task).eval(), lesson.task.example_inputs(1, lessons.CPU)
    batches = sorted({given.batch, 16, 1}, reverse=True)
    if "sit" in parts:
        models, rivals = {BASE: model}, {}
        for speed, found in record.found["equal_latency"].items():
            models[f"SiT {speed}"] = slimmed(model, found["sit"], example)
            models[f"ToMe {speed}"] = merged(model, found["merging"]["r"])
            rivals[f"SiT {speed}"] = f"ToMe {speed}"
        latency["sit"] = figures(models, example, batches, given.seconds, rivals=rivals)
        record.save()
    if "ofb" in parts:
        models, widths = {BASE: model}, []
        for seed, runs in record.found["runs"].items():
            for method in methods_of({seed: runs}):
                found = preferred(runs, method)
                if "widths" in found and found["widths"] not in widths:  # some prune to the same widths
                    widths.append(found["widths"])
                    models[f"{method}, {seed}"] = of_widths(model, found["widths"])
        latency["ofb"] = figures(models, example, batches, given.seconds)
        record.save()


def _target(batch: int) -> Target:
    return Target.parse(f"cpu:1@{batch}")


def measure_ratios(ratios: dict[str, Any], record: Record, seconds: float) -> None:
    """Batch 16 takes three times as long as batch 1; rows that are there already are not measured again."""
    found = ratios.setdefault("latency", {})
    tables = [found.setdefault(f"batch {batch}", {}).setdefault(str(_target(batch)), {}) for batch in (16, 1)]
    wanted = {name: row for name, row in ratios["passes"].items() if any(name not in one for one in tables)}
    models, example, ratios["peers_macs_ratio"] = models_of(wanted)
    for batch, share, table in zip((16, 1), (3, 1), tables, strict=True):
        missing = {name: one for name, one in models.items() if name not in table}
        if missing:
            part = share * seconds * len(missing) / len(ratios["passes"])
            [(_, rows)] = figures({BASE: models[BASE], **missing}, example, [batch], part).items()
            table.update({name: rows[name] for name in missing})
            record.save()


def methods_of(runs: dict[str, Any]) -> list[str]:
    """Names of the methods of all seeds, without their rates."""
    return list(dict.fromkeys(name.partition(_RATE)[0] for seed in runs.values() for name in seed))


def preferred(runs: dict[str, Any], method: str) -> dict[str, Any]:
    """The run of one seed whose rate is the best by validation, with the number of those ``tried``; empty without."""
    tried = [one for name, one in runs.items() if name.partition(_RATE)[0] == method]
    return max(tried, key=lambda one: one["validation"]) | {"tried": len(tried)} if tried else {}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Mean accuracies of every method over the seeds at the rate that validation prefers; its share of the MACs."""
    rows: dict[str, Any] = {}
    runs = found.get("runs", {})
    for method in methods_of(runs):
        both = [
            (best, seed["teacher"]["macs"]) for seed in runs.values() if (best := preferred(seed, method))
        ]
        every, dense = zip(*both, strict=True)
        tests = [one["test"] for one in every]
        rows[method] = {
            "seeds": len(every),
            "rates_tried": [one["tried"] for one in every],
            "test": round(statistics.mean(tests), 4),
            "test_of_each": tests,
            "test_range": round(max(tests) - min(tests), 4),
            "validation": round(statistics.mean(one["validation"] for one in every), 4),
            "macs_ratio": round(
                statistics.mean(one["macs"] / whole for one, whole in zip(every, dense, strict=True)), 4
            ),
        }
    return rows


if __name__ == "__main__":
    main()
