"""What a pipeline gives back: the model, what each pass did to its cost and quality, and the ways out."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress._record import DESCRIPTION, FORMAT, Step, read_description
from compress.origins import base_of, origin_of
from compress.outputs import relative_gap
from compress.saved import describe, rebuild, tensors_of
from compress.structure import StructureError
from nas.errors import UserMistake, first_line
from nas.files import CorruptFile, sweep_temporary, write_record
from nas.report.formats import format_count, format_interval
from nas.weights import load_tensors, save_tensors

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["FORMAT", "CompressionResult", "Step", "load", "why_not_savable"]

_staging = threading.Lock()
_staged: set[Path] = set()
_WEIGHTS = "weights.safetensors"
_EXAMPLE = "example.safetensors"
_TOLERANCE = 1e-5
"""Of the outputs' size: the same layers computed in the same order differ by nothing."""
_NOT_BUILT = (
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)
"""What constructors raise that are given what does not fit; RecursionError is among them."""


@dataclass
class CompressionResult:
    """``model`` is on the CPU, in evaluation mode, plain PyTorch; ``steps[0]`` is the original.

    Attributes:
        target: text of the target that ``latency`` of the steps is of.
        budget: text of the budget that was met, or None.
        example: inputs of one call, batch 1.
        origin: how a model of its kind is built; None where that cannot be told (then it cannot be saved).
        facts: seed, environment and the like.
    """

    model: nn.Module
    steps: tuple[Step, ...]
    target: str
    budget: str | None
    example: tuple[Tensor, ...]
    origin: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def original(self) -> Step:
        """What it began with."""
        return self.steps[0]

    @property
    def final(self) -> Step:
        """What came out."""
        return self.steps[-1]

    def report(self) -> Table:
        """A rich table, one row for each step; on a console too narrow for it, each step is a few lines."""
        from compress.steps_table import StepsTable

        return StepsTable(f"{self.target}, {self.budget or 'no budget'}", self._heads(), self.rows())

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of ``report``: each figure was counted or measured in this run, ``-`` stands for none."""
        return [_row(step, self.metric) for step in self.steps]

    @property
    def metric(self) -> str:
        """Which of a step's metrics counts: the task's objective, or accuracy."""
        return str(self.facts.get("metric") or "accuracy")

    def _heads(self) -> tuple[str, ...]:
        return ("after", "params", "MACs", "latency (ms)", "of original", self.metric, "agreement")

    def __str__(self) -> str:
        rows = [self._heads(), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def save(self, directory: str | Path) -> Path:
        """Write ``compressed.json`` (sealed) and ``weights.safetensors`` into a new or empty directory.

        What was written is loaded again and compared with the model before this returns.

        Raises:
            StructureError: a part of the model, or how it is built, cannot be told in JSON.
            UserMistake: the directory holds something already.
        """
        out = Path(directory)
        check_empty(out)
        with staged(out) as staging:
            self.write(staging)
        return out

    def write(self, directory: Path) -> None:
        """The files of ``save``, into an existing directory."""
        origin = self.origin or origin_of(self.model)
        trust = [str(origin.get("class", "")).partition(":")[0]]
        described = describe(self.model, base_of(origin, trust))
        digest = save_tensors(tensors_of(self.model), directory / _WEIGHTS)
        example = save_tensors({str(n): x for n, x in enumerate(self.example)}, directory / _EXAMPLE)
        record = {
            "format": FORMAT,
            "origin": origin,
            "structure": described,
            "frozen": _frozen(self.model),
            "weights_sha256": digest,
            "example_sha256": example,
            "steps": [step.to_dict() for step in self.steps],
            "target": self.target,
            "budget": self.budget,
            "facts": self.facts,
        }
        write_record(directory / DESCRIPTION, record)
        again = load(directory, trust=trust).model
        if reason := _other_outputs(again, self.model, self.example):
            raise StructureError(reason)

    def export(self, directory: str | Path) -> Path:
        """A bundle to deploy: the files of ``save``, ``model.onnx`` and ``latency.json``; see ``compress.bundle``."""
        from compress.bundle import write_bundle

        return write_bundle(self, Path(directory))


def load(directory: str | Path, *, trust: Iterable[str] = ()) -> CompressionResult:
    """A saved result; neither the passes nor their training code are imported.

    Args:
        directory: written by ``CompressionResult.save`` or ``export``.
        trust: packages besides torch.nn, timm and spaces whose module classes may be used: code of them runs.

    Raises:
        UserMistake: no such directory, an untrusted class, or a base that cannot be built here.
        CorruptFile: a file is damaged.
    """
    place = Path(directory)
    path = place / DESCRIPTION
    record = read_description(path)
    trust = [name for name in trust if name]
    try:
        model = rebuild(record["structure"], base_of(record["origin"], trust), trust)
    except UserMistake as error:
        raise UserMistake(f"{path}: {error}") from None
    except (*_NOT_BUILT, MemoryError) as error:
        raise UserMistake(
            f"{path}: cannot be built here ({type(error).__name__}: {first_line(error, 200)})"
        ) from None
    state, _ = load_tensors(place / _WEIGHTS, record["weights_sha256"])
    _fill(model, state, record["frozen"], path)
    examples, _ = load_tensors(place / _EXAMPLE, record["example_sha256"])
    if not examples or examples.keys() != {str(n) for n in range(len(examples))}:
        raise CorruptFile(
            place / _EXAMPLE, f"holds {', '.join(sorted(examples)) or 'nothing'}, not 0, 1, ..."
        )
    return CompressionResult(
        model=model.eval(),
        steps=tuple(Step.from_dict(step) for step in record["steps"]),
        target=record["target"],
        budget=record["budget"],
        example=tuple(examples[str(n)] for n in range(len(examples))),
        origin=record["origin"],
        facts=record["facts"],
    )


def why_not_savable(
    model: nn.Module, origin: Mapping[str, Any] | None, example: tuple[Tensor, ...]
) -> str | None:
    """Why ``model`` as it is could not be saved and loaded again; None when it could. Nothing is written.

    Args:
        origin: as of ``compress.origins.origin_of``, which is asked where it is None.
    """
    try:
        origin = origin or origin_of(model)
        trust = [str(origin.get("class", "")).partition(":")[0]]
        base = base_of(origin, trust)
        with torch.random.fork_rng(devices=[]):  # making modules draws weights
            again = rebuild(describe(model, base), base, trust).eval()
        state = {name: x.detach() for name, x in tensors_of(model).items()}
        _fill(again, state, _frozen(model), Path("the model"))
    except (UserMistake, CorruptFile) as error:
        return str(error)
    except _NOT_BUILT as error:
        return f"{type(model).__name__}: cannot be built again ({type(error).__name__}: {first_line(error, 200)})"
    return _other_outputs(again, model, example)


def _other_outputs(again: nn.Module, model: nn.Module, example: tuple[Tensor, ...]) -> str | None:
    """Why ``again``, built from the description of ``model``, is not the same; None when it is."""
    found = "gives other outputs"
    with torch.no_grad():
        wanted = model(*example)
        try:
            if relative_gap(again(*example), wanted) <= _TOLERANCE:
                return None
        except Exception as error:  # a model without something that it kept fails in any way
            found = f"does not run ({type(error).__name__}: {error})"
    return (
        f"{type(model).__name__}: built again from its description it {found}; "
        "something in it is kept in no parameter, buffer or attribute"
    )


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` to write into, which becomes ``out`` when the block ends and goes when it raises.

    What writers that were killed have left beside ``out`` is removed first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with _staging:
        if (
            not _staged
        ):  # by its name, what another thread is writing could be of a killed process of our number
            with contextlib.suppress(OSError):  # what is another user's stays
                sweep_temporary(out.parent)
        staging.mkdir()
        _staged.add(staging)
    try:
        yield staging
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # after the rename this name is gone
        _staged.discard(staging)


def check_empty(out: Path) -> None:
    """Raises UserMistake when ``out`` is there and no empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserMistake(f"{out}: not an empty directory; give a new one")


