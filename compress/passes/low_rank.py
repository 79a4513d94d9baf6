"""Low-rank factorisation of Linear and Conv2d layers, by energy or by a common budget.

Source: the low-rank approximation of "Hiformer: Heterogeneous Feature Interactions Learning with Transformers for
Recommender Systems", applied to trained weights. Directions are those in which a layer's outputs vary on calibration
data (activation-aware SVD); without data, the singular vectors of its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from compress.finetune import epochs_of, finetune
from compress.passes import register_pass
from compress.passes._low_rank_analysis import Layer, factorised, find_layers, fingerprint, put
from compress.passes._low_rank_choice import Keep, Ranks, Speed, by_budget, by_energy, by_rank
from compress.passes.base import Context, Pass
from compress.structure import StructureError
from nas.errors import UserMistake

__all__ = ["LowRank"]

_STRONGEST = 0.97
_EPOCHS = 3


@register_pass("low_rank")
class LowRank(Pass):
    """Turns layers into two thin ones in sequence, where that is really faster on the target.

    Ranks come from ``rank`` where it is given, else from ``energy``, else from ``ratio``.

    Args:
        ratio: share of the MACs (of the parameters, where the budget is of parameters) of all layers looked at that
            goes, in [0, 1); the layers compete for it. Less goes where more is not possible.
        energy: share of the energy of its outputs that every layer keeps, in (0, 1].
        rank: of every layer, at least 1.
        only: parts of names of the layers looked at, as ``qkv`` or ``[qkv, fc1]`` or ``qkv+fc1``; all by default.
        skip: parts of names of layers left alone.
        least: layers with fewer inputs or outputs are left alone, at least 2.
        qkv: ``one`` factorisation of a fused qkv, or ``three``, with a rank for queries, keys and values each.
        calibrate: look at the outputs on training data; None does where there is some.
        batches: of training data to look at, at least 1.
        sensitivity: with calibration and ``ratio``, weigh layers by how far the model's outputs move when the layer
            alone is factorised; False takes every layer's lost share of energy as equally bad.
        multiple: ranks are rounded up to multiples of this where at least eight times as many are possible.
        keep: factorise only where it is surely ``faster`` on the target, where it is ``not_slower``, or ``anyway``.
        seconds: of measuring for each shape of layer at most, above 0.
        epochs: of fine-tuning; None takes the pipeline's, else 3. Without training data there is none.
        learning_rate, distillation: of the fine-tuning.
    """

    changes = frozenset({"ranks"})
    cannot_precede: Mapping[str, str] = MappingProxyType(
        {
            "widths": "factorised layers have no units of their own to cut any more; cut widths first",
            "tokens": "blocks with factorised layers are not recognised any more; change tokens first, low_rank behind",
        }
    )

    def __init__(
        self,
        ratio: float = 0.4,
        *,
        energy: float | None = None,
        rank: int | None = None,
        only: str | Sequence[str] = (),
        skip: str | Sequence[str] = (),
        least: int = 16,
        qkv: Literal["one", "three"] = "one",
        calibrate: bool | None = None,
        batches: int = 4,
        sensitivity: bool = True,
        multiple: int = 8,
        keep: Keep = "faster",
        seconds: float = 6.0,
        epochs: int | None = None,
        learning_rate: float = 5e-4,
        distillation: float = 0.5,
    ):
        if not 0 <= ratio < 1:
            raise UserMistake(f"low_rank: ratio={ratio} must be in [0, 1), the share that goes")
        if energy is not None and not 0 < energy <= 1:
            raise UserMistake(f"low_rank: energy={energy} must be in (0, 1], the share that stays")
        if energy is not None and rank is not None:
            raise UserMistake(f"low_rank: energy={energy} and rank={rank} exclude each other; give one")
        if rank is not None and rank < 1:
            raise UserMistake(f"low_rank: rank={rank} must be at least 1")
        if least < 2 or batches < 1 or multiple < 1 or not seconds > 0:
            raise UserMistake(
                f"low_rank: least={least} must be at least 2, batches={batches} and multiple={multiple} at least 1, "
                f"seconds={seconds} above 0"
            )
        if qkv not in ("one", "three") or keep not in ("faster", "not_slower", "anyway"):
            raise UserMistake(
                f"low_rank: qkv={qkv!r}, keep={keep!r}; allowed: one, three, and faster, not_slower, anyway"
            )
        self.ratio, self.energy, self.rank = ratio, energy, rank
        self.only, self.skip = _words(only), _words(skip)
        self.least, self.qkv, self.multiple = least, qkv, multiple
        self.calibrate, self.batches, self.sensitivity = calibrate, batches, sensitivity
        self.keep, self.seconds = keep, seconds
        self.epochs, self.learning_rate, self.distillation = epochs, learning_rate, distillation
        self.requires = frozenset(
            ({"calibration"} if calibrate else set()) | ({"train"} if epochs else set())
        )
        self._looked_at: dict[Any, list[Layer]] = {}
        self._measured: dict[Any, tuple[int, str]] = {}

    def with_strength(self, strength: float) -> Pass:
        """``ratio`` from 0 to 0.97; what was found out about the model and the target is kept."""
        options = {
            name: value for name, value in self.options().items() if name not in ("ratio", "energy", "rank")
        }
        made = LowRank(strength * _STRONGEST, **options)
        made._looked_at, made._measured = self._looked_at, self._measured
        return made

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See ``Pass.apply``."""
        result = copy.deepcopy(model).eval()
        layers = self._layers(result, context)
        if not layers:
            raise StructureError(
                f"{type(model).__name__}: no nn.Linear or ungrouped nn.Conv2d with at least {self.least} inputs and "
                "outputs that is called as a module"
            )
        limits = Speed(self.keep, self.seconds, self._measured).limits(layers, context)
        ranks = self._ranks(layers, limits, context)
        self._tell(layers, ranks, context)
        for layer in layers:
            if layer.name in ranks:
                put(result, layer.names, factorised(layer, ranks[layer.name]))
        finetune(
            result,
            context,
            epochs=epochs_of(self.epochs, context, _EPOCHS) if ranks else 0,
            learning_rate=self.learning_rate,
            distillation=self.distillation,
        )
        return result

    def _layers(self, model: nn.Module, context: Context) -> list[Layer]:
        calibrated = context.train is not None if self.calibrate is None else self.calibrate
        # Looking takes long, and a pipeline that adjusts strengths would ask for the same again and again.
        key = (fingerprint(model), id(context.train), tuple(x.shape for x in context.example))
        if key not in self._looked_at:
            self._looked_at.clear()  # it holds tensors of the size of the model
            self._looked_at[key] = find_layers(
                copy.deepcopy(model),
                context,
                only=self.only,
                skip=self.skip,
                least=self.least,
                split=self.qkv == "three",
                batches=self.batches if calibrated else 0,
                sensitivity=self.sensitivity and self.energy is None and self.rank is None,
            )
        return self._looked_at[key]

    def _ranks(self, layers: Sequence[Layer], limits: Mapping[str, int], context: Context) -> Ranks:
        if self.rank is not None:
            return by_rank(layers, self.rank, limits)
        if self.energy is not None:
            return by_energy(layers, self.energy, self.multiple, limits)
        cost = "params" if context.budget is not None and context.budget.kind == "params" else "macs"
        return by_budget(layers, self.ratio, cost, self.multiple, limits)

    def _tell(self, layers: Sequence[Layer], ranks: Ranks, context: Context) -> None:
        if not ranks:
            context.report(f"none of {len(layers)} layers is factorised: the model stays as it was")
            return
        chosen = ", ".join(f"{name} {'+'.join(map(str, rank))}" for name, rank in ranks.items())
        context.report(f"factorised {len(ranks)} of {len(layers)} layers; ranks: {chosen}")


def _words(text: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(one.strip() for one in text.split("+")) if isinstance(text, str) else tuple(text)
