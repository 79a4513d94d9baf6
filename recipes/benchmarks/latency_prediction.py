"""How well is latency predicted from 5, 10, 20, 40 measurements? On models that are really measured, on this machine.

    python -m recipes.benchmarks.latency_prediction --measurements FILE --out recipes/results/latency_prediction.json

Vision transformers (depth 4-12, width 128-384, heads of 32 or 64, ratio 2-4, 96-192 pixels) and samples of three
spaces, with the inputs of their tasks, are measured in two sessions; predictors are fitted to samples of the first and
scored on the rest of the second, so that no score is better than the measurement repeats (and, as ``same session``, on
the rest of the first). Compared: this predictor on samples drawn at random and on samples that it chose, one constant x
MACs, boosting on the knobs, a table of measured blocks. Further parts: batches pooled in one predictor, and a move to
another target with 5 and 10 samples.

``--measurements`` keeps what was measured: a run that was cut short goes on there, and scoring needs no new
measurement. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor, nn

from nas.environment import describe_environment
from nas.files import atomic_write_json, read_json
from nas.latency import Options, Plan, Target, measure_together
from nas.latency.prediction import (
    Block,
    BlockTable,
    LatencyPredictor,
    blocks_of,
    choose_samples,
    count_work,
    pooled_identity,
)
from nas.tasks import make_task
from spaces import get_space

__all__ = ["main"]

Array = NDArray[np.float64]
Made = tuple[nn.Module, tuple[Tensor, ...]]
CLASSES = 100
TOGETHER = 16
SPACES = ("efficient_transformer:small", "efficient_transformer:small_translation", "lv_vit:small")


def vit(knobs: dict[str, Any], batch: int) -> Made:
    """A vision transformer and images for it."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(patch_size=16, num_classes=CLASSES, **knobs)
    return model, (torch.randn(batch, 3, knobs["img_size"], knobs["img_size"]),)


def from_space(name: str) -> Callable[[dict[str, Any], int], Made]:
    """What makes a model of a space and inputs of its task."""
    space = get_space(name)
    task = make_task(space.task or "image_classification")

    def make(architecture: dict[str, Any], batch: int) -> Made:
        torch.manual_seed(0)
        model = space.build(architecture, task.signature)
        return model, task.example_inputs(batch, torch.device("cpu"))

    return make


