"""Takes activations away and merges the layers on both sides of them, as VanillaNet's deep training does.

Paper: Chen, Wang, Guo, Tao, "VanillaNet: the Power of Minimalism in Deep Learning", NeurIPS 2023, arXiv 2305.12972,
section 3.1. Code: huawei-noah/VanillaNet, commit 6aaf7311d8cadddcec9db7595f071bfda6c480f4, MIT (read, not copied).

While the model is fine-tuned, each chosen activation A becomes (1 - share) A(x) + share x, the share rising from 0 to
1 epoch by epoch; then first layer, batch norm and second layer are one layer, exactly.

Deviations:
- any activation of PyTorch that looks at each number alone, where the original has the ReLU of its own network;
- the last epoch always trains with a share of 1, also where there is but one;
- of a model with many activations a part can be chosen: those whose absence changes the outputs least.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import inputs_of
from compress.finetune import epochs_of, finetune
from compress.outputs import relative_gap
from compress.passes import register_pass
from compress.passes._activation_pairs import Found, Pair, find_pairs, is_identity, run
from compress.passes._activation_training import AnnealedBatches, Fading
from compress.passes.base import Context, Pass, PassFailed
from compress.structure import StructureError
from nas.errors import UserMistake, nearest
from spaces.layers.series_activation import SeriesActivation
from spaces.vision._vanillanet_merging import fold_norm, merge_layers, why_not_mergeable
from spaces.vision._vanillanet_network import VanillaBlock, VanillaNet
from spaces.vision.vanillanet import SCHEDULES

__all__ = ["ActivationPruning", "find_pairs", "merge_pairs"]

_EPOCHS = 20
_SAMPLES = 32


@register_pass("activation_pruning")
class ActivationPruning(Pass):
    """Fades activations between two linear layers or convolutions to the identity, and merges the layers.

    An activation is taken if it can be proven (torch.fx) that nothing but the second layer reads it, that both layers
    are used once, that they merge exactly (see ``spaces.vision._vanillanet_merging.why_not_mergeable``) and that
    the merged layer costs less than the two. A VanillaNet comes out in its merged form.

    Args:
        share: of the activations that can be taken, in [0, 1]; the least important ones.
        layers: names of activations, or patterns such as ``blocks.*.mlp.act``, to choose from; None: all.
        epochs: of fine-tuning; None: the pipeline's, or 20. 0: taken at once, for a model whose activations are the
            identity already (a trained VanillaNet of form ``deep``) or for a later training.
        decay: share of the epochs until an activation is gone, in [0, 1]; published: a third.
        schedule: ``linear`` or ``cosine``.
        learning_rate: peak, above 0.
        distillation: weight of the original's outputs in the loss, in [0, 1].

    Raises:
        UserMistake: an option out of its range.
    """

    changes = frozenset({"activations", "fusion"})

    def __init__(
        self,
        share: float = 1.0,
        *,
        layers: str | Sequence[str] | None = None,
        epochs: int | None = None,
        decay: float = 1 / 3,
        schedule: str = "linear",
        learning_rate: float = 5e-4,
        distillation: float = 0.5,
    ):
        laws = {
            "share": (0 <= share <= 1, "in [0, 1]"),
            "epochs": (epochs is None or epochs >= 0, "at least 0"),
            "decay": (0 <= decay <= 1, "in [0, 1]"),
            "schedule": (schedule in SCHEDULES, " or ".join(SCHEDULES)),
            "learning_rate": (learning_rate > 0, "above 0"),
            "distillation": (0 <= distillation <= 1, "in [0, 1]"),
        }
        for name, (holds, law) in laws.items():
            if not holds:
                raise UserMistake(f"activation_pruning: {name}={locals()[name]!r} must be {law}")
        self.share, self.epochs, self.decay, self.schedule = share, epochs, decay, schedule
        self.layers = [layers] if isinstance(layers, str) else None if layers is None else list(layers)
        self.learning_rate, self.distillation = learning_rate, distillation
        self.requires = frozenset() if epochs == 0 else frozenset({"train"})

    def with_strength(self, strength: float) -> Pass:
        """``share`` is the strength."""
        other = copy.copy(self)
        other.share = strength
        return other

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """``model`` without the chosen activations; see ``Pass.apply``.

        Raises:
            StructureError: no activation can be taken, or one that was named cannot; and why.
            PassFailed: the training came to nothing, or the merged model is not equal to the unmerged one.
        """
        result = copy.deepcopy(model).eval()
        example = _varied(result, context.example, context.seed)
        named = self._named(find_pairs(result, example), result)
        chosen = _accepted(result, self._ranked(result, named, context))
        fading = [pair.act for pair in chosen if not is_identity(result.get_submodule(pair.act))]
        context.report(
            f"activation_pruning: {len(chosen)} of {len(named)} activations go, {len(named) - len(chosen)} stay"
        )
        self._fade(result, fading, context)
        expected = run(result, example)
        merge_pairs(result, chosen)
        _tidy(result)
        _compare(run(result, example), expected)
        return result.eval()

    def _named(self, found: Found, model: nn.Module) -> list[Pair]:
        pairs = {pair.act: pair for pair in found.pairs}
        costly = [act for act, pair in pairs.items() if not _accepted(model, [pair])]
        for act in costly:
            del pairs[act]
        refused = dict.fromkeys(costly, "the merged layer would cost more than the two") | found.refused
        if self.layers is None:
            if not pairs:
                reasons = "; ".join(f"{act}: {reason}" for act, reason in list(refused.items())[:3])
                raise StructureError(
                    f"activation_pruning: {type(model).__name__} has no activation between two layers that merge"
                    + (f" ({reasons})" if reasons else "")
                )
            return list(pairs.values())
        chosen: dict[str, Pair] = {}
        for pattern in self.layers:
            matched = [act for act in pairs if fnmatch.fnmatchcase(act, pattern)]
            if not matched:
                why = next(
                    (reason for act, reason in refused.items() if fnmatch.fnmatchcase(act, pattern)), None
                )
                known = [*pairs, *refused]
                raise StructureError(
                    f"activation_pruning: layers={pattern!r}: "
                    + (
                        why
                        or f"no such activation{nearest(pattern, known)}; known: {', '.join(known) or 'none'}"
                    )
                )
            chosen.update((act, pairs[act]) for act in matched)
        return list(chosen.values())

    def _ranked(self, model: nn.Module, pairs: list[Pair], context: Context) -> list[Pair]:
        """As many as ``share`` says, those first whose absence changes the outputs least."""
        if self.share == 1:
            return pairs
        inputs = _samples(model, context)
        usual = run(model, inputs)
        changes = []
        for pair in pairs:
            act = model.get_submodule(pair.act)
            _put(model, pair.act, nn.Identity())
            changes.append(float((run(model, inputs) - usual).square().mean()))
            _put(model, pair.act, act)
        order = sorted(range(len(pairs)), key=changes.__getitem__)
        return [pairs[place] for place in order[: round(self.share * len(pairs))]]

    def _fade(self, model: nn.Module, names: Sequence[str], context: Context) -> None:
        epochs = epochs_of(self.epochs, context, _EPOCHS, must=True)
        fading = [Fading(model.get_submodule(name)) for name in names]
        for name, one in zip(names, fading, strict=True):
            _put(model, name, one)
        if fading and epochs and not context.probe:
            decay_epochs = min(round(self.decay * epochs), epochs - 1)
            if context.train is not None:
                annealed = AnnealedBatches(context.train, fading, decay_epochs, self.schedule)
                context = context.with_changes(train=annealed)
            finetune(
                model,
                context,
                epochs=epochs,
                learning_rate=self.learning_rate,
                distillation=self.distillation,
            )
        for name in names:
            _put(model, name, nn.Identity())


def merge_pairs(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Merge, in place, the two layers of each pair, whatever their activation is: it is left out.

    The merged layer takes the place of the first; activation, batch norms and the second become ``nn.Identity``.
    """
    home: dict[str, str] = {}
    for pair in pairs:
        first, second = model.get_submodule(_find(home, pair.first)), model.get_submodule(pair.second)
        if pair.norm and not isinstance(norm := model.get_submodule(pair.norm), nn.Identity):
            first = fold_norm(first, norm)
        if pair.last_norm and not isinstance(norm := model.get_submodule(pair.last_norm), nn.Identity):
            second = fold_norm(second, norm)
        _put(model, _find(home, pair.first), merge_layers(first, second))
        home[pair.second] = pair.first
        for name in (pair.act, pair.second, pair.norm, pair.last_norm):
            if name:
                _put(model, name, nn.Identity())


