"""What a model's layers would lose at which rank: spectra of their outputs, and how much the model minds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import move
from compress.passes.base import Context
from nas.errors import UserMistake
from spaces.layers.low_rank import LowRankConv2d, LowRankLinear, SplitLowRankLinear

__all__ = ["Layer", "Part", "factorised", "find_layers", "fingerprint", "put"]

_FACTORISED = (LowRankConv2d, LowRankLinear, SplitLowRankLinear)
_RIDGE = 1e-3
"""Share of the plain weights' spectrum that is mixed into a measured one: few samples say nothing of the rest."""


@dataclass
class Part:
    """A run of a layer's outputs that is factorised by itself.

    Attributes:
        basis: (outputs, n) orthonormal directions of the outputs, the one that carries most first.
        energies: (n,) of the outputs' squared length, what each direction carries; float64, not increasing.
        weight: (outputs, inputs) of the layer, kernels flattened.
        mean: (outputs,) mean output without the bias, where measured; what is cut away is put into the bias.
    """

    weight: Tensor
    basis: Tensor
    energies: Tensor
    mean: Tensor | None

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(rank, inputs) and (outputs, rank), evenly scaled: their product is the weight along ``rank`` directions."""
        up = self.basis[:, :rank]
        down = up.T @ self.weight
        scale = down.norm(dim=1).clamp(min=1e-30).sqrt()
        return down / scale[:, None], up * scale

    def lost_mean(self, rank: int) -> Tensor:
        """What the mean output loses at that rank, (outputs,); zero where no data was seen."""
        if self.mean is None:
            return torch.zeros(len(self.weight), dtype=self.weight.dtype)
        up = self.basis[:, :rank]
        return self.mean - up @ (up.T @ self.mean)


@dataclass
class Layer:
    """A layer that can be factorised.

    Attributes:
        names: all names of the module in the model.
        module: as it is: a full layer, or one that is factorised already.
        whole: the full layer that computes the same; ``module`` itself where it is one.
        parts: one, or three of a fused qkv.
        positions: output positions of one sample, over all calls: MACs are ``positions`` times weights.
        shape: of its input in a call with one sample.
        sensitivity: of the model's outputs to a lost share of energy; 1 where not measured.
    """

    names: tuple[str, ...]
    module: nn.Module
    positions: int
    shape: tuple[int, ...]
    parts: list[Part] = field(default_factory=list)
    sensitivity: float = 1.0
    whole: nn.Linear | nn.Conv2d = field(init=False)

    def __post_init__(self) -> None:
        self.whole = _whole(self.module)

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def inputs(self) -> int:
        """Numbers that one output is made of."""
        return self.whole.weight[0].numel()

    @property
    def outputs(self) -> int:
        """Output channels."""
        return len(self.whole.weight)

    def dense(self) -> int:
        """Weights as it is."""
        return sum(x.numel() for name, x in self.module.named_parameters() if name.endswith("weight"))

    def per_rank(self, parts: int = 1) -> int:
        """Weights of one more rank, of one of ``parts`` equal parts."""
        return self.inputs + self.outputs // parts

    def losses(self) -> list[Tensor]:
        """For each part (n,): what leaving out a direction costs the model, relative to other layers."""
        total = torch.stack([part.energies.sum() for part in self.parts]).sum().clamp(min=1e-30)
        return [part.energies / total * self.sensitivity for part in self.parts]


def find_layers(
    model: nn.Module,
    context: Context,
    *,
    only: Sequence[str],
    skip: Sequence[str],
    least: int,
    split: bool,
    batches: int,
    sensitivity: bool,
) -> list[Layer]:
    """The layers that can be factorised, with their spectra; the model is left as it was.

    A Linear or an ungrouped Conv2d that the example really calls, and whose weight nobody else reads; one that is
    factorised already counts as one layer, which a smaller rank may be found for.

    Args:
        only, skip: parts of names (between dots, or whole names) of layers looked at, and left alone; () is all.
        least: layers with fewer inputs or outputs are left alone.
        split: queries, keys and values of a fused ``qkv`` are three parts.
        batches: of ``context.train`` to look at; 0: the weights alone are looked at.
        sensitivity: whether to measure how much the model minds each; needs batches.

    Raises:
        UserMistake: ``context.train`` gives nothing.
    """
    named = _candidates(model, only, skip, least)
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    layers = _called(model, named, tuple(x.to(home) for x in context.example))
    if not layers:
        return []
    probe = copy.deepcopy(model).to(context.device).eval() if batches else model
    seen = _inputs(context, batches)
    moments = _moments(probe, layers, seen)
    for layer in layers:
        count = 3 if split and layer.name.split(".")[-1] == "qkv" and layer.outputs % 3 == 0 else 1
        layer.parts = _parts(layer, count, moments.get(layer.name))
    if sensitivity and seen:
        _measure_sensitivity(probe, layers, seen[0])
    return layers


def factorised(layer: Layer, ranks: Sequence[int]) -> nn.Module:
    """The layer at these ranks, one for each part; on its device, of its type."""
    old = layer.whole
    has_bias = old.bias is not None
    made: nn.Module
    if isinstance(old, nn.Conv2d):
        made = LowRankConv2d(
            old.in_channels,
            old.out_channels,
            ranks[0],
            kernel_size=old.kernel_size,
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
            bias=has_bias,
            padding_mode=old.padding_mode,
        )
    elif len(ranks) > 1:
        made = SplitLowRankLinear(old.in_features, old.out_features, ranks, bias=has_bias)
    else:
        made = LowRankLinear(old.in_features, old.out_features, ranks[0], bias=has_bias)
    ups: Iterable[Any] = made.ups if isinstance(made, SplitLowRankLinear) else [made.up]
    made.to(old.weight.device, old.weight.dtype)
    pairs = [part.factors(rank) for part, rank in zip(layer.parts, ranks, strict=True)]
    with torch.no_grad():
        made.down.weight.copy_(torch.cat([down for down, _ in pairs]).reshape(made.down.weight.shape))
        biases = old.bias.chunk(len(ranks)) if old.bias is not None else [None] * len(ranks)
        for up, part, rank, (_, factor), bias in zip(ups, layer.parts, ranks, pairs, biases, strict=True):
            up.weight.copy_(factor.reshape(up.weight.shape))
            if bias is not None:
                up.bias.copy_(bias + part.lost_mean(rank).to(bias))
    made.requires_grad_(old.weight.requires_grad)
    if old.bias is not None:
        for up in ups:
            up.bias.requires_grad_(old.bias.requires_grad)
    return made.train(old.training)


def put(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """``module`` in the place of each of these names."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module)