def families(limit: int, seed: int = 0) -> dict[str, tuple[list[dict[str, Any]], Callable[..., Made]]]:
    """Names -> candidates by their knobs, and what makes one."""
    rng = random.Random(seed)
    vits: list[dict[str, Any]] = []
    while len(vits) < limit:
        width = rng.choice([128, 192, 256, 320, 384])
        knobs = {
            "img_size": rng.choice([96, 112, 128, 144, 160, 192]),
            "depth": rng.randint(4, 12),
            "embed_dim": width,
            "num_heads": width // rng.choice([32, 64]),
            "mlp_ratio": rng.choice([2, 3, 4]),
        }
        if knobs not in vits:
            vits.append(knobs)
    found: dict[str, tuple[list[dict[str, Any]], Callable[..., Made]]] = {"vit": (vits, vit)}
    for name in SPACES:
        space = get_space(name)
        found[name] = ([space.sample(rng) for _ in range(limit // 2)], from_space(name))
    return found


class Measured:
    """Measured milliseconds by name, kept in a file."""

    def __init__(self, path: Path, seconds: float):
        self.path = path
        self.seconds = seconds
        self.scale = path.with_suffix(".scale.json")
        self.data: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}

    def complete(
        self, session: str, makers: dict[str, Callable[[], Made]], target: Target
    ) -> dict[str, float]:
        """Milliseconds of all of ``makers``; those of this session that are not known yet are measured now."""
        key = f"{session} {target}"
        known = self.data.setdefault(key, {})
        missing = [name for name in makers if name not in known]
        # In another order than they were made, or the drift of the machine would look like a difference of models.
        random.Random(key).shuffle(missing)
        for start in range(0, len(missing), TOGETHER):
            group = {name: makers[name]() for name in missing[start : start + TOGETHER]}
            plan = Plan(max_seconds=self.seconds * len(group), precision=0.01)
            found = measure_together(group, target, plan=plan, options=Options(scale=self.scale))
            for name, result in found.results.items():
                known[name] = {
                    "ms": result.median_ms, "half_width": result.half_width, "trusted": result.trusted,
                    "clock": result.clock, "identity": pooled_identity(result.identity),
                }  # fmt: skip
            atomic_write_json(self.path, self.data)
            print(key, start + len(group), "of", len(missing), flush=True)
        return {name: known[name]["ms"] for name in makers if name in known}

    def summary(self, session: str, names: Iterable[str], target: Target) -> dict[str, Any]:
        """How good the measurements were."""
        known = self.data[f"{session} {target}"]
        entries = [known[name] for name in names if name in known]
        return {
            "models": len(entries),
            "trusted": sum(e["trusted"] for e in entries),
            "median_half_width": round(float(np.median([e["half_width"] for e in entries])), 4),
            "identities": len({e["identity"] for e in entries}),
            "clocks": sorted({e["clock"] for e in entries}),
        }


def scores(found: Array, measured: Array) -> dict[str, float]:
    """Kendall tau and how near the values are."""
    error = np.abs(found / measured - 1)
    return {
        "kendall": float(kendalltau(found, measured)[0]),
        "within_10_percent": float(np.mean(error <= 0.1)),
        "within_5_percent": float(np.mean(error <= 0.05)),
        "median_error": float(np.median(error)),
    }


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Means over draws, and how many there were; None where no draw had a value (tau of one model)."""
    means: dict[str, float | None] = {}
    for name in rows[0]:
        values = [row[name] for row in rows if np.isfinite(row[name])]
        means[name] = round(float(np.mean(values)), 4) if values else None
    return {**means, "draws": len(rows)}


def predicted(predictor: LatencyPredictor, work: Sequence[Any], measured: Array) -> dict[str, float]:
    """Scores of a predictor with its intervals."""
    found = predictor.predict_many(work)
    inside = [p.low_ms <= t <= p.high_ms for p, t in zip(found, measured, strict=True)]
    return {
        **scores(np.array([p.median_ms for p in found]), measured),
        "covered": float(np.mean(inside)),
        "trusted": float(np.mean([p.trusted for p in found])),
        "half_width": float(np.median([min(p.high_ms / p.median_ms - 1, 10.0) for p in found])),
    }


def chosen_samples(pool: Sequence[int], work: Sequence[Any], ms: Array, count: int) -> list[int]:
    """What the predictor would have asked to be measured, two at a time after the corners."""
    taken = [pool[i] for i in choose_samples([work[i] for i in pool], [], min(count, 8))]
    while len(taken) < count:
        predictor = LatencyPredictor().fit([work[i] for i in taken], ms[taken].tolist())
        more = choose_samples(
            [work[i] for i in pool], [work[i] for i in taken], min(2, count - len(taken)), predictor=predictor
        )
        taken += [pool[i] for i in more]
    return taken


def boosting(knobs: Array, ms: Array, others: Array) -> Array:
    """Gradient boosting on the raw knobs, as a predictor without counted work."""
    from sklearn.ensemble import GradientBoostingRegressor

    trained = GradientBoostingRegressor(random_state=0).fit(knobs, np.log(ms))
    return np.asarray(np.exp(trained.predict(others)))


def compare(
    work: Sequence[Any], knobs: Array | None, first: Array, second: Array, sizes: Sequence[int], draws: int
) -> dict[str, Any]:
    """All predictors at all sizes: fitted to samples of the first session, scored on the rest of the second."""
    macs = np.array([w.macs for w in work])
    result: dict[str, Any] = {}
    for size in [s for s in sizes if s < 0.8 * len(work)]:
        rows: dict[str, list[dict[str, float]]] = {}
        for draw in range(draws):
            pool = random.Random(draw).sample(range(len(work)), len(work))
            train = pool[:size]
            rest = pool[size:]
            ours = LatencyPredictor().fit([work[i] for i in train], first[train].tolist())
            rows.setdefault("random", []).append(predicted(ours, [work[i] for i in rest], second[rest]))
            same = predicted(ours, [work[i] for i in rest], first[rest])
            rows.setdefault("random, same session", []).append(same)
            constant = float(np.median(first[train] / macs[train]))
            rows.setdefault("macs", []).append(scores(macs[rest] * constant, second[rest]))
            if knobs is not None:
                found = boosting(knobs[train], first[train], knobs[rest])
                rows.setdefault("boosting", []).append(scores(found, second[rest]))
            if draw < draws // 4 + 1:
                half = pool[: max(len(pool) * 2 // 3, size)]
                train = chosen_samples(half, work, first, size)
                rest = [i for i in pool if i not in set(train)]
                ours = LatencyPredictor().fit([work[i] for i in train], first[train].tolist())
                rows.setdefault("chosen", []).append(predicted(ours, [work[i] for i in rest], second[rest]))
        result[str(size)] = {name: mean_of(entries) for name, entries in rows.items()}
        print(size, json.dumps(result[str(size)]), flush=True)
    return result


def table_of_blocks(
    makers: dict[str, Callable[[], Made]],
    ms: dict[str, float],
    measured: Measured,
    target: Target,
    calibrated: int,
) -> dict[str, Any]:
    """Look-up by measured blocks, raw and with two constants fitted to ``calibrated`` whole models."""
    table = BlockTable()
    models: dict[str, list[str]] = {}
    waiting: dict[str, Block] = {}
    for name, make in makers.items():
        blocks = blocks_of(*make())
        models[name] = [block.signature for block in blocks]
        waiting.update(
            {block.signature: block for block in table.missing(blocks) if block.signature not in waiting}
        )
    found = measured.complete(
        "blocks", {s: (lambda b=b: (b.module, b.inputs)) for s, b in waiting.items()}, target
    )
    for signature, value in found.items():
        table.add(signature, value)
    names = list(models)
    raw = np.array([table.total(models[name]) for name in names])
    truth = np.array([ms[name] for name in names])
    table.calibrate([models[name] for name in names[:calibrated]], truth[:calibrated].tolist())
    fitted = np.array([table.total(models[name]) for name in names])
    return {
        "blocks": len(table),
        "models": len(names),
        "sum": scores(raw, truth),
        "calibrated_to": calibrated,
        "calibrated": scores(fitted[calibrated:], truth[calibrated:]),
    }


def pooled(
    by_batch: dict[int, tuple[list[Any], Array, Array]], sizes: Sequence[int], draws: int
) -> dict[str, Any]:
    """One predictor for all batches; tau over all rows together and within each batch."""
    work = [w for works, _, _ in by_batch.values() for w in works]
    batch = np.array([b for b, (works, _, _) in by_batch.items() for _ in works])
    first = np.concatenate([ms for _, ms, _ in by_batch.values()])
    second = np.concatenate([ms for _, _, ms in by_batch.values()])
    result: dict[str, Any] = {}
    for size in [s for s in sizes if s < 0.8 * len(work)]:
        rows = []
        for draw in range(draws):
            pool = random.Random(draw).sample(range(len(work)), len(work))
            ours = LatencyPredictor().fit([work[i] for i in pool[:size]], first[pool[:size]].tolist())
            rest = np.array(pool[size:])
            row = predicted(ours, [work[i] for i in rest], second[rest])
            found = np.array([p.median_ms for p in ours.predict_many([work[i] for i in rest])])
            for one in by_batch:
                here = batch[rest] == one
                tau = kendalltau(found[here], second[rest][here])[0] if here.sum() > 1 else np.nan
                row[f"kendall_batch_{one}"] = float(tau)
            rows.append(row)
        result[str(size)] = mean_of(rows)
        print("pooled", size, json.dumps(result[str(size)]), flush=True)
    return result


def moved(work: Sequence[Any], here: Array, there: Array, again: Array, draws: int) -> dict[str, Any]:
    """A predictor fitted to 40 samples here, moved there with 5 and 10; beside it one that starts anew there."""
    result: dict[str, Any] = {}
    for size in (5, 10):
        rows: dict[str, list[dict[str, float]]] = {"moved": [], "anew": []}
        for draw in range(draws):
            pool = random.Random(draw).sample(range(len(work)), len(work))
            source = LatencyPredictor().fit([work[i] for i in pool[:40]], here[pool[:40]].tolist())
            train, rest = pool[:size], pool[size:]
            samples, values = [work[i] for i in train], there[train].tolist()
            others = [work[i] for i in rest]
            rows["moved"].append(predicted(source.transfer(samples, values), others, again[rest]))
            rows["anew"].append(predicted(LatencyPredictor().fit(samples, values), others, again[rest]))
        result[str(size)] = {name: mean_of(entries) for name, entries in rows.items()}
        print("moved", size, json.dumps(result[str(size)]), flush=True)
    return result


def makers_of(
    name: str, candidates: Sequence[dict[str, Any]], make: Callable[..., Made], batch: int
) -> dict[str, Callable[[], Made]]:
    """Name of a model -> what makes it, for one batch."""
    return {f"{name}{i}": (lambda c=c: make(c, batch)) for i, c in enumerate(candidates)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", default="cpu:1")
    parser.add_argument("--other-target", help="to move a predictor to, as cpu:2 or cuda:0")
    parser.add_argument(
        "--limit", type=int, default=160, help="vision transformers; half as many of each space"
    )
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1, 8, 64], help="pooled; fewer than two: none"
    )
    parser.add_argument(
        "--batch-limit", type=int, default=24, help="vision transformers measured at each batch"
    )
    parser.add_argument("--table-limit", type=int, default=40, help="vision transformers looked up by blocks")
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 10, 20, 40, 120])
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring per model and session")
    parser.add_argument("--measurements", type=Path, help="file that keeps what was measured")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    target = Target.parse(options.target)
    with tempfile.TemporaryDirectory() as folder:
        measured = Measured(options.measurements or Path(folder) / "measured.json", options.seconds)
        result = run(options, target, measured)
    if options.out:
        atomic_write_json(options.out, result)


def run(options: argparse.Namespace, target: Target, measured: Measured) -> dict[str, Any]:
    """All parts."""
    result: dict[str, Any] = {"target": str(target), "families": {}, "environment": describe_environment()}
    chosen = families(options.limit)
    vits, make_vit = chosen["vit"]
    for name, (candidates, make) in chosen.items():
        makers = makers_of(name, candidates, make, target.batch)
        work = [count_work(*makers[key]()) for key in makers]
        times = [measured.complete(session, makers, target) for session in ("first", "second")]
        keys = [i for i, key in enumerate(makers) if key in times[0] and key in times[1]]
        names = [list(makers)[i] for i in keys]
        first, second = (np.array([t[key] for key in names]) for t in times)
        knobs = np.array([list(candidates[i].values()) for i in keys], dtype=float) if name == "vit" else None
        entry = {
            "repeatability": {k: round(v, 4) for k, v in scores(first, second).items()},
            "milliseconds": [round(float(np.quantile(first, share)), 3) for share in (0, 0.1, 0.5, 0.9, 1)],
            "measurements": {s: measured.summary(s, makers, target) for s in ("first", "second")},
            "sizes": compare([work[i] for i in keys], knobs, first, second, options.sizes, options.draws),
        }
        result["families"][name] = entry
        if name == "vit":
            some = {key: makers[key] for key in names[: options.table_limit]}
            both = {key: float(v) for key, v in zip(names, second, strict=True)}
            entry["blocks"] = table_of_blocks(some, both, measured, target, calibrated=10)
            if options.other_target:
                other = Target.parse(options.other_target)
                away = [measured.complete(s, makers, other) for s in ("first", "second")]
                there, again = (np.array([t[key] for key in names]) for t in away)
                entry["moved"] = moved([work[i] for i in keys], first, there, again, options.draws)
    if len(options.batches) > 1:
        by_batch = {}
        for batch in options.batches:
            makers = makers_of("vit", vits[: options.batch_limit], make_vit, batch)
            at = replace(target, batch=batch)
            work = [count_work(*make()) for make in makers.values()]
            times = [measured.complete(f"batch {s}", makers, at) for s in ("first", "second")]
            by_batch[batch] = (work, *(np.array([t[key] for key in makers]) for t in times))
        result["pooled"] = pooled(by_batch, options.sizes, options.draws)
    return result


if __name__ == "__main__":
    main()