def _accepted(model: nn.Module, pairs: Sequence[Pair]) -> list[Pair]:
    """Those that can be merged one after the other, each at a gain; a layer may be in two of them."""
    home: dict[str, str] = {}
    layers: dict[str, nn.Module] = {}
    positions: dict[str, int] = {}
    taken: list[Pair] = []
    for pair in pairs:
        place = _find(home, pair.first)
        first = layers.get(place) or _shape_of(model, pair.first)
        second = layers.get(pair.second) or _shape_of(model, pair.second)
        counts = [positions.get(place, pair.positions[0]), positions.get(pair.second, pair.positions[1])]
        if why_not_mergeable(first, second, biased=pair.norm is not None):
            continue
        merged = merge_layers(first, second)
        before = sum(count * _size(layer) for count, layer in zip(counts, (first, second), strict=True))
        if counts[1] * _size(merged) >= before:
            continue
        layers[place], positions[place] = merged, counts[1]
        home[pair.second] = place
        taken.append(pair)
    return taken


def _shape_of(model: nn.Module, name: str) -> nn.Module:
    return copy.deepcopy(model.get_submodule(name)).to("meta")


def _size(layer: Any) -> int:
    return int(layer.weight.numel())


def _find(home: dict[str, str], name: str) -> str:
    """Where the layer is that ``name`` has become part of."""
    while name in home:
        name = home[name]
    return name


