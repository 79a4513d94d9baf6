"""The interface of a pass, and what the pipeline hands to it."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compress.labels import as_targets, check_labels
from compress.structure import StructureError
from nas.errors import RunStopped, UserMistake, nearest
from nas.latency import Target

__all__ = [
    "CHANGES",
    "Adjustable",
    "Batches",
    "Budget",
    "Context",
    "Inputs",
    "Loss",
    "NothingLeft",
    "Pass",
    "PassFailed",
    "batches_of",
    "class_axis",
    "classification_loss",
    "is_one_logit",
]

Inputs = Tensor | Sequence[Tensor]
"""Of a model of one input, or of several, in the order in which it takes them; the batch comes first in each."""

Batches = Iterable[tuple[Inputs, Tensor]]
"""Batches of (inputs, labels), the first dimension of all is the batch; can be gone through again and again.

``compress.data`` reads them: ``answer`` for a model's outputs and loss, ``inputs_of`` and ``move`` for their parts."""

Loss = Callable[[Any, Tensor], Tensor]
"""What the model gave (in training mode, where that differs) and the labels -> a scalar."""

Kind = Literal["latency", "macs", "params"]

CHANGES = frozenset(
    {"tokens", "widths", "ranks", "experts", "activations", "fusion", "precision", "execution"}
)
"""What a pass can change: number of tokens, sizes of layers, factorised layers, experts, activations taken away,
layers merged into one, the type of numbers, the way in which the same values are computed."""

_QUANTISED: Mapping[str, str] = MappingProxyType(
    {"precision": "weights of int8 can be neither cut nor trained any more; quantise last"}
)


class PassFailed(RunStopped):
    """A pass could not do its work, and not because of what it was asked for: the loss became NaN, for instance."""


class NothingLeft(StructureError):
    """There is nothing in the model that the pass could do, and it would not be wrong to leave the model as it is.

    Behind a pass that makes the same ``changes`` the pipeline goes on without it; alone it is the user's mistake.
    """


@dataclass(frozen=True)
class Budget:
    """How much the result may cost.

    >>> str(Budget.parse("latency=0.6")), str(Budget.parse("latency=8ms")), str(Budget.parse("macs=1.2e9"))
    ('latency <= 0.6 of the original', 'latency <= 8 ms', 'macs <= 1200000000')

    Attributes:
        kind: ``latency`` (measured on the target), ``macs`` of one sample, or ``params``.
        value: with ``relative`` a share of the original's, in (0, 1]; else milliseconds of one call, or a count.
        relative: which of the two.

    Raises:
        UserMistake: another kind, or a value out of its range.
    """

    kind: Kind
    value: float
    relative: bool = True

    def __post_init__(self) -> None:
        known = ["latency", "macs", "params"]
        if self.kind not in known:
            raise UserMistake(
                f"budget: kind {self.kind!r}{nearest(str(self.kind), known)}; allowed: {', '.join(known)}"
            )
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise UserMistake(f"budget: {self.kind}={self.value!r} must be a number")
        fits = 0 < self.value < math.inf and (self.value <= 1 or not self.relative)
        if not fits:
            allowed = "a share of the original in (0, 1]" if self.relative else "above 0 and finite"
            raise UserMistake(f"budget: {self.kind}={self.value:g}; allowed: {allowed}")

    @classmethod
    def parse(cls, text: str | Mapping[str, float] | Budget) -> Budget:
        """A budget from ``latency=0.6``, ``latency=60%``, ``latency=8ms``, ``macs=0.5``, ``params=2e6``, or a mapping.

        Numbers up to 1 are shares of the original, larger ones are counts; milliseconds need their unit.
        """
        if isinstance(text, Budget):
            return text
        if isinstance(text, Mapping):
            if len(text) != 1:
                raise UserMistake(f"budget: {dict(text)!r} must name one of latency, macs, params")
            [(kind, value)] = text.items()
            text = f"{kind}={value}"
        if not isinstance(text, str):
            raise UserMistake(
                f"budget={text!r}: write latency=0.6, latency=60%, latency=8ms, macs=0.5 or params=2e6"
            )
        kind, equals, amount = text.replace("<=", "=").partition("=")
        kind, amount = kind.strip(), amount.strip().lower()
        percent, milliseconds = amount.endswith("%"), amount.endswith("ms")
        try:
            value = float(amount.removesuffix("%").removesuffix("ms").strip())
        except ValueError:
            value = math.nan
        if not equals or math.isnan(value):
            raise UserMistake(
                f"budget {text!r}: write latency=0.6, latency=60%, latency=8ms, macs=0.5 or params=2e6"
            )
        if percent:
            value /= 100
        relative = percent or (value <= 1 and not milliseconds)
        if kind == "latency" and not relative and not milliseconds:
            raise UserMistake(
                f"budget {text!r}: a latency is a share of the original up to 1, or has its unit, as in 8ms"
            )
        return cls(kind, value, relative)  # type: ignore[arg-type]  # looked at by __post_init__

    def limit(self, original: float) -> float:
        """The most that is allowed, where the original has ``original`` (milliseconds or a count)."""
        return self.value * original if self.relative else self.value

    def __str__(self) -> str:
        if self.relative:
            return f"{self.kind} <= {self.value:g} of the original"
        return (
            f"{self.kind} <= {self.value:g} ms"
            if self.kind == "latency"
            else f"{self.kind} <= {self.value:.0f}"
        )