def _frozen(model: nn.Module) -> list[str]:
    """Names of the parameters that do not learn though they could."""
    return sorted(
        name
        for name, one in model.named_parameters(remove_duplicate=False)
        if _may_learn(one) and not one.requires_grad
    )


def _may_learn(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _fill(model: nn.Module, state: dict[str, Tensor], frozen: Iterable[str], path: Path) -> None:
    own, fixed = tensors_of(model), set(frozen)
    if unknown := sorted(fixed - own.keys()):
        raise CorruptFile(path, f"it names {unknown[0]!r} as frozen, which the model does not have")
    if own.keys() != state.keys():
        wrong = sorted(own.keys() ^ state.keys())[:3]
        raise CorruptFile(path, f"its weights and its structure disagree ({', '.join(wrong)}, ...)")
    parameters: dict[int, nn.Parameter] = {}
    for name, value in state.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if own[name].shape != value.shape:
            raise CorruptFile(
                path, f"{name} is {tuple(value.shape)} in the file, not {tuple(own[name].shape)}"
            )
        # Copied, because in a file tensors lie anywhere, and kernels for aligned memory are faster and round otherwise.
        if leaf in owner._parameters:
            # Tied parameters come from the file as one tensor and stay one parameter.
            if id(value) not in parameters:
                learns = _may_learn(value) and name not in fixed
                parameters[id(value)] = nn.Parameter(value.clone(), requires_grad=learns)
            # By setattr, because recurrent layers of torch keep a second list of their weights.
            setattr(owner, leaf, parameters[id(value)])
        else:
            owner._buffers[leaf] = value.clone()


def _row(step: Step, metric: str) -> tuple[str, ...]:
    latency, ratio = step.latency, step.ratio
    value = step.metrics.get(metric)
    return (
        step.name,
        format_count(step.params),
        format_count(step.macs) + ("+" if step.uncounted else ""),
        "-"
        if latency is None
        else format_interval(latency["median_ms"], latency["low_ms"], latency["high_ms"]),
        "-" if ratio is None else f"{ratio['ratio']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
        "-" if value is None else f"{100 * value:.2f} %" if metric == "accuracy" else f"{value:.4f}",
        "-" if step.agreement is None else f"{100 * step.agreement:.2f} %",
    )
