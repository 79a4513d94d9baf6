"""``compress``: passes one after the other, measured before, between and after, adjusted until the budget is met."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.budgeting import Costs, fitting_passes
from compress.data import Judge, Judgement, TaskLoss, as_batches
from compress.fits import check_fits, example_of, look_at
from compress.measuring import count, measure_against
from compress.origins import origin_of
from compress.outputs import difference
from compress.passes import parse_pass
from compress.passes.base import Batches, Budget, Context, Loss, Pass, PassFailed, classification_loss
from compress.result import CompressionResult, Step, why_not_savable
from compress.structure import StructureError
from nas.environment import describe_environment
from nas.errors import UserMistake, first_line
from nas.latency import Target
from nas.tasks.base import Task

__all__ = ["compress"]

logger = logging.getLogger(__name__)

_TYING_MATTERS = frozenset({"widths", "ranks", "experts", "fusion", "precision"})
_ORIGINAL = "original"
_ATTEMPTS = 3


def compress(
    model: nn.Module,
    passes: str | Pass | Sequence[str | Pass],
    *,
    train: Batches | Task | None = None,
    validation: Batches | Task | None = None,
    target: str | Target = "cpu:1",
    budget: str | Mapping[str, float] | Budget | None = None,
    seed: int = 0,
    loss: Loss | None = None,
    epochs: int | None = None,
    device: str | torch.device | None = None,
    example: Tensor | tuple[Tensor, ...] | None = None,
    origin: Mapping[str, Any] | None = None,
    measure_seconds: float = 20.0,
    savable: bool = False,
    report: Callable[[str], None] | None = None,
) -> CompressionResult:
    """Make a smaller and faster model out of ``model``, which is not changed itself.

    Args:
        model: a timm model, one of our architectures, or a module that is built like them.
        passes: in the order in which they run: objects of ``make_pass``, or texts such as ``"ofb:target=0.5"``.
        train: batches (inputs, labels) to learn from: a DataLoader, another re-iterable, or a task. Several inputs
            are a tuple: ((ids, numbers), labels).
        validation: likewise, to judge by: a task by its own metrics, batches by accuracy. Without it nothing is
            judged. A task given as ``train`` serves both.
        target: where the result will run, as for ``nas measure``.
        budget: ``"latency=0.6"`` (of the original, measured on the target), ``"latency=8ms"``, ``"macs=0.5"``,
            ``"params=2e6"``. Adjustable passes then get the weakest common strength that meets it, whatever their
            own options for it say.
        seed: of everything random, in [0, 2**32).
        loss: of outputs and labels; by default that of the task given as ``train``, else cross entropy (of a single
            output: of the chance that it is the logit of).
        epochs: for every pass that trains and was not told its own number.
        device: where passes train; the target's by default.
        example: inputs of one sample, where neither data nor model tell.
        origin: how a model of this kind is built, for saving; see ``compress.origins.origin_of``.
        measure_seconds: for the last, interleaved measurement of all steps; 0 measures no latency at all.
        savable: refuse, before anything is done, a model that could not be saved afterwards; else that is only said.
        report: told what is being done, one line at a time; also which passes did not make it measurably faster.

    Raises:
        UserMistake: an unknown pass, an order or a model that a pass refuses, data that yields nothing or that the
            model does not run on, a task whose batches are not (inputs, labels), a budget that cannot be met, tied
            weights that a pass would untie, hooks or parametrizations, a model that cannot be saved where ``savable``.
        PassFailed: a pass could not do its work: the loss became NaN, or its result gives other shapes.
    """
    run = [passes] if isinstance(passes, (str, Pass)) else list(passes)
    chosen = [parse_pass(one) if isinstance(one, str) else one for one in run]
    check_order(chosen)
    wanted = Budget.parse(budget) if budget is not None else None
    place = target if isinstance(target, Target) else Target.parse(target)
    place.check()
    if wanted is not None and wanted.kind == "latency" and measure_seconds <= 0:
        raise UserMistake("measure_seconds=0: a latency budget is met by measuring; give some seconds")
    original = _private_copy(model, chosen)
    tell = report or logger.info
    data = _Data(train, validation, seed, chosen)
    looks = [look_at(one, name) for name, one in data.sources()]
    inputs = (example,) if isinstance(example, Tensor) else example
    inputs = inputs or example_of(original, *looks)
    inputs = tuple(x[:1].detach().cpu() for x in inputs)
    chosen_loss = loss or data.loss
    check_fits(original, inputs, looks, chosen_loss)
    start, reason = (dict(origin), None) if origin is not None else _origin_or_none(original)
    reason = reason or why_not_savable(original, start, inputs)
    if reason and savable:
        raise StructureError(f"the result could not be saved: {reason}")
    if reason:
        tell(f"the result cannot be saved: {reason}")
    where = torch.device(device) if device is not None else place.torch_device()
    context = Context(
        example=inputs,
        train=data.train,
        validation=None if isinstance(data.validation, Task) else data.validation,
        loss=chosen_loss,
        teacher=copy.deepcopy(original).requires_grad_(False).to(where),
        target=place,
        budget=wanted,
        seed=seed,
        device=where,
        epochs=epochs,
        report=tell,
    )
    judge = data.judge(where)
    pipeline = _Pipeline(original, chosen, context, judge, measure_seconds)
    steps, result = pipeline.run()
    return CompressionResult(
        model=result,
        steps=steps,
        target=str(place),
        budget=None if wanted is None else str(wanted),
        example=inputs,
        origin=start,
        facts={
            "seed": seed,
            "epochs": epochs,
            "metric": judge.metric if judge else None,
            "environment": describe_environment(),
        },
    )


def check_order(passes: Sequence[Pass]) -> None:
    """Raises UserMistake, with the reason, when a pass cannot follow an earlier one, or when there is none."""
    if not passes:
        raise UserMistake("passes: there is none; give at least one")
    for position, later in enumerate(passes):
        for earlier in passes[:position]:
            for change in sorted(earlier.changes & later.cannot_follow.keys()):
                raise UserMistake(
                    f"pass {later.name!r} cannot follow {earlier.name!r}, which changes the {change}: "
                    f"{later.cannot_follow[change]}"
                )
            for word in sorted({later.name, *later.changes} & earlier.cannot_precede.keys()):
                raise UserMistake(
                    f"pass {later.name!r} cannot follow {earlier.name!r}: {earlier.cannot_precede[word]}"
                )


class _Data:
    """Training and validation data, looked at before anything is done."""

    def __init__(self, train: Any, validation: Any, seed: int, passes: Iterable[Pass]):
        if validation is None and isinstance(train, Task):
            validation = train
        self.train: Batches | None = None if train is None else as_batches(train, "train", seed=seed)
        self.loss: Loss = TaskLoss(train) if isinstance(train, Task) else classification_loss
        self.validation: Batches | Task | None = validation
        if validation is not None and not isinstance(validation, Task):
            self.validation = as_batches(validation, "validation")
        for one in passes:
            if one.requires and self.train is None:
                needs = " and ".join(sorted(one.requires))
                raise UserMistake(f"pass {one.name!r} needs data ({needs}); give train=")

    def sources(self) -> list[tuple[str, Batches | Task]]:
        """What there is, with its name; the validation data first, since it is not augmented."""
        both = (("validation", self.validation), ("train", self.train))
        return [(name, one) for name, one in both if one is not None]

    def judge(self, device: torch.device) -> Judge | None:
        return None if self.validation is None else Judge(self.validation, device)


class _Pipeline:
    def __init__(
        self, original: nn.Module, passes: list[Pass], context: Context, judge: Judge | None, seconds: float
    ):
        self._original, self._passes, self._context = original, passes, context
        self._judge, self._seconds = judge, seconds

    def run(self) -> tuple[tuple[Step, ...], nn.Module]:
        """The steps, the original first, and the last model."""
        counted = count(self._original, self._context.example)
        costs = Costs(self._original, counted, self._context, self._seconds)
        self._context = self._context.with_changes(original=costs.original())
        before = self._judged(_ORIGINAL, self._original)
        first = Step(_ORIGINAL, **_counts(counted), metrics=before.metrics if before else {})
        budget, strength = self._context.budget, None
        for attempt in range(_ATTEMPTS):
            passes = self._passes
            if budget is not None:
                passes, strength = fitting_passes(passes, costs, self._apply_all, at_least=strength)
            steps, models = [first], [self._original]
            for number, one in enumerate(passes, 1):
                step, made = self._step(one, models[-1], before, f"{number}/{len(passes)}")
                steps.append(step)
                models.append(made)
            steps = self._measured(steps, models)
            if budget is None or costs.holds(steps[-1]):
                if budget is not None and not costs.sure(steps[-1]):
                    doubt = (
                        f"the budget {budget} is met by the median, not surely: {costs.describe(steps[-1])}"
                    )
                    self._context.report(doubt)
                    steps[-1] = replace(steps[-1], notes=(*steps[-1].notes, doubt))
                return tuple(steps), models[-1]
            if strength is None or strength >= 1 or attempt + 1 == _ATTEMPTS:
                break
            self._context.report(f"the result misses the budget {budget}; once more, stronger")
            strength = min(1.0, strength + 0.03)
        raise UserMistake(
            f"budget {budget}: not met by the result of {', '.join(str(one) for one in self._passes)}: "
            f"{costs.describe(steps[-1])}; allow more, or add a pass"
        )

    def _step(self, one: Pass, model: nn.Module, before: Any, where: str) -> tuple[Step, nn.Module]:
        started, notes = time.perf_counter(), list[str]()

        def tell(text: str) -> None:
            notes.append(text)
            self._context.report(f"{one.name}: {text}")

        self._context.report(f"pass {where}: {one}")
        made = self._apply(one, model, self._context.with_changes(report=tell))
        seconds = time.perf_counter() - started
        judged = self._judged(one.name, made)
        step = Step(
            str(one),
            **_counts(count(made, self._context.example)),
            metrics=judged.metrics if judged else {},
            agreement=judged.agreement(before) if judged and before else None,
            seconds=seconds,
            notes=tuple(notes),
        )
        return step, made

    def _judged(self, name: str, model: nn.Module) -> Judgement | None:
        if self._judge is None:
            return None
        judged = self._judge.judge(model)
        if (value := judged.metrics.get(self._judge.metric)) is not None:
            self._context.report(f"{name}: {self._judge.metric} {value:.4f}")
        return judged

    def _apply_all(self, passes: Sequence[Pass]) -> nn.Module:
        """The shapes that ``passes`` lead to, without training."""
        made, probe = self._original, self._context.with_changes(probe=True, report=lambda text: None)
        for one in passes:
            made = self._apply(one, made, probe)
        return made

    def _apply(self, one: Pass, model: nn.Module, context: Context) -> nn.Module:
        # The pass promises not to change what it gets; a copy makes sure, and costs little beside the pass.
        given = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
            torch.manual_seed(context.seed)
            try:
                made = one.apply(given, context)
            except StructureError as error:
                raise StructureError(f"pass {one.name!r}: {error}") from None
            except PassFailed as error:
                raise PassFailed(f"pass {one.name!r}: {error}") from error
        made = made.cpu().eval()
        _check_plain(made, one)
        with torch.no_grad():
            outputs, wanted = made(*context.example), model(*context.example)
        gap = difference(outputs, wanted)
        if gap == float("inf"):
            raise PassFailed(f"pass {one.name!r}: its result gives outputs of another shape, or NaN")
        return made

    def _measured(self, steps: list[Step], models: list[nn.Module]) -> list[Step]:
        if self._seconds <= 0:
            return steps
        self._context.report(f"measuring all {len(models)} steps together on {self._context.target}")
        names = [_ORIGINAL, *(f"{n}: {step.name}" for n, step in enumerate(steps[1:], 1))]
        session = measure_against(
            dict(zip(names, models, strict=True)),
            _ORIGINAL,
            self._context.example,
            self._context.target,
            seconds=self._seconds,
            seed=self._context.seed,
        )
        measured = _with_doubts(
            [
                replace(
                    step,
                    latency=session.results[name].to_dict(),
                    ratio=None if name == _ORIGINAL else session.pair(name, _ORIGINAL).to_dict(),
                )
                for name, step in zip(names, steps, strict=True)
            ]
        )
        for before, after in zip(steps, measured, strict=True):
            for note in after.notes[len(before.notes) :]:
                self._context.report(f"{after.name}: {note}")
        return measured


def _private_copy(model: nn.Module, passes: Sequence[Pass]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UserMistake(f"model: {type(model).__name__} is no torch.nn.Module")
    inner = getattr(model, "_orig_mod", None)  # torch.compile's wrapper
    model = inner if isinstance(inner, nn.Module) else model
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UserMistake(f"model: is wrapped in {type(model).__name__}; give its .module")
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_floating_point() or parameter.device.type == "meta":
            continue
        first = seen.setdefault(id(parameter), name)
        if first != name and (one := next((p for p in passes if p.changes & _TYING_MATTERS), None)):
            raise UserMistake(
                f"model: {first} and {name} are one tensor (tied weights), which pass {one.name!r} would tear apart; "
                "untie them (give each its own copy) first"
            )
    for parameter in model.parameters():
        if parameter.device.type == "meta":
            raise UserMistake(
                "model: some parameters are on the meta device and have no values; load its weights first"
            )
    for name, module in model.named_modules():
        if getattr(module, "_forward_hooks", None) or getattr(module, "_forward_pre_hooks", None):
            raise UserMistake(
                f"model: {name or 'it'} has a forward hook, which the result could not keep; remove it first"
            )
        if hasattr(module, "parametrizations"):
            raise UserMistake(
                f"model: {name or 'it'} is parametrized; make its weights plain first "
                "(torch.nn.utils.parametrize.remove_parametrizations)"
            )
    try:
        return copy.deepcopy(model).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise UserMistake(
            f"model: cannot be copied ({first_line(error, 150)}); detach the tensors that it keeps, or build it anew"
        ) from None


def _check_plain(model: nn.Module, one: Pass) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "parametrizations") or getattr(module, "_forward_hooks", None):
            raise PassFailed(f"pass {one.name!r}: left a mask or a hook on {name or 'the model'}")


def _counts(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": found["params"], "macs": found["macs"], "uncounted": tuple(found["uncounted"])}


def _origin_or_none(model: nn.Module) -> tuple[dict[str, Any] | None, str | None]:
    """The origin, or why there is none: compressing needs none."""
    try:
        return origin_of(model), None
    except StructureError as error:
        return None, str(error)


def _with_doubts(steps: Sequence[Step]) -> list[Step]:
    """Each with a note where it was not measured to be faster than the one before it."""
    found, before = [], {"ratio": 1.0, "low": 1.0}
    for step in steps:
        if step.ratio is not None:
            now = step.ratio
            if now["high"] >= before["low"]:
                note = (
                    f"not surely faster: {now['ratio']:.3f} [{now['low']:.3f}, {now['high']:.3f}] of the original's "
                    f"time, {before['ratio']:.3f} before this pass"
                )
                step = replace(step, notes=(*step.notes, note))
            before = now
        found.append(step)
    return found
