"""``compress``: passes one after the other, measured before, between and after, adjusted until the budget is met."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.arguments import (
    check_learnable,
    check_plain_arguments,
    device_of,
    learnable_batches,
    passes_of,
    private_copy,
    target_of,
)
from compress.budgeting import Costs, Fit, fitting_passes
from compress.data import Judge, Judgement, Sources
from compress.fits import Look, check_fits, example_of, look_at
from compress.measuring import count, measure_against
from compress.origins import origin_of
from compress.outputs import difference
from compress.passes.base import (
    Batches,
    Budget,
    Context,
    Loss,
    NothingLeft,
    Pass,
    PassFailed,
)
from compress.randomness import lent_generators
from compress.result import CompressionResult, Step, why_not_savable
from compress.structure import StructureError
from nas.environment import describe_environment
from nas.errors import UserMistake
from nas.latency import Target
from nas.tasks.base import Task

__all__ = ["compress"]

logger = logging.getLogger(__name__)

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
            are a tuple: ((ids, numbers), labels). A loader with a ``generator=`` of its own draws from that one, and
            moves it on; any other draws its order from ``seed``.
        validation: likewise, to judge by: a task by its own metrics, batches by accuracy. Without it nothing is
            judged. A task given as ``train`` serves both.
        target: where the result will run, as for ``nas measure``.
        budget: ``"latency=0.6"`` (of the original, measured on the target), ``"latency=8ms"``, ``"macs=0.5"``,
            ``"params=2e6"``. Adjustable passes that lower it then get the weakest common strength that meets it,
            whatever their own options for it say; the others stay as they are.
        seed: of everything random, in [0, 2**32). The global generators of torch, numpy and ``random`` are lent from it
            meanwhile and stand afterwards where they stood before.
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
        UserMistake: an argument of another type or out of its range, an unknown pass, an order or a model that a pass
            refuses, data that yields nothing or that the model does not run on, labels that the model has no outputs
            for, a task whose batches are not (inputs, labels), a budget that cannot be met, tied weights that a pass
            would untie, hooks or parametrizations, a model that cannot be saved where ``savable``.
        PassFailed: a pass could not do its work: the loss became NaN, or its result gives other shapes.
    """
    wanted = Budget.parse(budget) if budget is not None else None
    check_plain_arguments(
        seed=seed,
        epochs=epochs,
        measure_seconds=measure_seconds,
        budget=wanted,
        example=example,
        origin=origin,
        loss=loss,
        report=report,
    )
    tell = report or logger.info
    # Passes train, whatever mode they are called in.
    with torch.inference_mode(False), torch.enable_grad(), lent_generators(seed):
        chosen = passes_of(passes)
        check_order(chosen)
        place = target_of(target)
        where = device_of(device, place)
        original = private_copy(model, chosen)
        sources = learnable_batches(train), learnable_batches(validation)
        data = Sources(*sources, seed, chosen, loss)
        looks = [look_at(one, name) for name, one in data.sources()]
        for look in looks:
            if look.name == "train":
                check_learnable(look.name, (*look.inputs, look.labels))
        inputs = _inputs(example, original, looks)
        check_fits(original, inputs, looks, data.loss)
        start = _start(original, origin, inputs, savable, tell)
        context = Context(
            example=inputs,
            train=data.train,
            validation=None if isinstance(data.validation, Task) else data.validation,
            loss=data.loss,
            teacher=copy.deepcopy(original).requires_grad_(False).to(where),
            target=place,
            budget=wanted,
            seed=seed,
            device=where,
            epochs=epochs,
            report=tell,
        )
        judge = data.judge(where)
        steps, result = _Pipeline(original, chosen, context, judge, measure_seconds).run()
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
        budget, fit = self._context.budget, Fit(tuple(self._passes), {})
        if budget is not None:
            fit = fitting_passes(self._passes, costs, self._apply_all)
        if not fit.strengths and self._trains_before_the_last():
            self._context.report("looking whether all passes can work, before the first one trains")
            self._apply_all(self._passes)
        for attempt in range(_ATTEMPTS):
            steps, models = [first], [self._original]
            for number in range(len(fit.passes)):
                step, made = self._step(fit.passes, number, models[-1], before)
                steps.append(step)
                models.append(made)
            steps = self._measured(steps, models)
            if budget is None or costs.holds(steps[-1]):
                return self._without_doubt(steps, costs), models[-1]
            if attempt + 1 == _ATTEMPTS or (stronger := fit.stronger()) is None:
                break
            self._context.report(f"the result misses the budget {budget}; once more, stronger")
            fit = stronger
        raise UserMistake(
            f"budget {budget}: not met by the result of {', '.join(str(one) for one in self._passes)}: "
            f"{costs.describe(steps[-1])}; allow more, or add a pass"
        )

    def _without_doubt(self, steps: list[Step], costs: Costs) -> tuple[Step, ...]:
        """The steps, the last one with a note where it does not surely meet the budget."""
        if costs.budget is None or costs.sure(steps[-1]):
            return tuple(steps)
        doubt = f"the budget {costs.budget} is met by the median, not surely: {costs.describe(steps[-1])}"
        self._context.report(doubt)
        return (*steps[:-1], replace(steps[-1], notes=(*steps[-1].notes, doubt)))

    def _trains_before_the_last(self) -> bool:
        """Whether a refusal of a later pass would come when an earlier one has trained already."""
        if self._context.train is None:
            return False
        for one in self._passes[:-1]:
            unknown = None if "train" in one.requires else 0
            for given in (getattr(one, "epochs", unknown), getattr(one, "finetune_epochs", 0)):
                if (self._context.epochs if given is None else given) != 0:
                    return True
        return False

    def _step(
        self, passes: Sequence[Pass], number: int, model: nn.Module, before: Judgement | None
    ) -> tuple[Step, nn.Module]:
        one, started, notes = passes[number], time.perf_counter(), list[str]()

        def tell(text: str) -> None:
            notes.append(text)
            self._context.report(f"{one.name}: {text}")

        self._context.report(f"pass {number + 1}/{len(passes)}: {one}")
        made = self._apply_or_leave(passes, number, model, self._context.with_changes(report=tell))
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
        for number in range(len(passes)):
            made = self._apply_or_leave(passes, number, made, probe)
        return made

    def _apply_or_leave(
        self, passes: Sequence[Pass], number: int, model: nn.Module, context: Context
    ) -> nn.Module:
        """The model as it is where an earlier pass has left the pass nothing to do."""
        one = passes[number]
        try:
            return self._apply(one, model, context)
        except NothingLeft as error:
            if not any(earlier.changes & one.changes for earlier in passes[:number]):
                raise
            context.report(f"an earlier pass left it nothing to do, the model stays as it was: {error}")
            return copy.deepcopy(model)

    def _apply(self, one: Pass, model: nn.Module, context: Context) -> nn.Module:
        # The pass promises not to change what it gets; a copy makes sure, and costs little beside the pass.
        given = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
            torch.manual_seed(context.seed)
            try:
                made = one.apply(given, context)
            except StructureError as error:
                kind = NothingLeft if isinstance(error, NothingLeft) else StructureError
                raise kind(f"pass {one.name!r}: {error}") from None
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