def classification_loss(outputs: Any, labels: Tensor) -> Tensor:
    """Cross entropy of logits (B, classes, ...); a tuple (distilled models in training) is averaged over its members.

    Labels are classes (B, ...), whole numbers, of which -100 is left out, or one-hot or probabilities
    (B, classes, ...). A single output, (B, 1) or (B,), is the logit of a
    chance, and its labels are 0, 1 or chances between, (B, 1) or (B,).

    Raises UserMistake for classes that are no whole numbers or out of range; when labels of a single output are no
    chances or not as many; or for (B, 1, ...): of one class the chance is always 1.
    """
    if isinstance(outputs, (tuple, list)):
        return torch.stack([classification_loss(one, labels) for one in outputs]).mean()
    if not is_one_logit(outputs):
        if outputs.shape[1:2] == (1,):
            raise UserMistake(
                f"train: outputs {tuple(outputs.shape)} are logits of one class, from which nothing is learned; give "
                "loss="
            )
        check_labels(labels, outputs.shape, "train")
        return nn.functional.cross_entropy(outputs.float(), as_targets(labels, outputs.shape))
    if labels.numel() != outputs.numel():
        raise UserMistake(
            f"train: labels {tuple(labels.shape)} do not fit outputs {tuple(outputs.shape)}, one number for each "
            "sample; give loss="
        )
    low, high = (float(x) for x in labels.aminmax())
    if not 0 <= low <= high <= 1:
        raise UserMistake(
            f"train: labels of one output must lie in [0, 1], not {low:g} to {high:g}; give loss= for other numbers"
        )
    return nn.functional.binary_cross_entropy_with_logits(outputs.float().flatten(), labels.float().flatten())


def is_one_logit(outputs: Tensor) -> bool:
    """Whether ``outputs`` holds one number for each sample: a softmax over it would be 1 whatever it is."""
    return outputs.dim() == 1 or outputs.shape[1:] == (1,)


def _quiet(text: str) -> None:
    pass


@dataclass(frozen=True)
class Context:
    """What a pass may use.

    Attributes:
        example: inputs of one call, batch 1, on the CPU.
        train: batches to learn from, or None; the pipeline has looked that it yields something.
        validation: batches to judge by, or None.
        loss: of the model's outputs and the labels.
        teacher: the original model in evaluation mode, without gradients, on ``device``; not to be changed.
        target: where the result will run.
        budget: of the whole pipeline, or None; see also ``limits``.
        original: what the original costs: ``params``, ``macs`` (of one sample) and, once measured, ``latency`` (ms).
        seed: of everything random.
        device: where training and calibration run.
        epochs: for every pass that trains and was not told its own number; None leaves it to the pass.
        probe: only the shapes of the result count (the pipeline looks for a strength that meets the budget, or whether
            all passes can work before the first one trains): a pass then skips all training but returns a model of the
            very structure it would return otherwise.
        report: told one line about what is being done.
    """

    example: tuple[Tensor, ...]
    train: Batches | None = None
    validation: Batches | None = None
    loss: Loss = classification_loss
    teacher: nn.Module | None = None
    target: Target = field(default_factory=lambda: Target.parse("cpu:1"))
    budget: Budget | None = None
    original: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    epochs: int | None = None
    probe: bool = False
    report: Callable[[str], None] = _quiet

    def with_changes(self, **changes: Any) -> Context:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def batches_of(context: Context) -> Batches:
    """The batches to learn from; none where there is no data.

    Not ``context.train or ()``: that asks a loader for its length, and a stream has none.
    """
    return () if context.train is None else context.train


def class_axis(context: Context) -> int:
    """Along which axis outputs have their classes: 1 where the loss is a cross entropy of PyTorch, else the last."""
    named = context.loss in (classification_loss, nn.functional.cross_entropy)
    return 1 if named or isinstance(context.loss, nn.CrossEntropyLoss) else -1


class Pass(ABC):
    """One compression step. Options are the keyword arguments of ``__init__``, JSON values; kept as attributes.

    Attributes:
        name: given by ``register_pass``.
        requires: of ``train`` (batches to learn from) and ``calibration`` (batches, labels are not looked at).
        changes: of ``CHANGES``.
        cannot_follow: what an earlier pass must not have changed -> the reason, for the message.
        cannot_precede: name of a later pass, or what it must not change -> the reason.
    """

    name: ClassVar[str]
    requires: frozenset[str] = frozenset()
    changes: frozenset[str] = frozenset()
    cannot_follow: Mapping[str, str] = _QUANTISED
    cannot_precede: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """The compressed model, in evaluation mode, on the device of ``model``; plain PyTorch without masks or hooks.

        ``model`` itself is never changed: work on ``copy.deepcopy(model)``. Modules that stay in the result and are
        not of torch.nn or timm live in ``spaces.layers`` and have ``config() -> dict`` (JSON), so that
        ``type(module)(**module.config())`` makes their structure again; children that this does not make, or makes
        otherwise (wrapped blocks), are put in by name afterwards.

        Raises:
            UserMistake: (or its child ``StructureError``) the pass cannot work on this model, and why.
        """

    def options(self) -> dict[str, Any]:
        """The options it was made with (its public attributes), for the record."""
        return {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "requires"
        }

    def __str__(self) -> str:
        """The text that makes it again, with the options that are not the default."""
        usual = {name: one.default for name, one in inspect.signature(type(self)).parameters.items()}
        chosen = {
            name: value
            for name, value in self.options().items()
            if value != usual.get(name) and name in usual
        }
        text = ",".join(f"{name}={_as_text(value)}" for name, value in chosen.items())
        return f"{self.name}:{text}" if text else self.name


def _as_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_as_text(one) for one in value)}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@runtime_checkable
class Adjustable(Protocol):
    """A pass that can be made stronger or weaker, so that the pipeline can meet a budget by measuring."""

    def with_strength(self, strength: float) -> Pass:
        """The same pass at a strength in [0, 1]: 0 changes as good as nothing, 1 takes away all that it can.

        Cost must not rise with the strength. The result of ``apply`` with ``context.probe`` is what is measured.
        """
        ...