def fingerprint(model: nn.Module) -> tuple[float, ...]:
    """Tells models with other weights apart (as good as surely); the same for copies."""
    return tuple(float(p.detach().double().norm()) for p in model.parameters())


def _whole(module: Any) -> nn.Linear | nn.Conv2d:
    return module.whole() if isinstance(module, _FACTORISED) else module


def _candidates(
    model: nn.Module, only: Sequence[str], skip: Sequence[str], least: int
) -> dict[nn.Module, list[str]]:
    closed: set[str] = set()  # somebody reads their weights without calling them
    for name, module in model.named_modules():
        closed |= {f"{name}.{part}".lstrip(".") for part in getattr(module, "reads_weights", ())}
        if isinstance(
            module, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        ):
            closed |= {f"{name}.{inner}".lstrip(".") for inner, _ in module.named_modules() if inner}
        if isinstance(module, _FACTORISED):
            closed |= {f"{name}.{inner}".lstrip(".") for inner, _ in module.named_modules() if inner}
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowRankConv2d):
            sizes = (module.in_channels * module.down.weight[0, 0].numel(), module.out_channels)
        elif type(module) is nn.Linear or isinstance(module, (LowRankLinear, SplitLowRankLinear)):
            sizes = (module.in_features, module.out_features)
        elif type(module) is nn.Conv2d and module.groups == 1:
            sizes = (module.in_channels * module.weight[0, 0].numel(), module.out_channels)
        else:
            continue
        if name and min(sizes) >= least and name not in closed:
            found.setdefault(module, []).append(name)
    return {
        module: names
        for module, names in found.items()
        if all(
            owners[id(x)] == len(names) for name, x in module.named_parameters() if name.endswith("weight")
        )
        and not any(_named(name, skip) for name in names)
        and (not only or any(_named(name, only) for name in names))
    }


def _named(name: str, words: Sequence[str]) -> bool:
    return any(word == name or f".{word}." in f".{name}." for word in words)


