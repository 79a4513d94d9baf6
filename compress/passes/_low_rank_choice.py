"""Which layers get which ranks: by energy, a fixed rank, or a common budget; never where it would not be faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.measuring import measure_against
from compress.passes._low_rank_analysis import Layer, factorised
from compress.passes.base import Context
from nas.latency import Pair

__all__ = ["Keep", "Ranks", "Speed", "by_budget", "by_energy", "by_rank", "cheaper_below"]

Keep = Literal["faster", "not_slower", "anyway"]
Ranks = dict[str, tuple[int, ...]]
"""Name of a layer -> the rank of each part; layers that stay as they are have no entry."""

_LADDER = (0.8, 0.5, 0.25, 0.125)


def cheaper_below(layer: Layer) -> int:
    """The largest sum of ranks (over the parts) with fewer weights than the layer has; 0 when there is none."""
    return (layer.dense() - 1) // layer.per_rank(len(layer.parts))


def by_rank(layers: Sequence[Layer], rank: int, limits: Mapping[str, int]) -> Ranks:
    """The same rank everywhere, parts of a fused qkv together."""
    wanted = {}
    for layer in layers:
        each = -(-rank // len(layer.parts))
        wanted[layer.name] = tuple(min(each, len(part.energies)) for part in layer.parts)
    return _within(wanted, limits)


def by_energy(layers: Sequence[Layer], energy: float, multiple: int, limits: Mapping[str, int]) -> Ranks:
    """The least ranks that keep this share of the energy of each part."""
    wanted = {}
    for layer in layers:
        ranks = []
        for part in layer.parts:
            kept = part.energies.cumsum(0) / part.energies.sum().clamp(min=1e-30)
            ranks.append(_rounded(int((kept < energy).sum()) + 1, multiple, len(part.energies)))
        wanted[layer.name] = tuple(ranks)
    return _within(wanted, limits)


def by_budget(
    layers: Sequence[Layer], ratio: float, cost: str, multiple: int, limits: Mapping[str, int]
) -> Ranks:
    """All layers compete: directions that carry least for their price go first, until ``ratio`` of the layers' cost
    is gone, or nothing more can go.

    Args:
        cost: ``macs`` or ``params``.
    """
    prices = [layer.positions if cost == "macs" else 1 for layer in layers]
    scores = [
        [losses / (price * layer.per_rank(len(layer.parts))) for losses in layer.losses()]
        for layer, price in zip(layers, prices, strict=True)
    ]
    least = torch.tensor([-1.0], dtype=torch.float64)
    thresholds = torch.cat([least, *(one for parts in scores for one in parts)]).unique()
    total = sum(price * layer.dense() for layer, price in zip(layers, prices, strict=True))

    def at(threshold: float) -> tuple[Ranks, int]:
        wanted = {
            layer.name: tuple(_rounded(int((one > threshold).sum()), multiple, len(one)) for one in parts)
            for layer, parts in zip(layers, scores, strict=True)
        }
        chosen = _within(wanted, limits)
        used = sum(
            price
            * (
                layer.per_rank(len(layer.parts)) * sum(chosen[layer.name])
                if layer.name in chosen
                else layer.dense()
            )
            for layer, price in zip(layers, prices, strict=True)
        )
        return chosen, used

    # Cost falls with the threshold, so the weakest that is enough is found by halving.
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if at(float(thresholds[middle]))[1] <= (1 - ratio) * total:
            high = middle
        else:
            low = middle + 1
    return at(float(thresholds[low]))[0]


def _rounded(rank: int, multiple: int, most: int) -> int:
    if most >= 8 * multiple:
        rank = -(-max(1, rank) // multiple) * multiple
    return max(1, min(rank, most))


def _within(wanted: Ranks, limits: Mapping[str, int]) -> Ranks:
    return {name: ranks for name, ranks in wanted.items() if sum(ranks) <= limits[name]}


@dataclass
class Speed:
    """Up to which rank a factorised layer is faster on the target, measured once for layers of one shape.

    Args:
        keep: ``faster``: it surely is; ``not_slower``: it is not surely slower; ``anyway``: nothing is measured.
        seconds: of measuring for each shape.
        known: verdicts so far, shared between passes of different strength.
    """

    keep: Keep
    seconds: float
    known: dict[Any, tuple[int, str]]

    def limits(self, layers: Sequence[Layer], context: Context) -> dict[str, int]:
        """Name of a layer -> the largest sum of ranks allowed, 0 for none; what the target said is reported."""
        found, told = {}, dict[str, None]()
        for layer in layers:
            most = cheaper_below(layer)
            if self.keep == "anyway" or most < len(layer.parts):
                found[layer.name] = most if most >= len(layer.parts) else 0
                continue
            key = (_shape(layer), str(context.target), self.keep)
            if key not in self.known:
                self.known[key] = self._measured(layer, most, context)
            found[layer.name], words = self.known[key]
            told[words] = None
        for words in told:
            context.report(words)
        return found

    def _measured(self, layer: Layer, most: int, context: Context) -> tuple[int, str]:
        count = len(layer.parts)
        tops = min(len(part.energies) for part in layer.parts)
        rungs = sorted({min(tops, max(1, int(most * share) // count)) for share in _LADDER}, reverse=True)
        models: dict[str, nn.Module] = {"dense": layer.module}
        models.update({str(rank): factorised(layer, [rank] * count) for rank in rungs})
        session = measure_against(
            {name: model.cpu().eval() for name, model in models.items()},
            "dense",
            (_input(layer),),
            context.target,
            seconds=self.seconds,
            seed=context.seed,
        )
        pairs = {rank: session.pair(str(rank), "dense") for rank in rungs}
        allowed: Callable[[Pair], bool] = (
            (lambda pair: pair.verdict == "faster")
            if self.keep == "faster"
            else (lambda pair: pair.verdict != "slower")
        )
        limit = max((rank * count for rank, pair in pairs.items() if allowed(pair)), default=0)
        figures = ", ".join(
            f"rank {rank * count}: {pair.ratio:.3f} ({pair.verdict})" for rank, pair in pairs.items()
        )
        words = f"up to rank {limit}" if limit else "at no rank, they stay as they are"
        return limit, (
            f"layers like {layer.name} ({layer.inputs} -> {layer.outputs}) on {context.target}, time against the "
            f"layer as it is: {figures}; {self.keep.replace('_', ' ')} {words}"
        )


def _shape(layer: Layer) -> tuple[Any, ...]:
    module = layer.whole
    window: tuple[Any, ...] = ()
    if isinstance(module, nn.Conv2d):
        window = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
    has_bias = module.bias is not None
    return (layer.inputs, layer.outputs, layer.dense(), window, layer.shape, len(layer.parts), has_bias)


def _input(layer: Layer) -> Tensor:
    # Batch 1: repeating it to the target's batch is the measurement's business.
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(layer.shape, generator=generator)
    return made[:1] if isinstance(layer.whole, nn.Conv2d) else made.reshape(1, -1, layer.shape[-1])
