"""A model written as an ONNX file, for the engines that read one."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nas.errors import TrialFailure, UserMistake
from nas.latency.runtimes.base import InputSets, distinct_shapes, installed, tensors_of, twin

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from nas.latency.target import Target

__all__ = ["Exported", "cast", "eager_outputs", "export_onnx", "named_inputs"]

logger = logging.getLogger(__name__)

_INLINE_BYTES = 1_500_000_000


class Exported(NamedTuple):
    """An ONNX file, and the exporter that wrote it: dynamo, torchscript, or none for a file that was there."""

    path: Path
    exporter: str

    @property
    def versions(self) -> dict[str, str]:
        """What the file, and so the time, depends on."""
        own = {"onnxscript": installed("onnxscript")} if self.exporter == "dynamo" else {}
        return {"exporter": self.exporter, **own}


def eager_outputs(model: nn.Module | Path, sets: InputSets) -> dict[int, list[Tensor]]:
    """What the model computes in fp32 on the CPU, for one set of every shape; nothing for a file."""
    import torch

    if isinstance(model, Path):
        return {}
    numbers = distinct_shapes(sets)

    reference, plain = twin(model, torch.float32, "cpu", channels_last=False), cast(sets, torch.float32)
    with torch.inference_mode():
        return {number: [x.clone() for x in tensors_of(reference(*plain[number]))] for number in numbers}


def export_onnx(
    model: nn.Module | Path, sets: InputSets, target: Target, dtype: torch.dtype, directory: Path
) -> Exported:
    """Write ``model`` in ``dtype`` as ``directory/model.onnx``; dimensions are fixed where all sets agree.

    The exporter on ``torch.export`` is tried first where it is installed, then the one on TorchScript. A constant
    that the latter bakes in is found by comparing the engine's outputs, which every caller does.

    Raises TrialFailure with the reasons of both when neither can write it.
    """
    if isinstance(model, Path):
        return Exported(model, "none")
    path = directory / "model.onnx"
    model, sets = twin(model, dtype, "cpu", channels_last=False), cast(sets, dtype)
    names = [f"input_{number}" for number in range(len(sets[0]))]
    reasons = []
    for exporter in ("dynamo", "torchscript"):
        if exporter == "dynamo" and find_spec("onnxscript") is None:
            reasons.append("dynamo: onnxscript is not installed")
            continue
        try:
            with _quiet():
                _export(model, sets, path, names, exporter)
        except Exception as error:  # an exporter may raise anything for a model that it does not understand
            reasons.append(f"{exporter}: {type(error).__name__}: {_first_line(error)}")
            logger.info("%s export failed: %s", exporter, error)
            continue
        return Exported(path, exporter)
    raise TrialFailure(
        "error", f"{target.runtime}: the model cannot be written as ONNX ({'; '.join(reasons)})"
    )


def named_inputs(names: list[str], tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The tensors by the names that an engine knows them by.

    Our own files call them ``input_NUMBER``, and an exporter may leave out one that the model ignores; those of
    other files count by position.
    """
    own = {f"input_{number}": x for number, x in enumerate(tensors)}
    if set(names) <= set(own):
        return {name: own[name] for name in names}
    if len(names) != len(tensors):
        raise UserMistake(
            f"inputs: there are {len(tensors)}, but the ONNX model takes {len(names)} ({', '.join(names)})"
        )
    return dict(zip(names, tensors, strict=True))


def cast(sets: InputSets, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """The inputs with their floating-point tensors in ``dtype``."""
    return [tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors) for tensors in sets]


def _export(model: nn.Module, sets: InputSets, path: Path, names: list[str], exporter: str) -> None:
    import torch

    varying = [_varying([tensors[position] for tensors in sets]) for position in range(len(names))]
    options: dict[str, Any]
    if exporter == "dynamo":
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        options = {"external_data": size > _INLINE_BYTES}
        if any(varying):
            marked = tuple({axis: torch.export.Dim.DYNAMIC for axis in axes} for axes in varying)
            options["dynamic_shapes"] = marked
    else:
        options = {"dynamic_axes": {name: axes for name, axes in zip(names, varying, strict=True) if axes}}
    # A measurement runs in inference mode, whose tensors torch.export does not take.
    with torch.inference_mode(False), torch.no_grad():
        arguments = tuple(x.clone() for x in max(sets, key=lambda tensors: sum(x.numel() for x in tensors)))
        torch.onnx.export(
            model,
            arguments,
            str(path),
            input_names=names,
            dynamo=exporter == "dynamo",
            verbose=False,
            **options,
        )


def _varying(versions: list[Tensor]) -> list[int]:
    """Dimensions of one input that differ between the sets."""
    return [axis for axis in range(versions[0].dim()) if len({x.shape[axis] for x in versions}) > 1]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the terminal, and torch's fused encoder layer off, which no exporter knows."""
    import torch

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _first_line(error: Exception) -> str:
    # The exporters decorate their messages with colours.
    text = str(error).replace("\x1b[96m", "").replace("\x1b[0m", "").strip()
    return text.partition("\n")[0][:200]