def _called(model: nn.Module, named: dict[nn.Module, list[str]], example: tuple[Tensor, ...]) -> list[Layer]:
    layers: dict[nn.Module, Layer] = {}

    def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module not in layers:
            layers[module] = Layer(tuple(named[module]), module, 0, tuple(inputs[0].shape))
        layers[module].positions += output.numel() // layers[module].outputs

    with ExitStack() as stack, torch.no_grad():
        for module in named:
            stack.callback(module.register_forward_hook(note).remove)
        model(*example)
    return sorted(layers.values(), key=lambda layer: list(named).index(layer.module))


def _inputs(context: Context, batches: int) -> list[tuple[Tensor, ...]]:
    if not batches:
        return []
    if context.train is None:
        raise UserMistake("low_rank: calibrating needs data; give train=, or calibrate=false")
    found = []
    for batch in context.train:
        found.append(move(batch, context.device)[0])
        if len(found) == batches:
            break
    if not found:
        raise UserMistake("low_rank: train= yields no batch to calibrate with")
    return found


@torch.no_grad()
def _moments(
    model: nn.Module, layers: Sequence[Layer], seen: Sequence[tuple[Tensor, ...]]
) -> dict[str, list[Tensor]]:
    """For each layer: number of outputs seen, their sum (out,) and second moment (out, out), bias taken off."""
    if not seen:
        return {}
    found: dict[str, list[Tensor]] = {}

    def watch(name: str, whole: nn.Linear | nn.Conv2d) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            y = output.movedim(1, -1) if isinstance(whole, nn.Conv2d) else output
            y = y.reshape(-1, y.shape[-1]).float()
            if whole.bias is not None:
                y = y - whole.bias.to(y.device)
            new = [torch.tensor(float(len(y))), y.sum(0).double().cpu(), (y.T @ y).double().cpu()]
            old = found.get(name)
            found[name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

        return hook

    with ExitStack() as stack:
        for layer in layers:
            module = model.get_submodule(layer.name)
            stack.callback(module.register_forward_hook(watch(layer.name, layer.whole)).remove)
        for inputs in seen:
            model(*inputs)
    return found


def _parts(layer: Layer, count: int, moments: list[Tensor] | None) -> list[Part]:
    weight = layer.whole.weight.detach().flatten(1).double().cpu()
    made = []
    for number, rows in enumerate(weight.chunk(count)):
        # All outputs lie in the span of the weights: a small problem where there are fewer inputs than outputs.
        span, inner = torch.linalg.qr(rows)
        spectrum, mean = inner @ inner.T, None
        if moments is not None:
            n, total, second = moments
            here = slice(number * len(rows), (number + 1) * len(rows))
            measured = second[here, here] / n
            if layer.whole.bias is not None:  # the mean can go into the bias, and needs no direction
                mean = total[here] / n
                measured = measured - torch.outer(mean, mean)
            measured = span.T @ measured @ span
            ridge = _RIDGE * measured.trace().clamp(min=1e-30) / spectrum.trace().clamp(min=1e-30)
            spectrum = measured + ridge * spectrum
        energies, directions = torch.linalg.eigh((spectrum + spectrum.T) / 2)
        made.append(Part(rows, span @ directions.flip(1), energies.flip(0).clamp(min=0), mean))
    return made


@torch.no_grad()
def _measure_sensitivity(model: nn.Module, layers: Sequence[Layer], inputs: Sequence[Tensor]) -> None:
    """How far the model's outputs move, relative to the share of energy lost, when one layer alone loses half of what
    it could keep and still be cheaper."""
    before = _flat(model(*inputs))
    scale = before.square().mean().clamp(min=1e-30)
    for layer in layers:
        count = len(layer.parts)
        even = max(1, layer.dense() // (2 * count * layer.per_rank(count)))
        ranks = [min(even, len(part.energies)) for part in layer.parts]
        lost = sum(float(losses[rank:].sum()) for losses, rank in zip(layer.losses(), ranks, strict=True))
        own = model.get_submodule(layer.name)
        put(model, layer.names, factorised(layer, ranks).to(inputs[0].device))
        moved = (_flat(model(*inputs)) - before).square().mean() / scale
        put(model, layer.names, own)
        layer.sensitivity = max(float(moved) / lost, 1e-12) if lost > 1e-12 else 1.0


def _flat(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.flatten().double()
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return torch.cat([_flat(one) for one in values])