def _tidy(model: nn.Module) -> None:
    """VanillaNets in their own merged form: without empty places, batch norms of the series activations folded."""
    for module in model.modules():
        names = {VanillaNet: ("stem", "head"), VanillaBlock: ("convs",)}.get(type(module), ())
        for name in names:
            layers = [layer for layer in getattr(module, name) if not isinstance(layer, nn.Identity)]
            setattr(module, name, nn.Sequential(*layers))
    for name, module in list(model.named_modules()):
        if isinstance(module, SeriesActivation) and name:
            _put(model, name, module.fold())


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module.train(model.training))


def _varied(model: nn.Module, example: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The example on the model's device; numbers with noise, since an example of zeros shows no difference."""
    generator = torch.Generator().manual_seed(seed)
    given = [x + torch.randn(x.shape, generator=generator) if x.is_floating_point() else x for x in example]
    return _moved(model, given)


def _samples(model: nn.Module, context: Context) -> list[Tensor]:
    if context.train is None:
        return _varied(model, context.example, context.seed)
    return _moved(model, [x[:_SAMPLES] for x in inputs_of(next(iter(context.train)))])


def _moved(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    like = next(model.parameters(), torch.zeros(()))
    return [x.to(like) if x.is_floating_point() else x.to(like.device) for x in inputs]


def _compare(outputs: Tensor, expected: Tensor) -> None:
    """Rounding apart, merging changes nothing; a model that reads its layers from outside would show here."""
    gap = relative_gap(outputs, expected)
    if not gap <= 1e4 * torch.finfo(expected.dtype).eps:
        raise PassFailed(
            f"activation_pruning: the merged model's outputs differ by {gap:.3g} of their size from the unmerged "
            "one's; its layers are read outside of their own forward pass, choose others by layers="
        )