def _check_plain(model: nn.Module, one: Pass) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "parametrizations") or getattr(module, "_forward_hooks", None):
            raise PassFailed(f"pass {one.name!r}: left a mask or a hook on {name or 'the model'}")


def _counts(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": found["params"], "macs": found["macs"], "uncounted": tuple(found["uncounted"])}


def _inputs(
    example: Tensor | tuple[Tensor, ...] | None, model: nn.Module, looks: Sequence[Look]
) -> tuple[Tensor, ...]:
    """Of one call with one sample, on the CPU."""
    given = (example,) if isinstance(example, Tensor) else example
    return tuple(learnable_batches(x[:1].detach().cpu()) for x in given or example_of(model, *looks))


def _start(
    model: nn.Module,
    origin: Mapping[str, Any] | None,
    inputs: tuple[Tensor, ...],
    savable: bool,
    tell: Callable[[str], None],
) -> dict[str, Any] | None:
    """The origin, where it is known: compressing needs none. What could not be saved is said, or refused."""
    start, reason = (dict(origin), None) if origin is not None else _origin_or_none(model)
    reason = reason or why_not_savable(model, start, inputs)
    if reason and savable:
        raise StructureError(f"the result could not be saved: {reason}")
    if reason:
        tell(f"the result cannot be saved: {reason}")
    return start


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
