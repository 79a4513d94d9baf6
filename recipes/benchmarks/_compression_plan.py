"""Settings at which ToMe and SiT are equally fast on the target, found by measuring untrained models.

Two sessions. The first measures ToMe at several strengths and SiT at several token counts for each place to slim at; a
straight line of latency over tokens tells which count meets ToMe's. The second measures those counts and their
neighbours against ToMe itself, in the same rounds, and decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from compress.measuring import count
from compress.structure import recognise
from recipes.benchmarks._compression_latency import BASE, figures, slimmed
from recipes.benchmarks._compression_others import merged, merging_counts
from spaces.layers.token_slimming import kept_tokens

__all__ = ["PLACES", "candidates", "decided", "first_guess"]

PLACES: dict[float, list[list[int]]] = {1.7: [[2, 4]], 3.0: [[1, 2]]}
"""Speed -> blocks that SiT may slim after; validation chooses between them."""

_MEANS = (5, 6, 7, 8, 9, 12, 14, 16, 18, 20, 23)
_WINDOW, _POINTS = (0.6, 1.05), 3
_NEXT_TO_NOTHING = 1.05
_Found = dict[str, Any]


def first_guess(
    model: nn.Module, example: Sequence[Tensor], speeds: Sequence[float], batch: int, seconds: float
) -> _Found:
    """One session; for each speed ToMe's ``merging`` (the weakest that is fast enough, or its fastest; or a weaker one
    that takes hardly longer) and ``guesses``: for each place the token counts that should be as fast, the one nearest
    to it in the middle."""
    merging = {f"merging {mean}": merging_counts(mean, _depth(model)) for mean in _MEANS}
    grids = {
        (speed, tuple(after)): _thinned(_in_window(model, after, speed))
        for speed in speeds
        for after in PLACES[speed]
    }
    slimming = {_name(after, one): (after, one) for (_, after), grid in grids.items() for one in grid}
    models = {BASE: model}
    models |= {name: merged(model, counts) for name, counts in merging.items()}
    models |= {name: _slimmed(model, after, one, example) for name, (after, one) in slimming.items()}
    [(target, measured)] = figures(models, example, [batch], seconds).items()
    found: _Found = {"target": target, "measured": measured, "speeds": {}}
    ratios = {name: row["ratio"] for name, row in measured.items() if name != BASE}
    for speed in speeds:
        fitting = (name for name in merging if ratios[name] <= 1 / speed)
        enough = next(fitting, min(merging, key=lambda name: ratios[name]))
        # Where merging saturates, much more of it gains next to no time, and would only cost ToMe its accuracy.
        theirs = next(name for name in merging if ratios[name] <= _NEXT_TO_NOTHING * ratios[enough])
        guesses = []
        for after in PLACES[speed]:
            points = [
                (_share(model, after, one), ratios[_name(after, one)]) for one in grids[speed, tuple(after)]
            ]
            tokens = _nearest(model, after, points, ratios[theirs])
            guesses.append({"slim_after": after, "tokens": tokens})
        found["speeds"][f"{speed:g}x"] = {"merging": {"r": merging[theirs]}, "guesses": guesses}
    return found


def decided(
    model: nn.Module, example: Sequence[Tensor], guess: Mapping[str, Any], batch: int, seconds: float
) -> _Found:
    """Another session, of one speed: for each place the token counts whose latency is nearest to ToMe's.

    Args:
        guess: as ``first_guess`` found it for this speed.
    """
    theirs = "ToMe"
    models = {BASE: model, theirs: merged(model, guess["merging"]["r"])}
    tried: dict[str, list[str]] = {}
    settings: dict[str, _Found] = {}
    for one in guess["guesses"]:
        place = candidates(one["slim_after"])
        for tokens in one["tokens"]:
            name = _name(one["slim_after"], tokens)
            settings[name] = {"slim_after": one["slim_after"], "tokens": tokens}
            models[name] = slimmed(model, settings[name], example)
            tried.setdefault(place, []).append(name)
    [(target, measured)] = figures(models, example, [batch], seconds, base=theirs).items()
    dense = count(model, example)["macs"]
    chosen = {}
    for place, names in tried.items():
        best = min(names, key=lambda name: abs(measured[name]["ratio"] - 1))
        share = round(count(models[best], example)["macs"] / dense, 4)
        chosen[place] = {**settings[best], "macs_ratio": share, "to_merging": measured[best]}
    share = round(count(models[theirs], example)["macs"] / dense, 4)
    merging = {**guess["merging"], "macs_ratio": share, "ms": measured[theirs]["ms"]}
    return {"target": target, "merging": merging, "candidates": chosen, "measured": measured}


def candidates(after: Sequence[int]) -> str:
    """Name of a place."""
    return "after " + " ".join(map(str, after))


def _name(after: Sequence[int], tokens: Sequence[int]) -> str:
    return f"sit {candidates(after)}: {' '.join(map(str, tokens))}"


def _slimmed(
    model: nn.Module, after: Sequence[int], tokens: Sequence[int], example: Sequence[Tensor]
) -> nn.Module:
    return slimmed(model, {"slim_after": list(after), "tokens": list(tokens)}, example)


def _depth(model: Any) -> int:
    return len(model.blocks)


def _share(model: nn.Module, after: Sequence[int], tokens: Sequence[int]) -> float:
    """Mean over the blocks of the share of patch tokens that they see."""
    patches = recognise(model).patches or 1
    seen = [
        tokens[sum(place < number for place in after) - 1] if number > after[0] else patches
        for number in range(1, _depth(model) + 1)
    ]
    return sum(seen) / (patches * len(seen))


def _grid(model: nn.Module, after: Sequence[int]) -> list[list[int]]:
    """Every choice of tokens of one share per slimming, the most tokens first."""
    patches = recognise(model).patches or 1
    grid = {kept_tokens(patches, hundredth / 200, len(after)) for hundredth in range(10, 200)}
    return [list(tokens) for tokens in sorted(grid, reverse=True)]


def _in_window(model: nn.Module, after: Sequence[int], speed: float) -> list[list[int]]:
    low, high = _WINDOW
    return [one for one in _grid(model, after) if low <= _share(model, after, one) * speed <= high]


def _thinned(grid: list[list[int]]) -> list[list[int]]:
    """``_POINTS`` of them, the first and the last included."""
    places = np.linspace(0, len(grid) - 1, min(_POINTS, len(grid))).round().astype(int)
    return [grid[place] for place in places]


def _nearest(
    model: nn.Module, after: Sequence[int], points: Sequence[tuple[float, float]], wanted: float
) -> list[list[int]]:
    """The token counts whose latency, by a straight line through ``points``, is nearest, and two on each side."""
    slope, start = np.polyfit(*zip(*points, strict=True), 1)
    grid = _grid(model, after)
    shares = [_share(model, after, one) for one in grid]
    best = min(range(len(grid)), key=lambda n: abs(start + slope * shares[n] - wanted))
    return grid[max(0, best - 2) : best + 3]
