"""HAT's eight latency tables: this toolkit's predictor against LightGBM and against HAT's own network.

    python -m recipes.benchmarks.latency_hat --data FOLDER --reference ranker-reference.json \
        --out recipes/results/latency_hat.json

Split as in the reference: rows with equal features once (the first), shuffled by ``random.Random(233)``, the first
80 % to train on (cut to the size at hand), the next 10 % for the early stopping of LightGBM and of the network, the
rest for the figures. The predictor sees neither of the last two, and no row's place in the file.

The tables hold ten averages per architecture. They are turned into counted work (encoder, decoder steps x layers x
widths); every price is then fitted. Kendall tau and the share within +-10 % are those of the median that the predictor
forecasts, RMSE is of the mean that it forecasts: the device's disturbances only cost time, so the two differ by up to
4 % on the tables that drift. ``drift`` tells how much of the error that is: predictions of five folds, then without the
running median of the residuals of 30 neighbours in order of measurement: taken off the measurements, or put onto the
predictions (for information; nothing is fitted to it and no other figure uses the order).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from nas.environment import describe_environment
from nas.files import atomic_write_json
from nas.latency.prediction import LatencyPredictor

__all__ = ["counted_work", "main", "split"]

Array = NDArray[np.float64]
SIZES = (100, 200, 500, None)
FEATURES = 10
NEIGHBOURS = 30
# HAT's network: inputs over these, milliseconds over the device's figure.
INPUT_SCALE = (640, 6, 2048, 6, 640, 6, 2048, 6, 6, 2)
OUTPUT_SCALE = {"titanxp": 200.0, "xeon": 300.0, "raspberrypi": 5000.0}


def read(path: Path) -> tuple[Array, Array]:
    """Features (rows, 10) and total milliseconds (rows,) of one table, in the order of measurement."""
    with path.open(newline="") as file:
        rows = np.array([[float(x) for x in row] for row in list(csv.reader(file))[1:]])
    return rows[:, :FEATURES], rows[:, FEATURES] + rows[:, FEATURES + 1]


def split(features: Array) -> tuple[list[int], list[int], list[int]]:
    """Places of the rows to train on, to stop early by, and to report."""
    first = list({tuple(row): place for place, row in reversed(list(enumerate(features)))}.values())
    rows = sorted(first)
    random.Random(233).shuffle(rows)
    train, held = int(0.8 * len(rows)), int(0.1 * len(rows))
    return rows[:train], rows[train : train + held], rows[train + held :]


def counted_work(row: Sequence[float]) -> dict[str, float]:
    """Kinds of work of one architecture, up to constants (sentence length, beam, vocabulary, q/k/v width)."""
    width_e, _, ffn_e, heads_e, width_d, layers, ffn_d, heads_self, heads_cross, span = row
    return {
        "constant": 1.0,
        "encoder_attention": width_e,
        "encoder_ffn": width_e * ffn_e,
        "encoder_heads": heads_e,
        "output_layer": width_d,
        "decoder_layers": layers,
        "decoder_attention": layers * width_d,
        "decoder_ffn": layers * width_d * ffn_d,
        "decoder_ffn_rows": layers * ffn_d,
        "decoder_self_heads": layers * heads_self,
        "decoder_cross_heads": layers * heads_cross,
        "decoder_span": layers * span,
        "cross_keys": layers * width_e,
        "cross_keys_span": layers * width_e * span,
    }


def scores(median: Array, mean: Array, measured: Array) -> dict[str, float]:
    """Kendall tau and hits of the median, root mean square error of the mean."""
    return {
        "kendall": round(float(kendalltau(median, measured)[0]), 4),
        "within_10_percent": round(float(np.mean(np.abs(median / measured - 1) <= 0.1)), 4),
        "rmse_ms": round(float(np.sqrt(np.mean((mean - measured) ** 2))), 3),
    }


def ours(x: Array, y: Array, x_test: Array, y_test: Array) -> dict[str, Any]:
    """Scores of the predictor, and what share of the measurements its 90 % intervals hold."""
    predictor = LatencyPredictor().fit([counted_work(row) for row in x], list(y))
    found = predictor.predict_many([counted_work(row) for row in x_test])
    inside = [p.low_ms <= t <= p.high_ms for p, t in zip(found, y_test, strict=True)]
    return {
        **scores(np.array([p.median_ms for p in found]), np.array([p.mean_ms for p in found]), y_test),
        "covered": round(float(np.mean(inside)), 4),
        "trusted": round(float(np.mean([p.trusted for p in found])), 4),
        "model": predictor.model,
    }


def lightgbm(
    x: Array, y: Array, x_held: Array, y_held: Array, x_test: Array, y_test: Array
) -> dict[str, Any]:
    """Scores of gradient boosting with the settings of the reference, on all ten features."""
    import lightgbm as boosting

    settings = {
        "objective": "regression", "max_depth": 6, "num_leaves": 30, "learning_rate": 0.1, "verbose": -1,
        "num_threads": 1, "min_data_in_leaf": 20 if len(y) >= 100 else max(2, len(y) // 10),
    }  # fmt: skip
    stop = boosting.early_stopping(5, verbose=False)
    trained = boosting.train(
        settings, boosting.Dataset(x, y), 100, valid_sets=[boosting.Dataset(x_held, y_held)], callbacks=[stop]
    )
    found = np.asarray(trained.predict(x_test))
    return scores(found, found, y_test)


def network(
    x: Array,
    y: Array,
    x_held: Array,
    y_held: Array,
    x_test: Array,
    y_test: Array,
    scale: float,
    *,
    steps: int,
    rate: float,
) -> dict[str, Any]:
    """Scores of HAT's network (10-400-400-400-400-1, ReLU, Adam, MSE, batch 128), the best state by the held-out part.

    HAT's rate is 1e-5 with 5,000 steps; ``rate`` is a parameter because that is hardly trained on 100 rows.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    widths = [FEATURES, 400, 400, 400, 400]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(400, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)

    def tensors(features: Array, milliseconds: Array) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.tensor(features / np.array(INPUT_SCALE), dtype=torch.float32)
        return inputs, torch.tensor(milliseconds / scale, dtype=torch.float32)[:, None]

    inputs, wanted = tensors(x, y)
    held, held_wanted = tensors(x_held, y_held)
    test, _ = tensors(x_test, y_test)
    generator = torch.Generator().manual_seed(0)
    best, found = float("inf"), np.zeros(len(y_test))
    for step in range(steps):
        chosen = torch.randint(len(inputs), (128,), generator=generator)
        loss = nn.functional.mse_loss(net(inputs[chosen]), wanted[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            with torch.no_grad():
                error = float(nn.functional.mse_loss(net(held), held_wanted))
                if error < best:
                    best, found = error, net(test)[:, 0].double().numpy() * scale
    return scores(found, found, y_test)


def drift(features: Array, milliseconds: Array) -> dict[str, float]:
    """Tau and hits of five-fold predictions on all rows, as measured and without slow drift of the machine."""
    work = [counted_work(row) for row in features]
    found = np.empty(len(work))
    places = np.random.default_rng(0).permutation(len(work))
    for fold in np.array_split(places, 5):
        rest = np.setdiff1d(places, fold)
        predictor = LatencyPredictor().fit([work[i] for i in rest], milliseconds[rest].tolist())
        found[fold] = [p.median_ms for p in predictor.predict_many([work[i] for i in fold])]
    residual = np.log(milliseconds / found)
    half = NEIGHBOURS // 2
    slow = np.empty(len(work))
    for place in range(len(work)):
        near = np.r_[max(0, place - half) : place, place + 1 : min(len(work), place + half + 1)]
        slow[place] = np.median(residual[near])
    still = milliseconds / np.exp(slow)
    before, after = scores(found, found, milliseconds), scores(found, found, still)
    told = scores(found * np.exp(slow), found, milliseconds)
    return {
        "kendall_as_measured": before["kendall"],
        "kendall_without_drift": after["kendall"],
        "kendall_if_told_the_drift": told["kendall"],
        "within_10_percent_as_measured": before["within_10_percent"],
        "within_10_percent_without_drift": after["within_10_percent"],
    }


def run_table(
    path: Path, printed: dict[str, Any] | None, steps: int, rates: Sequence[float]
) -> dict[str, Any]:
    """All figures of one table."""
    features, milliseconds = read(path)
    train, held, test = split(features)
    device = next(scale for name, scale in OUTPUT_SCALE.items() if name in path.stem)
    last = (features[held], milliseconds[held], features[test], milliseconds[test])
    sizes: dict[str, Any] = {}
    for size in SIZES:
        rows = train[:size]
        x, y = features[rows], milliseconds[rows]
        entry: dict[str, Any] = {"rows": len(rows), "ours": ours(x, y, *last[2:])}
        entry["lightgbm"] = lightgbm(x, y, *last)
        for rate in rates:
            entry[f"network_{rate:g}"] = network(x, y, *last, device, steps=steps, rate=rate)
        if printed is not None:
            entry["lightgbm_printed"] = {
                kind: printed[f"lightgbm_{kind}"].get(str(len(rows))) for kind in ("all10", "top5")
            }
        sizes["all" if size is None else str(size)] = entry
    return {"sizes": sizes, "drift": drift(features, milliseconds)}


def wins(tables: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Of how many tables ours is above every rival of a size (and not below the reference's printed tau), by figure."""
    counted: dict[str, dict[str, int]] = {}
    for table in tables.values():
        for size, entry in table["sizes"].items():
            line = counted.setdefault(
                size, {"kendall": 0, "within_10_percent": 0, "rmse_ms": 0, "printed_kendall": 0}
            )
            rivals = [
                e for name, e in entry.items() if name.startswith(("network", "lightgbm")) and "kendall" in e
            ]
            mine = entry["ours"]
            line["kendall"] += all(mine["kendall"] > r["kendall"] for r in rivals)
            # Where both hit everything there is nothing to be above of.
            line["within_10_percent"] += all(
                mine["within_10_percent"] >= r["within_10_percent"] for r in rivals
            )
            line["rmse_ms"] += all(mine["rmse_ms"] < r["rmse_ms"] for r in rivals)
            printed = [e["kendall"] for e in entry.get("lightgbm_printed", {}).values() if e]
            line["printed_kendall"] += bool(printed) and all(mine["kendall"] > tau for tau in printed)
    return counted


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of the eight *_all.csv files")
    parser.add_argument("--reference", type=Path, help="JSON of the printed LightGBM figures")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--limit", type=int, help="only the first so many tables")
    parser.add_argument("--steps", type=int, default=5000, help="of the network; 0 leaves it out")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-5, 1e-3], help="of the network; HAT's is 1e-5"
    )
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    if options.reference is not None and not options.reference.exists():
        parser.error(f"--reference={options.reference} does not exist")
    paths = sorted(options.data.glob("*_all.csv"))[: options.limit]
    if not paths:
        parser.error(f"--data={options.data} holds no *_all.csv")
    printed = json.loads(options.reference.read_text())["results"] if options.reference else {}
    began = time.perf_counter()
    tables: dict[str, Any] = {}
    for path in paths:
        name = path.stem.removesuffix("_all")
        tables[name] = run_table(
            path, printed.get(name), options.steps, options.rates if options.steps else []
        )
        for size, entry in tables[name]["sizes"].items():
            line = {who: figures for who, figures in entry.items() if who not in ("rows", "lightgbm_printed")}
            print(name, size, json.dumps(line), flush=True)
        print(name, json.dumps(tables[name]["drift"]), flush=True)
    result = {
        "what": "Latency predictors on HAT's tables, same rows: tau, share within 10 %, RMSE on the held-out tenth",
        "rival_of_both_below": wins(tables),
        "tables": tables,
        "seconds": round(time.perf_counter() - began, 1),
        "environment": describe_environment(),
    }
    print(json.dumps(result["rival_of_both_below"]))
    if options.out:
        atomic_write_json(options.out, result)


if __name__ == "__main__":
    main()
